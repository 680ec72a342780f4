"""Samples of a base model, alone or with an adapter that was saved, and log-probs as a trainer has them.

Log-probs are the model's own at temperature 1, whatever a token was drawn with, and come from the pass that training
uses (rlt/logprobs). N tokens of a prompt, K or k tokens at a position.
"""

import secrets
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel

from rlt.errors import Refused
from rlt.generation.decoding import Drawn, Stops, best_tokens, decode
from rlt.generation.seeds import request_seed
from rlt.logprobs import token_log_probs
from rlt.models.devices import device_type, on
from rlt.models.loading import load_frozen, load_tokenizer
from rlt.serving.storage import local_files
from rlt.wire.json_form import SampleRequest
from rlt.wire.values import EMPTY_CELL, BestTokens, SampledSequence, SampleResponse, Tensor

ROWS = 64  # samples at once
ADAPTERS = 16  # that are kept ready
TOKEN_BUDGET = 8192
LOGITS = 2**26  # held at once for tables of best tokens: 256 MiB
QUIET = r"Model (with|has) `tie_word_embeddings=True`|fan_in_fan_out is"  # of a head that is never merged here


class TorchSampler:
    """
    Args:
        folder: of the base model and its tokenizer.
    """

    def __init__(self, folder: str):
        self.model: Any = on(device_type(), load_frozen(folder, torch.float32))
        self.tokenizer = load_tokenizer(folder)
        config = self.model.config.get_text_config()
        self.vocabulary, self.context = config.vocab_size, config.max_position_embeddings
        ends = self.model.generation_config.eos_token_id
        self.ends = ends if isinstance(ends, list) else [self.tokenizer.eos_token_id if ends is None else ends]
        self._adapters: dict[str, str] = {}  # names in PEFT by addresses, the one that was asked for last at the end
        self._made = 0

    def sample(self, request: SampleRequest, address: str | None) -> SampleResponse:
        """
        Raises:
            Refused: tokens that the model does not know, a prompt that leaves no room, or alternatives of a prompt.
        """
        self._check(request)
        with self._with(address) as model, torch.no_grad():
            drawn = self._draw(model, request)
            scored, prompt = self._score(model, request, drawn)
            best = self._best_of_prompt(model, request) if request.best_of_prompt else None
            targets = self._score_targets(model, request) if request.targets is not None else None
        sequences = [_sequence(each, values) for each, values in zip(drawn, scored, strict=True)]
        return SampleResponse(sequences, prompt, best, target_prompt_logprobs=targets)

    def forget(self, address: str) -> None:
        if (inner := self._adapters.pop(address, None)) is not None:
            self.model.delete_adapter(inner)

    def _check(self, request: SampleRequest) -> None:
        largest = request.prompt.max()
        if request.targets is not None and request.targets.values.size:
            largest = max(largest, request.targets.values.max())
        if largest >= self.vocabulary:
            raise Refused(f"the token {largest} is none of this model, which has {self.vocabulary}")
        if request.prompt.size + (request.params.max_tokens or 1) > self.context:
            raise Refused(f"the prompt and max_tokens are more than the {self.context} tokens that the model reads")
        if request.alternatives:
            raise Refused("prompt_alt_tokens_k is not known here: topk_prompt_logprobs gives the likeliest tokens")

    @contextmanager
    def _with(self, address: str | None) -> Iterator[Any]:
        """The model with an adapter, or without any."""
        if address is not None:
            self._put_on(address)
            yield self.model
        elif isinstance(self.model, PeftModel):
            with self.model.disable_adapter():
                yield self.model
        else:
            yield self.model

    def _put_on(self, address: str) -> None:
        inner = self._adapters.pop(address, None)
        if inner is None:
            self._made += 1
            inner = f"rlt{self._made}"
            with local_files(address) as folder, warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=QUIET)
                self._load(folder, inner)
        self._adapters[address] = inner
        self.model.set_adapter(inner)
        self.model.requires_grad_(False)
        if len(self._adapters) > ADAPTERS:
            self.model.delete_adapter(self._adapters.pop(next(iter(self._adapters))))

    def _load(self, folder: Path, inner: str) -> None:
        if isinstance(self.model, PeftModel):
            self.model.load_adapter(str(folder), inner)
        else:
            self.model = PeftModel.from_pretrained(self.model, str(folder), adapter_name=inner)
        self.model.eval()

    def _draw(self, model: Any, request: SampleRequest) -> list[Drawn]:
        params, prompt = request.params, request.prompt.tolist()
        stops = Stops(params.stop, self.ends, self.tokenizer)
        most = params.max_tokens or self.context - len(prompt)
        seed = secrets.randbits(62) if params.seed is None else params.seed
        chances = [torch.Generator().manual_seed(request_seed(seed, i)) for i in range(request.num_samples)]
        drawn = []
        for start in range(0, len(chances), ROWS):
            some = chances[start : start + ROWS]
            drawn += decode(model, prompt, some, params, stops, most, request.best_of_samples)
        return drawn

    def _score(
        self, model: Any, request: SampleRequest, drawn: list[Drawn]
    ) -> tuple[list[np.ndarray], np.ndarray | None]:
        """Log-probs of each sample's tokens, and of the prompt's if they are asked for."""
        prompt = request.prompt.tolist()
        sequences = [prompt + each.tokens for each in drawn]
        counted = [[*range(len(prompt), len(ids))] for ids in sequences]
        if request.prompt_logprobs:
            counted[0] = [*range(1, len(sequences[0]))]
        found, _ = token_log_probs(model, sequences, counted, token_budget=TOKEN_BUDGET)
        scored = [values.cpu().numpy() for values in found]
        if not request.prompt_logprobs:
            return scored, None
        values = np.concatenate([[np.nan], scored[0][: len(prompt) - 1]]).astype(np.float32)
        if request.last_prompt_logprobs is not None:
            values[: max(0, len(prompt) - request.last_prompt_logprobs)] = np.nan
        return [scored[0][len(prompt) - 1 :], *scored[1:]], values

    def _best_of_prompt(self, model: Any, request: SampleRequest) -> BestTokens:
        """The prompt is read in blocks, as logits of all its positions could be more than there is memory for."""
        ids_1N, past, found = torch.tensor(request.prompt[None], device=model.device), None, []
        for ids in ids_1N.split(max(1, LOGITS // self.vocabulary), dim=1):
            read = model(input_ids=ids, past_key_values=past, use_cache=True)
            past = read.past_key_values
            found.append(best_tokens(read.logits[0], request.best_of_prompt))
        ids_Nk, values_Nk = (torch.cat(each)[:-1] for each in zip(*found, strict=True))
        first = np.full((1, ids_Nk.shape[1]), EMPTY_CELL[0]), np.full((1, ids_Nk.shape[1]), EMPTY_CELL[1])
        ids, values = (np.concatenate([a, b.cpu().numpy()]) for a, b in zip(first, (ids_Nk, values_Nk), strict=True))
        return BestTokens(ids.astype(np.int32), values.astype(np.float32))

    def _score_targets(self, model: Any, request: SampleRequest) -> Tensor:
        """(N - 1, K)."""
        assert request.targets is not None
        prompt, targets = request.prompt.tolist(), request.targets.dense(missing=-1)
        if targets.shape[0] != len(prompt) - 1 or targets.ndim != 2:
            raise Refused(f"target_prompt_logprobs has the shape {targets.shape}, and ({len(prompt) - 1}, K) would do")
        if not targets.size:
            return Tensor(np.empty(targets.shape, np.float32), targets.shape)
        asked, where = [np.maximum(targets, 0).tolist()], [[*range(1, len(prompt))]]
        found, _ = token_log_probs(model, [prompt], where, targets=asked, token_budget=TOKEN_BUDGET)
        values = np.where(targets < 0, EMPTY_CELL[1], found[0].cpu().numpy()).astype(np.float32)
        return Tensor(values, values.shape)


def _sequence(drawn: Drawn, log_probs: np.ndarray) -> SampledSequence:
    best = None
    if drawn.best:
        ids, values = (np.array(column) for column in zip(*drawn.best, strict=True))
        best = BestTokens(ids.astype(np.int32), values.astype(np.float32))
    tokens = np.array(drawn.tokens, np.int32)
    return SampledSequence(tokens, log_probs.astype(np.float32), "stop" if drawn.stopped else "length", best)

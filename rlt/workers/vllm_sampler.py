"""Samples by vLLM, with the adapters that were saved: requests from many threads run in one batch.

Log-probs of samples are the engine's, at temperature 1, whatever a token was drawn with. What is asked about a prompt
is read by the trainer's own pass, for which a second copy of the base is loaded when it is first needed: the engine
reads prompts with an adapter on the output head wrongly, and gives no log-probs of tokens that are named.
"""

import logging
import secrets
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from vllm import SamplingParams as EngineParams
from vllm.lora.request import LoRARequest

from rlt.generation.decoding import Stops
from rlt.generation.sampler import build_adapter_engine
from rlt.generation.seeds import request_seed
from rlt.launching.owned import ADAPTERS, owned_folder
from rlt.models.loading import load_tokenizer
from rlt.wire.json_form import SampleRequest
from rlt.wire.values import SampledSequence, SampleResponse
from rlt.workers.held import ADAPTER_FILE
from rlt.workers.scores import PromptScores, asks_about_prompt, best_tokens_of, check_request
from rlt.workers.tensor_files import local_files
from rlt.workers.torch_sampler import TorchSampler, response

COPIES = 64  # of adapters from elsewhere, on this machine's disk

logger = logging.getLogger("rlt")


class VLLMSampler:
    """May be called from many threads.

    Args:
        folder: of the base model and its tokenizer.

    Raises:
        ImportError, ValueError, NotImplementedError: there is no vLLM, or it does not run this model.
    """

    def __init__(self, folder: str):
        self._folder, self.tokenizer = folder, load_tokenizer(folder)
        self.engine = build_adapter_engine(folder)
        config = self.engine.llm.model_config
        self.vocabulary, self.context = config.get_vocab_size(), self.engine.context
        ends = config.try_get_generation_config().get("eos_token_id")
        self.ends = ends if isinstance(ends, list) else [self.tokenizer.eos_token_id if ends is None else ends]
        self._adapters: dict[str, LoRARequest | None] = {}  # by addresses; None: the engine does not take it
        self._copies = owned_folder(ADAPTERS)
        self._scorer: TorchSampler | None = None
        self._lock = threading.Lock()

    def sample(self, request: SampleRequest, address: str | None) -> SampleResponse:
        """
        Raises:
            Refused: as of `check_request` and `score_prompt`.
        """
        check_request(request, self.vocabulary, self.context)
        adapter = self._adapter(address) if address is not None else None
        if address is not None and adapter is None:
            return self._torch().sample(request, address)
        output = self.engine.generate(request.prompt.tolist(), self._params(request), adapter)
        sequences = [_sequence(each, request.best_of_samples) for each in output.outputs]
        if len(sequences) < request.num_samples:  # at temperature 0 all are one
            sequences *= request.num_samples
        about = self._torch().score(request, address) if asks_about_prompt(request) else PromptScores()
        return response(sequences, about, min(output.num_cached_tokens or 0, request.prompt.size))

    def forget(self, address: str) -> None:
        with self._lock:
            adapter, scorer = self._adapters.pop(address, None), self._scorer
        if adapter is not None:
            self.engine.forget(adapter)
        if scorer is not None:
            scorer.forget(address)

    def _params(self, request: SampleRequest) -> EngineParams:
        params = request.params
        stops = Stops(params.stop, self.ends, self.tokenizer)
        return EngineParams(
            n=1 if params.temperature == 0 else request.num_samples,
            temperature=params.temperature,
            top_k=max(params.top_k, 0),
            top_p=params.top_p,
            seed=request_seed(secrets.randbits(62) if params.seed is None else params.seed),
            max_tokens=params.max_tokens or self.context - request.prompt.size,
            stop=stops.texts or None,
            stop_token_ids=sorted(stops.tokens),
            ignore_eos=True,  # the model's own ends are among the tokens, unless others are given
            logprobs=request.best_of_samples,
            detokenize=bool(stops.texts),
            skip_special_tokens=False,
            spaces_between_special_tokens=False,
        )

    def _torch(self) -> TorchSampler:
        with self._lock:
            if self._scorer is None:
                self._scorer = TorchSampler(self._folder)
            return self._scorer

    def _adapter(self, address: str) -> LoRARequest | None:
        """A number that is this address's alone; None where the engine cannot have it."""
        with self._lock:
            if address not in self._adapters:
                self._adapters[address] = self._new_adapter(address)
            adapter = self._adapters[address] = self._adapters.pop(address)
            if adapter is None or Path(adapter.lora_path).is_dir():
                return adapter
            self._adapters[address] = adapter = self._new_adapter(address)  # its copy had to go
            return adapter

    def _new_adapter(self, address: str) -> LoRARequest | None:
        with local_files(address) as folder:
            if not (folder / ADAPTER_FILE).is_file():
                return None
            system, place = url_to_fs(address)
            kept = Path(place) if isinstance(system, LocalFileSystem) else self._copy(folder)
            adapter = self.engine.new_adapter(str(kept))
        refusal = self.engine.try_adapter(adapter)
        if refusal:
            logger.warning("vLLM does not take the adapter at %s, so it is sampled by torch: %s", address, refusal)
            return None
        return adapter

    def _copy(self, folder: Path) -> Path:
        """Files that were fetched stay here for as long as the engine may read them again."""
        copies = sorted(Path(self._copies.name).glob("*/"), key=lambda path: path.stat().st_mtime)
        for old in copies[: max(0, len(copies) - COPIES + 1)]:
            shutil.rmtree(old)
        return Path(shutil.copytree(folder, Path(self._copies.name) / secrets.token_hex(8)))


def _sequence(output: Any, best: int) -> SampledSequence:
    tokens = np.array(output.token_ids, np.int32)
    pairs = list(zip(output.token_ids, output.logprobs, strict=True))
    log_probs = np.array([found[token].logprob for token, found in pairs], np.float32)
    rows = [sorted(((each.logprob, token) for token, each in found.items()), reverse=True)[:best] for _, found in pairs]
    table = best_tokens_of([([token for _, token in row], [value for value, _ in row]) for row in rows])
    stopped = "stop" if output.finish_reason == "stop" else "length"
    return SampledSequence(tokens, log_probs, stopped, table if best else None)

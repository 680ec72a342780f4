"""Samples by the trainer's own forward pass, one request after the other: of any model, and of weights that vLLM does
not take.

Log-probs are the model's own at temperature 1, whatever a token was drawn with, and come from the pass that training
uses (rlt/logprobs).
"""

import secrets
from typing import Any

import numpy as np
import torch

from rlt.generation.decoding import Drawn, Stops, decode
from rlt.generation.seeds import request_seed
from rlt.logprobs import token_log_probs
from rlt.models.loading import load_tokenizer
from rlt.wire.json_form import SampleRequest
from rlt.wire.values import SampledSequence, SampleResponse
from rlt.workers.held import HeldModel
from rlt.workers.scores import TOKEN_BUDGET, PromptScores, best_tokens_of, check_request, score_prompt

ROWS = 64  # samples at once


class TorchSampler:
    """May be called from many threads, which wait for each other.

    Args:
        folder: of the base model and its tokenizer.
    """

    def __init__(self, folder: str):
        self.model, self.tokenizer = HeldModel(folder), load_tokenizer(folder)
        with self.model.weights(None) as base:
            config, ends = base.config.get_text_config(), base.generation_config.eos_token_id
        self.vocabulary, self.context = config.vocab_size, config.max_position_embeddings
        self.ends = ends if isinstance(ends, list) else [self.tokenizer.eos_token_id if ends is None else ends]

    def sample(self, request: SampleRequest, address: str | None) -> SampleResponse:
        """
        Raises:
            Refused: as of `check_request` and `score_prompt`.
        """
        check_request(request, self.vocabulary, self.context)
        with self.model.weights(address) as model:
            drawn = self._draw(model, request)
            scored = _scored(model, request.prompt.tolist(), drawn)
            about = score_prompt(model, request)
        return response([_sequence(*each) for each in zip(drawn, scored, strict=True)], about)

    def score(self, request: SampleRequest, address: str | None) -> PromptScores:
        with self.model.weights(address) as model:
            return score_prompt(model, request)

    def forget(self, address: str) -> None:
        self.model.forget(address)

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


def response(sequences: list[SampledSequence], about: PromptScores, cache_hits: int = 0) -> SampleResponse:
    return SampleResponse(sequences, about.log_probs, about.best, cache_hits, target_prompt_logprobs=about.targets)


def _scored(model: Any, prompt: list[int], drawn: list[Drawn]) -> list[np.ndarray]:
    sequences = [prompt + each.tokens for each in drawn]
    counted = [[*range(len(prompt), len(ids))] for ids in sequences]
    found, _ = token_log_probs(model, sequences, counted, token_budget=TOKEN_BUDGET)
    return [values.cpu().numpy() for values in found]


def _sequence(drawn: Drawn, log_probs: np.ndarray) -> SampledSequence:
    best = best_tokens_of(drawn.best) if drawn.best else None
    tokens = np.array(drawn.tokens, np.int32)
    return SampledSequence(tokens, log_probs.astype(np.float32), "stop" if drawn.stopped else "length", best)

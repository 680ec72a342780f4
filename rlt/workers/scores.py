"""What a sampling request asks about its prompt: log-probs, the likeliest tokens, and those of given tokens.

They come from the pass that training uses (rlt/logprobs), at temperature 1, whatever samples are drawn with.
N tokens of a prompt, K given tokens or k likeliest ones at a position.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from rlt.errors import Refused
from rlt.logprobs import best_next_tokens, token_log_probs
from rlt.wire.json_form import SampleRequest
from rlt.wire.values import EMPTY_CELL, BestTokens, Tensor

TOKEN_BUDGET = 8192


@dataclass(frozen=True, eq=False)
class PromptScores:
    log_probs: np.ndarray | None = None  # (N) float32, NaN where there is none
    best: BestTokens | None = None
    targets: Tensor | None = None  # (N - 1, K), or as sparse as they were asked for


def asks_about_prompt(request: SampleRequest) -> bool:
    return request.prompt_logprobs or request.best_of_prompt > 0 or request.targets is not None


def score_prompt(model: Any, request: SampleRequest) -> PromptScores:
    """
    Raises:
        Refused: given tokens in another shape than (N - 1, K).
    """
    return PromptScores(
        _log_probs(model, request) if request.prompt_logprobs else None,
        _best(model, request) if request.best_of_prompt else None,
        _targets(model, request) if request.targets is not None else None,
    )


def _log_probs(model: Any, request: SampleRequest) -> np.ndarray:
    prompt = request.prompt.tolist()
    (found,), _ = token_log_probs(model, [prompt], [[*range(1, len(prompt))]], token_budget=TOKEN_BUDGET)
    values = np.concatenate([[np.nan], found.cpu().numpy()]).astype(np.float32)
    if request.last_prompt_logprobs is not None:
        values[: max(0, len(prompt) - request.last_prompt_logprobs)] = np.nan
    return values


def _best(model: Any, request: SampleRequest) -> BestTokens:
    k = min(request.best_of_prompt, model.config.get_text_config().vocab_size)
    ids, values = np.full((len(request.prompt), k), EMPTY_CELL[0]), np.full((len(request.prompt), k), EMPTY_CELL[1])
    if len(request.prompt) > 1:
        found_ids, found = best_next_tokens(model, request.prompt[:-1].tolist(), k)
        ids[1:], values[1:] = found_ids.cpu().numpy(), found.cpu().numpy()
    return BestTokens(ids.astype(np.int32), values.astype(np.float32))


def _targets(model: Any, request: SampleRequest) -> Tensor:
    """0 where no token was given; as sparse as they were asked for."""
    assert request.targets is not None
    prompt, targets = request.prompt.tolist(), request.targets.dense(missing=-1)
    if targets.ndim != 2 or targets.shape[0] != len(prompt) - 1:
        raise Refused(f"target_prompt_logprobs has the shape {targets.shape}, and ({len(prompt) - 1}, K) would do")
    values = np.zeros(targets.shape, np.float32)
    if targets.size:
        asked, where = [np.maximum(targets, 0).tolist()], [[*range(1, len(prompt))]]
        (found,), _ = token_log_probs(model, [prompt], where, targets=asked, token_budget=TOKEN_BUDGET)
        values = np.where(targets < 0, 0.0, found.cpu().numpy()).astype(np.float32)
    starts, columns = request.targets.row_starts, request.targets.columns
    if starts is None or columns is None:
        return Tensor(values, values.shape)
    rows = np.repeat(np.arange(len(values)), np.diff(starts))
    return Tensor(values[rows, columns], values.shape, starts, columns)


def check_request(request: SampleRequest, vocabulary: int, context: int) -> None:
    """
    Raises:
        Refused: tokens that the model does not know, a prompt that leaves no room, or alternatives of a prompt.
    """
    largest = request.prompt.max()
    if request.targets is not None and request.targets.values.size:
        largest = max(largest, request.targets.values.max())
    if largest >= vocabulary:
        raise Refused(f"the token {largest} is none of this model, which has {vocabulary}")
    asked = request.prompt.size + (request.params.max_tokens or 1)
    if asked > context:
        raise Refused(f"prompt and max_tokens are {asked} tokens, and the model is read with {context} at most")
    if request.alternatives:
        raise Refused("prompt_alt_tokens_k is not known here: topk_prompt_logprobs gives the likeliest tokens")


def best_tokens_of(rows: list[tuple[list[int], list[float]]]) -> BestTokens:
    ids, values = (np.array(column) for column in zip(*rows, strict=True))
    return BestTokens(ids.astype(np.int32), values.astype(np.float32))

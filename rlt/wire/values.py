"""Requests and answers as plain data.

Shapes: N tokens of a datum, K candidates at a position, k the best of a position.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from rlt.errors import Refused

NUMBER_TYPES = ("float32", "int64")  # of a loss's inputs once they are read
EMPTY_CELL = (0, -99999.0)  # of a table of best tokens
ADAM_MOST = 1e30  # float32 holds what a step makes of it
LossConfig = dict[str, float | str]
StopReason = Literal["stop", "length"]


@dataclass(frozen=True, eq=False)
class Tensor:
    """An input of a loss, (N) or (N, K): its numbers, or the cells that are present with where their rows begin."""

    values: np.ndarray  # of `shape`, or one number for each cell that is present
    shape: tuple[int, ...]
    row_starts: np.ndarray | None = None  # (N + 1) int64; None: all cells are present
    columns: np.ndarray | None = None  # one int64 for each cell that is present

    def dense(self, missing: float = 0) -> np.ndarray:
        if self.row_starts is None or self.columns is None:
            return self.values.reshape(self.shape)
        full = np.full(self.shape, missing, self.values.dtype)
        full[np.repeat(np.arange(self.shape[0]), np.diff(self.row_starts)), self.columns] = self.values
        return full


def tensor_of(numbers: Any) -> Tensor:
    """All cells present; floats become float32, integers int64."""
    array = np.asarray(numbers)
    array = np.ascontiguousarray(array, "float32" if array.dtype.kind == "f" else "int64")
    return Tensor(array, array.shape)


@dataclass(frozen=True, eq=False)
class Datum:
    tokens: np.ndarray  # (N) int64, what the model reads
    loss_inputs: dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class ForwardBackwardRequest:
    model_id: str
    seq_id: int
    data: list[Datum]
    loss_fn: str
    loss_config: LossConfig = field(default_factory=dict)
    forward_only: bool = False  # neither gradients nor optimizer change


@dataclass(frozen=True, eq=False)
class ForwardBackwardOutput:
    outputs: list[dict[str, np.ndarray]]  # one for each datum, (N) or (N, K)
    metrics: dict[str, float]  # by `name:reduction`; `loss:sum` is always there
    output_type: str = "scalar"


@dataclass(frozen=True, eq=False)
class BestTokens:
    """The k likeliest tokens at each position; cells without one hold `EMPTY_CELL`."""

    token_ids: np.ndarray  # (N, k) int32
    logprobs: np.ndarray  # (N, k) float32


@dataclass(frozen=True, eq=False)
class SampledSequence:
    tokens: np.ndarray  # (N) int32, the token that ended it included
    logprobs: np.ndarray | None  # (N) float32
    stop_reason: StopReason
    best: BestTokens | None = None


@dataclass(frozen=True, eq=False)
class SampleResponse:
    sequences: list[SampledSequence]
    prompt_logprobs: np.ndarray | None = None  # float32, as long as the prompt, NaN where there is none
    best_of_prompt: BestTokens | None = None
    cache_hit_tokens: int = 0
    target_prompt_logprobs: Tensor | None = None
    alternatives: tuple[Tensor, Tensor] | None = None  # token ids and log-probs of a prompt's sampled alternatives


@dataclass(frozen=True)
class SamplingParams:
    max_tokens: int | None = None  # None: up to the end of the context
    seed: int | None = None
    stop: str | list[str] | list[int] | None = None  # None: the model's own end; []: nothing stops
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 1:
            raise Refused(f"max_tokens is {self.max_tokens}: give 1 or more, or leave it out")
        if not 0 <= self.temperature < float("inf"):
            raise Refused(f"temperature is {self.temperature}: give a finite number from 0 on")
        if not 0 < self.top_p <= 1:
            raise Refused(f"top_p is {self.top_p}: give a number above 0, up to 1")
        if self.top_k < -1:
            raise Refused(f"top_k is {self.top_k}: give a positive number, or -1 for all tokens")


@dataclass(frozen=True)
class AdamParams:
    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0  # 0: gradients are not clipped

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 <= value <= ADAM_MOST:
                raise Refused(f"{name} is {value}: give a number from 0 to {ADAM_MOST:g}")
        if not (self.beta1 < 1 and self.beta2 < 1):
            raise Refused(f"beta1 and beta2 are {self.beta1} and {self.beta2}: both must be below 1")


@dataclass(frozen=True)
class Limits:
    """What a server reads of a request; anything above is refused."""

    body_bytes: int = 32 * 2**20
    datums: int = 1100  # clients cut at 1024
    tokens: int = 131_072  # of one datum or prompt
    candidates: int = 1024  # K
    loss_inputs: int = 16  # arrays of a datum
    samples: int = 1024  # of one prompt

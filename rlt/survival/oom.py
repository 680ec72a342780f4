"""What runs out of memory is tried again in smaller passes, by all ranks together, with the same result.

The work is a function that can be called again: a micro-batch's forward and backward passes, or a reading without
gradients. It says how large its passes are (`Watch.plan`), and where all ranks may learn of each other (`Watch.meet`).
A rank that ran out of memory goes to its next meeting, which is the others' next one too; all of them then start
again with half the tokens per pass. That needs two things of the work, which only its author knows:

- What it adds up can be set back (`start_again`): gradients to those of the start of the optimizer step, none.
- Between two meetings either nothing is collective, or a rank that lost its part of a pass makes up for it (calling
  the watch around that part). Where neither holds, `Watch.enter` and `Watch.leave` say so: out of memory there, the
  others wait in a collective that this rank does not reach, and the run ends with one line.

Left out: the first `optimizer.step()` allocates the optimizer's states, after a backward pass that may have fitted; out
of memory there, some parameters are updated and others not, and nothing can be repeated. Nor can a process that the
kernel kills for the host's memory.

    budget = TokenBudget(8192, "lower max_length")
    loss = repeat_smaller(budget, lambda watch: forward_backward(batch, budget.tokens, watch), optimizer.zero_grad)
    budget.step_done()
"""

import gc
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from rlt.errors import Refused
from rlt.survival.host_memory import resident_bytes

Value = TypeVar("Value")
PATIENCE = 32  # clean steps before larger passes are tried; twice as many each time that they fail again

logger = logging.getLogger("rlt")


class NoMemoryLeft(Refused):
    """Out of memory where no smaller passes help; one line with the figures and the remedy."""


@dataclass(frozen=True)
class Shortage:
    """What did not fit.

    Attributes:
        tokens: of the pass; 0: none was begun.
        hopeless: whether the pass cannot be made smaller: it has one sequence.
        peak_gib: the most memory that was held, in GiB: on a GPU of tensors, else by the process.
    """

    tokens: int
    hopeless: bool
    peak_gib: float


Agree = Callable[[Shortage | None], Shortage | None]


class RanOut(Exception):
    """Some rank ran out of memory; raised on all of them where they meet."""

    def __init__(self, shortage: Shortage):
        super().__init__(shortage)
        self.shortage = shortage


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that a device, or the CPU's allocator, has no memory left."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and should_reduce_batch_size(error)


def free_memory() -> None:
    """Give back what nothing holds any more. An exception holds the frames that it came through, and so their tensors:
    its `except` block must be left before."""
    gc.collect()
    clear_device_cache()


def peak_gib() -> float:
    """The most memory that was held at once, in GiB: on a GPU of tensors; else what the process holds now."""
    return (torch.cuda.max_memory_allocated() if torch.cuda.is_available() else resident_bytes()) / 2**30


class TokenBudget:
    """Tokens per pass: as configured until they do not fit, then half, and more again after clean steps.

    Args:
        configured: most tokens of one pass; None: as many as its longest sequence has.
        remedy: what a user can do where one sequence alone does not fit.

    Attributes:
        tokens: most tokens of a pass now.
        lowered: whether they are fewer than configured.
        recovered: how often something was repeated with fewer.
    """

    def __init__(self, configured: int | None, remedy: str):
        self.configured, self.remedy = configured, remedy
        self.tokens, self.lowered, self.recovered = configured, False, 0
        self._failed = 0  # tokens of the pass that did not fit as configured
        self._patience, self._clean = PATIENCE, 0

    def lower(self, shortage: Shortage) -> None:
        """Half of what did not fit.

        Raises:
            NoMemoryLeft: nothing smaller is left to try.
        """
        if shortage.hopeless or shortage.tokens < 2:
            what = (
                f"one sequence of {shortage.tokens} tokens in a pass" if shortage.tokens else "passes of a fixed size"
            )
            raise NoMemoryLeft(f"out of memory with {what} ({shortage.peak_gib:.2f} GiB held at most): {self.remedy}")
        if not self.lowered:
            self._failed = shortage.tokens
            self._patience *= 2 if self.recovered else 1
        failed = min(shortage.tokens, self.tokens or shortage.tokens) if self.lowered else shortage.tokens
        self.tokens, self.lowered = failed // 2, True
        self.recovered, self._clean = self.recovered + 1, 0
        logger.warning(
            "out of memory in a pass of %d tokens (%.2f GiB held at most): repeated with at most %d tokens per pass",
            shortage.tokens,
            shortage.peak_gib,
            self.tokens,
        )

    def step_done(self) -> None:
        """A step came to its end; after enough of them, passes may be twice as large again."""
        if not self.lowered:
            return
        self._clean += 1
        if self._clean < self._patience:
            return
        self._clean = 0
        self.tokens = (self.tokens or 0) * 2
        if self.tokens >= self._failed:
            self.tokens, self.lowered = self.configured, False
        logger.info("%d steps fitted: up to %s tokens per pass are tried again", self._patience, self.tokens)


class Watch:
    """One attempt: what its passes are, whether it ran out of memory, and whether others did.

    Args:
        budget: of the passes.
        agree: from this rank's shortage, or None, to one of any rank's; collective. None: there is one rank.
        keeps_graphs: whether what passes have allocated stays until the last is done.
    """

    def __init__(self, budget: TokenBudget, agree: Agree | None = None, keeps_graphs: bool = False):
        self.budget, self._agree, self._keeps_graphs = budget, agree, keeps_graphs
        self.shortage: Shortage | None = None
        self._passes: list[tuple[int, int]] = []
        self._at, self._inside = 0, False

    def plan(self, passes: list[tuple[int, int]]) -> None:
        """Tokens and sequences of each of the next passes."""
        self._passes, self._at = passes, 0

    def begin(self, number: int) -> None:
        """The planned pass of this number begins."""
        self._at = number

    def enter(self) -> None:
        """From here on other ranks wait for this one."""
        self._inside = True

    def leave(self) -> None:
        """They do not any more."""
        self._inside = False

    def lose(self, error: RuntimeError) -> None:
        """Note that this rank ran out of memory.

        Raises:
            NoMemoryLeft: others wait for it in a collective.
        """
        self.shortage = self._shortage()
        if self._inside:
            raise NoMemoryLeft(
                f"out of memory amid a pass of {self.shortage.tokens} tokens ({self.shortage.peak_gib:.2f} GiB held at "
                "most), where other ranks wait for this one and nothing can be repeated: set logprob_token_budget="
                f"{self.shortage.tokens // 2}, or lower per_device_train_batch_size"
            ) from error

    def __call__(self, part: Callable[[], Value]) -> Value | None:
        """The value of a part of a pass; None where this rank ran out of memory and has to take part all the same."""
        try:
            return part()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            self.lose(error)
        free_memory()
        return None

    def meet(self) -> None:
        """All ranks learn whether any of them ran out of memory; collective.

        Raises:
            RanOut: one did.
        """
        found = self._agree(self.shortage) if self._agree else self.shortage
        if found is not None:
            raise RanOut(found)

    def _shortage(self) -> Shortage:
        if not self._passes:
            return Shortage(self.budget.tokens or 0, False, peak_gib())
        if self._keeps_graphs:
            tokens, hopeless = max(tokens for tokens, _ in self._passes), len(self._passes) == 1
        else:
            tokens, hopeless = self._passes[self._at][0], True
        return Shortage(tokens, hopeless and self._passes[self._at][1] == 1, peak_gib())


def repeat_smaller(
    budget: TokenBudget,
    attempt: Callable[[Watch], Value],
    start_again: Callable[[], None] = lambda: None,
    agree: Agree | None = None,
) -> Value:
    """What `attempt` returns, once no rank ran out of memory in it.

    Args:
        budget: whose `tokens` the attempt reads; lowered before each repetition.
        attempt: the work; a `lowered` budget asks it to keep no more than one pass's activations.
        start_again: undo what a broken-off attempt has left behind.
        agree: as in `Watch`.

    Raises:
        NoMemoryLeft: one sequence per pass is too much, or other ranks are in a collective.
    """
    while True:
        outcome = _outcome(attempt, Watch(budget, agree, keeps_graphs=not budget.lowered))
        if not isinstance(outcome, Shortage):
            return outcome
        free_memory()
        start_again()
        budget.lower(outcome)


def _outcome(attempt: Callable[[Watch], Value], watch: Watch) -> Value | Shortage:
    """What an attempt returns, or what some rank lacked; nothing else of a failed one is left once this returns."""
    value = None
    try:
        try:
            value = attempt(watch)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            watch.lose(error)
        watch.meet()
    except RanOut as found:
        return found.shortage
    return cast(Value, value)

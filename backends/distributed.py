"""What ranks of one run do together; with one process each of these is the identity, or does nothing.

    from backends import distributed
    total = distributed.all_reduce(loss)                      # of all ranks, in a new tensor
    advantages = distributed.masked_whiten(advantages, mask)  # by the mean and deviation of all ranks' values
    distributed.say("step done")                              # once, by rank 0

Every function but `rank`, `world_size` and `say` is collective: all ranks call it, in the same order.
"""

import logging
from collections.abc import Sequence
from types import TracebackType

import torch
from torch import Tensor
from torch import distributed as dist

from rlt.errors import Refused
from rlt.survival.oom import NoMemoryLeft, RanOut, Shortage, is_out_of_memory

VARIANCE_FLOOR = 1e-8  # keeps values that agree from exploding
OPERATIONS = {"sum": dist.ReduceOp.SUM, "mean": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}

logger = logging.getLogger("rlt")


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def all_reduce(values: Tensor, operation: str = "sum") -> Tensor:
    """The sum, mean, max or min of what ranks have at each place of a tensor; gradients do not flow.

    Raises:
        Refused: another operation.
    """
    if operation not in OPERATIONS:
        raise Refused(f"operation={operation!r} is not known: {', '.join(OPERATIONS)} would do")
    if world_size() == 1:
        return values
    found = values.detach().to(_device(), copy=True).contiguous()
    dist.all_reduce(found, OPERATIONS[operation])
    return (found / world_size() if operation == "mean" else found).to(values.device)


def all_gather(values: Tensor) -> list[Tensor]:
    """What each rank has, in the order of ranks; they may differ in their first dimension."""
    if world_size() == 1:
        return [values]
    mine = values.detach().to(_device()).contiguous()
    sizes = [int(size) for size in _gathered(torch.tensor([len(mine)], device=_device()))]
    filled = mine.new_zeros(max(sizes), *mine.shape[1:])
    filled[: len(mine)] = mine
    return [some[:size].to(values.device) for some, size in zip(_gathered(filled), sizes, strict=True)]


def broadcast(values: Tensor, source: int = 0) -> Tensor:
    """What one rank has; the others give a tensor of its shape and dtype."""
    if world_size() == 1:
        return values
    found = values.detach().to(_device(), copy=True).contiguous()
    dist.broadcast(found, source)
    return found.to(values.device)


def barrier() -> None:
    """Wait until all ranks are here."""
    if world_size() > 1:
        dist.barrier()


def say(text: str) -> None:
    """To the log, by rank 0 alone."""
    if rank() == 0:
        logger.info("%s", text)


def masked_whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """(v - mean) / deviation over what all ranks' masks choose; 0 elsewhere.

    The variance is the population's: the mean of squares. Ranks may have nothing chosen, and shapes of their own.

    Args:
        shift_mean: False: the mean is added back, so that only the scale changes.
    """
    chosen = mask.to(torch.bool)
    exact = torch.where(chosen, values, 0).double()
    total, count = all_reduce(torch.stack([exact.sum(), chosen.sum().double()])).unbind()
    mean = total / count.clamp(min=1)
    squares = all_reduce(torch.where(chosen, (exact - mean).square(), 0).sum()[None])[0]
    found = (exact - mean) * torch.rsqrt(squares / count.clamp(min=1) + VARIANCE_FLOOR)
    return torch.where(chosen, found if shift_mean else found + mean, 0).to(values.dtype)


class Together:
    """Within it a rank may fail alone; at its end all ranks fail, so that none waits for one that is gone.

    What is collective inside must have been reached by all ranks or by none. Out of memory is not for here, as it has
    a meeting of its own (rlt/survival/oom.py).
    """

    def __enter__(self) -> "Together":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if world_size() == 1 or isinstance(error, NoMemoryLeft):
            return  # amid a pass: the others wait elsewhere, and it is for this rank to end
        passes = isinstance(error, RanOut) or (error is not None and is_out_of_memory(error))
        words = "" if error is None or passes else f"{type(error).__name__}: {error}"
        failed = [(number, said) for number, said in enumerate(gather_texts(words)) if said]
        if failed and (error is None or passes):
            number, said = failed[0]
            name, _, what = said.partition(": ")
            raise Refused(what) if name == Refused.__name__ else RuntimeError(f"rank {number} failed: {said}")


def gather_texts(text: str) -> list[str]:
    """What each rank says."""
    said = torch.frombuffer(bytearray(text.encode() or b"\0"), dtype=torch.uint8)
    return [bytes(some.tolist()).rstrip(b"\0").decode() for some in all_gather(said)]


def agree_on_shortage(mine: Shortage | None) -> Shortage | None:
    """Of any rank that ran out of memory, the worst; for `rlt.survival.oom.Watch`."""
    row = [0.0] * 4 if mine is None else [1.0, mine.tokens, mine.hopeless, mine.peak_gib]
    rows = torch.stack(all_gather(torch.tensor(row, dtype=torch.float64)))
    short = rows[rows[:, 0] > 0]
    if not len(short):
        return None
    hopeless = short[short[:, 2] > 0]
    worst = max((hopeless if len(hopeless) else short).tolist(), key=lambda row: row[1])
    return Shortage(int(worst[1]), bool(len(hopeless)), worst[3])


def _gathered(values: Tensor) -> Sequence[Tensor]:
    found = [torch.empty_like(values) for _ in range(world_size())]
    dist.all_gather(found, values)
    return found


def _device() -> torch.device:
    """Where the group's tensors are."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")

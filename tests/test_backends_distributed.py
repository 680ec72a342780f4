"""Helpers of several ranks: the identity with one process, and with two what one process has of all values."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from conftest import spawn_ranks

from backends import distributed
from rlt.errors import Refused
from rlt.survival.oom import RanOut, Shortage

# By hand: 1, 2, 3 and 6 are chosen: mean 3, squares (4 + 1 + 0 + 9) / 4 = 3.5, deviation 1.870829.
VALUES = [torch.tensor([[1.0, 9.0], [2.0, 3.0]]), torch.tensor([6.0, float("nan"), 5.0])]
MASKS = [torch.tensor([[1, 0], [1, 1]]), torch.tensor([1, 0, 0])]
WHITE = [torch.tensor([[-1.069045, 0.0], [-0.534522, 0.0]]), torch.tensor([1.603567, 0.0, 0.0])]


def close(found, expected) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_with_one_process_each_is_the_identity():
    values = torch.tensor([1.0, 2.0])
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    for operation in ("sum", "mean", "max", "min"):
        assert distributed.all_reduce(values, operation) is values
    assert distributed.all_gather(values)[0] is values and distributed.broadcast(values) is values
    assert distributed.barrier() is None
    assert distributed.gather_texts("word") == ["word"]
    close(distributed.masked_whiten(torch.tensor([1.0, 2.0, 3.0, 6.0, 7.0]), torch.tensor([1, 1, 1, 1, 0])),
          torch.tensor([-1.069045, -0.534522, 0.0, 1.603567, 0.0]))  # fmt: skip
    with pytest.raises(Refused, match="operation='product' is not known: sum, mean, max, min would do"):
        distributed.all_reduce(values, "product")


def test_values_that_agree_stay_finite_and_a_mask_may_choose_nothing():
    close(distributed.masked_whiten(torch.full((3,), 2.0), torch.ones(3)), torch.zeros(3))
    close(distributed.masked_whiten(torch.ones(2), torch.zeros(2)), torch.zeros(2))


def of_two_ranks(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    assert (distributed.rank(), distributed.world_size()) == (rank, 2)
    mine = torch.tensor([1.0, 5.0]) if rank == 0 else torch.tensor([3.0, 2.0])
    for operation, expected in (("sum", [4.0, 7.0]), ("mean", [2.0, 3.5]), ("max", [3.0, 5.0]), ("min", [1.0, 2.0])):
        close(distributed.all_reduce(mine, operation), torch.tensor(expected))
    close(mine, torch.tensor([[1.0, 5.0], [3.0, 2.0]][rank]))
    ragged = [torch.tensor([[1, 2]]), torch.zeros(0, 2, dtype=torch.long)]
    assert [some.tolist() for some in distributed.all_gather(ragged[rank])] == [[[1, 2]], []]
    assert distributed.broadcast(torch.tensor([rank]), 1).tolist() == [1]
    distributed.barrier()
    assert distributed.gather_texts("" if rank else "né") == ["né", ""]
    close(distributed.masked_whiten(VALUES[rank], MASKS[rank]), WHITE[rank])
    shifted = distributed.masked_whiten(VALUES[rank], MASKS[rank], shift_mean=False)
    close(shifted, torch.where(MASKS[rank].bool(), WHITE[rank] + 3, 0))
    failures_are_of_all(rank)
    dist.destroy_process_group()


def failures_are_of_all(rank: int) -> None:
    for error, kind in ((Refused("bad datum"), Refused), (OSError("disk full"), (OSError, RuntimeError))):
        with pytest.raises(kind, match=str(error)), distributed.Together():
            if rank == 1:
                raise error
    with distributed.Together():
        pass
    kinds = [Shortage(8, False, 1.0), None] if rank else [None, Shortage(4, True, 2.0)]
    assert distributed.agree_on_shortage(kinds[0]) == Shortage(8, False, 1.0)
    assert distributed.agree_on_shortage(kinds[1]) == Shortage(4, True, 2.0)
    with pytest.raises(Refused if rank == 0 else RuntimeError, match="bad"), distributed.Together():
        raise Refused("bad") if rank == 0 else RuntimeError("bad")
    # A rank that ran out of memory fails with the one that has another reason: else it would go to a meeting alone.
    with pytest.raises(Refused, match="bad"), distributed.Together():
        raise Refused("bad") if rank == 0 else torch.OutOfMemoryError("full")
    with pytest.raises(RanOut), distributed.Together():
        raise RanOut(Shortage(1, True, 1.0))


def test_two_ranks_have_what_one_process_has_of_all_values(tmp_path):
    spawn_ranks(of_two_ranks, (str(tmp_path),))

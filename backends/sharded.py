"""A training backend of one rank of several: all of them together do what one process does with the whole batch.

    torchrun --nproc_per_node 2 program.py     # in which each rank says:
    backend = create_fsdp_backend("embedded/smollm2-135m-instruct", "runs/a", learning_rate=1e-4)
    output = backend.forward_backward(batch).result(60)      # the same whole batch on each rank
    backend.optim_step().result(60)

Each rank asks for the same operations in the same order, gives the whole batch, reads its share of it (rank_passes.py),
and has the whole output. Gradients and their norm are those of the whole batch. Rank 0 writes states, in the form of
every other backend, to a folder that all ranks see. What a rank refuses, all refuse; one that is lost is waited for
until the limit of its process group.
"""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from backends import distributed, saved
from backends.distributed import Together
from backends.passes import DataWork, PlainWork
from backends.protocol import Batch, Loss
from backends.pytorch import PyTorchTrainingBackend
from backends.rank_passes import RankDataWork
from backends.rank_plain import RankPlainWork
from backends.ranks import Copies
from backends.reading import DEFAULT_LOSS
from rlt.errors import Refused


class ShardedTrainingBackend(PyTorchTrainingBackend):
    """`backends.protocol.TrainingBackend` of one of several ranks.

    Args:
        ranks: how they share the model.
        optimizer: of the model as it is shared.
        options: of `PyTorchTrainingBackend`.
    """

    def __init__(
        self,
        ranks: Copies,
        optimizer: torch.optim.Optimizer,
        loss_fn: str | Callable = DEFAULT_LOSS,
        checkpoint_dir: str | Path = "checkpoints",
        device: str | torch.device = "auto",
        **options: Any,
    ):
        super().__init__(ranks.model, optimizer, loss_fn, checkpoint_dir, device, **options)
        self.ranks = ranks
        self._agree = distributed.agree_on_shortage if distributed.world_size() > 1 else None

    @property
    def _wrapped(self) -> Any:
        return self.ranks.wrapped

    def _work(self, batch: Batch, loss_fn: Loss, config: Mapping[str, float] | None) -> DataWork | PlainWork:
        with Together():
            work = super()._work(batch, loss_fn, config)
        if len(set(distributed.gather_texts(_digest(batch)))) > 1:
            raise Refused("ranks were given different batches: give each of them the whole batch")
        if isinstance(work, DataWork):
            return RankDataWork(work.data, work.loss, work.config, self.ranks)
        return RankPlainWork(work.batch, work.loss, self.ranks)

    def _activate(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # of this thread, which collectives take

    def _start_again(self) -> None:
        self.ranks.give_up_gradients()
        self._done = 0

    def _step(self, largest: float) -> float | None:
        return self.ranks.step(self.optimizer, largest) if self._works else None

    def _writes(self) -> bool:
        return distributed.rank() == 0

    def _save_state(self, name: str | None, with_optimizer: bool, overwrite: bool) -> Path:
        with Together():
            return super()._save_state(name, with_optimizer, overwrite)

    def _read_state(self, path: str | Path, with_optimizer: bool) -> saved.Saved:
        with Together():
            return super()._read_state(path, with_optimizer)

    def _load_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        with Together():
            self._check_weights(weights)
        super()._load_weights(weights)


def _digest(batch: Batch) -> str:
    """Of all that is in a batch."""
    rows = (
        [batch] if isinstance(batch, Mapping) else [{"tokens": torch.tensor(d.tokens), **d.loss_inputs} for d in batch]
    )
    found = hashlib.sha256()
    for row in rows:
        for name, value in sorted(row.items()):
            found.update(name.encode())
            found.update(_bytes(value) if isinstance(value, torch.Tensor) else repr(value).encode())
    return found.hexdigest()


def _bytes(values: torch.Tensor) -> bytes:
    return values.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()

"""The weights and states of a backend: given out, taken in, written and read back, by the names that parameters have.

What is written continues on any number of processes (backends/state.py). Gradients are not kept: loading drops them.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from backends import saved
from backends.futures import TrainFuture
from backends.reading import ReadsBatches
from backends.state import full_weights, load_training_state, load_weights, training_state, whole_shape
from rlt.errors import Refused


class KeepsState(ReadsBatches):
    """Mixed into backends of a whole model, or of an adapter whose parameters alone are trained while it is active."""

    optimizer: torch.optim.Optimizer
    scheduler: Any
    checkpoint_dir: Path
    weight_version: int

    def get_weights(self) -> TrainFuture[dict[str, torch.Tensor]]:
        return self._worker.submit(self._get_weights)

    def load_weights(self, weights: Mapping[str, torch.Tensor]) -> TrainFuture[None]:
        return self._worker.submit(self._load_weights, weights)

    def save_state(
        self, name: str | None = None, with_optimizer: bool = True, overwrite: bool = False
    ) -> TrainFuture[Path]:
        return self._worker.submit(self._save_state, name, with_optimizer, overwrite)

    def load_state(self, path: str | Path, with_optimizer: bool = True) -> TrainFuture[int]:
        return self._worker.submit(self._load_state, path, with_optimizer)

    def _drop_gradients(self) -> None:
        raise NotImplementedError

    @property
    def _wrapped(self) -> Any:
        """What knows of a sharding of the model."""
        return self.model

    def _public(self, name: str) -> str:
        """The name that a parameter has outside."""
        return name

    def _shapes(self) -> dict[str, torch.Size]:
        return {self._public(n): whole_shape(p) for n, p in self.model.named_parameters() if p.requires_grad}

    def _buffers(self) -> dict[str, torch.Tensor]:
        kept = self.model.state_dict()
        return {name: value for name, value in self.model.named_buffers() if name in kept}

    def _about(self) -> dict[str, Any]:
        """What the weights are of, beyond names and shapes."""
        return {}

    def _renamed(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """By the names inside, of what has names outside."""
        inside = {self._public(n): n for n, p in self.model.named_parameters() if p.requires_grad}
        return {inside[name]: value for name, value in tensors.items()}

    def _get_weights(self, keep: bool = True) -> dict[str, torch.Tensor]:
        """
        Args:
            keep: here; of several ranks, those that do not only take part.
        """
        self._activate()
        found = full_weights(self._wrapped, keep)
        trained = {self._public(n): n for n, p in self.model.named_parameters() if p.requires_grad}
        return {name: found[inner].clone() for name, inner in trained.items()} if keep else {}

    def _load_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        self._activate()
        self._check_weights(weights)
        load_weights(self._wrapped, self._renamed(weights))
        self._drop_gradients()

    def _check_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        saved.check_fits(dict(weights), self._shapes(), all_of_them=False)

    def _save_state(self, name: str | None, with_optimizer: bool, overwrite: bool) -> Path:
        self._activate()
        state = training_state(self._wrapped, self.optimizer, self._writes())
        folder = name or f"step_{self.weight_version:04d}"
        if self._writes():
            self._write(folder, state, with_optimizer, overwrite)
        return self.checkpoint_dir / folder

    def _writes(self) -> bool:
        """Whether it is for this process to write what is saved."""
        return True

    def _write(self, name: str, state: dict[str, Any], with_optimizer: bool, overwrite: bool) -> None:
        kept = {self._public(n): v for n, v in state["optimizer"].items()}
        written = saved.Saved(
            weights={self._public(n): v for n, v in state["weights"].items()},
            buffers=self._buffers(),
            optimizer=kept if with_optimizer else None,
            optimizer_kind=type(self.optimizer).__name__,
            scheduler=self.scheduler.state_dict() if self.scheduler is not None and with_optimizer else None,
            weight_version=self.weight_version,
            about=self._about(),
        )
        saved.write(self.checkpoint_dir, name, written, overwrite)

    def _load_state(self, path: str | Path, with_optimizer: bool) -> int:
        self._activate()
        found = self._read_state(path, with_optimizer)
        optimizer = self._renamed(found.optimizer or {}) if with_optimizer else {}
        weights = self._renamed(found.weights)
        load_training_state(self._wrapped, self.optimizer, {"weights": weights, "optimizer": optimizer})
        for name, buffer in self._buffers().items():
            buffer.copy_(found.buffers[name])
        if with_optimizer and self.scheduler is not None:
            self._load_schedule(found.scheduler)
        self._drop_gradients()
        self.weight_version = found.weight_version
        return self.weight_version

    def _read_state(self, path: str | Path, with_optimizer: bool) -> saved.Saved:
        folder = saved.place_of(self.checkpoint_dir, path)
        found = saved.read(folder)
        self._check_saved(found, folder, with_optimizer)
        return found

    def _check_saved(self, found: saved.Saved, folder: Path, with_optimizer: bool) -> None:
        if found.about != self._about():
            raise Refused(f"{folder} is of {found.about}, and this backend trains {self._about()}")
        saved.check_fits(found.weights, self._shapes(), all_of_them=True)
        saved.check_fits(found.buffers, {n: b.shape for n, b in self._buffers().items()}, all_of_them=True)
        if not with_optimizer:
            return
        kind = type(self.optimizer).__name__
        if found.optimizer is None or (self.scheduler is not None and found.scheduler is None):
            lacks = "optimizer state" if found.optimizer is None else "schedule"
            raise Refused(f"{folder} has no {lacks}: load it with_optimizer=False, and the optimizer begins anew")
        if found.optimizer_kind != kind:
            raise Refused(f"{folder} has the state of {found.optimizer_kind}, and this backend's optimizer is {kind}")

    def _load_schedule(self, state: Mapping[str, Any] | None) -> None:
        self.scheduler.load_state_dict(state)
        for group, rate in zip(self.optimizer.param_groups, self.scheduler.get_last_lr(), strict=True):
            group["lr"] = rate

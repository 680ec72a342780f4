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
from backends.state import full_weights, load_full_weights, load_training_state, training_state
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

    def _public(self, name: str) -> str:
        """The name that a parameter has outside."""
        return name

    def _parameters(self) -> dict[str, torch.Tensor]:
        return {self._public(n): p for n, p in self.model.named_parameters() if p.requires_grad}

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

    def _get_weights(self) -> dict[str, torch.Tensor]:
        self._activate()
        found = full_weights(self.model)
        trained = {self._public(n): n for n, p in self.model.named_parameters() if p.requires_grad}
        return {name: found[inner].clone() for name, inner in trained.items()}

    def _load_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        self._activate()
        saved.check_fits(dict(weights), {n: p.shape for n, p in self._parameters().items()}, all_of_them=False)
        load_full_weights(self.model, self._renamed(weights))
        self._drop_gradients()

    def _save_state(self, name: str | None, with_optimizer: bool, overwrite: bool) -> Path:
        self._activate()
        state = training_state(self.model, self.optimizer)
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
        return saved.write(self.checkpoint_dir, name or f"step_{self.weight_version:04d}", written, overwrite)

    def _load_state(self, path: str | Path, with_optimizer: bool) -> int:
        self._activate()
        folder = saved.place_of(self.checkpoint_dir, path)
        found = saved.read(folder)
        self._check_saved(found, folder, with_optimizer)
        optimizer = self._renamed(found.optimizer or {}) if with_optimizer else {}
        weights = self._renamed(found.weights)
        load_training_state(self.model, self.optimizer, {"weights": weights, "optimizer": optimizer})
        for name, buffer in self._buffers().items():
            buffer.copy_(found.buffers[name])
        if with_optimizer and self.scheduler is not None:
            self._load_schedule(found.scheduler)
        self._drop_gradients()
        self.weight_version = found.weight_version
        return self.weight_version

    def _check_saved(self, found: saved.Saved, folder: Path, with_optimizer: bool) -> None:
        if found.about != self._about():
            raise Refused(f"{folder} is of {found.about}, and this backend trains {self._about()}")
        saved.check_fits(found.weights, {n: p.shape for n, p in self._parameters().items()}, all_of_them=True)
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

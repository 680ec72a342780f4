"""Batches read by a model: which loss they are for, in which passes, and without gradients (`forward`)."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from backends.futures import TrainFuture, Worker
from backends.loss_table import check_data, find_loss
from backends.passes import DataWork, PlainWork, Way
from backends.plain import check_plain, plain_loss
from backends.protocol import Batch, ForwardOutput, Loss
from rlt.errors import Refused
from rlt.models.devices import device_type
from rlt.survival.oom import Agree, TokenBudget, Watch, repeat_smaller

TOKEN_BUDGET = 8192
DEFAULT_LOSS = "cross_entropy"
REMEDY = "give shorter sequences, fewer trained weights (an adapter), or gradient checkpointing"


class ReadsBatches:
    """Mixed into whatever has a model and reads batches with it."""

    model: Any
    _worker: Worker
    _agree: Agree | None = None  # of several ranks

    def _prepare_reading(
        self,
        model: Any,
        loss_fn: str | Callable,
        device: str | torch.device,
        token_budget: int | None,
        autocast: torch.dtype | None,
    ) -> None:
        if isinstance(loss_fn, str):
            find_loss(loss_fn)
        self.device = _device(model, device)
        self.model, self.loss_fn, self.autocast = _on(self.device, model), loss_fn, autocast
        self._reading_budget = TokenBudget(token_budget, REMEDY)

    def forward(
        self, batch: Batch, loss_fn: Loss = None, loss_fn_config: Mapping[str, float] | None = None
    ) -> TrainFuture[ForwardOutput]:
        return self._worker.submit(self._forward, batch, loss_fn, loss_fn_config)

    def _activate(self) -> None:
        """Before every operation; for those that share a model."""

    def _work(self, batch: Batch, loss_fn: Loss, config: Mapping[str, float] | None) -> DataWork | PlainWork:
        if isinstance(batch, Mapping):
            if config:
                raise Refused("loss_fn_config is for data; a plain batch's loss function takes none")
            loss = plain_loss(loss_fn or (None if isinstance(self.loss_fn, str) else self.loss_fn))
            check_plain(self.model, batch)
            return PlainWork(batch, loss)
        loss = find_loss(loss_fn or (self.loss_fn if isinstance(self.loss_fn, str) else DEFAULT_LOSS))
        settings, data = loss.config(config), list(batch)
        check_data(loss, data, *self._limits())
        return DataWork(data, loss, settings)

    def _limits(self) -> tuple[int, int | None]:
        """Tokens that the model knows, and how many it reads."""
        if not hasattr(self.model, "get_output_embeddings"):
            kind = type(self.model).__name__
            raise Refused(f"{kind} is no causal model of transformers: give it a mapping of tensors, not data")
        config = self.model.config.get_text_config()
        return config.vocab_size, getattr(config, "max_position_embeddings", None)

    def _forward(self, batch: Batch, loss_fn: Loss, config: Mapping[str, float] | None) -> ForwardOutput:
        self._activate()
        work = self._work(batch, loss_fn, config)
        with self._mode(False), torch.no_grad():
            way = partial(self._way, self._reading_budget)
            found = repeat_smaller(self._reading_budget, lambda watch: work.run(way(watch)), agree=self._agree)
        self._reading_budget.step_done()
        return found

    def _way(self, budget: TokenBudget, watch: Watch, backward: bool = False) -> Way:
        return Way(self.model, self.device, watch, budget.tokens, self.autocast, backward)

    @contextmanager
    def _mode(self, training: bool) -> Iterator[None]:
        """With dropout or without, and then as it was before."""
        before = [(module, module.training) for module in self.model.modules()]
        self.model.train(training)
        try:
            yield
        finally:
            for module, was in before:
                module.training = was


def _device(model: Any, asked: str | torch.device) -> torch.device:
    if asked != "auto":
        return torch.device(asked)
    on_gpus = [parameter.device for parameter in model.parameters() if parameter.device.type != "cpu"]
    return on_gpus[0] if on_gpus else torch.device(device_type())


def _on(device: torch.device, model: Any) -> Any:
    """Quantised models can not be moved, and need not be where they are there already."""
    elsewhere = (
        p for p in model.parameters() if p.device.type != device.type or device.index not in (None, p.device.index)
    )
    return model if next(elsewhere, None) is None else model.to(device)

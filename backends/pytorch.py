"""A training backend of one process, around a model and an optimizer that exist already.

    backend = PyTorchTrainingBackend(model, optimizer, loss_fn, "runs/a", "cuda")
    output = backend.forward_backward([Datum(tokens, {"target_tokens": ..., "weights": ...})]).result(60)
    backend.optim_step(AdamParams(learning_rate=1e-4)).result(60)

A batch is a list of `Datum`, read by packed passes (rlt/logprobs), or for any model a mapping of tensors, of which
`labels` go to the loss and the others to the model. What runs out of memory is repeated in smaller passes, beginning
with the first call since the last optimizer step; so is a call that failed amid its passes undone.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from backends.adamw import check_adam, clipped_norm, overwrite
from backends.futures import TrainFuture, Worker
from backends.keeping import KeepsState
from backends.loss_table import check_data, find_loss
from backends.passes import DataWork, PlainWork, Way
from backends.plain import check_plain, plain_loss
from backends.protocol import AdamParams, Batch, ForwardOutput, Loss, StepOutput
from rlt.errors import Refused
from rlt.models.devices import device_type
from rlt.survival.oom import TokenBudget, Watch, repeat_smaller
from rlt.survival.random_state import random_state, set_random_state

TOKEN_BUDGET = 8192
DEFAULT_LOSS = "cross_entropy"
REMEDY = "give shorter sequences, fewer trained weights (an adapter), or gradient checkpointing"


class PyTorchTrainingBackend(KeepsState):
    """`backends.protocol.TrainingBackend` in one process.

    Args:
        model: any module; data (not plain batches) need a Hugging Face causal model, or one with an adapter.
        optimizer: of its trained parameters; `AdamParams` need one of Adam's kind.
        loss_fn: a name from `LOSSES` for data, or a function of (outputs, labels) for plain batches; what a call does
            not say. One that is marked `additive` (backends/losses.py) may be computed of parts of a batch.
        checkpoint_dir: where states are saved.
        device: "auto": a GPU where there is one. The model is moved there.
        token_budget: most tokens of a pass, padding included; None: as many as the longest sequence has.
        autocast: the dtype of what may run in a lower precision; None: everything as the weights are.
        scheduler: of the optimizer, stepped with it.
        worker: who does the operations; None: a thread of its own.
    """

    def __init__(
        self,
        model: Any,
        optimizer: torch.optim.Optimizer,
        loss_fn: str | Callable = DEFAULT_LOSS,
        checkpoint_dir: str | Path = "checkpoints",
        device: str | torch.device = "auto",
        *,
        token_budget: int | None = TOKEN_BUDGET,
        autocast: torch.dtype | None = None,
        scheduler: Any = None,
        worker: Worker | None = None,
    ):
        if isinstance(loss_fn, str):
            find_loss(loss_fn)
        self.device = torch.device(device_type() if device == "auto" else device)
        self.model, self.optimizer, self.scheduler = _on(self.device, model), optimizer, scheduler
        self.loss_fn, self.checkpoint_dir, self.autocast = loss_fn, Path(checkpoint_dir), autocast
        self.weight_version = 0
        self._budget, self._reading_budget = TokenBudget(token_budget, REMEDY), TokenBudget(token_budget, REMEDY)
        self._works: list[tuple[DataWork | PlainWork, tuple]] = []  # since the last step, and random states before each
        self._done = 0  # how many of them are in the gradients
        self._owns_worker = worker is None
        self._worker = worker or Worker(f"the backend of {self.checkpoint_dir}")

    # What is asked

    def forward(
        self, batch: Batch, loss_fn: Loss = None, loss_fn_config: Mapping[str, float] | None = None
    ) -> TrainFuture[ForwardOutput]:
        return self._worker.submit(self._forward, batch, loss_fn, loss_fn_config)

    def forward_backward(
        self, batch: Batch, loss_fn: Loss = None, loss_fn_config: Mapping[str, float] | None = None
    ) -> TrainFuture[ForwardOutput]:
        return self._worker.submit(self._forward_backward, batch, loss_fn, loss_fn_config)

    def optim_step(self, params: AdamParams | None = None) -> TrainFuture[StepOutput]:
        return self._worker.submit(self._optim_step, params)

    def close(self) -> None:
        """Finish what has begun, and end the thread."""
        if self._owns_worker:
            self._worker.close()

    # Passes

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
            found = repeat_smaller(self._reading_budget, lambda watch: work.run(self._way(self._reading_budget, watch)))
        self._reading_budget.step_done()
        return found

    def _forward_backward(self, batch: Batch, loss_fn: Loss, config: Mapping[str, float] | None) -> ForwardOutput:
        self._activate()
        self._works.append((self._work(batch, loss_fn, config), random_state()))
        try:
            found = self._add_gradients()
        finally:
            if self._done < len(self._works):  # it failed: what it has added goes, with what was there
                set_random_state(self._works.pop()[1])
                self._start_again()
        assert found is not None
        return found

    def _add_gradients(self) -> ForwardOutput | None:
        """Of all calls since the last step that are not in the gradients; what the last of them gives."""
        with self._mode(True):
            return repeat_smaller(self._budget, self._add_missing, self._start_again)

    def _add_missing(self, watch: Watch) -> ForwardOutput | None:
        found = None
        for number in range(self._done, len(self._works)):
            work, random = self._works[number]
            set_random_state(random)
            found = work.run(self._way(self._budget, watch, backward=True))
            self._done = number + 1
        return found

    def _way(self, budget: TokenBudget, watch: Watch, backward: bool = False) -> Way:
        return Way(self.model, self.device, watch, budget.tokens, self.autocast, backward)

    def _start_again(self) -> None:
        """No gradients."""
        self.optimizer.zero_grad(set_to_none=True)
        self._done = 0

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

    # The step

    def _optim_step(self, params: AdamParams | None) -> StepOutput:
        self._activate()
        if params is not None:
            check_adam(params, self.optimizer, self.scheduler)
        if self._done < len(self._works):
            self._add_gradients()
        if params is not None:
            overwrite(self.optimizer, params)
        rate = float(self.optimizer.param_groups[0]["lr"])
        norm = clipped_norm(self.optimizer, params.grad_clip_norm if params else 0.0)
        try:
            if norm is None:
                return StepOutput(0.0, rate, self.weight_version)
            self.optimizer.step()
        finally:
            self._drop_gradients()
        if self.scheduler is not None:
            self.scheduler.step()
        self.weight_version += 1
        self._budget.step_done()
        return StepOutput(norm, rate, self.weight_version)

    def _drop_gradients(self) -> None:
        self._works.clear()
        self._start_again()


def _on(device: torch.device, model: Any) -> Any:
    """Quantised models can not be moved, and need not be where they are there already."""
    elsewhere = (p for p in model.parameters() if p.device.type != device.type or device.index not in (None, p.device.index))
    return model if next(elsewhere, None) is None else model.to(device)

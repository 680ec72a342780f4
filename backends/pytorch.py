"""A training backend of one process, around a model and an optimizer that exist already.

    backend = PyTorchTrainingBackend(model, optimizer, loss_fn, "runs/a", "cuda")
    output = backend.forward_backward([Datum(tokens, {"target_tokens": ..., "weights": ...})]).result(60)
    backend.optim_step(AdamParams(learning_rate=1e-4)).result(60)

A batch is a list of `Datum`, read by packed passes (rlt/logprobs), or for any model a mapping of tensors, of which
`labels` go to the loss and the others to the model. What runs out of memory is repeated in smaller passes, beginning
with the first call since the last optimizer step; so is a call that failed amid its passes undone.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from backends import adamw
from backends.futures import TrainFuture, Worker
from backends.hidden import mean_hidden_states
from backends.keeping import KeepsState
from backends.passes import DataWork, PlainWork
from backends.protocol import AdamParams, Batch, ForwardOutput, Loss, StepOutput
from backends.reading import DEFAULT_LOSS, REMEDY, TOKEN_BUDGET
from rlt.survival.oom import TokenBudget, Watch, repeat_smaller
from rlt.survival.random_state import random_state, set_random_state


class PyTorchTrainingBackend(KeepsState):
    """`backends.protocol.TrainingBackend` in one process.

    Args:
        model: any module; data (not plain batches) need a Hugging Face causal model, or one with an adapter.
        optimizer: of its trained parameters; `AdamParams` need one of Adam's kind.
        loss_fn: a name from `LOSSES` for data, or a function of (outputs, labels) for plain batches; what a call does
            not say. One that is marked `additive` (backends/losses.py) may be computed of parts of a batch.
        checkpoint_dir: where states are saved.
        device: "auto": the GPU that the model is on, else a GPU where there is one. The model is moved there.
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
        self._worker, self._owns_worker = worker or Worker(f"the backend of {checkpoint_dir}"), worker is None
        self._prepare_reading(model, loss_fn, device, token_budget, autocast)
        self.optimizer, self.scheduler, self.checkpoint_dir = optimizer, scheduler, Path(checkpoint_dir)
        self.weight_version = 0
        self._budget = TokenBudget(token_budget, REMEDY)
        self._works: list[tuple[DataWork | PlainWork, tuple]] = []  # since the last step, and random states before each
        self._done = 0  # how many of them are in the gradients

    # What is asked

    def forward_backward(
        self, batch: Batch, loss_fn: Loss = None, loss_fn_config: Mapping[str, float] | None = None
    ) -> TrainFuture[ForwardOutput]:
        return self._worker.submit(self._forward_backward, batch, loss_fn, loss_fn_config)

    def optim_step(self, params: AdamParams | None = None) -> TrainFuture[StepOutput]:
        return self._worker.submit(self._optim_step, params)

    def hidden_means(self, sequences: Sequence[Sequence[int]]) -> TrainFuture[list[torch.Tensor]]:
        """Of each sequence the mean of its last hidden states (backends/hidden.py)."""
        return self._worker.submit(self._hidden_means, sequences)

    def close(self) -> None:
        """Finish what has begun, and end the thread."""
        if self._owns_worker:
            self._worker.close()

    def _hidden_means(self, sequences: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        self._activate()
        return mean_hidden_states(self.model, sequences)

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
            return repeat_smaller(self._budget, self._add_missing, self._start_again, self._agree)

    def _add_missing(self, watch: Watch) -> ForwardOutput | None:
        found = None
        for number in range(self._done, len(self._works)):
            work, random = self._works[number]
            set_random_state(random)
            found = work.run(self._way(self._budget, watch, backward=True))
            self._done = number + 1
        return found

    def _start_again(self) -> None:
        """No gradients."""
        self.optimizer.zero_grad(set_to_none=True)
        self._done = 0

    # The step

    def _optim_step(self, params: AdamParams | None) -> StepOutput:
        self._activate()
        if params is not None:
            adamw.check_adam(params, self.optimizer, self.scheduler)
        if self._done < len(self._works):
            self._add_gradients()
        if params is not None:
            adamw.overwrite(self.optimizer, params)
        rate = float(self.optimizer.param_groups[0]["lr"])
        try:
            norm = self._step(params.grad_clip_norm if params else 0.0)
            if norm is None:
                return StepOutput(0.0, rate, self.weight_version)
        finally:
            self._drop_gradients()
        if self.scheduler is not None:
            self.scheduler.step()
        self.weight_version += 1
        self._budget.step_done()
        return StepOutput(norm, rate, self.weight_version)

    def _step(self, largest: float) -> float | None:
        return adamw.step(self.optimizer, largest)

    def _drop_gradients(self) -> None:
        self._works.clear()
        self._start_again()

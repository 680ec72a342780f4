"""What a place that trains does, whoever asks: four operations and their state. It knows no HTTP and no trainer.

Losses are sums over tokens, and gradients add up over calls until `optim_step`. N tokens of a datum, K targets at each.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from backends.futures import TrainFuture

if TYPE_CHECKING:
    import torch

    Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Datum:
    """One sequence to learn from.

    Attributes:
        tokens: what the model reads, N of them.
        loss_inputs: tensors by name, each with a value for each token: `target_tokens` (N,) or (N, K) that are to come
            next, and what the loss needs beside them (backends/losses.py).
    """

    tokens: list[int]
    loss_inputs: "Tensors"


PlainBatch = Mapping[str, Any]  # tensors of a row per sequence: input_ids, attention_mask, labels, what the model takes
Batch = Sequence[Datum] | PlainBatch
Loss = str | Callable | None


@dataclass(frozen=True)
class AdamParams:
    """AdamW's numbers for one step; `grad_clip_norm` is of all trained parameters together, and 0 clips nothing."""

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0


@dataclass(frozen=True)
class ForwardOutput:
    """What a pass over a batch gives.

    Attributes:
        logprobs: of each datum, float32 on the CPU, in the shape of its `target_tokens`; of a plain batch, none.
        elementwise_loss: the loss of each token, in the same shape; empty where a loss is not a sum over tokens.
        metrics: by names `what:reduction`, which say how those of several calls go together; `loss:sum` is there.
    """

    logprobs: "list[torch.Tensor]" = field(default_factory=list)
    elementwise_loss: "list[torch.Tensor]" = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class StepOutput:
    """What an optimizer step did.

    Attributes:
        grad_norm: of all trained parameters, before clipping; 0 where there were no gradients, and nothing was done.
        learning_rate: of the step.
        weight_version: how many steps the weights have had.
    """

    grad_norm: float
    learning_rate: float
    weight_version: int


@runtime_checkable
class TrainingBackend(Protocol):
    """Operations are done in the order in which they are asked for; each answers at once with a future."""

    def forward(
        self, batch: Batch, loss_fn: Loss = None, loss_fn_config: Mapping[str, float] | None = None
    ) -> TrainFuture[ForwardOutput]:
        """What a loss of a batch is, without gradients: neither they nor the optimizer are touched.

        Args:
            loss_fn: for data a name from `LOSSES` or a function of (data, log-probs), for a plain batch a function of
                (outputs, labels) or "causal_lm"; a function gives a loss or (loss, metrics). None: the backend's own.
            loss_fn_config: of a loss with a name.
        """
        ...

    def forward_backward(
        self, batch: Batch, loss_fn: Loss = None, loss_fn_config: Mapping[str, float] | None = None
    ) -> TrainFuture[ForwardOutput]:
        """The same, with the loss's gradients added to those that are there; a call that fails adds nothing."""
        ...

    def optim_step(self, params: AdamParams | None = None) -> TrainFuture[StepOutput]:
        """Step with the gradients, and drop them. None: with the optimizer's own numbers."""
        ...

    def get_weights(self) -> "TrainFuture[dict[str, torch.Tensor]]":
        """Copies of the trained weights, whole, on the CPU, by name."""
        ...

    def load_weights(self, weights: "Tensors") -> TrainFuture[None]:
        """The reverse; weights that are not named keep their values. Gradients are dropped."""
        ...

    def save_state(
        self, name: str | None = None, with_optimizer: bool = True, overwrite: bool = False
    ) -> TrainFuture[Path]:
        """Write weights, optimizer and weight version to a folder that is whole or absent. None: `step_0100`, say."""
        ...

    def load_state(self, path: str | Path, with_optimizer: bool = True) -> TrainFuture[int]:
        """Read them back, from a name below the backend's folder or from a path; the weight version.

        Gradients are dropped. `with_optimizer=False`: the optimizer begins anew.
        """
        ...

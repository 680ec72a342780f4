"""Batches of tensors for models that their user made: which loss, and what is refused before anything is read."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from backends.losses import IGNORED, OUTPUT_LOSSES, additive, compute_loss_from_outputs
from backends.protocol import Loss
from rlt.errors import Refused


def plain_loss(loss_fn: Loss) -> Callable:
    """A function of (outputs, labels); None: the first of those that have a name.

    Raises:
        Refused: there is none of that name.
    """
    if callable(loss_fn):
        return loss_fn
    kind = loss_fn or OUTPUT_LOSSES[0]
    if kind not in OUTPUT_LOSSES:
        raise Refused(
            f"loss_fn={kind!r} is not one of a plain batch: {', '.join(OUTPUT_LOSSES)} or a function would do"
        )
    return additive(partial(compute_loss_from_outputs, kind=kind))


def check_plain(model: Any, batch: Mapping[str, Any]) -> None:
    """
    Raises:
        Refused: labels are missing, rows differ in number, or tokens are not of the model's vocabulary.
    """
    labels = batch.get("labels")
    if not isinstance(labels, Tensor) or not labels.numel():
        raise Refused("a plain batch needs labels: a tensor with a row for each sequence")
    for name, value in batch.items():
        if isinstance(value, Tensor) and value.dim() and len(value) != len(labels):
            raise Refused(f"a plain batch has {len(labels)} rows of labels and {len(value)} of {name}")
    if not hasattr(model, "get_input_embeddings"):
        return
    vocabulary = model.config.get_text_config().vocab_size
    ids = batch.get("input_ids")
    read = [] if ids is None else [("input_ids", ids)]
    for name, tokens in [*read, ("labels", labels[labels != IGNORED])]:
        if tokens.numel() and not (tokens.min() >= 0 and tokens.max() < vocabulary):
            raise Refused(f"{name} of a plain batch must be from 0 to {vocabulary - 1}")

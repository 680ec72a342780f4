"""Losses by name: which inputs and configuration each takes, read from its own signature, and what is refused.

Everything is looked at before a model reads anything, so that a bad batch leaves no gradients behind.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch

from backends import losses
from backends.protocol import Datum, Loss
from rlt.errors import Refused

TARGETS = "target_tokens"
NOT_PUBLIC = "stable_reinforce"


@dataclass(frozen=True)
class LossFunction:
    """A loss of datums.

    Attributes:
        compute: gives the loss of each token ("tokens"), of each pair of neighbours ("pairs"), or as a user's function
            of data and their log-probs one number ("batch"), with or without figures of its own.
    """

    name: str
    compute: Callable
    over: Literal["tokens", "pairs", "batch"] = "tokens"

    @cached_property
    def _parameters(self) -> dict[str, inspect.Parameter]:
        named = list(inspect.signature(self.compute).parameters.items())
        return {} if self.over == "batch" else dict(named[1:])  # the first are the log-probs

    @cached_property
    def inputs(self) -> dict[str, bool]:
        """Names of its inputs beside the targets, and whether each is needed."""
        found = {n: p for n, p in self._parameters.items() if p.kind is not p.KEYWORD_ONLY}
        return {name: parameter.default is parameter.empty for name, parameter in found.items()}

    @cached_property
    def defaults(self) -> dict[str, float]:
        return {n: p.default for n, p in self._parameters.items() if p.kind is p.KEYWORD_ONLY}

    @property
    def adds_up(self) -> bool:
        """Whether a batch may be read in parts."""
        return self.over == "tokens" or getattr(self.compute, "additive", False)

    def config(self, given: Mapping[str, float] | None) -> dict[str, float]:
        """All keys of its configuration.

        Raises:
            Refused: an unknown key, or a value that is not a number.
        """
        given = given or {}
        for key, value in given.items():
            if key not in self.defaults:
                known = f"{', '.join(self.defaults)} would do" if self.defaults else "it takes none"
                raise Refused(f"loss_fn={self.name} does not know the configuration {key!r}: {known}")
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise Refused(f"loss_fn={self.name}: {key}={value!r} is not a number")
        return {**self.defaults, **given}

    def arguments(self, datum: Datum, like: torch.Tensor) -> dict[str, torch.Tensor]:
        """A datum's inputs where its log-probs are."""
        return {name: datum.loss_inputs[name].to(like) for name in self.inputs if name in datum.loss_inputs}


LOSSES = {
    loss.name: loss
    for loss in (
        *(LossFunction(f.__name__, f) for f in (losses.cross_entropy, losses.importance_sampling, losses.ppo)),
        *(LossFunction(f.__name__, f) for f in (losses.cispo, losses.gspo, losses.dro, losses.grpo)),
        LossFunction("dpo", losses.dpo, "pairs"),
    )
}


def find_loss(loss_fn: Loss) -> LossFunction:
    """By its name, or around a user's function of (data, log-probs), which gives a loss or (loss, metrics).

    Raises:
        Refused: there is none of that name.
    """
    if callable(loss_fn):
        return LossFunction(getattr(loss_fn, "__name__", "custom"), loss_fn, "batch")
    names = ", ".join(LOSSES)
    if loss_fn == NOT_PUBLIC:
        raise Refused(f"loss_fn={NOT_PUBLIC}: its formula is not public; {names} would do")
    if loss_fn not in LOSSES:
        raise Refused(f"loss_fn={loss_fn!r} is not known: {names} would do")
    return LOSSES[loss_fn]


def check_data(loss: LossFunction, data: Sequence[Datum], vocabulary: int, context: int | None) -> None:
    """All data can be read and have what the loss needs.

    Args:
        vocabulary: tokens are below it.
        context: most tokens that the model reads; None: any number.

    Raises:
        Refused: with the number of the datum.
    """
    if not data:
        raise Refused("no data: give at least one datum")
    if loss.over == "pairs" and len(data) % 2:
        raise Refused(f"loss_fn={loss.name} takes pairs, the chosen one first; {len(data)} data are no pairs")
    for number, datum in enumerate(data):
        where = f"datum {number}"
        _check_tokens(datum, vocabulary, context, where)
        _check_targets(loss, datum, vocabulary, where)
        for name, needed in loss.inputs.items():
            if name in datum.loss_inputs:
                _check_input(name, datum, where)
            elif needed:
                raise Refused(f"{where} has no {name}, which loss_fn={loss.name} needs among the loss inputs")


def _check_tokens(datum: Datum, vocabulary: int, context: int | None, where: str) -> None:
    if not isinstance(datum, Datum):
        raise Refused(f"{where} is a {type(datum).__name__}, not a Datum; a plain batch is one mapping of tensors")
    for name, values in datum.loss_inputs.items():
        if not isinstance(values, torch.Tensor):
            raise Refused(f"{where}: {name} is a {type(values).__name__}, not a tensor")
    if not datum.tokens:
        raise Refused(f"{where} has no tokens")
    if context is not None and len(datum.tokens) > context:
        raise Refused(f"{where} has {len(datum.tokens)} tokens, and the model reads {context} at most")
    if not all(isinstance(token, int) and 0 <= token < vocabulary for token in datum.tokens):
        raise Refused(f"{where}: its tokens must be whole numbers from 0 to {vocabulary - 1}")


def _check_targets(loss: LossFunction, datum: Datum, vocabulary: int, where: str) -> None:
    targets = datum.loss_inputs.get(TARGETS)
    if targets is None:
        raise Refused(f"{where} has no {TARGETS} among the loss inputs")
    count, shape = len(datum.tokens), tuple(targets.shape)
    wide = loss.name == "cross_entropy" or loss.over == "batch"
    if shape != (count,) and not (wide and len(shape) == 2 and shape[0] == count and shape[1] > 0):
        raise Refused(f"{where}: {TARGETS} has the shape {shape}, and ({count},){f' or ({count}, K)' * wide} would do")
    if targets.is_floating_point() or targets.dtype == torch.bool or targets.is_complex():
        raise Refused(f"{where}: {TARGETS} must be whole numbers, not {targets.dtype}")
    if targets.min() < 0 or targets.max() >= vocabulary:
        raise Refused(f"{where}: {TARGETS} must be from 0 to {vocabulary - 1}")


def _check_input(name: str, datum: Datum, where: str) -> None:
    values, targets = datum.loss_inputs[name], datum.loss_inputs[TARGETS]
    if values.shape != targets.shape:
        raise Refused(f"{where}: {name} has the shape {tuple(values.shape)}, and {TARGETS} {tuple(targets.shape)}")
    if values.is_complex() or not torch.isfinite(values).all():
        raise Refused(f"{where}: {name} has values that are no finite numbers")

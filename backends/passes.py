"""A batch through a model in passes that fit: its loss, and its gradients, which add up.

A loss that is a sum over data is gone back from pass by pass. Another one is of all log-probs at once: they are read
without gradients first, and each pass once more with them, to go back from it with the loss's gradients for its
log-probs (gradient caching, arXiv 2101.06983). Either way one pass's activations are held at a time.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from backends.loss_table import TARGETS, LossFunction
from backends.losses import IGNORED
from backends.protocol import Datum, ForwardOutput
from rlt.errors import Refused
from rlt.logprobs import pass_members, token_log_probs
from rlt.survival.oom import Watch
from rlt.survival.random_state import random_state, set_random_state


@dataclass(frozen=True)
class Way:
    """How passes are made.

    Attributes:
        tokens: most of one pass; None: as many as the longest sequence has.
        autocast: the dtype of what may run in a lower precision; None: all as the weights are.
        backward: whether gradients are added.
    """

    model: Any
    device: torch.device
    watch: Watch
    tokens: int | None
    autocast: torch.dtype | None
    backward: bool

    def context(self):
        return torch.autocast(self.device.type, dtype=self.autocast, enabled=self.autocast is not None)


@dataclass
class Found:
    """What passes have given so far."""

    log_probs: dict[int, Tensor] = field(default_factory=dict)
    elementwise: dict[int, Tensor] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    loss: float = 0.0

    def output(self, tokens: int) -> ForwardOutput:
        log_probs, elementwise = (
            [values[member] for member in sorted(values)] for values in (self.log_probs, self.elementwise)
        )
        return ForwardOutput(
            log_probs, elementwise, {**self.metrics, "loss:sum": self.loss, "tokens:sum": float(tokens)}
        )


@dataclass(frozen=True)
class DataWork:
    """Data and their loss, all of which was checked."""

    data: Sequence[Datum]
    loss: LossFunction
    config: Mapping[str, float]

    def run(self, way: Way) -> ForwardOutput:
        found, passes = Found(), self._passes(way)
        if self.loss.adds_up or len(passes) == 1:
            for members in passes:
                log_probs = self._read(way, members)
                total = self._loss(found, members, log_probs)
                self._keep(found, members, log_probs)
                if way.backward:
                    total.backward()
                del log_probs, total
        else:
            self._run_whole(way, found, passes)
        return found.output(sum(map(counted_tokens, self.data)))

    def _passes(self, way: Way) -> list[list[int]]:
        """Which data each pass reads, in their order; those with as many targets at a place go together."""
        kinds = defaultdict(list)
        for member, datum in enumerate(self.data):
            kinds[datum.loss_inputs[TARGETS].shape[1:]].append(member)
        passes = []
        for members in kinds.values():
            sequences = [self.data[member].tokens for member in members]
            most = way.tokens or max(map(len, sequences))
            found = pass_members(way.model, sequences, [[*range(1, len(ids) + 1)] for ids in sequences], most)
            passes += [sorted(members[number] for number in some) for some in found]
        return passes

    def _read(self, way: Way, members: list[int]) -> list[Tensor]:
        data = [self.data[member] for member in members]
        return token_log_probs(
            way.model,
            [datum.tokens for datum in data],
            [[*range(1, len(datum.tokens) + 1)] for datum in data],
            targets=[datum.loss_inputs[TARGETS].tolist() for datum in data],
            token_budget=way.tokens or max(len(datum.tokens) for datum in data),
            autocast=way.context(),
            guard=way.watch,
        )[0]

    def _loss(self, found: Found, members: Sequence[int], log_probs: list[Tensor]) -> Tensor:
        data = [self.data[member] for member in members]
        if self.loss.over == "batch":
            total = users_loss(self.loss.compute(data, log_probs), found.metrics)
        else:
            inputs = [self.loss.arguments(datum, values) for datum, values in zip(data, log_probs, strict=True)]
            if self.loss.over == "pairs":
                columns = {name: [row[name] for row in inputs] for name in self.loss.inputs if name in inputs[0]}
                total = self.loss.compute(log_probs, **columns, **self.config).sum()
            else:
                rows = zip(log_probs, inputs, strict=True)
                parts = [self.loss.compute(values, **row, **self.config) for values, row in rows]
                found.elementwise |= zip(members, map(_kept, parts), strict=True)
                total = torch.stack([part.sum() for part in parts]).sum()
        found.loss += finite(total, self.loss.name, torch.is_grad_enabled())
        return total

    def _run_whole(self, way: Way, found: Found, passes: list[list[int]]) -> None:
        states, leaves = [], {}
        with torch.no_grad():
            for members in passes:
                states.append(random_state())
                leaves |= zip(members, self._read(way, members), strict=True)
        after = random_state()
        rows = [leaves[member].requires_grad_(way.backward) for member in range(len(self.data))]
        total = self._loss(found, range(len(self.data)), rows)
        self._keep(found, range(len(self.data)), rows)
        if not way.backward:
            return
        total.backward()
        for members, state in zip(passes, states, strict=True):
            set_random_state(state)  # the same dropout
            pulled = [
                (values * leaves[member].grad).sum()
                for member, values in zip(members, self._read(way, members), strict=True)
                if leaves[member].grad is not None
            ]
            if pulled:
                torch.stack(pulled).sum().backward()
            del pulled
        set_random_state(after)

    @staticmethod
    def _keep(found: Found, members: Sequence[int], log_probs: list[Tensor]) -> None:
        found.log_probs |= zip(members, map(_kept, log_probs), strict=True)


@dataclass(frozen=True)
class PlainWork:
    """Tensors of a row per sequence for any model, and a function of (outputs, labels)."""

    batch: Mapping[str, Any]
    loss: Callable

    def run(self, way: Way) -> ForwardOutput:
        found = Found()
        for rows, part in self._parts(way):
            inputs, labels = self._placed(way, part, rows)
            with way.context():
                total = users_loss(self.loss(way.model(**inputs), labels), found.metrics)
            found.loss += finite(total, "the loss", torch.is_grad_enabled())
            if way.backward:
                total.backward()
            del inputs, total
        return found.output(self._counted())

    def _counted(self) -> int:
        return int((self.batch["labels"] != IGNORED).sum())

    def _placed(self, way: Way, part: Mapping[str, Any], rows: int) -> tuple[dict[str, Any], Tensor]:
        """What the model takes of a part, and labels."""
        inputs = {name: value.to(way.device) if isinstance(value, Tensor) else value for name, value in part.items()}
        labels = inputs.pop("labels")
        way.watch.plan([(labels.numel(), rows)])
        way.watch.begin(0)
        return inputs, labels

    def _parts(self, way: Way) -> Iterator[tuple[int, dict[str, Any]]]:
        """How many rows can be split off, and the part of the batch; one part where the loss is no sum over rows."""
        labels = self.batch["labels"]
        count = len(labels)
        if not getattr(self.loss, "additive", False):
            yield 1, dict(self.batch)
            return
        step = max(1, way.tokens * count // labels.numel()) if way.tokens else 1
        for start in range(0, count, step):
            part = self._rows(slice(start, start + step))
            yield len(part["labels"]), part

    def _rows(self, rows: slice) -> dict[str, Any]:
        return {n: v[rows] if isinstance(v, Tensor) and v.dim() else v for n, v in self.batch.items()}


def _kept(values: Tensor) -> Tensor:
    return values.detach().float().cpu()


def counted_tokens(datum: Datum) -> int:
    """Those with a weight or an advantage; all where neither is given."""
    inputs = datum.loss_inputs
    named = next((inputs[name] for name in ("weights", "advantages") if name in inputs), None)
    return inputs[TARGETS].numel() if named is None else int((named != 0).sum())


def users_loss(given, metrics: dict[str, float]) -> Tensor:
    """A loss, or (loss, metrics); the figures of several parts are those of the last."""
    if isinstance(given, tuple):
        given, figures = given
        metrics |= {name: float(value) for name, value in figures.items()}
    if not isinstance(given, Tensor) or given.numel() != 1:
        raise Refused(f"a loss function must give a tensor of one number, not {type(given).__name__}")
    return given


def finite(total: Tensor, name: str, backward: bool) -> float:
    value = total.item()
    if value != value or abs(value) == float("inf"):
        raise Refused(f"{name} is {value}: nothing was added to the gradients")
    if backward and not total.requires_grad:
        raise Refused(f"{name} does not depend on the model's weights, so it has no gradients")
    return value

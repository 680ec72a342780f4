"""Tensors of a row per sequence through ranks that share a model; what holds of data (rank_passes.py) holds here."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from backends.distributed import Together, all_reduce, rank, world_size
from backends.passes import Found, PlainWork, Way, finite, users_loss
from backends.protocol import ForwardOutput
from backends.rank_passes import output_of, stretch
from backends.ranks import Copies


@dataclass(frozen=True)
class RankPlainWork(PlainWork):
    """Tensors of a row per sequence; rows are shared where the loss is a sum over them.

    Else every rank reads all of them, and each adds its part of the same gradients.
    """

    ranks: Copies

    def run(self, way: Way) -> ForwardOutput:
        found, parts = Found(), list(self._mine(way))
        count = int(all_reduce(torch.tensor(len(parts)), "max")) if self.ranks.collective else len(parts)
        with stretch(way):
            for rows, part in parts + [(0, self._rows(slice(0, 1)))] * (count - len(parts)):
                self._read_and_go_back(way, found, rows, part)
        return output_of(found, [], [], self._counted())

    def _mine(self, way: Way) -> Iterator[tuple[int, dict[str, Any]]]:
        if not getattr(self.loss, "additive", False):
            yield 1, dict(self.batch)
            return
        rows = torch.arange(len(self.batch["labels"])).tensor_split(world_size())[rank()].tolist()
        if rows:
            yield from PlainWork(self._rows(slice(rows[0], rows[-1] + 1)), self.loss)._parts(way)

    def _read_and_go_back(self, way: Way, found: Found, rows: int, part: dict[str, Any]) -> None:
        """
        Args:
            rows: that can be split off; 0: the pass is made for nothing.
        """
        whole = not getattr(self.loss, "additive", False)
        with Together() if self.ranks.collective else nullcontext():
            inputs, labels = self._placed(way, part, rows)
            if self.ranks.collective:
                way.watch.enter()
            with way.context():
                figures: dict[str, float] = {}
                total = users_loss(self.loss(self.ranks.outputs(inputs), labels), figures)
            way.watch.leave()
            factor = 0.0 if not rows else 1 / world_size() if whole else 1.0
            value = finite(total, "the loss", torch.is_grad_enabled())
            found.loss += value * factor
            found.metrics |= figures if rows else {}
        if way.backward:
            self.ranks.backward(total * factor, way.watch)

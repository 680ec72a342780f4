"""A whole batch through ranks that share a model: each reads its share, and all have what one process has of the batch.

A share is of neighbours, about as many tokens each, so that completions stay with their siblings; a rank may have none.
Where passes are collective, a rank with fewer of them makes the lacking ones for nothing. A loss of the whole batch at
once is computed by every rank from the log-probs of all, and gone back from for its own share.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from backends.distributed import Together, all_gather, all_reduce, gather_texts, rank, world_size
from backends.loss_table import TARGETS
from backends.passes import DataWork, Found, Way, counted_tokens
from backends.protocol import ForwardOutput
from backends.ranks import Copies
from rlt.logprobs import token_log_probs
from rlt.survival.random_state import random_state, set_random_state


def shares(sizes: Sequence[int], ranks: int, together: int = 1) -> list[list[int]]:
    """Which neighbours each rank reads.

    Args:
        sizes: tokens of each.
        together: how many neighbours are never parted; divides their number.
    """
    found: list[list[int]] = [[] for _ in range(ranks)]
    total, done = sum(sizes), 0
    for first in range(0, len(sizes), together):
        unit = range(first, first + together)
        size = sum(sizes[number] for number in unit)
        found[min(ranks - 1, int((done + size / 2) * ranks / total))] += unit
        done += size
    return found


@contextmanager
def stretch(way: Way) -> Iterator[None]:
    """Between two meetings of all ranks; within it one may fail, or run out of memory, alone."""
    with Together():
        yield
    way.watch.meet()


@dataclass(frozen=True)
class RankDataWork(DataWork):
    """Data of all ranks; the same on each."""

    ranks: Copies

    def run(self, way: Way) -> ForwardOutput:
        sizes = [len(datum.tokens) for datum in self.data]
        mine = shares(sizes, world_size(), 2 if self.loss.over == "pairs" else 1)[rank()]
        found, passes = Found(), self._agreed([[mine[n] for n in some] for some in self._passes_of(way, mine)])
        if self.loss.adds_up:
            with stretch(way):
                for members in passes:
                    self._read_and_go_back(way, found, members)
        else:
            self._run_whole(way, found, passes)
        return self._gathered(found)

    def _passes_of(self, way: Way, mine: list[int]) -> list[list[int]]:
        return DataWork([self.data[number] for number in mine], self.loss, self.config)._passes(way)

    def _agreed(self, passes: list[list[int]]) -> list[list[int]]:
        """As many passes on each rank, where they are collective; those that are lacking have no members."""
        if not self.ranks.collective:
            return passes
        count = int(all_reduce(torch.tensor(len(passes)), "max"))
        return passes + [[] for _ in range(count - len(passes))]

    def _read_and_go_back(self, way: Way, found: Found, members: list[int]) -> None:
        with self._pass(way):
            log_probs = self._read(way, members)
            total = None if way.watch.shortage else self._total(found, members, log_probs)
        if way.backward and total is not None:
            self.ranks.backward(total, way.watch)

    @contextmanager
    def _pass(self, way: Way) -> Iterator[None]:
        """A collective pass has a meeting before the way back, which nobody reaches alone."""
        if not self.ranks.collective:
            yield
            return
        with stretch(way):
            yield

    def _total(self, found: Found, members: list[int], log_probs: list[Tensor]) -> Tensor:
        if not members:
            return log_probs[0].sum()  # nothing, by way of the whole model
        total = self._loss(found, members, log_probs)
        self._keep(found, members, log_probs)
        return total

    def _read(self, way: Way, members: list[int]) -> list[Tensor]:
        data = [self.data[member] for member in members]
        sequences = [datum.tokens for datum in data] or [[0]]

        def compute() -> list[Tensor]:
            return token_log_probs(
                way.model,
                sequences,
                [[*range(1, len(datum.tokens) + 1)] for datum in data] or [[]],
                targets=[datum.loss_inputs[TARGETS].tolist() for datum in data] or [[]],
                token_budget=way.tokens or max(map(len, sequences)),
                autocast=way.context(),
                agree_on_forwards=(lambda count: count) if self.ranks.collective else None,  # agreed on before
                guard=way.watch,
            )[0]

        return self.ranks.inside(compute)

    def _run_whole(self, way: Way, found: Found, passes: list[list[int]]) -> None:
        states, leaves = [], {}
        with stretch(way), torch.no_grad():
            for members in passes:
                states.append(random_state())
                with self._pass(way):
                    leaves |= zip(members, self._read(way, members), strict=False)
        after, leaves = random_state(), dict(sorted(leaves.items()))
        self._keep(found, [*leaves], [*leaves.values()])
        with stretch(way):
            whole = self._loss_of_all(way, found, leaves)
            if way.backward:
                whole.backward()
        with stretch(way):
            for members, state in zip(passes if way.backward else [], states, strict=False):
                set_random_state(state)  # the same dropout
                self._pull(way, members, leaves)
        set_random_state(after)

    def _loss_of_all(self, way: Way, found: Found, leaves: dict[int, Tensor]) -> Tensor:
        """Of this rank's pairs, or of the whole batch, which counts once."""
        for values in leaves.values():
            values.requires_grad_(way.backward)
        if self.loss.over == "pairs":
            if not leaves:
                return torch.zeros((), requires_grad=True)
            return self._loss(found, [*leaves], [*leaves.values()])
        gathered = self._split(all_gather(_flat(leaves)))
        rows = [leaves.get(n, values.requires_grad_(way.backward)) for n, values in enumerate(gathered)]
        whole = self._loss(found, range(len(self.data)), rows)
        found.loss = found.loss if rank() == 0 else 0.0
        return whole

    def _pull(self, way: Way, members: list[int], leaves: dict[int, Tensor]) -> None:
        with self._pass(way):
            log_probs = self._read(way, members)
            total = None
            if way.watch.shortage is None:
                pairs = zip(members, log_probs, strict=True) if members else ()
                total = sum((v * g).sum() for m, v in pairs if (g := leaves[m].grad) is not None)
                total = total if isinstance(total, Tensor) else torch.stack([v.sum() for v in log_probs]).sum() * 0.0
        if total is not None:
            self.ranks.backward(total, way.watch)

    def _gathered(self, found: Found) -> ForwardOutput:
        """What one process would give, on every rank."""
        log_probs = self._split(all_gather(_flat(found.log_probs)))
        kept = all_gather(_flat(found.elementwise))
        elementwise = self._split(kept) if sum(map(len, kept)) else []
        return output_of(found, log_probs, elementwise, sum(map(counted_tokens, self.data)))

    def _split(self, gathered: list[Tensor]) -> list[Tensor]:
        """By data, of what ranks have of theirs: shares are in the order of ranks."""
        shapes = [datum.loss_inputs[TARGETS].shape for datum in self.data]
        parts = torch.cat(gathered).split([shape.numel() for shape in shapes])
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def _flat(values: dict[int, Tensor]) -> Tensor:
    ordered = [values[number].detach().float().flatten() for number in sorted(values)]
    return torch.cat(ordered) if ordered else torch.zeros(0)


def output_of(found: Found, log_probs: list[Tensor], elementwise: list[Tensor], tokens: int) -> ForwardOutput:
    """The figures of a user's loss are those of the last rank that has some."""
    loss = float(all_reduce(torch.tensor(found.loss, dtype=torch.float64)))
    figures = [json.loads(said) for said in gather_texts(json.dumps(found.metrics))]
    metrics = next((some for some in reversed(figures) if some), {})
    return ForwardOutput(log_probs, elementwise, {**metrics, "loss:sum": loss, "tokens:sum": float(tokens)})

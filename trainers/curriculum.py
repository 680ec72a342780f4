"""Rows drawn by a curriculum by length (Dataset Decomposition, arXiv 2405.13226), with a state that checkpoints keep.

A packed row of half the length counts as half a row: each micro-batch takes so many rows of one length that it has the
tokens of `per_device_train_batch_size` rows of `max_length`. Which length comes next follows from the shares alone,
whose tokens are owed most; which rows, from a shuffle of that length's rows for each time through them. The last ones
of a shuffle, which do not fill a micro-batch of each rank, are left out of it: no row is taken twice at once.
"""

import json
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
from torch.utils.data import DataLoader

from rlt.durable import read_json, write_whole
from rlt.errors import Refused
from rlt.planning.curriculum import Phase

logger = logging.getLogger("rlt")

SAMPLER_STATE = "sampler.json"  # of a checkpoint

if TYPE_CHECKING:  # a mixin of trainers
    from transformers import Trainer as Base
else:
    Base = object


@dataclass
class Place:
    """How far a sampler has come.

    Attributes:
        round: micro-batches of each rank that were drawn.
        phase: number of the phase of the last of them.
        drawn: of its rounds, by length.
        taken: rows of each length, ever; beyond their number they are shuffled anew.
    """

    round: int = 0
    phase: int = 0
    drawn: dict[int, int] = field(default_factory=dict)
    taken: dict[int, int] = field(default_factory=dict)


class CurriculumSampler:
    """Micro-batches of row numbers, of one rank, in the order in which they are trained on.

    Args:
        buckets: the length of each row of the data.
        phases: in order.
        max_length: tokens that a row of `rows_each` counts for.
        rows_each: such rows of a micro-batch.
        rounds_of_step: micro-batches that each rank accumulates.
        steps: of the run.
        seed: of the shuffles.
        rank, ranks: all ranks draw the same lengths at once, and rows of their own.

    Raises:
        Refused: a phase names a length that no row has, or too few for one micro-batch of each rank.
    """

    def __init__(
        self,
        buckets: Any,
        phases: list[Phase],
        *,
        max_length: int,
        rows_each: int,
        rounds_of_step: int,
        steps: int,
        seed: int,
        rank: int = 0,
        ranks: int = 1,
    ):
        self.phases, self.max_length, self.rows_each = phases, max_length, rows_each
        lengths = numpy.asarray(buckets)
        self.rank, self.ranks = rank, ranks
        self.rows = {int(length): numpy.flatnonzero(lengths == length) for length in numpy.unique(lengths)}
        for phase in phases:
            for length in phase.shares:
                if length not in self.rows:
                    raise Refused(
                        f"curriculum: no packed row has {length} tokens: there are {', '.join(map(str, self.rows))}"
                    )
                taken = self._at_once(length)
                if len(self.rows[length]) < taken:
                    found = len(self.rows[length])
                    raise Refused(
                        f"curriculum: {found} packed rows have {length} tokens, and {taken} are taken at once: "
                        "lower per_device_train_batch_size, or leave that length out"
                    )
        self._say_left_out()
        self.rounds_of_step, self.rounds, self.seed = rounds_of_step, steps * rounds_of_step, seed
        self.begin = Place()
        self._known = Place()  # an earlier place that later ones are found from
        self._shuffled: dict[int, tuple[int, Any]] = {}

    def _at_once(self, length: int) -> int:
        """Rows of a length that all ranks take for one micro-batch of each."""
        return self.ranks * (self.rows_each * self.max_length // length)

    def _say_left_out(self) -> None:
        named = {length for phase in self.phases for length in phase.shares}
        for length in sorted(self.rows.keys() - named):
            count = len(self.rows[length])
            logger.warning(
                "curriculum: no phase names %d tokens: %d packed rows, of %d tokens with their padding, are left out",
                *(length, count, count * length),
            )

    def __len__(self) -> int:
        return self.rounds

    def __iter__(self) -> Iterator[list[int]]:
        """All micro-batches of the run; those before a loaded state are empty, for the trainer to skip."""
        yield from ([] for _ in range(self.begin.round))
        place = _copy(self.begin)
        while place.round < self.rounds:
            length = self._next_length(place)
            count = self.rows_each * self.max_length // length
            first = place.taken.get(length, 0) + self.rank * count
            yield [self._row(length, number) for number in range(first, first + count)]
            self._go_on(place, length)

    def state_dict(self, rounds: int) -> dict[str, Any]:
        """The state once so many micro-batches of each rank were trained on: loaders draw ahead of that."""
        if self._known.round > rounds:
            self._known = _copy(self.begin)
        while self._known.round < rounds:
            self._go_on(self._known, self._next_length(self._known))
        return asdict(self._known)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        numbers = {key: {int(length): count for length, count in state[key].items()} for key in ("drawn", "taken")}
        self.begin = Place(state["round"], state["phase"], **numbers)
        self._known = _copy(self.begin)

    def _next_length(self, place: Place) -> int:
        """Also begins the next phase where the last has ended."""
        step = place.round // self.rounds_of_step
        number = next((n for n, p in enumerate(self.phases) if p.until_step is None or step < p.until_step), None)
        number = len(self.phases) - 1 if number is None else number
        if number != place.phase:
            place.phase, place.drawn = number, {}
        done, shares = sum(place.drawn.values()) + 1, self.phases[number].shares
        return max(shares, key=lambda length: shares[length] * done - place.drawn.get(length, 0))

    def _go_on(self, place: Place, length: int) -> None:
        place.round += 1
        place.drawn[length] = place.drawn.get(length, 0) + 1
        place.taken[length] = place.taken.get(length, 0) + self._at_once(length)

    def _row(self, length: int, number: int) -> int:
        """The so many-th row of a length, over all times through them."""
        taken = self._at_once(length)
        epoch, place = divmod(number, len(self.rows[length]) // taken * taken)
        if self._shuffled.get(length, (None,))[0] != epoch:
            order = numpy.random.default_rng([self.seed, length, epoch]).permutation(self.rows[length])
            self._shuffled[length] = epoch, order
        return int(self._shuffled[length][1][place])


def _copy(place: Place) -> Place:
    return Place(place.round, place.phase, dict(place.drawn), dict(place.taken))


class FollowsCurriculum(Base):
    """Mixed into trainers: `curriculum` draws their rows where it is set, and is part of their checkpoints."""

    curriculum: CurriculumSampler | None = None

    def get_train_dataloader(self) -> DataLoader:
        # Overridden because batches of several sizes are drawn; each rank has a sampler of its own.
        if self.curriculum is None:
            return super().get_train_dataloader()
        return DataLoader(
            self.train_dataset,  # pyrefly: ignore[bad-argument-type]  # a dataset of the library has the methods
            batch_sampler=self.curriculum,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )

    def _save_extra_state(self, folder: Path) -> None:
        super()._save_extra_state(folder)  # pyrefly: ignore[missing-attribute]  # of AtomicCheckpoints
        if self.curriculum is not None:
            state = self.curriculum.state_dict(self.state.global_step * self.curriculum.rounds_of_step)
            write_whole(folder / SAMPLER_STATE, json.dumps(state))

    def _load_extra_state(self, folder: Path) -> None:
        super()._load_extra_state(folder)  # pyrefly: ignore[missing-attribute]
        if self.curriculum is not None and (state := read_json(folder / SAMPLER_STATE)) is not None:
            self.curriculum.load_state_dict(state)

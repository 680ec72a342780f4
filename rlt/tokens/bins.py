"""Best-fit decreasing: the longest first, each to the row with the least room that still holds it.

Rows may be of several lengths: where none has room, a new one is opened, of the least length that holds the sequence.
"""

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Bin:
    """A row: its length, and the numbers of the sequences that it holds."""

    length: int
    members: list[int] = field(default_factory=list)


def best_fit_decreasing(lengths: Sequence[int], sizes: Sequence[int]) -> list[Bin]:
    """Rows that hold every sequence once, in the order in which they were opened.

    Args:
        lengths: of the sequences, each between 1 and the largest size.
        sizes: of rows, ascending.

    Each sequence costs one search among the distinct rooms, of which there are at most as many as sequences and as
    tokens of a row.
    """
    bins: list[Bin] = []
    rooms: list[int] = []  # distinct, ascending
    with_room: dict[int, list[int]] = defaultdict(list)  # numbers of bins
    for number in sorted(range(len(lengths)), key=lambda n: -lengths[n]):  # equal ones in their order
        length = lengths[number]
        assert 0 < length <= sizes[-1], length
        at = bisect_left(rooms, length)
        if at < len(rooms):
            room = rooms[at]
            which = with_room[room].pop()
            if not with_room[room]:
                del rooms[at]
        else:
            room, which = sizes[bisect_left(sizes, length)], len(bins)
            bins.append(Bin(room))
        bins[which].members.append(number)
        left = room - length
        if left:
            if not with_room[left]:
                insort(rooms, left)
            with_room[left].append(which)
    return bins

"""Token sequences that share a prefix, laid out so that the prefix is computed once.

A packed row is `prefix + rest_1 + … + rest_G`, group after group: positions restart after the prefix, and each rest
sees the prefix and itself (models/attention.py). What all sequences begin with, the stem (a system prompt), stands once
in each row: the second group's prefix follows the first group without it. Packing without cross-talk is described in
arXiv 2107.02027; sharing a prompt between its completions is the same idea with a tree instead of a list.
T tokens of a packed row.
"""

from collections import defaultdict
from collections.abc import Hashable
from dataclasses import dataclass
from itertools import accumulate

import torch

from models.attention import SharedPrefixLayout, Span

BLOCK = 128  # FlexAttention's block: a row of whole blocks needs no special last one


@dataclass(frozen=True)
class Pack:
    """One group of a packed row: which sequences it holds, where each rest begins, and the length of the prefix."""

    members: list[int]  # indices into the caller's sequences
    starts: list[int]  # counted from the pack's first token: where each member's first own token stands
    prefix_length: int
    length: int

    def position(self, member: int, index: int) -> int:
        """Where token `index` of the pack's `member`-th sequence stands, counted from the pack's first token."""
        return index if index < self.prefix_length else self.starts[member] + index - self.prefix_length


def common_prefix(sequences: list[list[int]]) -> int:
    """Number of leading tokens that all sequences share."""
    shortest, longest = min(sequences), max(sequences)
    for i, (a, b) in enumerate(zip(shortest, longest, strict=False)):
        if a != b:
            return i
    return min(len(shortest), len(longest))


def pack_group(sequences: list[list[int]], members: list[int], token_budget: int) -> list[Pack]:
    """Packs of one group, each of at most `token_budget` tokens; a longer single sequence is a pack of its own."""
    prefix_length = common_prefix([sequences[m] for m in members])
    packs: list[Pack] = []
    inside: list[int] = []
    starts: list[int] = []
    length = prefix_length
    for member in sorted(members, key=lambda m: len(sequences[m])):
        rest = len(sequences[member]) - prefix_length
        if inside and length + rest > token_budget:
            packs.append(Pack(inside, starts, prefix_length, length))
            inside, starts, length = [], [], prefix_length
        inside.append(member)
        starts.append(length)
        length += rest
    return [*packs, Pack(inside, starts, prefix_length, length)]


def fill_rows(packs: list[Pack], token_budget: int, stem: int = 0) -> list[list[Pack]]:
    """Rows of at most `token_budget` tokens (first fit, longest first); a longer pack is a row of its own.

    Args:
        stem: tokens that all packs begin with; each row has them once.
    """
    rows: list[list[Pack]] = []
    for pack in sorted(packs, key=lambda p: p.length, reverse=True):
        fits = (row for row in rows if stem + sum(p.length - stem for p in [*row, pack]) <= token_budget)
        row = next(fits, None)
        if row is None:
            rows.append([pack])
        else:
            row.append(pack)
    return rows


def lay_out(row: list[Pack], sequences: list[list[int]], device: torch.device, stem: int = 0) -> dict:
    """Model inputs of a row: `input_ids` and `position_ids` (1, T), `layout`, and a placeholder for the mask.

    On a GPU the row is padded to a multiple of `BLOCK`.
    """
    ids: list[int] = []
    positions: list[int] = []
    spans = []
    for number, pack in enumerate(row):
        first = sequences[pack.members[0]]
        rests = [sequences[member][pack.prefix_length :] for member in pack.members]
        known = stem if number else 0
        spans.append(Span(len(ids), pack.prefix_length - known, tuple(map(len, rests)), known))
        ids += first[known : pack.prefix_length]
        positions += range(known, pack.prefix_length)
        for rest in rests:
            ids += rest
            positions += range(pack.prefix_length, pack.prefix_length + len(rest))
    padding = -len(ids) % BLOCK if device.type == "cuda" else 0
    return {
        "input_ids": torch.tensor([ids + [0] * padding], device=device),
        "position_ids": torch.tensor([positions + [0] * padding], device=device),
        # Four dimensions tell transformers that the mask is ready; the attention reads the layout instead.
        "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device),
        "layout": SharedPrefixLayout(tuple(spans), len(ids) + padding),
    }


def positions_in(row: list[Pack], stem: int, counted: list[list[int]]) -> list[int]:
    """Where in the row stands what comes before each counted token, pack by pack, member by member.

    A pack's tokens behind the stem stand `offset` later than in the pack alone.
    """
    offsets = [0, *accumulate(pack.length - stem for pack in row)]
    alone = [
        (offset, pack.position(order, index - 1))
        for offset, pack in zip(offsets, row, strict=False)
        for order, member in enumerate(pack.members)
        for index in counted[member]
    ]
    return [at if at < stem else offset + at for offset, at in alone]


def batch_sequences(sequences: list[list[int]], members: list[int], token_budget: int) -> list[list[int]]:
    """Without sharing: neighbours in length share a batch, of at most `token_budget` tokens with its padding."""
    batches: list[list[int]] = []
    for member in sorted(members, key=lambda m: len(sequences[m])):
        if batches and len(sequences[member]) * (len(batches[-1]) + 1) <= token_budget:
            batches[-1].append(member)
        else:
            batches.append([member])
    return batches


def pad_batch(batch: list[int], sequences: list[list[int]], device: torch.device) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask` (B, T) of sequences padded on the right, where causal models do not look."""
    width = max(len(sequences[member]) for member in batch)
    rows = [sequences[member] for member in batch]
    return {
        "input_ids": torch.tensor([ids + [0] * (width - len(ids)) for ids in rows], device=device),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in rows], device=device),
    }


def members_of(groups: list[Hashable]) -> list[list[int]]:
    """Indices of the sequences of each group, in the order in which groups begin."""
    members = defaultdict(list)
    for index, group in enumerate(groups):
        members[group].append(index)
    return list(members.values())


def pad_rows(values: list[torch.Tensor], widths: list[int], width: int) -> torch.Tensor:
    """(B, width): the last `widths[i]` entries of each row's values, zeros behind them."""
    rows = [torch.nn.functional.pad(v[len(v) - n :], (0, width - n)) for v, n in zip(values, widths, strict=True)]
    return torch.stack(rows)

"""Token sequences laid out so that a beginning which several sequences share is computed once.

A row holds sequences in lexicographic order, and of each sequence only the tokens that it does not share with the
sequence before: a radix tree, written depth first. Positions count a sequence's tokens, and each token sees the tokens
before it in its own sequence
(models/attention.py). A system prompt, a question's prompt, the words with which several completions begin and whole
completions that are equal are all read once, without being told where they end. Packing without cross-talk is
described in arXiv 2107.02027; sharing a prompt between its completions is the same idea with a tree instead of a list.
T tokens of a packed row.
"""

from dataclasses import dataclass, field

import torch

from rlt.models.attention import Branch, SharedPrefixLayout

BLOCK = 128  # FlexAttention's block: a row of whole blocks needs no special last one


@dataclass
class Row:
    """Sequences of one forward pass.

    Attributes:
        members: indices into the caller's sequences, which are in lexicographic order.
        shared: for each member, how many leading tokens it has in common with the member before.
        length: tokens of the row.
        longest: tokens of the longest member, shared ones included.
        reach: how many leading tokens of the sequence at hand the row has already.
    """

    members: list[int] = field(default_factory=list)
    shared: list[int] = field(default_factory=list)
    length: int = 0
    longest: int = 0
    reach: int = 0

    def length_with(self, tokens: int, whole: bool) -> int:
        """Tokens of the row with one more member; `whole`: if each member had a padded row of its own."""
        if whole:
            return (len(self.members) + 1) * max(self.longest, tokens)
        return self.length + tokens - self.reach

    def add(self, member: int, tokens: int) -> None:
        self.members.append(member)
        self.shared.append(self.reach)
        self.length += tokens - self.reach
        self.longest = max(self.longest, tokens)
        self.reach = tokens


def common_prefix(first: list[int], second: list[int]) -> int:
    """Number of leading tokens that both have."""
    for i, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return i
    return min(len(first), len(second))


def fill_rows(sequences: list[list[int]], members: list[int], token_budget: int, whole: bool = False) -> list[Row]:
    """Rows of at most `token_budget` tokens; a longer single sequence is a row of its own.

    Each sequence goes to the row that has most of its beginning among those with room, else to the first with room.
    `whole`: the budget holds for padded rows of whole sequences, as recurrent layers read them (models/recurrent.py).
    """
    rows: list[Row] = []
    before: list[int] = []
    for member in sorted(members, key=sequences.__getitem__):
        ids = sequences[member]
        common = common_prefix(before, ids)
        for row in rows:
            row.reach = min(row.reach, common)
        with_room = [row for row in rows if row.length_with(len(ids), whole) <= token_budget]
        if with_room:
            row = max(with_room, key=lambda row: row.reach)
        else:
            rows.append(row := Row())
        row.add(member, len(ids))
        before = ids
    return rows


def lay_out(
    row: Row, sequences: list[list[int]], counted: list[list[int]], device: torch.device
) -> tuple[dict, list[int]]:
    """Model inputs of a row, and the places in it of the tokens before the counted ones, member by member.

    Returns:
        `input_ids` and `position_ids` (1, T), `layout`, and a placeholder for the mask; on a GPU the row is padded to
        a multiple of `BLOCK`. Places: one for each of `counted[member]`, in the order of `row.members`.
    """
    ids: list[int] = []
    positions: list[int] = []
    places: list[int] = []
    branches: list[Branch] = []
    path: list[tuple[int, int]] = []  # where the tokens of a sequence stand
    for member, shared in zip(row.members, row.shared, strict=True):
        own = sequences[member][shared:]
        path = _first_tokens(path, shared)
        if own:
            branches.append(Branch(len(ids), len(ids) + len(own), tuple(path)))
            path.append((len(ids), len(ids) + len(own)))
        ids += own
        positions += range(shared, shared + len(own))
        standing = [place for start, end in path for place in range(start, end)]
        places += [standing[index - 1] for index in counted[member]]
    padding = -len(ids) % BLOCK if device.type == "cuda" else 0
    inputs = {
        "input_ids": torch.tensor([ids + [0] * padding], device=device),
        "position_ids": torch.tensor([positions + [0] * padding], device=device),
        # Four dimensions tell transformers that the mask is ready; the attention reads the layout instead.
        "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device),
        "layout": SharedPrefixLayout(tuple(branches), len(ids) + padding),
    }
    return inputs, places


def _first_tokens(path: list[tuple[int, int]], count: int) -> list[tuple[int, int]]:
    """The beginning of a path, `count` tokens long."""
    kept = []
    for start, end in path:
        if count > 0:
            kept.append((start, min(end, start + count)))
        count -= end - start
    return kept


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


def pad_rows(values: list[torch.Tensor], widths: list[int], width: int) -> torch.Tensor:
    """(B, width): the last `widths[i]` entries of each row's values, zeros behind them."""
    rows = [torch.nn.functional.pad(v[len(v) - n :], (0, width - n)) for v, n in zip(values, widths, strict=True)]
    return torch.stack(rows)

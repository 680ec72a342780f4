"""Token sequences that share a prefix, laid out so that the prefix is computed once.

A packed row is `prefix + rest_1 + … + rest_G`: positions restart after the prefix, and each rest sees the prefix and
itself. Padding and packing by block masks are described in arXiv 2107.02027; sharing a prompt between its
completions is the same idea with a tree instead of a list.
R rows of a batch, T tokens of a packed row.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Pack:
    """One packed row: which sequences it holds, where each rest begins, and the length of the shared prefix."""

    members: list[int]  # indices into the caller's sequences
    starts: list[int]  # position in the row of each member's first own token
    prefix_length: int
    length: int

    def position(self, member: int, index: int) -> int:
        """Where token `index` of the pack's `member`-th sequence stands in the row."""
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


def batch_packs(packs: list[Pack], token_budget: int) -> list[list[Pack]]:
    """Neighbours in length share a batch, of at most `token_budget` tokens with its padding."""
    batches: list[list[Pack]] = []
    for pack in sorted(packs, key=lambda p: p.length):
        if batches and pack.length * (len(batches[-1]) + 1) <= token_budget:
            batches[-1].append(pack)
        else:
            batches.append([pack])
    return batches


def lay_out(batch: list[Pack], sequences: list[list[int]], device: torch.device) -> dict[str, torch.Tensor | None]:
    """Model inputs of a batch of packs.

    Returns:
        `input_ids` and `position_ids` (R, T), and `attention_mask`: boolean (R, 1, T, T), true where a token may
        look; None when plain causal attention says the same (no pack holds more than one sequence).
    """
    width = max(pack.length for pack in batch)
    ids_RT = torch.zeros(len(batch), width, dtype=torch.long)
    positions_RT = torch.arange(width).repeat(len(batch), 1)
    segments_RT = torch.zeros(len(batch), width, dtype=torch.long)  # 0 is the prefix
    for row, pack in enumerate(batch):
        ids_RT[row, : pack.prefix_length] = torch.tensor(sequences[pack.members[0]][: pack.prefix_length])
        for order, (member, start) in enumerate(zip(pack.members, pack.starts, strict=True), start=1):
            rest = sequences[member][pack.prefix_length :]
            span = slice(start, start + len(rest))
            ids_RT[row, span] = torch.tensor(rest, dtype=torch.long)
            positions_RT[row, span] = torch.arange(pack.prefix_length, pack.prefix_length + len(rest))
            segments_RT[row, span] = order
    if all(len(pack.members) == 1 for pack in batch):
        mask = None  # padding stands on the right, where causal attention does not look
    else:
        key_RT, query_RT = segments_RT[:, None, :], segments_RT[:, :, None]
        causal = torch.ones(width, width, dtype=torch.bool).tril()
        mask = (((key_RT == 0) | (key_RT == query_RT)) & causal)[:, None].to(device)
    return {"input_ids": ids_RT.to(device), "position_ids": positions_RT.to(device), "attention_mask": mask}

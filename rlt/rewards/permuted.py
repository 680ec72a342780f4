"""Rewards that say nothing of their completion: a control for what a reward does beyond its spread.

B completions in all, G of each question, neighbours in the batch.
"""

import torch


def permuted_within_groups(rewards_B: torch.Tensor, group_size: int, seed: int) -> torch.Tensor:
    """(B,) rewards, each group's finite ones in an order drawn by `seed`; every order is as likely, the given one too.

    A group keeps its mean and spread, so its advantages keep their sizes. What is not finite stays in its place.
    """
    assert len(rewards_B) % group_size == 0, f"{len(rewards_B)} rewards in groups of {group_size}"
    generator = torch.Generator().manual_seed(seed)
    permuted_B = rewards_B.clone()
    for group_G in permuted_B.split(group_size):  # views: what is written to them is written to the copy
        places = torch.isfinite(group_G).nonzero().squeeze(1)
        order = torch.randperm(len(places), generator=generator).to(places.device)
        group_G[places] = group_G[places[order]]
    return permuted_B

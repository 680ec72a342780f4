"""A frozen student answers, for a reward: by the plain loop of `decoding.py`, on the model that reads for the reward.

An engine that holds the policy cannot serve for it, and a second one would need its own memory and a copy of weights
that are here already. The loop's cost: one pass over the prompts, then a pass over one token a row for each token of
the longest answer, all answers of a batch at once.
"""

from typing import Any

import torch

from rlt.generation.decoding import Stops, decode_many
from rlt.prompts.styles import ReasoningFormat
from rlt.schema import GeneratedRewardConfig
from rlt.wire.values import SamplingParams

TOKENS_AT_ONCE = 16384  # of a batch where no budget is given


def write_answers(
    model: Any,
    tokenizer: Any,
    style: ReasoningFormat,
    config: GeneratedRewardConfig,
    prompts: list[list[int]],
    seeds: list[list[int]],
    token_budget: int | None,
) -> list[list[list[int]]]:
    """Token ids of each prompt's answers, one for each of its seeds: up to the solution's end tag, the model's own end,
    or `answers_max_length`.

    Args:
        model: frozen; adapters and dropout are as its caller has set them, but it reads in evaluation mode.
        seeds: with the same seeds it writes the same, but for the rounding of other batches.
    """
    if not prompts:
        return []
    params = SamplingParams(temperature=config.answers_temperature)
    stops = Stops([style.solution_tags[1]], [], tokenizer)
    stops.tokens = ends_of(model, tokenizer)
    generators = [[torch.Generator().manual_seed(seed) for seed in some] for some in seeds]
    trained = model.training
    model.eval()  # dropout, and checkpointing, which knows no cache
    try:
        drawn = decode_many(
            model, prompts, generators, params, stops, config.answers_max_length, token_budget or TOKENS_AT_ONCE
        )
    finally:
        model.train(trained)
    return [[answer.tokens for answer in some] for some in drawn]


def ends_of(model: Any, tokenizer: Any) -> set[int]:
    """The tokens with which a model ends a text."""
    own = model.generation_config.eos_token_id
    return {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}

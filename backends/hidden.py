"""What a model makes of a text before it predicts anything: the mean of its last hidden states."""

from collections.abc import Sequence
from typing import Any

import torch

from rlt.errors import Refused


@torch.no_grad()
def mean_hidden_states(model: Any, sequences: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """(H,) float32 on the CPU for each sequence; with the adapter that is active. One is read at a time: none pads.

    Raises:
        Refused: tokens that the model does not know, or more than it reads.
    """
    config = model.config.get_text_config()
    for ids in sequences:
        if not ids or not 0 <= min(ids) <= max(ids) < config.vocab_size:
            raise Refused(f"tokens must be from 0 to {config.vocab_size - 1}, and at least one")
        if len(ids) > config.max_position_embeddings:
            raise Refused(f"{len(ids)} tokens are more than the {config.max_position_embeddings} that the model reads")
    body = (model.get_base_model() if hasattr(model, "peft_config") else model).base_model
    training = body.training
    body.eval()
    try:
        found = [body(input_ids=torch.tensor([list(ids)], device=model.device), use_cache=False) for ids in sequences]
    finally:
        body.train(training)
    return [each.last_hidden_state[0].float().mean(0).cpu() for each in found]

"""Completions drawn with a copy of a model, beside its training: plain, for services that have no engine.

Engines are rlt/generation's; they are an order of magnitude faster, and know stop texts and many prompts at once.
"""

from dataclasses import dataclass
from typing import Any

import torch

from backends.create import load_hf_model
from backends.state import load_full_weights
from rlt.errors import Refused


@dataclass(frozen=True)
class Sample:
    """One completion: its tokens, the end token included, and the log-prob of each as it was drawn."""

    tokens: list[int]
    logprobs: list[float]


class Sampler:
    """
    Args:
        model_name, dtype, device: as of `load_hf_model`.
    """

    def __init__(self, model_name: str, dtype: str = "float32", device: str = "auto"):
        self.model = load_hf_model(model_name, dtype, device, attn_implementation="sdpa").eval()
        end = self.model.generation_config.eos_token_id
        self.ends = set(end if isinstance(end, list) else [] if end is None else [end])

    def load_weights(self, weights: dict[str, torch.Tensor]) -> None:
        load_full_weights(self.model, weights)

    @torch.no_grad()
    def sample(
        self, prompt: list[int], count: int = 1, max_tokens: int = 128, temperature: float = 1.0, seed: int = 0
    ) -> list[Sample]:
        """The same for the same seed and weights."""
        if not prompt or count < 1 or max_tokens < 1 or temperature <= 0:
            raise Refused("a prompt of tokens, count and max_tokens of 1 or more and a temperature above 0 would do")
        device = next(self.model.parameters()).device
        drawing, read, cache = torch.Generator(device).manual_seed(seed), torch.tensor([prompt] * count), None
        found: list[tuple[list[int], list[float]]] = [([], []) for _ in range(count)]
        for _ in range(max_tokens):
            output: Any = self.model(input_ids=read.to(device), past_key_values=cache, use_cache=True)
            cache, rows = output.past_key_values, torch.log_softmax(output.logits[:, -1].float() / temperature, -1)
            read = torch.multinomial(rows.exp(), 1, generator=drawing)
            for (tokens, log_probs), token, row in zip(found, read[:, 0].tolist(), rows, strict=True):
                if not tokens or tokens[-1] not in self.ends:
                    tokens.append(token)
                    log_probs.append(row[token].item())
            if all(tokens[-1] in self.ends for tokens, _ in found):
                break
        return [Sample(tokens, log_probs) for tokens, log_probs in found]

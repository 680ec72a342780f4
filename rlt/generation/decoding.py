"""Completions by a plain loop over a Hugging Face model and its cache: where there is no vLLM, and to the digit.

S samples, of P prompts with N tokens, V vocabulary, k best tokens of a position.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from rlt.errors import Refused
from rlt.logprobs.head import best_tokens
from rlt.logprobs.packing import batch_sequences
from rlt.wire.values import SamplingParams

BYTES_OF_A_LETTER = 4  # at most, and a token has one byte at least


@dataclass
class Drawn:
    """A completion.

    Attributes:
        tokens: the one that ended it included.
        best: at each of them, the k likeliest and their log-probs.
    """

    tokens: list[int] = field(default_factory=list)
    stopped: bool = False
    best: list[tuple[list[int], list[float]]] = field(default_factory=list)


class Stops:
    """What ends a completion: tokens, or texts once a token completes one.

    Args:
        stop: as of `SamplingParams`.
        own: the model's tokens that end a text, for a stop of None.
        tokenizer: for texts.
    """

    def __init__(self, stop: str | list[str] | list[int] | None, own: Sequence[int], tokenizer: Any):
        given = list(own) if stop is None else [stop] if isinstance(stop, str) else stop
        self.tokens = {each for each in given if isinstance(each, int)}
        self.texts = [each for each in given if isinstance(each, str)]
        if not all(self.texts):
            raise Refused("stop holds an empty text, which every text has: leave it out")
        self.tokenizer = tokenizer
        self._tail = max((len(text.encode()) for text in self.texts), default=0) + BYTES_OF_A_LETTER

    def reached(self, tokens: list[int]) -> bool:
        """With the last token; it was not before."""
        if tokens[-1] in self.tokens:
            return True
        if not self.texts:
            return False
        end = self.tokenizer.decode(tokens[-self._tail :], clean_up_tokenization_spaces=False)
        return any(text in end for text in self.texts)


@torch.no_grad()
def decode(
    model: Any,
    prompt: Sequence[int],
    generators: Sequence[torch.Generator],
    params: SamplingParams,
    stops: Stops,
    most: int,
    best: int = 0,
) -> list[Drawn]:
    """A completion for each generator, of `most` tokens at most, all in one batch whose prompt is read once."""
    ids_1N = torch.tensor([list(prompt)], device=model.device)
    read = model(input_ids=ids_1N, use_cache=True, logits_to_keep=1)
    cache = read.past_key_values
    cache.batch_repeat_interleave(len(generators))
    logits_SV = read.logits[:, -1].expand(len(generators), -1)
    drawn, going = [Drawn() for _ in generators], list(range(len(generators)))
    for number in range(most):
        tokens_S = draw(logits_SV, [generators[each] for each in going], params)
        _note(drawn, going, tokens_S, logits_SV, stops, best)
        kept = [row for row, each in enumerate(going) if not drawn[each].stopped]
        if not kept or number + 1 == most:
            break
        if len(kept) < len(going):
            cache.batch_select_indices(torch.tensor(kept, device=model.device))
        going = [going[row] for row in kept]
        logits_SV = model(input_ids=tokens_S[kept].unsqueeze(1), past_key_values=cache, use_cache=True).logits[:, -1]
    return drawn


@torch.no_grad()
def decode_many(
    model: Any,
    prompts: Sequence[Sequence[int]],
    generators: Sequence[Sequence[torch.Generator]],
    params: SamplingParams,
    stops: Stops,
    most: int,
    token_budget: int,
) -> list[list[Drawn]]:
    """Completions of many prompts, as many of each as it has generators (the same number everywhere).

    Prompts of like length share a batch, padded on the left; each is read once. A batch holds at most `token_budget`
    tokens, its completions and padding included, or one prompt.
    """
    drawn: list[list[Drawn]] = [[] for _ in prompts]
    sizes = [range(len(each) * (len(prompt) + most)) for prompt, each in zip(prompts, generators, strict=True)]
    for batch in batch_sequences([list(size) for size in sizes], list(range(len(prompts))), token_budget):
        some, own = [prompts[member] for member in batch], [generators[member] for member in batch]
        for member, found in zip(batch, _decode_batch(model, some, own, params, stops, most), strict=True):
            drawn[member] = found
    return drawn


def _decode_batch(model, prompts, generators, params: SamplingParams, stops: Stops, most: int) -> list[list[Drawn]]:
    count, width = len(generators[0]), max(map(len, prompts))
    ids_PN = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=model.device)
    mask_PN = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    places_PN = (mask_PN.cumsum(-1) - 1).clamp(min=0)
    read = model(input_ids=ids_PN, attention_mask=mask_PN, position_ids=places_PN, use_cache=True, logits_to_keep=1)
    cache = read.past_key_values
    cache.batch_repeat_interleave(count)
    logits_SV = read.logits[:, -1].repeat_interleave(count, dim=0)
    mask_SN = mask_PN.repeat_interleave(count, dim=0)
    own = [generator for some in generators for generator in some]
    drawn, going = [Drawn() for _ in own], list(range(len(own)))
    for number in range(most):
        tokens_S = draw(logits_SV, [own[each] for each in going], params)
        _note(drawn, going, tokens_S, logits_SV, stops, 0)
        kept = [row for row, each in enumerate(going) if not drawn[each].stopped]
        if not kept or number + 1 == most:
            break
        if len(kept) < len(going):
            rows = torch.tensor(kept, device=model.device)
            cache.batch_select_indices(rows)
            mask_SN, tokens_S = mask_SN[rows], tokens_S[rows]
        going = [going[row] for row in kept]
        mask_SN = torch.nn.functional.pad(mask_SN, (0, 1), value=1)
        asked = {"attention_mask": mask_SN, "position_ids": mask_SN.sum(-1, keepdim=True) - 1}
        logits_SV = model(input_ids=tokens_S[:, None], past_key_values=cache, use_cache=True, **asked).logits[:, -1]
    return [drawn[first : first + count] for first in range(0, len(drawn), count)]


def _note(drawn: list[Drawn], going: list[int], tokens_S, logits_SV, stops: Stops, best: int) -> None:
    likeliest = best_tokens(logits_SV, best) if best else None
    for row, (each, token) in enumerate(zip(going, tokens_S.tolist(), strict=True)):
        drawn[each].tokens.append(token)
        drawn[each].stopped = stops.reached(drawn[each].tokens)
        if likeliest is not None:
            drawn[each].best.append((likeliest[0][row].tolist(), likeliest[1][row].tolist()))


def draw(logits_SV: torch.Tensor, generators: Sequence[torch.Generator], params: SamplingParams) -> torch.Tensor:
    """A token for each row, by one number of its own generator (inverse transform sampling); temperature 0: the best.

    The temperature comes first, then the k best stay, then the likeliest that together have `top_p`.
    """
    if params.temperature == 0:
        return logits_SV.argmax(dim=-1)
    logits_SV = logits_SV.double() / params.temperature
    if 0 < params.top_k < logits_SV.shape[1]:
        least = logits_SV.topk(params.top_k).values[:, -1:]
        logits_SV = logits_SV.masked_fill(logits_SV < least, -torch.inf)
    shares_SV = logits_SV.softmax(dim=-1)
    if params.top_p < 1:
        sorted_SV, order_SV = shares_SV.sort(dim=-1, descending=True, stable=True)
        beyond = sorted_SV.cumsum(dim=-1) - sorted_SV >= params.top_p
        shares_SV = shares_SV.masked_fill(torch.zeros_like(beyond).scatter(1, order_SV, beyond), 0.0)
    sums_SV = shares_SV.cumsum(dim=-1)
    numbers = [torch.rand((), generator=each, dtype=torch.float64).item() for each in generators]
    last_S = sums_SV[:, -1]
    wanted_S = torch.tensor(numbers, dtype=torch.float64, device=sums_SV.device) * last_S
    inside_S = torch.minimum(wanted_S, last_S.nextafter(torch.zeros_like(last_S)))  # where rounding took it to the end
    return torch.searchsorted(sums_SV, inside_S.unsqueeze(1), right=True).squeeze(1)

"""Log-probabilities of tokens under a causal model: policy, reference, student and teacher all come through here.

Packed rows (packing.py) go through the model's trunk; the head (head.py) runs on the positions that count.
B rows of a batch (1 when prefixes are shared), T tokens of a row, H hidden size, N log-probs that are computed.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from itertools import groupby
from operator import itemgetter
from typing import Literal, Protocol, TypeVar

import torch
from transformers import PreTrainedModel
from trl.models.utils import _ForwardRedirection

from rlt.logprobs.divergence import Divergence, TeacherHead, head_divergences
from rlt.logprobs.head import head_best_tokens, head_log_probs
from rlt.logprobs.packing import batch_sequences, fill_rows, lay_out, pad_batch
from rlt.models.recurrent import let_recurrent_layers_read_rows
from rlt.models.sharing import Reading, way_of_reading

Value = TypeVar("Value")
LogProbs = tuple[list[torch.Tensor], list[torch.Tensor]]  # and entropies, one tensor a sequence

logger = logging.getLogger("rlt")


class Guard(Protocol):
    """What looks after passes that may run out of memory (rlt/survival/oom.py)."""

    def plan(self, passes: list[tuple[int, int]]) -> None: ...
    def begin(self, number: int) -> None: ...
    def enter(self) -> None: ...
    def leave(self) -> None: ...
    def __call__(self, part: Callable[[], Value]) -> Value | None: ...


def _causal_model(model) -> PreTrainedModel:
    """The Hugging Face model inside an adapter (whose layers stay active)."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@cache
def _say_how_it_reads(name: str, reading: Reading) -> None:
    if reading.way == "rows":
        logger.warning(
            "%s (%s) cannot share the prompt of completions: each is read with a prompt of its own",
            name,
            reading.reason,
        )
    elif reading.reason:
        logger.info("%s shares the prompt of completions in part: %s", name, reading.reason)


def _forwards(causal, sequences, counted, token_budget: int, device) -> Iterator[tuple[dict, list, list]]:
    """Model inputs of each forward pass, its members, and (row, position, member, index) of each token that counts.

    A sequence is read up to the token before its last counted one; its later tokens are left out.
    """
    read = [ids[: max(where, default=0)] for ids, where in zip(sequences, counted, strict=True)]
    asked = [member for member, where in enumerate(counted) if where]
    reading = way_of_reading(causal)
    _say_how_it_reads(type(causal).__name__, reading)
    if reading.way == "tree and rows":
        let_recurrent_layers_read_rows(causal)
    if reading.way != "rows":
        for row in fill_rows(read, asked, token_budget, whole=reading.way == "tree and rows"):
            inputs, places = lay_out(row, read, counted, device)
            named = [(member, i) for member in row.members for i in counted[member]]
            yield inputs, row.members, [(0, place, *name) for place, name in zip(places, named, strict=True)]
        return
    for batch in batch_sequences(read, asked, token_budget):
        wanted = [(row, i - 1, member, i) for row, member in enumerate(batch) for i in counted[member]]
        yield pad_batch(batch, read, device), batch, wanted


def token_log_probs(
    model,
    sequences: list[list[int]],
    counted: list[list[int]],
    *,
    targets: Sequence[Sequence] | None = None,
    temperature: float | Sequence[float] = 1.0,
    token_budget: int | None,
    autocast: AbstractContextManager | None = None,
    entropy: Literal["none", "value", "with_grad", "rank"] = "none",
    agree_on_forwards: Callable[[int], int] | None = None,
    guard: Guard | None = None,
) -> LogProbs:
    """Log-probs of the counted tokens of each sequence; what several begin with is computed once.

    Args:
        model: a Hugging Face causal model, or a PEFT model around one; unwrapped. Prefixes are shared when it was
            loaded with `shared_prefix` attention and its layers can read so (models/sharing.py); else rows are padded.
        sequences: token ids, one list per sequence.
        counted: indices of the tokens wanted, per sequence; index 0 has no log-prob.
        targets: whose log-probs are wanted at each counted index, in place of the sequence's own token there: a token,
            or K tokens (the same K everywhere). With them an index may be the sequence's length: what comes next.
        temperature: the logits are divided by it; one for all, or one per sequence.
        token_budget: most tokens of one forward pass, padding included; a longer single sequence passes alone. None:
            as many as the longest sequence has.
        autocast: context of the forward pass.
        entropy: whether to compute entropies, and whether gradients flow through them; "rank": ranks of the tokens in
            their place, 1 for the likeliest, from the same pass.
        agree_on_forwards: from this rank's number of forward passes to the number of all; for sharded models, whose
            passes are collective. Passes that are lacking are made on one token and count for nothing.
        guard: is told of the passes. Of a sharded model it also keeps this rank in step with the others: where a pass
            runs out of memory before or after its collective part, that and all later ones are made for nothing, and
            so are the values returned.

    Returns:
        Two lists with one float32 tensor (len(counted[i]),) per sequence: log-probs (of K targets, with K columns), and
        entropies in nats (zeros unless asked for), or ranks. Gradients flow when enabled.
    """
    beyond = targets is not None  # what comes after a sequence is no token of it
    assert all(0 < i < len(ids) + beyond for ids, where in zip(sequences, counted, strict=True) for i in where), (
        "index out of text"
    )
    causal = _causal_model(model)
    tokens = sequences if targets is None else _targets_by_index(counted, targets)
    temperatures = [temperature] * len(sequences) if isinstance(temperature, float | int) else temperature

    def read(wanted: list, hidden_BTH) -> list[torch.Tensor]:
        return _counted_log_probs(causal, wanted, tokens, temperatures, entropy, hidden_BTH)

    return _over_passes(causal, sequences, counted, read, token_budget, autocast, agree_on_forwards, guard)


def token_hidden_states(
    model,
    sequences: list[list[int]],
    counted: list[list[int]],
    *,
    token_budget: int | None,
    autocast: AbstractContextManager | None = None,
    agree_on_forwards: Callable[[int], int] | None = None,
    guard: Guard | None = None,
) -> LogProbs:
    """What a model's head would read for the counted tokens; arguments as of `token_log_probs`.

    Returns:
        One tensor (len(counted[i]) * H,) per sequence, flat as log-probs are; and empty ones in the entropies' place.
    """

    def read(wanted: list, hidden_BTH) -> list[torch.Tensor]:
        places = [row * hidden_BTH.shape[1] + at for row, at, *_ in wanted]
        hidden_NH = _chosen(hidden_BTH.flatten(0, 1), places)
        return [hidden_NH, hidden_NH.new_zeros(len(hidden_NH))]

    causal = _causal_model(model)
    states, _ = _over_passes(causal, sequences, counted, read, token_budget, autocast, agree_on_forwards, guard)
    return [values.flatten() for values in states], [values.new_zeros(0) for values in states]


def token_divergences(
    model,
    sequences: list[list[int]],
    counted: list[list[int]],
    *,
    against: Sequence[torch.Tensor],
    teacher: TeacherHead | None,
    divergence: Divergence,
    certain: int = 0,
    token_budget: int | None,
    autocast: AbstractContextManager | None = None,
    agree_on_forwards: Callable[[int], int] | None = None,
    guard: Guard | None = None,
) -> LogProbs:
    """Divergences of a student's next-token distributions from a teacher's, before each counted token.

    Args:
        against: the teacher's hidden states (n, G) for n of the counted tokens, behind whatever it has read. At the
            first `certain` ones, and at all behind those n, the teacher is certain of the sequence's own token: the
            divergence of the student (the forward KL, whichever is asked for) is minus its log-prob of that token.
        teacher: whose head reads those; None: the model's own.
        other arguments: as of `token_log_probs`.

    Returns:
        Two lists with one tensor (len(counted[i]),) per sequence: divergences, with gradients, and entropies of the
        student (0 where the teacher is certain), without.
    """
    causal = _causal_model(model)
    numbers = [{i: number for number, i in enumerate(where)} for where in counted]

    def read(wanted: list, hidden_BTH) -> list[torch.Tensor]:
        hidden_NH = _chosen(hidden_BTH.flatten(0, 1), [row * hidden_BTH.shape[1] + at for row, at, *_ in wanted])
        places = [(member, numbers[member][i] - certain) for *_, member, i in wanted]
        asked = [n for n, (member, number) in enumerate(places) if 0 <= number < len(against[member])]
        known = sorted(set(range(len(wanted))) - set(asked))
        of_teacher = [against[member][number] for member, number in (places[n] for n in asked)]
        tokens = [sequences[wanted[n][2]][wanted[n][3]] for n in known]
        parts = [hidden_NH.new_zeros(2, 0, dtype=torch.promote_types(hidden_NH.dtype, torch.float32))]
        if asked:
            states_NG = torch.stack(of_teacher).to(hidden_NH.device)
            found = head_divergences(causal, _chosen(hidden_NH, asked), teacher, states_NG, divergence)
            parts.append(torch.stack(found))
        if known:
            targets_N = torch.tensor(tokens, device=hidden_NH.device)
            log_probs_N, none_N = head_log_probs(
                causal, _chosen(hidden_NH, known), targets_N, divergence.temperature, "none"
            )
            parts.append(torch.stack([-log_probs_N, none_N]))
        order = sorted(range(len(wanted)), key=[*asked, *known].__getitem__)
        return [_chosen(values, order) for values in torch.cat(parts, dim=1)]

    return _over_passes(causal, sequences, counted, read, token_budget, autocast, agree_on_forwards, guard)


def _over_passes(
    causal,
    sequences: list[list[int]],
    counted: list[list[int]],
    read: Callable[[list, torch.Tensor], list[torch.Tensor]],
    token_budget: int | None,
    autocast: AbstractContextManager | None,
    agree_on_forwards: Callable[[int], int] | None,
    guard: Guard | None,
) -> LogProbs:
    """Two lists with what `read` makes of the wanted (row, position, member, index) and a pass's hidden states."""
    device = next(causal.get_input_embeddings().parameters()).device
    firsts: list[torch.Tensor] = [torch.zeros(0, device=device) for _ in sequences]
    seconds = list(firsts)
    token_budget = token_budget or max(map(len, sequences), default=1)
    forwards = list(_forwards(causal, sequences, counted, token_budget, device))
    if guard is not None:
        guard.plan([(inputs["input_ids"].numel(), len(members)) for inputs, members, _ in forwards])
    count = max(len(forwards), 1)  # where nothing counts, gradients still reach every parameter
    count = agree_on_forwards(count) if agree_on_forwards else count
    keep_up = guard if agree_on_forwards else None
    with autocast or nullcontext():
        for number, (inputs, members, wanted) in enumerate(forwards):
            if guard is not None:
                guard.begin(number)
            flat = _one_pass(causal, inputs, partial(read, wanted), keep_up)
            if flat is None:
                count += len(forwards) - number - 1  # each of which is made for nothing
                firsts, seconds = ([values.new_zeros(0) for values in firsts] for _ in range(2))
                break
            sizes = [len(counted[member]) for member in members]
            for store, values in zip((firsts, seconds), flat, strict=True):
                for member, part in zip(members, values.split(sizes), strict=True):
                    store[member] = part.clone()  # FSDP2 warns of views that leave a forward pass
        for _ in range(count - len(forwards)):
            nothing = _pass_for_nothing(causal, device)
            firsts = [values + nothing for values in firsts]
    return firsts, seconds


@torch.no_grad()
def best_next_tokens(model, ids: list[int], k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What a model holds likeliest behind each token of one sequence: ids and log-probs (N, k), the likeliest first."""
    causal = _causal_model(model)
    device = next(causal.get_input_embeddings().parameters()).device
    hidden_1NH = causal.base_model(input_ids=torch.tensor([ids], device=device), use_cache=False).last_hidden_state
    return head_best_tokens(causal, hidden_1NH[0], k)


def _targets_by_index(counted: list[list[int]], targets: Sequence[Sequence]) -> list[dict]:
    """For each sequence, the token at each counted index, or the K tokens as a tuple."""
    pairs = [zip(where, asked, strict=True) for where, asked in zip(counted, targets, strict=True)]
    return [{i: token if isinstance(token, int) else tuple(token) for i, token in some} for some in pairs]


def _one_pass(causal, inputs: dict, read: Callable, guard: Guard | None) -> list[torch.Tensor] | None:
    """What `read` makes of a pass's hidden states; None where it ran out of memory, and has kept up with the others."""
    if guard is None:
        return _with_whole_head(causal, read, causal.base_model(**inputs, use_cache=False).last_hidden_state)
    hidden_BTH = guard(partial(_collective_trunk, causal, inputs, guard))
    if hidden_BTH is None:
        _pass_for_nothing(causal, inputs["input_ids"].device)
        return None
    # Caught inside the head's call, whose end gives back what ZeRO-3 has gathered for it.
    return _with_whole_head(causal, lambda hidden: guard(partial(read, hidden)), hidden_BTH)


def _collective_trunk(causal, inputs: dict, guard: Guard) -> torch.Tensor:
    """Hidden states; from the first layer to the last, other ranks wait for this one."""
    entered = causal.get_input_embeddings().register_forward_pre_hook(lambda *_: guard.enter(), prepend=True)
    try:
        hidden_BTH = causal.base_model(**inputs, use_cache=False).last_hidden_state
    finally:
        entered.remove()
    guard.leave()
    return hidden_BTH


def pass_members(model, sequences: list[list[int]], counted: list[list[int]], token_budget: int) -> list[list[int]]:
    """Which sequences each pass of `token_log_probs` reads; every pass alone reads them at once, too."""
    causal = _causal_model(model)
    return [members for _, members, _ in _forwards(causal, sequences, counted, token_budget, torch.device("cpu"))]


def _with_whole_head(causal, read: Callable, hidden_BTH) -> list[torch.Tensor] | None:
    """`read` of the hidden states, with a head that is whole.

    ZeRO-3 gathers the head at each call of it, together with all ranks: every rank calls it once a pass, however many
    tokens count on this rank. The call returns one tensor, as the head's own does in a pass for nothing.
    """
    head = causal.get_output_embeddings()
    if not (type(head) is torch.nn.Linear and hasattr(head.weight, "ds_id")):
        return read(hidden_BTH)

    shapes: list[torch.Size] = []

    def flat(hidden_BTH) -> torch.Tensor | None:
        values = read(hidden_BTH)
        if values is None:
            return None
        shapes.extend(value.shape for value in values)  # with K targets, log-probs have columns and entropies have none
        return torch.cat([value.flatten() for value in values])

    values = _ForwardRedirection()(head, head, flat, hidden_BTH)
    if values is None:
        return None
    parts = values.split([shape.numel() for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def _counted_log_probs(causal, wanted, tokens, temperatures, entropy, hidden_BTH) -> list[torch.Tensor]:
    """Log-probs and entropies of the wanted (row, position, member, index), in their order: of `tokens[member][index]`.

    A log-prob that several members want of a shared token is computed once.
    """
    wanted = [(temperatures[member], row, at, tokens[member][i]) for row, at, member, i in wanted]
    distinct = sorted(dict.fromkeys(wanted), key=itemgetter(0))
    numbers = {one: number for number, one in enumerate(distinct)}
    parts = []
    for temperature, some in groupby(distinct, key=itemgetter(0)):
        _, rows, positions, targets = zip(*some, strict=True)
        targets_N = torch.tensor(targets, device=hidden_BTH.device)
        places = [row * hidden_BTH.shape[1] + at for row, at in zip(rows, positions, strict=True)]
        hidden_NH = _chosen(hidden_BTH.flatten(0, 1), places)
        parts.append(head_log_probs(causal, hidden_NH, targets_N, temperature, entropy))
    order = [numbers[one] for one in wanted]
    return [_chosen(torch.cat(values), order) for values in zip(*parts, strict=True)]


def _chosen(values: torch.Tensor, places: list[int]) -> torch.Tensor:
    """`values[places]`, with gradients that are the same each time: a place that is named twice gets the sum of two,
    which the backward pass of plain indexing adds up in whatever order its threads come."""
    return values.index_select(0, torch.tensor(places, device=values.device, dtype=torch.long))


def _pass_for_nothing(causal, device) -> torch.Tensor:
    """Zero, by way of a whole forward pass over one token."""
    hidden_1TH = causal.base_model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device), use_cache=False)
    return causal.get_output_embeddings()(hidden_1TH.last_hidden_state).float().sum() * 0.0

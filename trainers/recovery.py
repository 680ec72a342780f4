"""An update that runs out of memory is repeated in smaller passes, and has the same gradients (rlt/survival/oom.py).

As configured, all passes of a micro-batch are made first and their activations kept until its loss is known. When they
do not fit, each pass is made twice: once without gradients, for the log-probs that the loss is of; and once more with
them, one pass after the other, going back from it at once with the loss's gradients for its log-probs (gradient
caching, arXiv 2101.06983). So the loss stays the trainer's own, of the whole micro-batch, whatever its denominators
are; the sum over passes of the chain rule is its gradient. One pass's activations are held at a time.

Gradients of earlier micro-batches are mixed with those of a backward pass that broke off: the optimizer step begins
anew, with its first micro-batch. Random generators are set back to where they were before the micro-batch at hand, and
dropout in smaller passes is seeded by its place in the run; without dropout the repeated gradients are the undisturbed
ones, with it they are those of other masks.

Under ZeRO-3 and FSDP2 a pass is collective from the first layer to the last, and so is going back from it. Out of
memory before, between and after, ranks stay in step; out of memory within, the run ends with one line.

Left out: optimizers whose backward pass is their step (LOMO), which nothing undoes; out of memory in one, the run ends
with one line.
"""

from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import transformers
from accelerate.utils import gather
from accelerate.utils.memory import clear_device_cache

from backends.collective import agree_on_forwards, inside_forward, is_sharded
from backends.updates import add_gradients, give_up_gradients, held_back, share_gradients
from rlt.generation.seeds import request_seed
from rlt.logprobs import LogProbs, pass_members, token_log_probs
from rlt.survival.oom import NoMemoryLeft, Shortage, TokenBudget, Watch, is_out_of_memory, peak_gib, repeat_smaller
from rlt.survival.random_state import random_state, set_random_state

UPDATE_REMEDY = (
    "lower max_prompt_length, max_completion_length or max_length, or set gradient_checkpointing=true, use_peft=true, "
    "or share the model between several GPUs (zero3, fsdp)"
)
FIXED_REMEDY = f"lower logprob_token_budget or per_device_train_batch_size, {UPDATE_REMEDY}"
SCORING_REMEDY = "lower max_prompt_length or max_completion_length, or set offload_untrained_models=true"

ENTROPY_CONTROL = ("_entropy_window_stats", "entropy_coef", "_last_world_entropy")  # of TRL's adaptive bonus


@contextmanager
def _seeded(seed: int, devices: list[torch.device]):
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


class Said(NamedTuple):
    """How many figures there are under each name, and what of the trainer's own state a loss moves."""

    counts: dict[str, int]
    control: dict[str, Any]


class MicroBatch(NamedTuple):
    inputs: Any
    num_items: Any
    random: tuple[Any, ...]  # states of random generators before it


@dataclass
class PassByPass:
    """What is read again once the loss's gradients for it are known.

    Attributes:
        groups: of each pass, the numbers of its members; without any, it is made for nothing.
        read: the values of a pass, with gradients if they are enabled.
        leaves: the values of all members as the loss has them, by kind (log-probs, entropies).
    """

    groups: list[list[int]]
    read: Callable[[int], LogProbs]
    leaves: LogProbs

    def pull(self, number: int, values: LogProbs) -> torch.Tensor:
        """A scalar that has the loss's gradients, as far as they come through one pass."""
        if not self.groups[number]:
            return values[0][0].sum()
        pulled = [
            (value * leaf.grad).sum()
            for kind, leaves in zip(values, self.leaves, strict=True)
            for value, leaf in zip(kind, (leaves[member] for member in self.groups[number]), strict=True)
            if value.requires_grad and leaf.grad is not None
        ]
        return torch.stack(pulled).sum()


class RecoversMemory(transformers.Trainer):
    """Mixed in behind TRL's trainer, whose `training_step` goes on here instead of in transformers."""

    args: Any
    optimizer: Any

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        budget = getattr(self.args, "logprob_token_budget", None)
        self._update_budget = TokenBudget(budget, UPDATE_REMEDY)
        self._scoring_budget = TokenBudget(budget, SCORING_REMEDY)
        self._step_batches: list[MicroBatch] = []  # of this optimizer step, up to the one at hand
        self._with_gradients = 0  # how many of them are in the gradients
        self._watch: Watch | None = None
        self._by_pass: PassByPass | None = None
        self._place = (0, 0)  # optimizer step and micro-batch

    # A micro-batch

    def training_step(self, model, inputs, num_items_in_batch=None):
        # Overridden because transformers goes forward, back and (under DeepSpeed) on to the optimizer in one.
        if self._is_one_with_its_step():
            return self._fixed_training_step(model, inputs, num_items_in_batch)
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()
        self._step_batches.append(MicroBatch(self._prepare_inputs(inputs), num_items_in_batch, random_state()))
        said = self._said_so_far()

        def start_again():
            give_up_gradients(model)
            self._with_gradients = 0
            self._unsay(said)
            set_random_state(self._step_batches[-1].random)

        attempt = partial(self._add_missing_gradients, model)
        loss = repeat_smaller(self._update_budget, attempt, start_again, self._agree())
        self._with_gradients = len(self._step_batches)
        if self.accelerator.sync_gradients:
            share_gradients(model)
            self._step_batches, self._with_gradients = [], 0
            self._update_budget.step_done()
            self._scoring_budget.step_done()
        return loss

    def _is_one_with_its_step(self) -> bool:
        """Whether a backward pass is the optimizer's step too, which nothing undoes."""
        return self.accelerator.has_lomo_optimizer

    def _fixed_training_step(self, model, inputs, num_items) -> torch.Tensor:
        try:
            return super().training_step(model, inputs, num_items)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise NoMemoryLeft(
                f"out of memory in a step that cannot be repeated ({peak_gib():.2f} GiB held at most): {FIXED_REMEDY}"
            ) from error

    def _add_missing_gradients(self, model, watch: Watch) -> torch.Tensor:
        """The loss of the micro-batch at hand; after a new beginning, earlier ones of the step come first."""
        state, last = self.accelerator.gradient_state, len(self._step_batches) - 1
        ends_step = state.sync_gradients
        for number in range(self._with_gradients, last):
            said = self._said_so_far()
            state._set_sync_gradients(False)
            try:
                self._add_gradients(model, number, False, watch)
            finally:
                state._set_sync_gradients(ends_step)
            self._unsay(said)  # it was said when the micro-batch was at hand
        return self._add_gradients(model, last, ends_step, watch)

    def _add_gradients(self, model, number: int, ends_step: bool, watch: Watch) -> torch.Tensor:
        batch = self._step_batches[number]
        self._watch, self._by_pass, self._place = watch, None, (self.state.global_step, number)
        try:
            with held_back(model):
                dropout = self._dropout() if self._update_budget.lowered else nullcontext()
                with dropout, self.compute_loss_context_manager():
                    loss: Any = self.compute_loss(model, batch.inputs, num_items_in_batch=batch.num_items)
                if (not self.model_accepts_loss_kwargs or batch.num_items is None) and self.compute_loss_func is None:
                    loss = loss / self.current_gradient_accumulation_steps
                watch.meet()
                every = self.args.torch_empty_cache_steps
                if every is not None and self.state.global_step % every == 0:
                    clear_device_cache()
                if self._by_pass is None:
                    self._go_back(loss, ends_step)
                else:
                    loss.backward()  # as far as the log-probs
                    self._go_back_by_pass(self._by_pass, ends_step)
        finally:
            self._watch = self._by_pass = None
        return loss.detach()

    def _go_back(self, loss: torch.Tensor, last: bool) -> None:
        watch: Any = self._watch
        if is_sharded(self.accelerator):
            watch.enter()
        add_gradients(self.accelerator, loss, last)
        watch.leave()

    def _go_back_by_pass(self, passes: PassByPass, ends_step: bool) -> None:
        watch: Any = self._watch
        for number in range(len(passes.groups)):
            values = passes.read(number)
            if is_sharded(self.accelerator):
                watch.meet()
            self._go_back(passes.pull(number, values), ends_step and number == len(passes.groups) - 1)
            del values
            if is_sharded(self.accelerator):
                watch.meet()

    # Log-probs

    def _read(self, model, inner, sequences: list[list[int]], counted: list[list[int]], **how) -> LogProbs:
        """`token_log_probs` of sequences under a model.

        Args:
            model: as it was wrapped.
            inner: what is wrapped.
            how: `sharded`: whether the model's passes are collective; `reads`: another function of rlt/logprobs than
                `token_log_probs`; what that function takes (`against` has a value for each sequence).
        """
        if self._is_one_with_its_step():
            budget = self.args.logprob_token_budget
            compute = partial(self._compute, inner, sequences, counted, budget, None, **how)
            return inside_forward(model, inner, how["sharded"], compute)
        if self._watch is None or not torch.is_grad_enabled():
            return self._read_for_scores(model, inner, sequences, counted, **how)
        if self._update_budget.lowered:
            return self._read_by_pass(model, inner, sequences, counted, **how)
        values = self._read_at_once(model, inner, sequences, counted, self._update_budget, self._watch, **how)
        self._watch.meet()
        return values

    def _read_at_once(self, model, inner, sequences, counted, budget: TokenBudget, watch: Watch, *, sharded, **how):
        compute = partial(self._compute, inner, sequences, counted, budget.tokens, watch, sharded=sharded, **how)
        if not sharded:
            return compute()
        return inside_forward(model, inner, True, compute)

    def _compute(
        self, inner, sequences, counted, tokens: int | None, watch: Watch | None, *, sharded: bool, reads=None, **how
    ):
        return (reads or token_log_probs)(
            inner,
            sequences,
            counted,
            token_budget=tokens,
            autocast=self.accelerator.autocast(),
            agree_on_forwards=agree_on_forwards(self.accelerator) if sharded else None,
            guard=watch,
            **how,
        )

    def _read_for_scores(self, model, inner, sequences, counted, *, sharded, **how) -> LogProbs:
        """Without gradients the passes themselves are repeated, inside the forward pass that sharding knows of."""

        def attempt(watch: Watch) -> LogProbs:
            tokens = self._scoring_budget.tokens
            return self._compute(inner, sequences, counted, tokens, watch, sharded=sharded, **how)

        agree = self._agree() if sharded else None
        compute = partial(repeat_smaller, self._scoring_budget, attempt, agree=agree)
        return inside_forward(model, inner, True, compute) if sharded else compute()

    def _read_by_pass(self, model, inner, sequences, counted, *, sharded, **how) -> LogProbs:
        """Log-probs that end the loss's graph; each pass is read again when it is gone back from."""
        watch: Any = self._watch
        assert self._update_budget.tokens is not None  # as it was lowered
        groups = pass_members(inner, sequences, counted, self._update_budget.tokens)
        count = max(len(groups), 1)
        agree = agree_on_forwards(self.accelerator) if sharded else None
        groups += [[]] * ((agree(count) if agree else count) - len(groups))

        def read(number: int) -> LogProbs:
            ids = [sequences[member] for member in groups[number]] or [[0]]
            where = [counted[member] for member in groups[number]] or [[]]
            own = {"against": [how["against"][member] for member in groups[number]]} if "against" in how else {}
            options = {"sharded": sharded, **how, **own}
            with self._dropout(number):
                return self._read_at_once(model, inner, ids, where, self._update_budget, watch, **options)

        device = self.accelerator.device
        nothing = torch.zeros(0, device=device)
        leaves: LogProbs = ([nothing] * len(sequences), [nothing] * len(sequences))
        with torch.no_grad():
            for number, group in enumerate(groups):
                values = read(number)
                if sharded:
                    watch.meet()
                for kind, found in zip(leaves, values, strict=True):
                    for member, value in zip(group, found, strict=False):
                        kind[member] = value
        watch.meet()
        for kind in leaves:
            for value in kind:
                value.requires_grad_()
        self._by_pass = PassByPass(groups, read, leaves)
        return leaves

    # What ranks tell each other, what is said, what is drawn

    def _agree(self):
        """See `Watch`; None with one rank."""
        if self.accelerator.num_processes == 1:
            return None

        def agree(mine: Shortage | None) -> Shortage | None:
            row = [0.0] * 4 if mine is None else [1.0, mine.tokens, mine.hopeless, mine.peak_gib]
            rows = gather(torch.tensor([row], dtype=torch.float64, device=self.accelerator.device))
            short = rows[rows[:, 0] > 0]
            if not len(short):
                return None
            hopeless = short[short[:, 2] > 0]
            worst = max((hopeless if len(hopeless) else short).tolist(), key=lambda row: row[1])
            return Shortage(int(worst[1]), bool(len(hopeless)), worst[3])

        return agree

    def _said_so_far(self) -> Said:
        """What a trainer of TRL has noted of this step."""
        counts = {name: len(values) for name, values in getattr(self, "_metrics", {}).get("train", {}).items()}
        return Said(counts, {name: vars(self)[name] for name in ENTROPY_CONTROL if name in vars(self)})

    def _unsay(self, said: Said) -> None:
        """Forget what was noted since."""
        for name, values in getattr(self, "_metrics", {}).get("train", {}).items():
            del values[said.counts.get(name, 0) :]
        vars(self).update(said.control)

    def _dropout(self, part: int | str = "whole"):
        """A context in which random numbers depend on the place in the run alone, and none are taken from outside."""
        device = self.accelerator.device
        seed = request_seed(self.args.seed, "update", *self._place, part, self.accelerator.process_index)
        return _seeded(seed, [device] if device.type == "cuda" else [])

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # Extended by how often memory ran out in this process, and what fits now.
        if "loss" in logs:
            logs["memory/recovered"] = self._update_budget.recovered + self._scoring_budget.recovered
            for name, budget in (("update", self._update_budget), ("scoring", self._scoring_budget)):
                if budget.tokens is not None:
                    logs[f"memory/{name}_tokens_per_pass"] = budget.tokens
        super().log(logs, start_time)

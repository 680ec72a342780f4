"""Pretraining on packed texts: what follows each token, with the model's own forward pass.

The model is called as transformers' models are, with positions that begin again at each sequence: its attention then
lets no sequence see another, and Liger, torch.compile and FP8 apply. SDPA, eager and FlexAttention make a mask of these
positions; FlashAttention reads lengths from them, but of a batch of one row alone, so it gets a micro-batch as one row.
What is added: a micro-batch that runs out of memory is repeated in smaller passes; the loss on held-out rows of each
source; tokens per second.
"""

import logging
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, set_seed
from transformers.utils.generic import is_flash_attention_requested

from backends.collective import is_sharded
from rlt.errors import Refused
from rlt.schema import PretrainSettings
from rlt.survival.kill_points import kill_point
from rlt.survival.oom import TokenBudget
from trainers.packed import IGNORED
from trainers.sft import SFTTrainer

REMEDY = (
    "lower per_device_train_batch_size, or max_length with the preparation's pack_length, or set "
    "gradient_checkpointing=true"
)

logger = logging.getLogger("rlt")


def new_model(settings: PretrainSettings, tokenizer) -> PreTrainedModel:
    """A model of the asked shape, with random weights that follow from the run's seed.

    Raises:
        Refused: its configuration has no such field, or its context is shorter than a packed row.
    """
    shape = dict(settings.model_shape or {})
    kind = shape.pop("model_type")
    try:
        known = AutoConfig.for_model(kind)
    except ValueError:
        raise Refused(f"model_shape: transformers has no model_type={kind}") from None
    for key in shape:
        if key not in known.to_dict():
            raise Refused(f"model_shape: {key} is no field of a {kind} configuration")
    ends = {role: getattr(tokenizer, role) for role in ("bos_token_id", "eos_token_id", "pad_token_id")}
    context = {"max_position_embeddings": settings.max_length} if "max_position_embeddings" in known.to_dict() else {}
    config = AutoConfig.for_model(kind, **{**context, **shape}, vocab_size=len(tokenizer), **ends)
    if getattr(config, "max_position_embeddings", settings.max_length) < settings.max_length:
        raise Refused(f"max_length={settings.max_length} is longer than model_shape's max_position_embeddings")
    set_seed(settings.seed)
    return AutoModelForCausalLM.from_config(config, attn_implementation=settings.attn_implementation)


class PretrainTrainer(SFTTrainer):
    """Trains on packed rows, as `PackedCollator` gives them.

    Args:
        unigrams: entropy of the corpus's tokens, in nats, logged beside the loss of evaluations.
        other arguments: as in `SFTTrainer`; `eval_dataset` is {source: packed rows}.
    """

    def __init__(self, *args, unigrams: float, **kwargs):
        super().__init__(*args, **kwargs)
        self.unigrams = unigrams
        self.evaluated: dict[str, float] = {}
        self._update_budget = TokenBudget(None, REMEDY)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        # Overridden because the loss comes from the model's own forward pass, in passes that fit.
        kill_point("backward")
        assert num_items_in_batch is not None and not return_outputs
        scale = self.accelerator.num_processes / num_items_in_batch  # gradients are averaged over ranks
        if is_sharded(self.accelerator):
            watch: Any = self._watch
            watch.enter()  # its passes are collective: memory that lacks on one rank is the end
            loss = self._nll(model, inputs) * scale
            watch.leave()
            return loss
        passes, done = self._passes(inputs), 0.0
        for number, some in enumerate(passes):
            if self._watch is not None:
                self._watch.begin(number)
            loss = self._nll(model, some) * scale
            if number == len(passes) - 1:
                return loss + done
            self._go_back(loss, False)
            done = done + loss.detach()
        raise AssertionError("no pass")

    def _passes(self, inputs: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        """A micro-batch in as many parts as its tokens need."""
        rows, width = inputs["input_ids"].shape
        fits = rows if self._update_budget.tokens is None else max(1, self._update_budget.tokens // width)
        parts = {name: values.split(fits) for name, values in inputs.items()}
        passes = [dict(zip(parts, some, strict=True)) for some in zip(*parts.values(), strict=True)]
        if self._watch is not None:
            self._watch.plan([(some["input_ids"].numel(), len(some["input_ids"])) for some in passes])
        return passes

    def _nll(self, model, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """The sum of the losses of all tokens that have a label."""
        wanted = {name: inputs[name] for name in ("input_ids", "labels", "position_ids")}
        plain: Any = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        if is_flash_attention_requested(plain.config):
            wanted = {name: values.view(1, -1) for name, values in wanted.items()}
        return model(**wanted, use_cache=False, num_items_in_batch=1).loss

    @torch.no_grad()
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        # Overridden because a loss by tokens is no mean of the batches' means.
        sources: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        model: Any = self.model
        model.eval()
        sums = {source: self._loss_of(rows) for source, rows in sources.items()}
        total = torch.stack(list(sums.values())).sum(0)
        self.evaluated = {source: float(nll / tokens) for source, (nll, tokens) in sums.items()}
        metrics = {f"{metric_key_prefix}_{source}_loss": loss for source, loss in self.evaluated.items()}
        metrics |= {f"{metric_key_prefix}_loss": float(total[0] / total[1]), "unigram_entropy": self.unigrams}
        self.evaluated["all"] = metrics[f"{metric_key_prefix}_loss"]
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _loss_of(self, rows: Dataset) -> torch.Tensor:
        """(2,): the sum over rows of all ranks, and how many tokens they predict."""
        each, ranks = self.args.per_device_eval_batch_size, self.accelerator.num_processes
        found = torch.zeros(2, dtype=torch.float64, device=self.accelerator.device)
        rounds = -(-len(rows) // (each * ranks))
        for number in range(rounds):
            start = (number * ranks + self.accelerator.process_index) * each
            numbers = range(start, min(start + each, len(rows)))
            batch = self.data_collator([rows[n] for n in numbers] or [rows[0]])
            if not numbers:  # other ranks have rows, and passes may be collective
                batch["labels"][:] = IGNORED
            batch = self._prepare_inputs(batch)
            with self.compute_loss_context_manager():
                nll = self._nll(self.model_wrapped, batch)
            found += torch.stack([nll.double(), (batch["labels"] != IGNORED).sum().double()])
        return self.accelerator.reduce(found, "sum")

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # Extended by tokens under the name that the progress bar has for them.
        if "loss" in logs:
            logs["num_tokens"] = self.state.num_input_tokens_seen
        super().log(logs, start_time)

    def sentence(self) -> str | None:
        """How the last evaluation compares with knowing unigrams alone."""
        if not self.evaluated:
            return None
        sources = ", ".join(f"{source} {loss:.3f}" for source, loss in self.evaluated.items() if source != "all")
        return f"held-out loss {self.evaluated['all']:.3f} nats a token ({sources}); unigrams have {self.unigrams:.3f}"

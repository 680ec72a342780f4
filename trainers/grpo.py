"""GRPO (arXiv 2402.03300) on TRL's trainer: seeded generation, packed log-probs, exact resume.

TRL keeps advantages, every loss type, importance-sampling correction, adapters and callbacks. What is overridden,
and why, is said at each method.
B completions of a batch, P prompt tokens, C completion tokens.
"""

import logging
import time
from collections import deque
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import trl
from safetensors.torch import load_file, save_file

from backends.collective import is_sharded
from backends.roll_call import slowest
from backends.state import full_weights, load_full_weights
from rlt.errors import Refused
from rlt.logprobs.packing import pad_rows
from rlt.models.residence import resident, send_for
from rlt.survival.kill_points import kill_point
from trainers.configs import GRPOConfig
from trainers.generation import SeededGeneration
from trainers.mismatch import MismatchAlarm, importance_figures
from trainers.outputs import asked_columns, update_seconds
from trainers.overlap import OverlappedGeneration
from trainers.recovery import RecoversMemory
from trainers.stopping import GivesUpSteps

logger = logging.getLogger("rlt")

PROMPT_TAIL = 4  # prompt tokens whose log-probs the policy's pass keeps: an explanation begins inside the prompt
# Losses that TRL divides by the rows of a micro-batch, and by its tokens; others, by those of all micro-batches.
MEAN_OF_ROWS = ("grpo", "dr_grpo", "sapo", "luspo")
MEAN_OF_TOKENS = "bnpo"
# What of a batch has a value per completion token: emptied where a completion has no reward, so that no log-ratio of a
# token that is not read is left to overflow.
LOG_PROBS = ("old_per_token_logps", "ref_per_token_logps", "sampling_per_token_logps")
PER_TOKEN = ("completion_mask", "tool_mask", *LOG_PROBS)


Pass = Literal["policy", "reference"]


class Rider(NamedTuple):
    """A sequence that is read in a pass which is made anyway."""

    ids: list[int]
    counted: list[int]
    temperature: float


class GRPOTrainer(OverlappedGeneration, SeededGeneration, GivesUpSteps, trl.GRPOTrainer, RecoversMemory):
    """Group-relative policy optimisation with one of three ways to generate: vLLM in process, on servers, or
    Hugging Face.

    Args:
        engine_dtype: of vLLM on the CPU, "bfloat16" or "float32".
        other arguments: as in TRL's `GRPOTrainer`; prompts are strings that carry their own special tokens.
    """

    args: Any  # GRPOConfig
    model: Any  # TRL's unions of wrappers
    ref_model: Any
    _buffered_inputs: Any
    model_wrapped: Any
    vllm_generation: Any  # one of our engines
    num_generations: Any
    num_generations_eval: Any
    COUNTED: tuple[str, ...] = (*GivesUpSteps.COUNTED, "_step", "entropy_coef", "_last_world_entropy")

    def __init__(self, *args, engine_dtype: str = "auto", **kwargs):
        config: GRPOConfig = kwargs["args"]
        # TRL would build its own engine, which the CPU cannot run; ours takes its place.
        with_engine, config.use_vllm = config.use_vllm, False
        self._awaited_passes: deque[Pass] = deque()
        self._mismatch = MismatchAlarm(rounds=config.bf16 or config.fp16 or engine_dtype != "float32")
        self.gives_up_steps = not config.overlap_generation  # whose next batch is written already
        super().__init__(*args, **kwargs)
        # A reference that moves, or that is sharded, stays where the policy is.
        self._sharded = is_sharded(self.accelerator)
        self._reference_waits = config.offload_untrained_models and not config.sync_ref_model and not self._sharded
        if self._reference_waits and self.ref_model is not None:
            self.ref_model.to("cpu")
        if with_engine:
            assert config.generation_batch_size is not None  # set by TRL where it is not given
            self._take_engine(config, engine_dtype, config.generation_batch_size, config.overlap_generation)

    # Prompts and generation

    def _generate_single_turn(  # pyrefly: ignore[bad-override]  # what it does not read it passes on
        self, prompt_ids, images, multimodal_fields, num_generations, **kwargs
    ):
        # Overridden so that sampling depends on the run's seed and step alone, not on a global generator.
        stock = super()._generate_single_turn
        ahead = self._generate_ahead if self.args.overlap_generation else None
        return self._write(
            prompt_ids, lambda: stock(prompt_ids, images, multimodal_fields, num_generations, **kwargs), ahead
        )

    # Log-probs

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, compute_entropy=False, **kwargs
    ):
        # Overridden to compute once what completions begin with, and the head only where it counts (logprobs/).
        if self.aux_loss_enabled or any(value is not None for value in kwargs.values() if value is not False):
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy, **kwargs
            )
        awaited = self._awaited_passes and not torch.is_grad_enabled()
        which = self._awaited_passes.popleft() if awaited else None
        sequences, counted = self._unpadded(
            input_ids, attention_mask, logits_to_keep, PROMPT_TAIL if which == "policy" else 0
        )
        riders = self._riders(which, sequences, counted) if which else []
        if which and (following := self._frozen_after(which)) is not None:
            send_for(following, self.accelerator.device)
        entropy = "none" if not compute_entropy else "with_grad" if self._entropy_bonus_enabled else "value"
        offload = self._reference_waits and model is self.ref_model
        inner = self.accelerator.unwrap_model(model)
        with resident(model, self.accelerator.device, offload) if offload else nullcontext():
            log_probs, entropies = self._read(
                model,
                inner,
                sequences + [rider.ids for rider in riders],
                counted + [rider.counted for rider in riders],
                temperature=[self.temperature] * len(sequences) + [rider.temperature for rider in riders]
                if riders
                else self.temperature,
                entropy=entropy,
                sharded=self._sharded,
            )
        rows = len(sequences)
        if which:
            self._take(which, log_probs[:rows], log_probs[rows:])
        widths = attention_mask[:, -logits_to_keep:].sum(1).tolist()
        padded = [pad_rows(values[:rows], widths, logits_to_keep) for values in (log_probs, entropies)]
        if self._watch is not None and self.accelerator.num_processes > 1:
            self._watch.enter()  # TRL gathers figures of the loss
        return padded[0], padded[1] if compute_entropy else None, None

    def _frozen_after(self, which: str) -> torch.nn.Module | None:
        """The waiting model that is needed next, once the pass of "policy" or "reference" has begun."""
        return self.ref_model if which == "policy" and self._reference_waits else None

    def _riders(self, which: str, sequences: list[list[int]], counted: list[list[int]]) -> list[Rider]:
        """What else the "policy" or the "reference" is to read in its pass over a batch; for subclasses."""
        return []

    def _take(self, which: str, log_probs: list[torch.Tensor], of_riders: list[torch.Tensor]) -> None:
        """What came of it: log-probs of the completions (with `PROMPT_TAIL`, the policy's) and of the riders."""

    @staticmethod
    def _unpadded(input_ids, attention_mask, logits_to_keep: int, tail: int):
        """Sequences, and the indices of their completion tokens (and of `tail` prompt tokens)."""
        sequences, counted = [], []
        for ids, mask in zip(input_ids, attention_mask.bool(), strict=True):
            prompt = ids[:-logits_to_keep][mask[:-logits_to_keep]].tolist()
            completion = ids[-logits_to_keep:][mask[-logits_to_keep:]].tolist()
            sequences.append(prompt + completion)
            first = max(1, len(prompt) - tail)
            counted.append(list(range(first, len(sequences[-1]))) if completion else [])
        return sequences, counted

    # A step: generate, score, and the share of it that one micro-batch trains on

    def _prepare_inputs(self, generation_batch):  # pyrefly: ignore[bad-override-param-name]  # TRL's name for it
        # Overridden so that siblings stay in one micro-batch.
        if not self.model.training:
            return self._generate_and_score_completions(generation_batch)
        steps = self.args.steps_per_generation
        return self._micro_batch(generation_batch, steps, steps * self.num_iterations)

    def _generate_and_score_completions(self, inputs):
        # Extended by which completions were scored: what has no finite reward is never trained on.
        self._awaited_passes = deque(self._passes_before_rewards())
        metrics, start = self._metrics["train" if self.model.training else "eval"], time.perf_counter()
        before = len(metrics["generation/seconds"])
        batch = super()._generate_and_score_completions(inputs)
        # The passes over new completions and their rewards; what is left of a step is its update.
        generation = sum(metrics["generation/seconds"][before:])
        metrics["scoring/seconds"].append(time.perf_counter() - start - generation)
        self._awaited_passes.clear()
        if "importance_sampling_ratio" in batch:
            bounds = self.vllm_importance_sampling_clip_min, self.vllm_importance_sampling_clip_max
            figures = importance_figures(batch, self.vllm_importance_sampling_mode, bounds, self.accelerator.gather)
            for name, value in figures.items():
                metrics[f"sampling/importance_sampling_ratio/{name}"].append(value)
        if self._trains_on_fresh():  # TRL then takes the update's own log-probs, whose ratio is exactly 1
            batch.pop("old_per_token_logps", None)
        batch["scored"] = self._scored
        tokens = (batch["completion_mask"] * self._scored[:, None]).sum()
        batch["num_items_in_batch"] = self.accelerator.gather(tokens).sum()
        batch["scored_share"] = self.accelerator.gather(self._scored.float()).mean()
        return batch

    def _passes_before_rewards(self) -> list[Pass]:
        """The passes without gradients that TRL makes over new completions, in its order."""
        corrected = self.use_vllm and self.vllm_importance_sampling_correction
        passes: list[Pass] = ["policy"] * (corrected or not self._trains_on_fresh())
        return [*passes, "reference"] if self.beta != 0.0 else passes

    def _trains_on_fresh(self) -> bool:
        """Whether every update is of the policy that read its completions last: no step is made in between."""
        return self.args.gradient_accumulation_steps % (self.args.steps_per_generation * self.num_iterations) == 0

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        # Extended: infinite rewards count as missing, as NaN does in TRL; what was asked is logged.
        kill_point("scoring")
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        rewards[~torch.isfinite(rewards)] = torch.nan
        if self.model.training:
            self._pending_extra_logs |= asked_columns(inputs)
        scored = ~rewards.isnan().all(dim=1)
        mode = "train" if self.model.training else "eval"
        self._metrics[mode]["completions/unscored"].append((~scored).sum().item())
        start = self.accelerator.process_index * len(prompts)
        self._scored = scored[start : start + len(prompts)]
        return rewards

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        # Overridden to leave unscored completions out of loss, KL and denominators. Their rows stay, without tokens:
        # TRL gathers statistics of rows, which are as many on every rank.
        kill_point("backward")
        scored, share = inputs["scored"], inputs["scored_share"]
        if not scored.all():
            # A batch of nothing else takes part by its first row, with a zero loss that reaches every parameter.
            left_out = ~scored if scored.any() else torch.arange(len(scored), device=scored.device) != 0
            masked = {key: inputs[key] for key in PER_TOKEN if inputs.get(key) is not None}
            inputs = inputs | {key: value.masked_fill(left_out[:, None], 0) for key, value in masked.items()}
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self._watch is not None:
            self._watch.leave()
        if not scored.any():
            return loss * 0.0
        if self.loss_type in MEAN_OF_ROWS:
            return loss / share
        return loss * scored.float().mean() / share if self.loss_type == MEAN_OF_TOKENS else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # Extended by the alarm on disagreement between engine and trainer, and by what differs between ranks.
        self._mismatch.check(self._metrics["train"].get("sampling/sampling_logp_difference/mean", ()))
        if self.accelerator.num_processes > 1 and "loss" in logs:
            spent = self._metrics["train"]["generation/seconds"]
            logs |= slowest(sum(spent), self.accelerator.device)
        if self.model.training and self._metrics["train"].get("step_time"):
            self._metrics["train"]["update/seconds"].append(update_seconds(self._metrics["train"]))
        super().log(logs, start_time)

    # Resume

    def _save_extra_state(self, folder: Path) -> None:
        # A buffer that the next micro-step replaces anyway need not be kept.
        unfinished = self._step % (self.args.steps_per_generation * self.num_iterations) != 0
        state = {
            "step": self._step,
            "accumulation": self.args.gradient_accumulation_steps,
            "processes": self.accelerator.num_processes,
            "buffer": self._buffered_inputs if unfinished else None,
            "ahead": self._written_ahead(),
            "entropy_control": (self.entropy_coef, self._last_world_entropy) if self.use_adaptive_entropy else None,
        }
        torch.save(state, folder / f"rollouts-{self.accelerator.process_index}.pt")
        if self.args.sync_ref_model:
            reference = full_weights(self.ref_model, keep=self.args.should_save)
            if self.args.should_save:
                save_file(reference, folder / "reference.safetensors")

    def _load_extra_state(self, folder: Path) -> None:
        before, now = self._read_rollouts(folder, 0), self.accelerator.num_processes
        if self.use_adaptive_entropy and before["entropy_control"]:  # of another run there may be none
            self.entropy_coef, self._last_world_entropy = before["entropy_control"]
        self._step = before["step"] * self.args.gradient_accumulation_steps // before["accumulation"]
        same = (before["processes"], before["accumulation"]) == (now, self.args.gradient_accumulation_steps)
        if same:
            mine = self._read_rollouts(folder, self.accelerator.process_index)
            self._buffered_inputs = mine["buffer"]
            self._take_up(mine["ahead"])
        elif before["buffer"] is not None:
            raise Refused(
                f"{folder} stands between two optimizer steps of one generation batch: continue on "
                f"{before['processes']} processes with {before['accumulation']} micro-batches a step, not on {now} "
                f"with {self.args.gradient_accumulation_steps}"
            )
        if self.args.sync_ref_model:
            load_full_weights(self.ref_model, load_file(folder / "reference.safetensors"))

    def _read_rollouts(self, folder: Path, rank: int) -> dict:
        return torch.load(folder / f"rollouts-{rank}.pt", map_location=self.accelerator.device, weights_only=True)

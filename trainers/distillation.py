"""On-policy distillation (GKD, arXiv 2306.13649) on TRL's trainer: seeded generation, packed passes, exact resume.

A student samples; a frozen teacher reads the same tokens behind a prompt of its own, which may hold the solution
(rlt/prompts/distillation.py); the student learns the teacher's next-token distributions there. TRL keeps the loop, the
figures of generation, adapters and callbacks. What is overridden, and why, is said at each method.

A step reads in the order in which things happen: completions; the teacher's hidden states before each of their tokens,
in one pass of which the head is left out; the student's pass, whose head meets the teacher's in chunks of positions
(rlt/logprobs/divergence.py). Where the teacher is certain of a token, the divergence is minus the student's log-prob of
it. The teacher is needed for its pass alone: with `offload_untrained_models` it waits in the CPU's memory, and its head
alone stays. It is held whole on each device, also where the student is in shards.
G hidden size of the teacher.
"""

import time
from pathlib import Path
from typing import Any

import torch
import trl
from transformers.trainer import TRAINER_STATE_NAME
from trl.trainer.utils import use_adapter

from backends.collective import is_sharded
from backends.roll_call import slowest
from rlt.durable import read_json
from rlt.logprobs import Divergence, TeacherHead, token_divergences, token_hidden_states
from rlt.models.residence import resident
from rlt.prompts.distillation import Completion, read_completion
from rlt.prompts.rendering import prompt_token_ids
from rlt.prompts.styles import ReasoningFormat
from rlt.rewards.gate import comes_to
from rlt.survival.kill_points import kill_point
from trainers.configs import DistillationConfig
from trainers.generation import SeededGeneration
from trainers.outputs import asked_columns, update_seconds
from trainers.recovery import RecoversMemory
from trainers.stopping import GivesUpSteps

# Figures of the loss, and the tokens that they are a mean over.
OVER_TOKENS = {"divergence": "asked_tokens", "entropy": "asked_tokens", "solution_surprise": "known_tokens"}


class DistillationTrainer(SeededGeneration, GivesUpSteps, trl.DistillationTrainer, RecoversMemory):
    """Trains a student on a teacher's next-token distributions.

    Args:
        teacher: frozen, of the student's vocabulary; None: the student itself without its adapter.
        style: tags, which say what of a completion the teacher goes on with.
        teacher_prompt: one of `rlt.prompts.distillation.TEACHER_PROMPTS`.
        learns_solution: behind a thought that the teacher has read, the solution counts too; rows need `solution`.
        engine_dtype: of vLLM on the CPU, "bfloat16" or "float32".
        other arguments: as in TRL's `DistillationTrainer`; rows hold `prompt` and `teacher_prompt`, strings that carry
            their own special tokens.
    """

    args: Any  # DistillationConfig
    model: Any  # TRL's unions of wrappers
    model_wrapped: Any
    processing_class: Any
    vllm_generation: Any  # one of our engines
    COUNTED: tuple[str, ...] = (*GivesUpSteps.COUNTED, "_step")

    def __init__(
        self,
        *args,
        teacher,
        style: ReasoningFormat,
        teacher_prompt: str = "question",
        learns_solution: bool = False,
        engine_dtype: str = "auto",
        **kwargs,
    ):
        config: DistillationConfig = kwargs["args"]
        # TRL would build its own engine, which the CPU cannot run; ours takes its place.
        with_engine, config.use_vllm = config.use_vllm, False
        self.num_generations, self.num_generations_eval = config.num_generations, config.num_generations_eval
        self.style, self.teacher_prompt, self.learns_solution = style, teacher_prompt, learns_solution
        super().__init__(*args, **kwargs)
        self.teacher = teacher
        self._teacher_head: TeacherHead | None = None
        self._divergence = Divergence(self.beta, self.temperature, config.divergence_top_k)
        self._sharded = is_sharded(self.accelerator)
        begun = f"{style.thought_tags[0]}\n\n" if learns_solution else ""
        # With its solution a student learns the start tag, which its turn was begun with: the prompt's last tokens.
        self._begun = len(prompt_token_ids(self.processing_class, [begun])[0]) if begun else 0
        self._rows: dict[str, list] = {}  # of the batch at hand, for `completions_of_step`
        self._of_rows: dict[int, list[tuple[float, float]]] = {}  # by micro-batch: mean divergence and entropy
        if with_engine:
            self._take_engine(config, engine_dtype, self._batch_size())

    def _batch_size(self) -> int:
        """Completions of a step, on all ranks."""
        each = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        return each * self.accelerator.num_processes

    # Prompts and generation

    def _repeating(self, sampler):
        # TRL asks each question once; here siblings share its prompt.
        sampler.mini_repeat_count = self.num_generations
        sampler.batch_size = self._batch_size() // self.num_generations
        return sampler

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, has_tool_images=False):
        # Overridden so that sampling depends on the run's seed and step alone, not on a global generator.
        stock = super()._generate_single_turn
        return self._write(prompt_ids, lambda: (stock(prompt_ids, images, multimodal_fields, has_tool_images), None))[0]

    def _prepare_inputs(self, generation_batch):  # pyrefly: ignore[bad-override-param-name]  # TRL's name for it
        # Overridden so that siblings stay in one micro-batch.
        steps = self.args.gradient_accumulation_steps
        return self._micro_batch(generation_batch, steps, steps)

    def _generate_and_score_completions(self, inputs):
        # Extended by what both models read of the completions, and by the teacher's states.
        metrics, start = self._metrics["train" if self.model.training else "eval"], time.perf_counter()
        before = len(metrics["generation/seconds"])
        batch = super()._generate_and_score_completions(inputs)
        kill_point("scoring")
        generation = sum(metrics["generation/seconds"][before:])
        sampled = _unpadded(batch["completion_ids"], batch["completion_mask"])
        read = [self._read_completion(row, ids) for row, ids in zip(inputs, sampled, strict=True)]
        states = self._teacher_states([row["teacher_prompt"] for row in inputs], [one.teacher_ids for one in read])
        batch["teacher_states"] = torch.nn.utils.rnn.pad_sequence(states, batch_first=True)
        device, sizes = self.accelerator.device, [len(one.student_ids) for one in read]
        batch["read_ids"] = torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(one.student_ids, device=device, dtype=torch.long) for one in read], batch_first=True
        )
        batch["sizes"] = torch.tensor(sizes, device=device)
        batch["asked"] = torch.tensor([len(one.teacher_ids) for one in read], device=device)
        batch["num_items_in_batch"] = self.accelerator.gather((batch["sizes"] + self._begun).sum()).sum()
        metrics["scoring/seconds"].append(time.perf_counter() - start - generation)
        self._rows = {
            "prompt": [row["prompt"] for row in inputs],
            "completion": self.processing_class.batch_decode(sampled, skip_special_tokens=True),
            **asked_columns(inputs),
            "tokens": list(map(len, sampled)),
            "counted_tokens": batch["asked"].tolist(),
        }
        return batch

    def _read_completion(self, row: dict, ids: list[int]) -> Completion:
        solution = row["solution"] if self.learns_solution else None
        return read_completion(self.processing_class, self.style, ids, self.teacher_prompt, solution, comes_to)

    # The teacher

    @torch.no_grad()
    def _teacher_states(self, prompts: list[str], completions: list[list[int]]) -> list[torch.Tensor]:
        """The teacher's hidden states (tokens, G) before each token of a completion."""
        begun = prompt_token_ids(self.processing_class, prompts)
        sequences, where = behind(begun, completions)
        counted = list(map(list, where))
        if self.teacher is None:
            policy: Any = self.accelerator.unwrap_model(self.model)
            with use_adapter(policy, adapter_name=None):
                states = self._hidden_states(self.model, policy, sequences, counted, self._sharded)
            size = policy.config.get_text_config().hidden_size
        else:
            with resident(self.teacher, self.accelerator.device, self.args.offload_untrained_models):
                self._teacher_head = TeacherHead.of(self.teacher)  # on the device, where it stays
                states = self._hidden_states(self.teacher, self.teacher, sequences, counted, False)
            size = self.teacher.config.get_text_config().hidden_size
        return [values.view(-1, size) for values in states]

    def _hidden_states(self, model, inner, sequences, counted, sharded: bool) -> list[torch.Tensor]:
        return self._read(model, inner, sequences, counted, reads=token_hidden_states, sharded=sharded)[0]

    # The loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        # Overridden to read a prompt once for all its completions, and each model behind a prompt of its own.
        kill_point("backward")
        asked, sizes = inputs["asked"].tolist(), inputs["sizes"].tolist()
        completions = [ids[:size].tolist() for ids, size in zip(inputs["read_ids"], sizes, strict=True)]
        sequences, counted = behind(_unpadded(inputs["prompt_ids"], inputs["prompt_mask"]), completions)
        divergences, entropies = self._read(
            model,
            self.accelerator.unwrap_model(model),
            sequences,
            [list(range(where.start - self._begun, where.stop)) for where in counted],
            certain=self._begun,
            reads=token_divergences,
            against=[states[:count] for states, count in zip(inputs["teacher_states"], asked, strict=True)],
            teacher=self._teacher_head,
            divergence=self._divergence,
            sharded=self._sharded,
        )
        self._log_loss(divergences, entropies, asked)
        # Of all ranks, over which gradients are averaged; the sum of all micro-batches is one mean over tokens.
        tokens = inputs["num_items_in_batch"].clamp(min=1) / self.accelerator.num_processes
        loss = torch.cat(divergences).sum() / tokens
        return (loss, None) if return_outputs else loss

    def _log_loss(self, divergences: list[torch.Tensor], entropies: list[torch.Tensor], asked: list[int]) -> None:
        """Means of all ranks, in nats: divergence and the student's entropy over the tokens that the teacher was asked
        for, minus log-probs over those that it is certain of."""
        zero = torch.zeros(1, device=self.accelerator.device)
        first = self._begun
        cut = [
            values.detach().float().split([first, n, len(values) - first - n])
            for values, n in zip(divergences, asked, strict=True)
        ]
        asked_for, known = [part[1] for part in cut], [torch.cat([part[0], part[2]]) for part in cut]
        entropy = [values[first : first + n].float() for values, n in zip(entropies, asked, strict=True)]
        sums = torch.stack([torch.cat([zero, *kind]).sum() for kind in (asked_for, entropy, known)])
        counts = sums.new_tensor([sum(map(len, asked_for)), sum(map(len, known))])
        if self._watch is not None and self.accelerator.num_processes > 1:
            self._watch.enter()
        total = self.accelerator.gather(torch.cat([sums, counts])[None]).sum(0).tolist()
        if self._watch is not None and self.accelerator.num_processes > 1:
            self._watch.leave()
        metrics = self._metrics["train"]
        metrics["divergence"].append(total[0] / max(total[3], 1.0))
        metrics["entropy"].append(total[1] / max(total[3], 1.0))
        if self.learns_solution:
            metrics["solution_surprise"].append(total[2] / max(total[4], 1.0))
        metrics["asked_tokens"].append(total[3])
        metrics["known_tokens"].append(total[4])
        means = [[values.mean().item() for values in kind] for kind in (asked_for, entropy)]
        self._of_rows[self._step % self.args.gradient_accumulation_steps] = list(zip(*means, strict=True))

    def completions_of_step(self) -> list[dict[str, Any]]:
        """This rank's completions of the optimizer step that has just ended, one after the other."""
        found = [pair for _, pairs in sorted(self._of_rows.items()) for pair in pairs]
        columns = {**self._rows, "divergence": [d for d, _ in found], "entropy": [e for _, e in found]}
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # Extended by what differs between ranks, and by what is left of a step for its update.
        if self.accelerator.num_processes > 1 and "loss" in logs:
            logs |= slowest(sum(self._metrics["train"]["generation/seconds"]), self.accelerator.device)
        if self.model.training and self._metrics["train"].get("step_time"):
            self._metrics["train"]["update/seconds"].append(update_seconds(self._metrics["train"]))
        if self.model.training:
            weigh_by_tokens(self._metrics["train"])
        super().log(logs, start_time)

    # Resume

    def _load_extra_state(self, folder: Path) -> None:
        # Checkpoints stand between optimizer steps, and each step samples anew.
        state: Any = read_json(folder / TRAINER_STATE_NAME)
        self._step = state["global_step"] * self.args.gradient_accumulation_steps


def weigh_by_tokens(metrics: dict[str, list[float]]) -> None:
    """Means of micro-batches become one mean over tokens, where TRL would take the mean of means; the numbers of tokens
    go."""
    counts = {name: metrics.pop(name, []) for name in ("asked_tokens", "known_tokens")}
    for name, tokens in OVER_TOKENS.items():
        if weights := counts[tokens] if metrics.get(name) else []:
            total = sum(value * weight for value, weight in zip(metrics[name], weights, strict=True))
            metrics[name] = [total / max(sum(weights), 1.0)]


def behind(prompts: list[list[int]], completions: list[list[int]]) -> tuple[list[list[int]], list[range]]:
    """Each prompt with its completion, and the indices of the completion's tokens."""
    sequences = [[*prompt, *ids] for prompt, ids in zip(prompts, completions, strict=True)]
    return sequences, [range(len(prompt), len(ids)) for prompt, ids in zip(prompts, sequences, strict=True)]


def _unpadded(ids_BT: torch.Tensor, mask_BT: torch.Tensor) -> list[list[int]]:
    return [ids[mask].tolist() for ids, mask in zip(ids_BT, mask_BT.bool(), strict=True)]

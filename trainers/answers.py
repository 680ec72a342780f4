"""How often a student in training answers held-out questions correctly, with an engine of its own or its trainer's."""

from typing import Any

import torch
from accelerate.utils import gather_object

from rlt.estimates import finite_mean
from rlt.generation.seeds import request_seed
from rlt.prompts.rendering import prompt_token_ids
from rlt.prompts.styles import ReasoningFormat
from rlt.rewards.verifiers import Verifier, final_answer
from rlt.schema import DistillSettings, StudentSettings
from trainers.held_out import share_of


class HeldOutAnswers:
    """Accuracy with the weights of the moment; seeds are the same at every evaluation.

    Args:
        settings: `eval_answers` answers to each question.
        rows: held-out questions with their prompts and solutions.
    """

    def __init__(self, settings: StudentSettings, rows: list[dict], style: ReasoningFormat):
        self.settings, self.rows, self.style = settings, rows, style
        self.verifier = Verifier(settings.verifier, settings.verifier_limit_s)
        self.engine: Any = None  # built with the first evaluation

    def __call__(self, trainer) -> dict[str, float]:
        """`eval_accuracy` and `eval_format_rate` over all ranks' questions."""
        if self.engine is None:
            self.engine = self._build(trainer)
        self.engine.sync_weights()
        accelerator = trainer.accelerator
        mine = range(accelerator.process_index, len(self.rows), accelerator.num_processes)
        found = gather_object(self._answer(trainer.processing_class, mine))
        return {
            "eval_accuracy": sum(right for right, _ in found) / len(found),
            "eval_format_rate": sum(given for _, given in found) / len(found),
        }

    def _build(self, trainer):
        from rlt.generation.sampler import MAX_SEQUENCES, build_engine  # vLLM, which takes seconds

        on_gpu = trainer.accelerator.device.type == "cuda"
        return build_engine(
            model=trainer.model,
            accelerator=trainer.accelerator,
            processing_class=trainer.processing_class,
            engine_dtype="bfloat16" if trainer.args.bf16 else "float32",
            gpu_memory_utilization=self.settings.vllm_gpu_memory_utilization,
            max_model_length=self.settings.max_prompt_length + self.settings.max_completion_length,
            max_num_seqs=MAX_SEQUENCES,
            enable_sleep_mode=on_gpu,  # its memory is the update's in between
            temperature=self.settings.temperature,
            max_completion_length=self.settings.max_completion_length,
        )

    def _answer(self, tokenizer, mine: range) -> list[tuple[bool, bool]]:
        """Whether each answer to this rank's questions is right, and whether one was given."""
        count, seed = self.settings.eval_answers, self.settings.seed
        asked = [self.rows[number] for number in mine for _ in range(count)]
        if not asked:  # with fewer questions than ranks
            return []
        seeds = [request_seed(seed, "answers", number) + member for number in mine for member in range(count)]
        sampled, _ = self.engine.generate_seeded(prompt_token_ids(tokenizer, [row["prompt"] for row in asked]), seeds)
        written = tokenizer.batch_decode(sampled, skip_special_tokens=True)
        given = [final_answer(text, self.style) for text in written]
        right = self.verifier.check_batch(given, asked)
        return [(one > 0, answer is not None) for one, answer in zip(right, given, strict=True)]


class SampledAnswers:
    """What `HeldOutEvaluation` measures of a student whose trainer samples: its answers, by the trainer's engine."""

    def __init__(self, settings: DistillSettings, style: ReasoningFormat, ddp_timeout: float):
        self.style = style
        self.verifier = Verifier(settings.verifier, settings.verifier_limit_s, ddp_timeout)

    @torch.no_grad()
    def __call__(self, trainer, rows: list[dict]) -> dict:
        """`step`; and of each question, in the rows' order, the means of its answers' accuracy, format and length."""
        was_training = trainer.model.training
        trainer.model.eval()
        repeats = trainer.num_generations_eval
        asked = [row for row in share_of(rows, trainer.accelerator) for _ in range(repeats)]
        prompt_ids = prompt_token_ids(trainer.processing_class, [row["prompt"] for row in asked])
        sampled = trainer._generate_single_turn(prompt_ids, None, {})
        trainer._metrics["eval"].clear()
        trainer.model.train(was_training)
        written = trainer.processing_class.batch_decode(sampled, skip_special_tokens=True)
        given = [final_answer(text, self.style) for text in written]
        right = self.verifier.check_batch(given, asked)
        columns = {
            "accuracy": [float(one > 0) for one in right],
            "format_rate": [float(answer is not None) for answer in given],
            "length": [float(len(ids)) for ids in sampled],
        }
        gathered = {name: gather_object(values) for name, values in columns.items()}
        starts = range(0, len(rows) * repeats, repeats)
        means = {name: [finite_mean(all_[i : i + repeats]) for i in starts] for name, all_ in gathered.items()}
        return {**means, "step": trainer.state.global_step}

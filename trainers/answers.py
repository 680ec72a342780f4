"""How often a student in training answers held-out questions correctly, with the engine that evaluations use."""

from typing import Any

from accelerate.utils import gather_object

from rlt.generation.seeds import request_seed
from rlt.prompts.rendering import prompt_token_ids
from rlt.prompts.styles import ReasoningFormat
from rlt.rewards.verifiers import Verifier, final_answer
from rlt.schema import StudentSettings


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

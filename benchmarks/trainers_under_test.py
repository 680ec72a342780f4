"""The trainers that are compared, built on the same model, prompts, lengths and dtype.

ours: TeacherGRPOTrainer. stock: TRL's GRPOTrainer, Hugging Face generation, the teacher reward one sample at a time.
stock_vllm: the same with vLLM in process (our engine, because TRL's own cannot be built on a CPU).
"""

import tempfile
from typing import Any

import torch
import transformers
import trl
import yaml
from datasets import Dataset
from harness import MODEL, ROOT, Setting, Stopwatch, floor_of, matrix_rate, now, peak_memory_gib, rows_of
from passes import DEVICE, HALF, one_at_a_time
from transformers import TrainerCallback

from rlt.generation.sampler import build_engine
from rlt.models.embedded import embedded_model_path
from rlt.models.loading import load_frozen, load_policy, load_tokenizer
from rlt.prompts.styles import load_format
from rlt.rewards import TeacherReward
from rlt.schema import TeacherRewardConfig, pick
from rlt.survival.host_memory import ReturnFreedMemory
from trainers.configs import GRPOConfig
from trainers.teacher_grpo import TeacherGRPOTrainer


def reward_config() -> TeacherRewardConfig:
    text = (ROOT / "cfgs/trainer_cfg/reward_cfg/teacher.yaml").read_text(encoding="utf-8")
    return pick(yaml.safe_load(text), TeacherRewardConfig)


def arguments(setting: Setting, variant: str, steps: int, folder: str) -> dict[str, Any]:
    """Shared by all; the end token never ends a completion."""
    with_engine = variant != "stock"
    accumulation = setting.completions // setting.micro_batch
    return {
        "output_dir": folder,
        "per_device_train_batch_size": setting.micro_batch,
        "gradient_accumulation_steps": accumulation,
        "steps_per_generation": accumulation,
        "num_generations": setting.generations,
        "max_completion_length": setting.completion_tokens,
        "max_steps": steps,
        "learning_rate": 1e-6,
        "beta": 0.04,
        "temperature": 0.7,
        "bf16": torch.bfloat16 == HALF,
        "use_cpu": DEVICE == "cpu",
        "gradient_checkpointing": False,
        "use_vllm": variant == "ours",
        "vllm_mode": "colocate",
        "vllm_max_model_length": 1024,
        "generation_kwargs": {
            "min_tokens" if with_engine else "min_new_tokens": setting.completion_tokens,
        },
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
    }


def build(variant: str, setting: Setting, steps: int, folder: str):
    transformers.utils.logging.set_verbosity_error()
    path = str(embedded_model_path(MODEL))
    tokenizer = load_tokenizer(path)
    rows = rows_of(setting, tokenizer) * steps
    attention = {"attn_implementation": "sdpa"} if variant != "ours" else {}
    policy = load_policy(path, **attention)
    student = load_frozen(path, HALF, **attention)
    shared = {"model": policy, "train_dataset": Dataset.from_list(rows), "processing_class": tokenizer}
    style = load_format("stratos")
    options = arguments(setting, variant, steps, folder)
    if variant == "ours":
        return TeacherGRPOTrainer(
            student=student,
            style=style,
            reward_config=reward_config(),
            args=GRPOConfig(**options),
            engine_dtype=str(HALF).removeprefix("torch.") if DEVICE == "cpu" else "auto",
            callbacks=[ReturnFreedMemory()],  # as trainers/build.py has it
            **shared,
        )
    reward = PerSampleReward(policy, student, tokenizer, style)
    trainer = trl.GRPOTrainer(reward_funcs=[reward], args=trl.GRPOConfig(**options), **shared)
    reward.autocast = trainer.accelerator.autocast
    if variant == "stock_vllm":
        put_engine_in(trainer)
    return trainer


class PerSampleReward:
    """The teacher reward as a plain script would compute it: two whole forward passes for each completion."""

    __name__ = "per_sample_reward"

    def __init__(self, policy, student, tokenizer, style):
        self.autocast = torch.no_grad
        self.reward = TeacherReward(
            tokenizer, style, reward_config(), 0.7, self.log_probs_of(policy), self.log_probs_of(student)
        )

    def log_probs_of(self, model):
        def log_probs(sequences, counted, temperature):
            with torch.no_grad():
                return one_at_a_time(model, sequences, counted, temperature, self.autocast)

        return log_probs

    def __call__(self, prompts, completions, question, solution, **columns):
        rows = [{"question": q, "solution": s} for q, s in zip(question, solution, strict=True)]
        return [scored.reward for scored in self.reward.score(rows, completions)]


def put_engine_in(trainer: trl.GRPOTrainer) -> None:
    """Stock generation through vLLM, with the log-probs that its importance sampling correction needs."""
    config = trainer.args
    trainer.vllm_generation = build_engine(
        model=trainer.model,
        accelerator=trainer.accelerator,
        processing_class=trainer.processing_class,
        engine_dtype=str(HALF).removeprefix("torch."),
        max_model_length=config.vllm_max_model_length,
        max_num_seqs=128,
        temperature=config.temperature,
        max_completion_length=config.max_completion_length,
        generation_kwargs=config.generation_kwargs,
    )
    trainer.use_vllm = config.use_vllm = True

    def generate(prompt_ids, *args, **kwargs):
        trainer.vllm_generation.sync_weights()
        return trainer.vllm_generation.generate_seeded(prompt_ids, list(range(len(prompt_ids))))

    trainer._generate_single_turn = generate


class StepTimes(TrainerCallback):
    """Seconds of each optimizer step, from its first micro-batch to the end of its update."""

    def __init__(self):
        self.steps: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = now()

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append(now() - self.start)


def measure_step(variant: str, setting: Setting, steps: int = 2) -> dict:
    """Seconds of the last of `steps` steps and of its phases, and the peak memory of the process."""
    rate = matrix_rate()  # before an engine takes threads of its own
    with tempfile.TemporaryDirectory() as folder:
        return _measure_step(build(variant, setting, steps, folder), setting, rate)


def _measure_step(trainer, setting: Setting, rate: float) -> dict:
    watch, times = Stopwatch(), StepTimes()
    for method, phase in {
        "_generate_single_turn": "generation",
        "_calculate_rewards": "scoring",
        "_generate_and_score_completions": "before the update",
    }.items():
        watch.watch(trainer, method, phase)
    trainer.add_callback(times)
    trainer.add_callback(Forget(watch))
    trainer.train()
    prompts = trainer._tokenize_prompts([row["prompt"] for row in trainer.train_dataset])[0]
    prompt_length = sum(map(len, prompts)) / len(prompts)
    seconds = dict(watch.seconds)
    before = seconds.pop("before the update")
    return {
        **seconds,
        "log-probs": before - seconds["generation"] - seconds["scoring"],
        "update": times.steps[-1] - before,
        "step": times.steps[-1],
        "memory": peak_memory_gib(),
        "matrix_rate": rate,
        "floor": vars(floor_of(setting, prompt_length, trainer.accelerator.unwrap_model(trainer.model))),
    }


class Forget(TrainerCallback):
    """Keeps the phases of the last step only."""

    def __init__(self, watch: Stopwatch):
        self.watch = watch

    def on_step_begin(self, args, state, control, **kwargs):
        self.watch.seconds.clear()

"""From a plan to a trainer on packed rows: supervised fine-tuning, and pretraining."""

from pathlib import Path

import trl
from datasets import Dataset
from transformers import TrainingArguments

from backends.collective import let_fsdp_run_on_cpu
from rlt.models.loading import load_tokenizer
from rlt.models.paths import resolve_model_path
from rlt.planning.curriculum import phases_of
from rlt.planning.plan import Plan
from rlt.preparation.split import TRAIN, VALIDATION
from rlt.runs.folder import CACHE
from rlt.runs.learned import check_training_rows
from rlt.schema import PretrainSettings, SFTSettings
from rlt.survival.host_memory import ReturnFreedMemory
from trainers.arguments import trl_config
from trainers.configs import SFTConfig
from trainers.curriculum import CurriculumSampler
from trainers.fp8 import compute_in_fp8
from trainers.outputs import leave_rows
from trainers.packed import (
    PackedCollator,
    check_made_for,
    check_packed,
    first_rows,
    held_out_by_source,
    identity_of_files,
    packed_files,
    packed_rows,
    tokenizer_of,
    unigram_entropy,
)
from trainers.policies import build_policy
from trainers.pretrain import PretrainTrainer, new_model
from trainers.sft import SFTTrainer


def build_packed_sft(plan: Plan, tokenizer, files: list[Path]):
    """The same on rows that a preparation has tokenised and packed: the loss of each token is that of unpacked rows."""
    settings: SFTSettings = plan.settings
    check_packed(settings)
    check_made_for(files, tokenizer, settings.max_length)
    cache = Path(settings.output_dir) / CACHE
    train = first_rows(packed_rows(files, cache), settings.dataset_size, "dataset_size")
    held_out = packed_files(settings.dataset_id_or_path, VALIDATION) if settings.eval_size else []
    evaluation = first_rows(packed_rows(held_out, cache), settings.eval_size, "eval_size") if held_out else None
    identity = identity_of_files(files)
    check_training_rows(Path(settings.output_dir), identity)
    arguments = trl_config(SFTConfig, plan)
    arguments.dataset_kwargs = {"skip_prepare_dataset": True}
    let_fsdp_run_on_cpu()
    policy, adapter = build_policy(settings, tokenizer, settings.model_name_or_path)
    trainer = SFTTrainer(
        model=policy,
        args=arguments,
        train_dataset=train,
        eval_dataset=evaluation,
        data_collator=PackedCollator(tokenizer.pad_token_id),
        curriculum=curriculum_of(plan, train, arguments),
        processing_class=tokenizer,
        peft_config=adapter,
        callbacks=[ReturnFreedMemory()],
    )
    leave_rows(trainer, identity, [])
    return trainer, None


def build_pretraining(plan: Plan):
    settings: PretrainSettings = plan.settings
    folder = Path(settings.dataset_id_or_path).expanduser()
    files = packed_files(folder, TRAIN)
    tokenizer = load_tokenizer(resolve_model_path(settings.model_name_or_path or tokenizer_of(files)))
    check_made_for(files, tokenizer, settings.max_length)
    train = packed_rows(files, Path(settings.output_dir) / CACHE)
    evaluation = held_out_by_source(folder, settings.eval_size, settings.max_length) if settings.eval_size else None
    identity = identity_of_files(files)
    check_training_rows(Path(settings.output_dir), identity)
    arguments = trl_config(trl.SFTConfig, plan)
    arguments.dataset_kwargs = {"skip_prepare_dataset": True}
    arguments.include_num_input_tokens_seen = "non_padding"
    let_fsdp_run_on_cpu()
    if settings.model_name_or_path is None:
        policy, adapter = new_model(settings, tokenizer), None
    else:
        policy, adapter = build_policy(settings, tokenizer, settings.model_name_or_path)
    if settings.fp8:
        compute_in_fp8(policy, settings.fp8 == "emulate")
    trainer = PretrainTrainer(
        unigrams=unigram_entropy(files),
        model=policy,
        args=arguments,
        train_dataset=train,
        eval_dataset=evaluation,
        data_collator=PackedCollator(tokenizer.pad_token_id, whole=arguments.torch_compile),
        curriculum=curriculum_of(plan, train, arguments),
        processing_class=tokenizer,
        peft_config=adapter,
        callbacks=[ReturnFreedMemory()],
    )
    leave_rows(trainer, identity, [])
    return trainer, trainer


def curriculum_of(plan: Plan, rows: Dataset, arguments: TrainingArguments) -> CurriculumSampler | None:
    """What draws the rows of a run; None: all of them are trained on in turn."""
    settings: PretrainSettings | SFTSettings = plan.settings
    if settings.curriculum is None:
        return None
    assert settings.max_length is not None  # the plan refuses it
    return CurriculumSampler(
        rows["bucket"][:],
        phases_of(settings.curriculum, settings.max_length),
        max_length=settings.max_length,
        rows_each=settings.per_device_train_batch_size,
        rounds_of_step=plan.accumulation_steps,
        steps=settings.max_steps,
        seed=settings.seed,
        rank=arguments.process_index,
        ranks=arguments.world_size,
    )

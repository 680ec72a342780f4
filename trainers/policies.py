"""The trained model, its adapter, and the tokenizer that it reads with."""

from typing import Any

import torch
from peft import LoraConfig
from transformers import PreTrainedModel

from rlt.errors import Refused
from rlt.models.devices import device_type, on, uses_bfloat16
from rlt.models.loading import check_vocabulary, load_policy, load_student, load_tokenizer
from rlt.models.paths import resolve_model_path
from rlt.models.recurrent import past_adapters
from rlt.prompts.styles import ReasoningFormat, load_format
from rlt.prompts.tokenizers import check_tokenizer
from rlt.schema import Generating, Training, Tuning


def tokenizer_and_style(settings: Tuning) -> tuple[Any, ReasoningFormat]:
    """What a run's prompts are rendered with."""
    style = load_format(settings.reasoning_format)
    tokenizer = load_tokenizer(resolve_model_path(settings.model_name_or_path), settings.trust_remote_code)
    check_tokenizer(style, tokenizer)
    return tokenizer, style


def build_frozen(path: str, tokenizer, settings: Generating) -> PreTrainedModel:
    """A student or teacher that is only read, in the dtype of forward passes: on the device, or waiting for its phases
    where `offload_untrained_models` says so."""
    model = load_student(
        path,
        tokenizer,
        dtype=torch.bfloat16 if uses_bfloat16(settings.bf16) else torch.float32,
        attn_implementation=settings.attn_implementation,
        trust_remote_code=settings.trust_remote_code,
    )
    return model if settings.offload_untrained_models else on(device_type(), model)


def build_policy(model: Training, tokenizer, name: str) -> tuple[PreTrainedModel, LoraConfig | None]:
    """The trained model and its adapter's configuration; full fine-tuning keeps float32 master weights."""
    low = torch.bfloat16 if uses_bfloat16(model.bf16) else torch.float32
    policy = load_policy(
        resolve_model_path(name),
        dtype=low if model.use_peft else torch.float32,
        attn_implementation=model.attn_implementation,
        load_in_4bit=model.load_in_4bit,
        load_in_8bit=model.load_in_8bit,
        trust_remote_code=model.trust_remote_code,
    )
    check_vocabulary(policy, tokenizer, name)
    if not model.use_peft:
        return policy, None
    adapter = LoraConfig(
        r=model.lora_r,
        lora_alpha=model.lora_alpha,
        lora_dropout=model.lora_dropout,
        target_modules=model.lora_target_modules,
        exclude_modules=past_adapters(policy) or None,
        task_type="CAUSAL_LM",
    )
    return policy, adapter


def check_embedding(policy: PreTrainedModel, targets: Any) -> None:
    """An adapter on the input alone of a tied embedding unties it, and engines know one embedding then.

    Raises:
        Refused: the targets name such a layer.
    """
    embedding = policy.get_input_embeddings()
    (name,) = (name.rpartition(".")[2] for name, module in policy.named_modules() if module is embedding)
    if policy.config.get_text_config().tie_word_embeddings and not isinstance(targets, str) and name in targets:
        raise Refused(f"lora_target_modules={list(targets)}: {name} is tied to the output head; leave it out")

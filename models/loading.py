"""Loading of policies, frozen models and tokenizers: safetensors only, no remote code unless asked for."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerFast

from models.embedded import embedded_model_path, is_embedded

PAD_CANDIDATES = ("<|pad|>", "<pad>", "[PAD]", "<|fim_pad|>", "<|endoftext|>", "<|finetune_right_pad_id|>", "<unk>")
CPU_BFLOAT16_FLAGS = ("avx512_bf16", "amx_bf16", "bf16")


def supports_bfloat16(device_type: str) -> bool:
    """Whether the device computes in bfloat16, not merely stores it."""
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported()
    info = Path("/proc/cpuinfo")
    words = info.read_text().split() if info.is_file() else []
    return any(flag in words for flag in CPU_BFLOAT16_FLAGS)


def resolve_model_path(name: str) -> str:
    """A local folder for embedded and local models; hub names as they are."""
    return str(embedded_model_path(name)) if is_embedded(name) else str(Path(name).expanduser()) if Path(name).expanduser().is_dir() else name


def load_tokenizer(name_or_path: str, trust_remote_code: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer that pads on the left with a token that does not end a turn.

    Raises:
        ValueError: no special token is free to pad with, or the tokenizer is not a fast one.
    """
    tokenizer = _told(name_or_path, AutoTokenizer.from_pretrained, trust_remote_code=trust_remote_code)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        vocabulary = tokenizer.get_vocab()
        free = [t for t in PAD_CANDIDATES if t in vocabulary and t != tokenizer.eos_token]
        if not free:
            raise ValueError(f"{name_or_path}: no token to pad with; save the tokenizer with a pad_token of its own")
        tokenizer.pad_token = free[0]
    return tokenizer


def load_policy(
    name_or_path: str,
    *,
    dtype: torch.dtype,
    attn_implementation: str = "sdpa",
    load_in_4bit: bool = False,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The model to train; pass float32 for full fine-tuning (master weights)."""
    options = {}
    if load_in_4bit:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    return _told(
        name_or_path,
        AutoModelForCausalLM.from_pretrained,
        dtype=dtype,
        attn_implementation=attn_implementation,
        trust_remote_code=trust_remote_code,
        use_safetensors=True,  # nothing is unpickled
        **options,
    )


def load_frozen(
    name_or_path: str, *, dtype: torch.dtype, attn_implementation: str = "sdpa", trust_remote_code: bool = False
) -> PreTrainedModel:
    """A model that only reads: evaluation mode, no gradients."""
    model = load_policy(
        name_or_path, dtype=dtype, attn_implementation=attn_implementation, trust_remote_code=trust_remote_code
    )
    return model.eval().requires_grad_(False)


def _told(name_or_path: str, load, **options):
    try:
        return load(name_or_path, **options)
    except OSError as error:  # transformers' way to say missing, unreachable, or without safetensors
        raise ValueError(f"{name_or_path} could not be loaded: {str(error).splitlines()[0]}") from error

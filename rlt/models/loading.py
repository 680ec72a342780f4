"""Loading of policies, frozen models and tokenizers: safetensors only, no remote code unless asked for."""

import warnings
from collections.abc import Callable
from json import JSONDecodeError
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from rlt.errors import Refused
from rlt.models.attention import NAME
from rlt.models.devices import supports_bfloat16
from rlt.models.files import check_files
from rlt.models.sharing import way_of_layers

# Tokens that vocabularies keep for padding, or that no text needs; in order of preference.
PAD_CANDIDATES = (
    "<|pad|>",
    "<|padding|>",
    "<pad>",
    "[PAD]",
    "<|fim_pad|>",
    "<|finetune_right_pad_id|>",
    "<|endoftext|>",
    "<unk>",
    "<|reserved_special_token_0|>",
)


def load_tokenizer(name_or_path: str, trust_remote_code: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer that pads on the left with a token that does not end a turn; the vocabulary stays as it is.

    Raises:
        Refused: it cannot be loaded, is not a fast one, or has no token to pad with.
    """
    tokenizer = told(AutoTokenizer.from_pretrained, name_or_path, trust_remote_code=trust_remote_code)
    if not tokenizer.is_fast:
        raise Refused(f"{name_or_path}: its tokenizer has no fast version, which character offsets need")
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.pad_token = _free_pad_token(tokenizer, name_or_path)
    return tokenizer


def _free_pad_token(tokenizer: PreTrainedTokenizerFast, name_or_path: str) -> str:
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    special |= {tokenizer.unk_token}
    for token in (*PAD_CANDIDATES, tokenizer.unk_token):
        if token in special and token not in (None, tokenizer.eos_token, tokenizer.bos_token):
            return token
    raise Refused(
        f"{name_or_path}: no special token is free to pad with (it must differ from {tokenizer.eos_token!r}); set "
        "pad_token in the tokenizer_config.json of a local copy"
    )


def load_policy(
    name_or_path: str,
    *,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str = NAME,
    load_in_4bit: bool = False,
    load_in_8bit: bool = False,
    trust_remote_code: bool = False,
    device: torch.device | str | None = None,
) -> PreTrainedModel:
    """The model to train.

    Args:
        name_or_path: a folder or a hub name, as `resolve_model_path` gives it.
        dtype: of the weights; float32 for full fine-tuning (bfloat16 does not move at small learning rates).
        attn_implementation: `shared_prefix` (where a model cannot, transformers' default), or one of transformers' own,
            with which no prompt is shared.
        load_in_4bit: nf4, computing in bfloat16 where the device does; needs an adapter to be trained.
        load_in_8bit: LLM.int8() (arXiv 2208.07339); likewise.
        trust_remote_code: runs the repository's own Python.
        device: where it goes; None is left to transformers and the launcher.

    Raises:
        Refused: it cannot be loaded, is an adapter alone, or bitsandbytes is missing.
    """
    options: dict[str, Any] = {}
    if load_in_4bit:
        options["quantization_config"] = _nf4(device)
    elif load_in_8bit:
        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    if device is not None:
        options["device_map"] = {"": torch.device(device)}
    model = told(
        AutoModelForCausalLM.from_pretrained,
        name_or_path,
        dtype=dtype,
        # None: SDPA, or the plain form for a model that has none.
        attn_implementation=None if attn_implementation == NAME else attn_implementation,
        trust_remote_code=trust_remote_code,
        use_safetensors=True,  # nothing is unpickled
        **options,
    )
    if load_in_4bit:
        _keep_unpacked(model)
    if getattr(model, "_hf_peft_config_loaded", False):  # transformers would train on with the adapter inside
        raise Refused(f"{name_or_path} is an adapter: name a local folder with it, which is merged into its base")
    if attn_implementation == NAME and way_of_layers(model).way != "rows":
        model.set_attn_implementation(NAME)
    elif _loses_soft_cap(model):
        if attn_implementation != NAME:
            raise Refused(
                f"{name_or_path} caps its attention's scores, and attn_implementation=sdpa leaves that out: "
                "shared_prefix or eager would do"
            )
        model.set_attn_implementation("eager")
    return model


def _loses_soft_cap(model: PreTrainedModel) -> bool:
    """Whether transformers takes SDPA, which has no soft cap (Gemma 2), without a word."""
    config = model.config.get_text_config()
    return config._attn_implementation == "sdpa" and getattr(config, "attn_logit_softcapping", None) is not None


def _nf4(device: torch.device | str | None) -> BitsAndBytesConfig:
    where = torch.device(device).type if device is not None else "cuda" if torch.cuda.is_available() else "cpu"
    compute = torch.bfloat16 if supports_bfloat16(where) else torch.float32
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)


def _keep_unpacked(model: PreTrainedModel) -> None:
    """On a CPU bitsandbytes repacks 4-bit weights at their first product in evaluation, for good; products with packed
    ones have no gradient, so that training went on with that of the residual stream alone (0.50.2)."""
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def load_frozen(
    name_or_path: str,
    dtype: torch.dtype,
    *,
    attn_implementation: str = NAME,
    trust_remote_code: bool = False,
    device: torch.device | str | None = None,
) -> PreTrainedModel:
    """A model that only reads: evaluation mode, no gradients. Arguments and errors as in `load_policy`."""
    model = load_policy(
        name_or_path,
        dtype=dtype,
        attn_implementation=attn_implementation,
        trust_remote_code=trust_remote_code,
        device=device,
    )
    return model.eval().requires_grad_(False)


def load_student(name_or_path: str, tokenizer: PreTrainedTokenizerFast, **options: Any) -> PreTrainedModel:
    """A frozen model that reads the ids of a tokenizer. Options as of `load_frozen`.

    Raises:
        Refused: it cannot be loaded, or as in `check_vocabulary`.
    """
    model = load_frozen(name_or_path, **options)
    check_vocabulary(model, tokenizer, name_or_path)
    return model


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, name_or_path: str) -> None:
    """Every token has a row in the model's embedding.

    Raises:
        Refused: tokens were added to the tokenizer, and the embedding was not resized.
    """
    embedding: Any = model.get_input_embeddings()
    # Not by its weight, of which ZeRO-3 leaves nothing between passes.
    rows, tokens = embedding.num_embeddings, max(tokenizer.get_vocab().values()) + 1
    if tokens > rows:
        raise Refused(
            f"{name_or_path}: its tokenizer has {tokens} tokens and its embedding {rows} rows: call "
            "model.resize_token_embeddings, and save the model again"
        )


def told(load: Callable, name_or_path: str, **options: Any):
    """`load` a model or tokenizer; if transformers cannot, raise `Refused` with the reason and a remedy."""
    try:
        return load(name_or_path, **options)
    except (OSError, SafetensorError, JSONDecodeError) as error:
        # Missing, unreachable, gated, without safetensors; or with a file that is not whole, which is named.
        check_files(Path(name_or_path))
        reason = str(error).strip().partition("\n")[0]
        raise Refused(
            f"{name_or_path} could not be loaded ({reason}): name a folder with safetensors weights and a tokenizer, "
            "or a hub model that is in the local cache or can be downloaded"
        ) from error
    except ValueError as error:
        if "does not support an attention implementation" not in str(error):
            raise
        asked = options["attn_implementation"]
        raise Refused(f"{name_or_path} has no attn_implementation={asked}: shared_prefix or eager would do") from error
    except ImportError as error:  # bitsandbytes or flash attention
        raise Refused(f"{name_or_path} needs a package that is missing: {str(error).strip()}") from error


def quiet_libraries() -> None:
    """Silence the libraries' progress bars and notes: a run has a bar of its own, and the notes are not about it."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(vllm|torch)\.")

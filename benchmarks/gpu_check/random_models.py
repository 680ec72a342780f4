"""Models with random weights, a tokenizer made in code, and rows: what a run needs, without a file to download.

The tokenizer has the bytes, the special tokens of chats, and after them words of one to four letters behind a space.
What a random model samples are mostly such words, and their text is cut into the same tokens again.
"""

import itertools
import json
import random
import string
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from benchmarks.gpu_check.sizes import Shape
from rlt.models.attention import NAME

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
POSITIONS = 40_960
SPREAD = 0.05  # of weights: wide enough that tokens matter to each other
SPACE = "Ġ"  # as byte-level tokenizers write it


def configuration(shape: Shape):
    """transformers' configuration of a shape."""
    shared = {
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.key_heads,
        "intermediate_size": shape.intermediate,
        "vocab_size": shape.vocabulary,
        "tie_word_embeddings": shape.tied,
        "max_position_embeddings": POSITIONS,
        "initializer_range": SPREAD,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 2,
    }
    return Qwen3Config(head_dim=shape.head_size, **shared) if shape.kind == "qwen3" else Qwen2Config(**shared)


def random_model(
    shape: Shape, device: str, dtype: torch.dtype, seed: int = 0, attention: str = NAME
) -> PreTrainedModel:
    """Made where it computes, which takes seconds on a GPU and minutes on a CPU."""
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(configuration(shape), dtype=dtype, attn_implementation="sdpa")
    model.set_attn_implementation(attention)
    return model.to(device).eval()


def tokenizer_of(size: int) -> PreTrainedTokenizerFast:
    """`size` tokens: three special ones, 256 bytes, and words, the shortest first."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["".join(word) for n in range(1, 5) for word in _words(n, size)][: size - len(SPECIAL) - len(alphabet)]
    # A word begins with the word that is a letter shorter, so that its merge follows that one's.
    merges = [((SPACE + word)[:-1], word[-1]) for word in words]
    names = [*SPECIAL, *alphabet, *(SPACE + word for word in words)]
    core = Tokenizer(models.BPE({name: number for number, name in enumerate(names)}, merges))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=SPECIAL[0],
        eos_token=SPECIAL[2],
        additional_special_tokens=[SPECIAL[1]],
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def _words(letters: int, most: int):
    return itertools.islice(itertools.product(string.ascii_lowercase, repeat=letters), most)


def save_model(shape: Shape, folder: Path, device: str, seed: int) -> str:
    """A folder as a trained model leaves it, in bfloat16, with the tokenizer."""
    model = random_model(shape, device, torch.bfloat16, seed, attention="sdpa")
    model.save_pretrained(folder)
    tokenizer_of(shape.vocabulary).save_pretrained(folder)
    return str(folder)


def write_rows(path: Path, count: int, trace_tokens: int) -> str:
    """JSONL of questions, solutions and traces of `trace_tokens` words, each a token."""
    rng = random.Random(0)

    def words(number: int) -> str:
        return " ".join("".join(rng.choices(string.ascii_lowercase, k=2)) for _ in range(number))

    asked = [{"question": f"{number} {words(20)}", "solution": words(24)} for number in range(count)]
    rows = [{**row, "reasoning_trace": words(trace_tokens)} for row in asked]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)

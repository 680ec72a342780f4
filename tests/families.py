"""Byte-level tokenizers trained on the spot, with chat templates that behave as those of known families do.

The templates are in our own words: what a family's template does to one question and its answer, and nothing else.
"""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text().splitlines()
CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\n"
END = "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"

# An empty thought in the last answer, and none in a prompt; a thought of the answer's own is taken out and put back.
QWEN3 = (
    f"{TURNS}{{% set text = m.content.split('</think>')[-1].lstrip('\n') if m.role == 'assistant' else m.content %}}"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ text }}"
    f"{END}{{% endif %}}"
)
# The same, and the prompt begins a thought: an open one, or where thinking is off by default an empty one.
QWEN35 = QWEN3.removesuffix("{% endif %}") + "<think>\n{% endif %}"
QWEN35_SMALL = QWEN3.removesuffix("{% endif %}") + "<think>\n\n</think>\n\n{% endif %}"
# A system turn of its own, with a date, a mode, and the given text without the words that switch the mode.
SMOLLM3 = (
    "<|im_start|>system\n## Metadata\n\nToday Date: {{ strftime_now('%d %B %Y') }}\nReasoning Mode: /think\n\n"
    "## Custom Instructions\n\n{% if messages[0].role == 'system' %}"
    "{{ messages[0].content.replace('/no_think', '').replace('/think', '').rstrip() }}"
    "{% set messages = messages[1:] %}{% else %}You are a helpful assistant.{% endif %}<|im_end|>\n"
    f"{TURNS}{{{{ m.content.lstrip('\n') if m.role == 'assistant' else m.content }}}}{END}{{% endif %}}"
)
# A BOS, a system turn with two dates, and every text trimmed.
LLAMA32 = (
    "{{ bos_token }}{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "{% set given = '' %}{% if messages[0].role == 'system' %}{% set given = messages[0].content | trim %}"
    "{% set messages = messages[1:] %}{% endif %}<|start_header_id|>system<|end_header_id|>\n\n"
    "Cutting Knowledge Date: December 2023\nToday Date: {{ date_string }}\n\n{{ given }}<|eot_id|>"
    "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
# A BOS, no system turn: the third Gemma puts that text before the question, the second one refuses it.
GEMMA_TURNS = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must "
    "alternate') }}{% endif %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ before if loop.first else '' }}{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
GEMMA3 = (
    "{{ bos_token }}{% set before = '' %}{% if messages[0].role == 'system' %}"
    "{% set before = messages[0].content + '\n\n' %}{% set messages = messages[1:] %}{% endif %}" + GEMMA_TURNS
)
GEMMA2 = (
    "{{ bos_token }}{% set before = '' %}{% if messages[0].role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}" + GEMMA_TURNS
)
# A BOS, the system text bare, an open thought in the prompt, and of an answer only what stands behind its thought.
R1_DISTILLED = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}"
    "<|User|>{{ m.content }}{% else %}<|Assistant|>{{ m.content.split('</think>')[-1] }}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)
R1_TOKENS = ["<|begin|>", "<|end|>", "<|User|>", "<|Assistant|>", "<|pad|>"]
LLAMA_TOKENS = ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|reserved_0|>"]
GEMMA_TOKENS = ["<bos>", "<end_of_turn>", "<start_of_turn>", "<pad>"]
# By family: the template, special tokens (with a BOS: it, then the end of a turn), whether there is a BOS.
FAMILIES = {
    "qwen3": (QWEN3, CHATML, False),
    "qwen3.5": (QWEN35, CHATML, False),
    "qwen3.5, small": (QWEN35_SMALL, CHATML, False),
    "smollm3": (SMOLLM3, CHATML, False),
    "llama3.2": (LLAMA32, LLAMA_TOKENS, True),
    "gemma3": (GEMMA3, GEMMA_TOKENS, True),
    "gemma2": (GEMMA2, GEMMA_TOKENS, True),
    "r1, distilled": (R1_DISTILLED, R1_TOKENS, True),
}


def byte_level(
    special: list[str], *, size: int = 700, bos: bool = False, trim: bool = False, text: list[str] = TEXT
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `size` tokens.

    Args:
        special: its special tokens; the pad token is the last one, the end of a turn the third or, with a BOS, the
            second one.
        bos: the first one is a BOS, which the tokenizer adds unless told not to.
        trim: its character ranges leave white space out.
    """
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"special_tokens": special, "initial_alphabet": alphabet, "show_progress": False}
    made.train_from_iterator(text, trainers.BpeTrainer(vocab_size=size, **options))
    steps = [processors.ByteLevel(trim_offsets=trim)]
    if bos:
        steps.append(processors.TemplateProcessing(single=f"{special[0]} $A", special_tokens=[(special[0], 0)]))
    made.post_processor = processors.Sequence(steps)
    roles = {"bos_token": special[0], "eos_token": special[1]} if bos else {"eos_token": special[2]}
    roles["pad_token"] = special[-1] if bos else special[0]
    return PreTrainedTokenizerFast(tokenizer_object=made, clean_up_tokenization_spaces=False, **roles)


def family(name: str, **options) -> PreTrainedTokenizerFast:
    """A tokenizer with the template of a family. Options as of `byte_level`."""
    template, special, bos = FAMILIES[name]
    tokenizer = byte_level(special, bos=bos, **options)
    tokenizer.chat_template = template
    return tokenizer

"""The tokenizer of a preparation: a model's, or a byte-level BPE (arXiv 1508.07909) that its own texts train."""

from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import orjson

from rlt.durable import flush_all
from rlt.formats.record import texts_of
from rlt.preparation.shards import read_shard
from rlt.preparation.split import TRAIN
from rlt.preparation.stage import Task
from rlt.runs.folder import TOKENIZER

END, PAD, TURN, TURN_END = "<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"
FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model"),
    *("vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "additional_chat_templates/*"),
)
SMALLEST = 256 + 4  # tokens of a vocabulary
READ_AT_MOST = 1_000_000_000  # characters; more of them change a vocabulary hardly
CHAT_TEMPLATE = (
    "{% if tools %}{{ '<|im_start|>tools\n' }}{% for tool in tools %}{{ tool | tojson + '\n' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}"
    "{% for call in message['tool_calls'] or [] %}"
    "{{ '<tool_call>\n' + call['function'] | tojson + '\n</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tokenizer_folder(output: Path) -> Path:
    """Where a preparation leaves the tokenizer that it has trained."""
    return output / TOKENIZER


def load(name: str) -> Any:
    """A tokenizer of transformers, by folder or name.

    Raises:
        Refused: as `rlt.models.loading.load_tokenizer`.
    """
    from rlt.models.loading import load_tokenizer
    from rlt.models.paths import resolve_model_path

    return load_tokenizer(resolve_model_path(name))


def tokenizer_files(name: str) -> list[Path]:
    """The files of a local or embedded model's folder that decide about ids and masks; none of a model on the hub.

    Raises:
        Refused: as `resolve_model_path`.
    """
    from rlt.models.paths import resolve_model_path

    folder = Path(resolve_model_path(name))
    return sorted(path for pattern in FILES for path in folder.glob(pattern) if path.is_file())


def fingerprint_of(tokenizer: Any) -> str:
    """Of its vocabulary, of how it cuts texts, and of its chat template: what ids and masks follow from."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    own = orjson.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else {}
    cuts = [own.get(part) for part in ("normalizer", "pre_tokenizer")]
    return sha256(orjson.dumps([vocabulary, cuts, tokenizer.chat_template])).hexdigest()[:16]


def train(vocabulary: int, task: Task, shards: int) -> None:
    """Write the tokenizer of the training split's texts.

    Args:
        vocabulary: at most so many tokens, special ones and the 256 bytes among them.
        task: whose place has the shards.
        shards: of the stage before.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    setattr(bpe, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=False))  # noqa: B010  # its stubs are read-only
    setattr(bpe, "decoder", decoders.ByteLevel())  # noqa: B010
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END, PAD, TURN, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_texts(task, shards), trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=END, eos_token=END, pad_token=PAD, clean_up_tokenization_spaces=False
    )
    made.add_special_tokens({"additional_special_tokens": [TURN, TURN_END]})
    made.chat_template = CHAT_TEMPLATE
    folder = tokenizer_folder(task.place.output)
    folder.mkdir(exist_ok=True)
    made.save_pretrained(folder)
    flush_all(folder)


def _texts(task: Task, shards: int) -> Iterator[str]:
    """Of each shard as many characters."""
    done = 0
    for number in range(shards):
        left = READ_AT_MOST // shards
        for record in read_shard(task.place.given(number)):
            if left <= 0:
                break
            done += 1
            task.progress(done)
            if record["meta"].get("split", TRAIN) == TRAIN:
                for text in texts_of(record):
                    left -= len(text)
                    yield text

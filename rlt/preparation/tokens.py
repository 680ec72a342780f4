"""Token ids, and which of them a loss counts: conversations by the model's own chat template, texts with their end.

A text is cut where trained and other characters meet, and each piece is tokenised for itself, as prompt and answer
are at sampling time. So the mask comes from lengths, never from ids, and no token lies on both sides.

<output>/tokens/train-00000.parquet      and validation-00000.parquet; the stage's own shards keep the records
<output>/tokenizer/                      the one that `train_tokenizer` asks for
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from rlt.errors import Refused
from rlt.formats.record import Dropped, Record
from rlt.models.embedded import is_embedded
from rlt.places import LOCAL_STARTS
from rlt.preparation.ledger import Counts
from rlt.preparation.split import TRAIN, sides
from rlt.preparation.stage import Pass, RowStage, Task, in_batches, write_judged
from rlt.preparation.tokenizers import SMALLEST, fingerprint_of, load, tokenizer_files, tokenizer_folder, train
from rlt.preparation.write import as_rows
from rlt.prompts.examples import student_example, teacher_example
from rlt.prompts.rows import add_teaching_prompt
from rlt.prompts.styles import load_format
from rlt.runs.folder import TOKENIZER, TOKENS
from rlt.schema import PrepareSettings
from rlt.tokens.files import TOKEN_COLUMNS, array_file, writing_arrays
from rlt.tokens.rendering import ChatRenderer, Rendered

HARMONY = "harmony"  # a tokenizer that is no model's: the format of gpt-oss (harmony.py)
CHAT, TEACHER, STUDENT = "chat", "teacher", "student"  # values of tokens_as
LOOKED_AT = 64  # of each shard's first rows: whether decoding gives the text back
NO_TOKEN = "no token that is trained"
UNKNOWN = "text that the tokenizer has no tokens for"


class Encoded(NamedTuple):
    """A row's tokens, and for each whether it is trained."""

    ids: list[int]
    mask: list[int]


class Encoder:
    """Records to tokens, by a tokenizer of transformers.

    Attributes:
        fingerprint: of the vocabulary.
        counted: figures beside rows.
    """

    def __init__(self, name: str):
        from tokenizers import Tokenizer

        self.tokenizer = load(name)
        self.render = ChatRenderer(self.tokenizer) if self.tokenizer.chat_template else None
        self.name, self.fingerprint = name, fingerprint_of(self.tokenizer)
        self.rendered: Any = self.tokenizer.backend_tokenizer
        # Of a plain text "<|endoftext|>" is text too.
        self.plain: Any = Tokenizer.from_str(self.rendered.to_str())
        self.plain.encode_special_tokens = True
        self.end = self.tokenizer.convert_tokens_to_ids(end_of_text(self.tokenizer))
        self.counted: Counter[str] = Counter()

    def __call__(self, records: list[Record]) -> list[Encoded | Dropped]:
        texts = [record["text"] for record in records if record["kind"] == "text"]
        plain = iter(self.plain.encode_batch_fast(texts, add_special_tokens=False))
        found = [None if record["kind"] == "text" else self._rendered(record) for record in records]
        pieces = [piece for one in found if isinstance(one, Rendered) for piece, _ in cut(one)]
        encoded = iter(self.rendered.encode_batch_fast(pieces, add_special_tokens=False))
        results = []
        for record, one in zip(records, found, strict=True):
            if one is None:
                ids = next(plain).ids
                judged = self._judged(Encoded(ids, [1] * len(ids)), record["text"])
                results.append(judged if isinstance(judged, Dropped) else with_end(judged, self.end))
            elif isinstance(one, Dropped):
                results.append(one)
            else:
                self.counted["turns_not_trained"] += one.untrained
                parts = [(next(encoded).ids, trained) for _, trained in cut(one)]
                ids = [token for part, _ in parts for token in part]
                mask = [trained for part, trained in parts for _ in part]
                results.append(self._judged(Encoded(ids, mask), one.text))
        return results

    def _rendered(self, record: Record) -> Rendered | Dropped:
        if self.render is None:
            raise Refused(f"tokenizer={self.name} has no chat template, which rows of kind {record['kind']} need")
        return self.render(record)

    def _judged(self, row: Encoded, text: str) -> Encoded | Dropped:
        if 1 not in row.mask:
            return Dropped(NO_TOKEN)
        unknown = self.tokenizer.unk_token_id
        if unknown is not None and unknown in row.ids and self.tokenizer.unk_token not in text:
            return Dropped(UNKNOWN)
        if self.counted["rows_decoded"] < LOOKED_AT:
            self.counted["rows_decoded"] += 1
            self._look_at(row, text)
        return row

    def _look_at(self, row: Encoded, text: str) -> None:
        """Raises:
        Refused: decoding does not give the text back.
        """
        decoded = self.tokenizer.decode(row.ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        normalizer = self.rendered.normalizer
        wanted = {text, normalizer.normalize_str(text)} if normalizer else {text}
        if decoded not in wanted and decoded.lstrip() not in {one.lstrip() for one in wanted}:
            raise Refused(
                f"tokenizer={self.name} does not give a text back that it has cut into tokens: it changes what a model "
                "would learn; name another"
            )


class ExampleEncoder(Encoder):
    """Rows with a reasoning trace as a teacher's warm-up or a student's distillation trains on them.

    Args:
        learner: teacher or student.
        style: a reasoning format's name or file.
        longest_prompt: tokens of a teacher's.
    """

    def __init__(self, name: str, learner: str, style: str, longest_prompt: int):
        super().__init__(name)
        self.learner, self.style, self.longest_prompt = learner, load_format(style), longest_prompt

    def __call__(self, records: list[Record]) -> list[Encoded | Dropped]:
        return [self._example(record) for record in records]

    def _example(self, record: Record) -> Encoded | Dropped:
        row = as_rows(record)
        if isinstance(row, Dropped):
            return row
        if not (row["reasoning_trace"] or "").strip():
            return Dropped("no reasoning_trace")
        if self.learner == STUDENT:
            made = student_example(self.tokenizer, self.style, row, None)
        else:
            reason = add_teaching_prompt(row, self.tokenizer, self.style, self.longest_prompt, self.tokenizer)
            if reason is not None:
                return Dropped(reason)
            made = teacher_example(self.tokenizer, self.style, row)
        return Encoded(made["input_ids"], made["completion_mask"])


def with_end(row: Encoded, end: int) -> Encoded:
    """A text's tokens and the one that says that it is over, which is learned too."""
    return Encoded([*row.ids, end], [*row.mask, 1])


def cut(rendered: Rendered) -> Iterator[tuple[str, int]]:
    """The pieces of a text that are tokenised apart, and whether each is trained; none is empty."""
    at = 0
    for start, end in rendered.spans:
        for piece, trained in ((rendered.text[at:start], 0), (rendered.text[start:end], 1)):
            if piece:
                yield piece, trained
        at = end
    if at < len(rendered.text):
        yield rendered.text[at:], 0


def end_of_text(tokenizer: Any) -> str:
    """What stands behind a text: `<|endoftext|>` where the vocabulary has it, else what ends a sequence."""
    named = "<|endoftext|>"
    return named if named in tokenizer.all_special_tokens else tokenizer.eos_token


class Tokens(RowStage):
    """Token ids and loss masks, beside the records."""

    name = "tokens"
    keys = ("tokenizer", "train_tokenizer", "tokens_as", "reasoning_format", "max_prompt_length")
    version = 2
    outputs = (TOKENS, TOKENIZER)

    def __init__(self, settings: PrepareSettings):
        super().__init__(settings)
        self.encoder: Any = None

    def check(self) -> None:
        named, size = self.settings.tokenizer, self.settings.train_tokenizer
        if (named is None) == (size is None):
            raise Refused(f"tokenizer={named} and train_tokenizer={size}: stage tokens needs one of them")
        if self.settings.tokens_as not in (CHAT, TEACHER, STUDENT):
            raise Refused(f"tokens_as={self.settings.tokens_as}: use {CHAT}, {TEACHER} or {STUDENT}")
        if self.settings.tokens_as != CHAT and named in (None, HARMONY):
            raise Refused(f"tokens_as={self.settings.tokens_as} needs the tokenizer of the model that will be trained")
        if size is not None and size < SMALLEST:
            raise Refused(f"train_tokenizer={size} must be at least {SMALLEST}: 256 bytes and the special tokens")
        if named is not None and named != HARMONY and not is_embedded(named) and named.startswith(LOCAL_STARTS):
            folder = Path(named).expanduser()
            if not (folder / "tokenizer.json").is_file():
                raise Refused(f"tokenizer={named}: there is no tokenizer.json")

    def folders(self) -> tuple[str, ...]:
        return (TOKENS,) if self.settings.train_tokenizer is None else self.outputs

    def files(self) -> list[Path]:
        named = self.settings.tokenizer
        style = Path(self.settings.reasoning_format).expanduser()
        own = tokenizer_files(named) if named and named != HARMONY else []
        return [*own, style] if style.is_file() else own

    def passes(self) -> list[Pass]:
        learn = [Pass("tokenizer", self.learn, 1)] if self.settings.train_tokenizer else []
        return [*learn, Pass("rows", self.task)]

    def learn(self, task: Task) -> None:
        """The tokenizer of the training split's own texts."""
        assert self.settings.train_tokenizer is not None
        train(self.settings.train_tokenizer, task, self.settings.engine_tasks)

    def start(self, task: Task) -> None:
        named = self.settings.tokenizer
        if named == HARMONY:
            self.encoder = import_module("rlt.tokens.harmony").HarmonyEncoder()
            return
        name = str(tokenizer_folder(task.place.output)) if named is None else named
        learner = self.settings.tokens_as
        if learner == CHAT:
            self.encoder = Encoder(name)
        else:
            style, longest = self.settings.reasoning_format, self.settings.max_prompt_length
            self.encoder = ExampleEncoder(name, learner, style, longest)

    def task(self, task: Task) -> Counts:
        self.start(task)
        with ExitStack() as files:
            name = self.settings.tokenizer or TOKENIZER
            notes = {"tokenizer": self.encoder.fingerprint, "tokenizer_name": name}
            notes["tokens_as"] = self.settings.tokens_as
            write = {
                split: files.enter_context(
                    writing_arrays(array_file(task.place.output / TOKENS, split, task.number), TOKEN_COLUMNS, notes)
                )
                for split in sides(self.settings)
            }
            figures: Counter[str] = Counter()

            def judged() -> Iterator[tuple[Record, Record | Dropped]]:
                for record, found in self._encoded(task):
                    if not isinstance(found, Dropped):
                        figures.update(tokens=len(found.ids), trained_tokens=sum(found.mask))
                        write[record["meta"].get("split", TRAIN)](as_row(record, found))
                    yield record, found if isinstance(found, Dropped) else record

            counts = write_judged(task, judged())
        counts.notes.update(figures)
        counts.notes.update({key: count for key, count in self.encoder.counted.items() if count})
        return counts

    def _encoded(self, task: Task) -> Iterator[tuple[Record, Encoded | Dropped]]:
        for some in in_batches(task.rows()):
            yield from zip(some, self.encoder(some), strict=True)


def as_row(record: Record, found: Encoded) -> dict[str, Any]:
    """A row of the file."""
    own = {key: record[key] for key in ("id", "source", "kind")}
    return {"input_ids": found.ids, "loss_mask": found.mask, "length": len(found.ids), **own}

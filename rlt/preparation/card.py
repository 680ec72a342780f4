"""The data card: what was read, what each stage kept and dropped and why, licences, hashes, a picture of the funnel.

Texts are shown of rows that a threshold only just kept or dropped, in stages after the one that replaces personal data.
"""

import heapq
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rlt.durable import digest, read_json, write_whole, written_whole
from rlt.formats.inputs import MANIFEST, parse_sources
from rlt.formats.record import Record, texts_of
from rlt.preparation.pii import Pii
from rlt.preparation.run import StageResult
from rlt.preparation.shards import read_shard
from rlt.preparation.stages import STAGES as BY_NAME
from rlt.runs.folder import CARD, FUNNEL, PREPARED
from rlt.schema import PrepareSettings

EXAMPLES = 20
EXCERPT = 120  # characters


def write_card(settings: PrepareSettings, results: list[StageResult]) -> None:
    """DATA_CARD.md and funnel.png in the output folder."""
    output = Path(settings.output_dir)
    draw_funnel(output / FUNNEL, results)
    parts = (
        [f"# {settings.run_name}: prepared data", made_from(results), f"![rows kept by each stage]({FUNNEL})"],
        ["## Sources", table(("source", "path", "format", "licence", "rows", "kept"), source_rows(settings, results))],
        ["## Stages", table(("stage", "in", "kept", "dropped", "characters kept"), stage_rows(results))],
        ["## Why rows were dropped", table(("stage", "reason", "rows"), reason_rows(results))],
        ["## Other counts", table(("stage", "what", "count"), note_rows(results))],
        ["## Close to a threshold", *examples(results)],
        ["## Files", table(("file", "bytes", "hash"), [*input_rows(output), *written_rows(output)])],
        ["## Settings", f"```json\n{json.dumps(settings_of_card(settings), indent=1)}\n```"],
    )
    write_whole(output / CARD, "\n\n".join(line for part in parts for line in part) + "\n")


def made_from(results: list[StageResult]) -> str:
    return f"Made from settings and inputs with the hash {results[-1].key}."


def is_of(card: Path, results: list[StageResult]) -> bool:
    """Whether a card is there, and of these results."""
    return card.is_file() and made_from(results) in card.read_text(encoding="utf-8")


def table(heads: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    lines = [_line(heads), _line("---" for _ in heads), *map(_line, rows)]
    return "\n".join(lines) if len(lines) > 2 else "None."


def _line(cells: Iterable[Any]) -> str:
    texts = (f"{cell:,}" if isinstance(cell, int) else str(cell).replace("|", "\\|") for cell in cells)
    return f"| {' | '.join(texts)} |"


def source_rows(settings: PrepareSettings, results: list[StageResult]) -> Iterator[tuple]:
    first, last = results[0].counts.sources, results[-1].counts.sources
    for source in parse_sources(settings.sources):
        read, kept = (counts.get(source.name, {}) for counts in (first, last))
        told = source.format or "by its columns"
        yield source.name, f"`{source.path}`", told, source.license or "unknown", read.get("in", 0), kept.get("kept", 0)


def stage_rows(results: list[StageResult]) -> Iterator[tuple]:
    for result in results:
        counts = result.counts
        yield result.name, counts.read, counts.kept, counts.read - counts.kept, counts.characters


def reason_rows(results: list[StageResult]) -> Iterator[tuple]:
    for result in results:
        for reason, count in sorted(result.counts.dropped.items(), key=lambda item: (-item[1], item[0])):
            yield result.name, reason, count


def note_rows(results: list[StageResult]) -> Iterator[tuple]:
    return ((result.name, note, count) for result in results for note, count in sorted(result.counts.notes.items()))


def input_rows(output: Path) -> Iterator[tuple]:
    manifest = read_json(output / MANIFEST) or {}
    return ((f"input `{name}`", entry["bytes"], f"xxh3 {entry['xxh3']}") for name, entry in sorted(manifest.items()))


def written_rows(output: Path) -> Iterator[tuple]:
    files = sorted(path for path in (output / PREPARED).glob("*") if path.stat().st_size)
    return ((f"`{PREPARED}/{path.name}`", path.stat().st_size, f"sha256 {digest(path)}") for path in files)


def settings_of_card(settings: PrepareSettings) -> dict[str, Any]:
    """Those that decide about rows: not where they are made, nor by how many."""
    keys = {key for name in settings.stages for key in BY_NAME[name](settings).depends_on()} - {"sources"}
    return {key: getattr(settings, key) for key in sorted(keys)}


def examples(results: list[StageResult]) -> Iterator[str]:
    """Of each stage with a score: the highest that are kept, the lowest that are dropped."""
    names = [result.name for result in results]
    cleaned = results[names.index(Pii.name) + 1 :] if Pii.name in names else []
    found = False
    for result in cleaned:
        keys = BY_NAME[result.name].score_keys
        kept = heapq.nlargest(EXAMPLES, _scored(result.folder / "shards", ("meta", *keys)), key=_order) if keys else []
        dropped = heapq.nsmallest(EXAMPLES, _scored(result.folder / "dropped", ("score",)), key=_order)
        for title, some in (("highest kept", kept), ("lowest dropped", dropped)):
            if some:
                found = True
                yield f"{result.name}, {title}:"
                yield table(("score", "id", "text"), ((f"{s:.3f}", r["id"], f"`{excerpt(r)}`") for s, r in some))
    if not found:
        yield "None."


def _scored(folder: Path, keys: tuple[str, ...]) -> Iterator[tuple[float, Record]]:
    """Rows that have a score, where these keys lead to in them."""
    for path in sorted(folder.iterdir()):
        for row in read_shard(path):
            score: Any = row
            for key in keys:
                score = None if score is None else score.get(key)
            if score is not None:
                yield score, row


def _order(pair: tuple[float, Record]) -> tuple[float, str]:
    return pair[0], pair[1]["id"]


def excerpt(record: Record) -> str:
    """The beginning of a record's texts, on one line."""
    text = " ".join(" / ".join(texts_of(record)).split())
    return (text[:EXCERPT] + "…" if len(text) > EXCERPT else text).replace("`", "'")


def draw_funnel(path: Path, results: list[StageResult]) -> None:
    """Rows kept after each stage, as bars; the lighter part is what the stage dropped."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 0.4 * len(results) + 1), layout="constrained")
    axes = figure.subplots()
    names, counts = [r.name for r in results], [r.counts for r in results]
    axes.barh(names, [c.read for c in counts], color="#d5dbe3")
    bars = axes.barh(names, [c.kept for c in counts], color="#3b6ea5")
    labels = [f"{c.kept:,}" + (f"  (−{c.read - c.kept:,})" if c.kept < c.read else "") for c in counts]
    axes.bar_label(bars, labels=labels, padding=3)
    axes.invert_yaxis()
    axes.set_xlabel("rows")
    axes.margins(x=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    with written_whole(path) as aside:
        figure.savefig(aside, format="png", dpi=120, metadata={"Software": None})

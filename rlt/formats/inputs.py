"""What is read: the files behind `sources`, and a manifest of them that stops a run when one changed meanwhile."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import xxhash

from rlt.durable import read_json, write_whole
from rlt.errors import Refused
from rlt.formats import FORMATS
from rlt.places import PREPARED, looked_in

MANIFEST = "inputs.json"
PACKAGED = "corpus/"  # a source of the default runs, made of packages that are installed (corpora.py)
GLOB = "*?["
COMPRESSED = ("", ".gz", ".zst")
SUFFIXES = (*(f"{kind}{end}" for kind in (".jsonl", ".json", ".csv", ".txt") for end in COMPRESSED), ".parquet")
KINDS = ("prose", "maths", "code")  # of rules: `meta.kind` of a record
# Names of evaluations, as words of a file's, a folder's or a hub set's name: whole ones, and those with a test part.
EVALUATIONS = re.compile(
    r"(?<![a-z])(bfcl|berkeley[-_]?function[-_]?calling|human[-_]?eval|mmlu|gpqa|theoremqa|mbpp"
    r"|math[-_]?500(?!\d)|aime[-_]?(20)?2[4-9](?!\d))(plus|pro|x)?(?![a-z])",
    re.I,
)
TESTED = re.compile(r"(?<![a-z])(gsm8k|arc)(?![a-z])", re.I)
TEST = re.compile(r"(?<![a-z])test(?![a-z])", re.I)
TRAINING = re.compile(r"mmlu.*auxiliary_train|mbpp.*(?<![a-z])train(?![a-z])", re.I)  # parts of them that are none
NAMES = 3  # of a path, from its end: the file, its folder, and the folder of that
BLOCK = 2**22
TASK_BYTES = 2**23  # a second or two of reading


@dataclass(frozen=True)
class Source:
    """One entry of `sources`.

    Args:
        name: what its rows are called by; the file's stem, if none is given.
        path: a file, a folder, a glob, a hub's data set, or `corpus/<name>`.
        format: a name of `formats.FORMATS`; None: told by its columns, where that is certain.
        license: of its rows, as text; None: unknown.
        kind: prose, maths or code, whose rules it is judged by; None: by its format.
        max_rows: at most so many are read.
        split, config, revision: of a hub's data set.
    """

    name: str
    path: str
    format: str | None = None
    license: str | None = None
    kind: str | None = None
    max_rows: int | None = None
    split: str = "train"
    config: str | None = None
    revision: str | None = None


@dataclass(frozen=True)
class Input:
    """What one task reads.

    Args:
        files: of the source, each with its number; (0, None) of a source that has none of its own.
        several: whether the source has more files than one, so that a row's number needs its file's.
    """

    source: Source
    files: tuple[tuple[int, Path | None], ...]
    several: bool


def parse_sources(entries: list[Any]) -> list[Source]:
    """The sources of the key `sources`: paths, or {path, name, format, ...}.

    Raises:
        Refused: an entry is neither, has an unknown key, or two have one name.
    """
    known = {field.name for field in fields(Source)}
    sources: list[Source] = []
    for entry in entries:
        if isinstance(entry, str):
            entry = {"path": entry}
        if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
            raise Refused(f"sources: {entry} must be a path, or have one: {{path: ..., format: ..., license: ...}}")
        if unknown := sorted(entry.keys() - known):
            raise Refused(f"sources: {unknown[0]!r} of {entry['path']} is none of {', '.join(sorted(known))}")
        for key, value in entry.items():
            wanted = int if key == "max_rows" else str
            if value is not None and (not isinstance(value, wanted) or isinstance(value, bool)):
                raise Refused(f"sources: {key}={value!r} of {entry['path']} must be {wanted.__name__}")
        if entry.get("kind") not in (None, *KINDS):
            raise Refused(f"sources: kind={entry['kind']} of {entry['path']} is none of {', '.join(KINDS)}")
        if entry.get("max_rows") is not None and entry["max_rows"] < 1:
            raise Refused(f"sources: max_rows={entry['max_rows']} of {entry['path']} must be at least 1")
        stem = Path(entry["path"]).name.split(".")[0].strip(GLOB) or "source"
        given: dict[str, Any] = {"name": stem, **entry}
        sources.append(Source(**given))
        refuse_evaluation(sources[-1])
    if not sources:
        raise Refused("sources is empty: name files, as in sources=[my/rows.jsonl]")
    for number, source in enumerate(sources):
        if source.name in [other.name for other in sources[:number]]:
            raise Refused(f"sources: two are called {source.name}: give them a name each, {{path: ..., name: ...}}")
    return sources


def refuse_evaluation(source: Source) -> None:
    """Of what a source is called; `files_of` looks at the files behind it.

    Raises:
        Refused: the source is an evaluation set, as its name says; by name alone, whatever its rows are.
    """
    path = Path(source.path).expanduser()
    if _on_hub(source):
        _refuse_names(source.path, [path.name, f"{source.config}/{source.split}"])
    elif not path.is_dir() and not _is_glob(source):
        _refuse_names(source.path, path.parts[-NAMES:])


def _refuse_names(place: str | Path, names: Sequence[str]) -> None:
    """Raises:
    Refused: the last two names have an evaluation's in them, or one has that is followed by the word test.
    """
    for number, name in enumerate(names):
        rest = "/".join(names[number:])
        whole = EVALUATIONS.search(name)
        as_a_whole = whole and number >= len(names) - 2 and not TRAINING.search(rest)
        if as_a_whole or ((whole or TESTED.search(name)) and TEST.search(rest)):
            raise Refused(
                f"sources: {place} is an evaluation set, as its name says: no run trains on it; name it in "
                "evaluation_sets, or rename it if it is none"
            )


def _is_glob(source: Source) -> bool:
    """A file may have such characters in its name."""
    return any(character in source.path for character in GLOB) and not Path(source.path).expanduser().exists()


def _on_hub(source: Source) -> bool:
    """Whether a source is called as a hub's data set is, and nothing of that name is here."""
    path = Path(source.path).expanduser()
    as_there = source.path.count("/") == 1 and not path.suffix and not _is_glob(source)
    return as_there and not source.path.startswith(PACKAGED) and not path.exists() and not path.is_symlink()


def files_of(source: Source) -> list[Path]:
    """The files of a source, sorted; none of a packaged corpus, or of a hub's data set.

    Raises:
        Refused: there is no such file, it cannot be read, or is an evaluation set by its name or that of its folders.
    """
    if source.path.startswith(PACKAGED):
        return []
    path = Path(source.path).expanduser()
    if _is_glob(source):
        anchor = Path(path.anchor) if path.is_absolute() else Path()
        return _readable(sorted(anchor.glob(str(path.relative_to(anchor)))), f"{source.path} matches no file")
    if path.is_dir() and (path / PREPARED).is_dir():  # of an earlier preparation, what came out of it
        path = path / PREPARED
    if path.is_dir():
        found = sorted(p for p in path.iterdir() if p.name.endswith(SUFFIXES))
        return _readable(found, f"{source.path} is a folder without a file of {', '.join(SUFFIXES)}")
    if _on_hub(source):
        return []
    return _readable([path], f"{source.path} does not exist{looked_in(source.path)}")


def _readable(paths: list[Path], otherwise: str) -> list[Path]:
    """The files among them.

    Raises:
        Refused: there is none, one is of no kind that is read, or is a link that leads nowhere.
    """
    found = []
    for path in paths:
        if path.is_symlink() and not path.exists():
            raise Refused(f"sources: {path} is a link that leads nowhere")
        if path.is_file():
            if not path.name.endswith(SUFFIXES):
                raise Refused(f"sources: {path} is none of {', '.join(SUFFIXES)}")
            for called in (path, path.resolve()):
                _refuse_names(path, called.parts[-NAMES:])
            found.append(path)
    if not found:
        raise Refused(f"sources: {otherwise}")
    return found


def check_inputs(sources: list[Source]) -> list[tuple[Source, Path | None]]:
    """Each file with its source, in order; None for a source that has none of its own.

    Raises:
        Refused: as `files_of`, or one file is named twice.
    """
    seen: dict[Path, str] = {}
    found: list[tuple[Source, Path | None]] = []
    for source in sources:
        files = files_of(source)
        found += [(source, file) for file in files] or [(source, None)]
        for file in files:
            if (place := file.resolve()) in seen:
                raise Refused(f"sources: {file} is named twice, by {seen[place]} and by {source.name}")
            seen[place] = source.name
    return found


def inputs_of(entries: list[Any]) -> list[Input]:
    """What the tasks of the first stage read, of the key `sources`: files of one source, each task so many that they
    are worth a process; all of a source with `max_rows` or of a format whose rows depend on one another.

    Raises:
        Refused: as `check_inputs`.
    """
    together: dict[Source, list[Path | None]] = {}
    for source, path in check_inputs(parse_sources(entries)):
        together.setdefault(source, []).append(path)
    inputs = []
    for source, paths in together.items():
        numbered = tuple(enumerate(paths))
        several = len(paths) > 1
        grouped = source.format in FORMATS and FORMATS[source.format].group is not None
        parts = [numbered] if source.max_rows or grouped else _tasks(numbered)
        inputs += [Input(source, part, several) for part in parts]
    return inputs


def _tasks(files: tuple[tuple[int, Path | None], ...]) -> Iterator[tuple[tuple[int, Path | None], ...]]:
    """Neighbours go together until they have `TASK_BYTES`."""
    some, size = [], 0
    for number, path in files:
        some.append((number, path))
        size += path.stat().st_size if path is not None else 0
        if size >= TASK_BYTES:
            yield tuple(some)
            some, size = [], 0
    if some:
        yield tuple(some)


def fingerprint(path: Path) -> str:
    """xxh3-128 of a file's content, in hex."""
    state = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            state.update(block)
    return state.hexdigest()


def manifest_of(files: list[Path]) -> dict[str, dict[str, Any]]:
    return {str(f): {"bytes": f.stat().st_size, "xxh3": fingerprint(f)} for f in files}


def keep_to_inputs(output: Path, files: list[Path]) -> dict[str, dict[str, Any]]:
    """Note what the inputs are, or see that they are what the run began with: what stages decide is kept by row number.

    Raises:
        Refused: an input changed, was added or is gone.
    """
    now, before = manifest_of(files), read_json(output / MANIFEST)
    if before is None:
        write_whole(output / MANIFEST, json.dumps(now, indent=1))
        return now
    for name in sorted({*before, *now}):
        if before.get(name) != now.get(name):
            what = "was added" if name not in before else "is gone" if name not in now else "changed"
            raise Refused(
                f"input {name} {what} since this preparation began in {output}: overwrite_output_dir=true starts again"
            )
    return now

"""Rows of files, as a stream: JSON lines, JSON, CSV, Parquet and text, under gzip and zstd too.

A line that is no row is `Bad`, with its reason; a file that cannot be read to its end is refused. What is repaired on
the way is counted in `notes`.
"""

import codecs
import csv
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import zstandard

from rlt.data.files import read_file
from rlt.errors import Refused
from rlt.formats.corpora import corpus_rows
from rlt.formats.inputs import COMPRESSED, PACKAGED, Source
from rlt.formats.plain import NotPlain, parse_object, plain
from rlt.schema import ReadConfig

BLOCK = 2**16  # bytes read at once; unpacked they may be a thousand times as many
SHOWN = 1000  # characters of a line that is no row, for the file of what was dropped
MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
UNREADABLE = {b"PAR1": "Parquet", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"PK\x03\x04": "zip"}
ENCODINGS = (
    *((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32")),
    *((codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16")),
)

Row = dict[str, Any]


@dataclass(frozen=True)
class Bad:
    """What stands in a row's place and is none."""

    reason: str
    given: str = ""


class Reader:
    """One file.

    Args:
        longest: bytes; a longer line (of JSON and text files: row) is `Bad`.
        lines: of a text file that are a row; None: the whole file is one.
        notes: what is repaired, by what it is.
    """

    def __init__(self, path: Path, longest: int, lines: int | None, notes: Counter[str]):
        self.path, self.longest, self.lines, self.notes = path, longest, lines, notes

    def rows(self) -> Iterator[Row | Bad]:
        """Raises:
        Refused: the file cannot be read, or is damaged; says where.
        """
        name = self.path.name.removesuffix(".gz").removesuffix(".zst")
        kinds = {".jsonl": self.json_lines, ".json": self.json, ".csv": self.csv, ".txt": self.text}
        try:
            if name.endswith(".parquet"):
                yield from plain_rows(read_file(self.path), self.notes)
            else:
                yield from kinds[Path(name).suffix]()
        except OSError as error:
            raise Refused(f"{self.path} cannot be read ({error.strerror or error})") from None

    def blocks(self) -> Iterator[bytes]:
        """The content, unpacked, as UTF-8 without a mark at its begin."""
        with self.path.open("rb") as file:
            given: Iterator[bytes] = iter(lambda: file.read(BLOCK), b"")
            first = next(given, b"")
            for magic, kind in UNREADABLE.items():
                if first.startswith(magic):
                    raise Refused(f"{self.path} is a {kind} file: unpack it, or give it its name")
            packed = next((kind for magic, kind in MAGIC.items() if first.startswith(magic)), None)
            if self.path.suffix != {"gzip": ".gz", "zstd": ".zst"}.get(packed or "", self.path.suffix) or (
                packed is None and self.path.suffix in COMPRESSED[1:] and first
            ):
                self.notes[f"files that are {packed or 'not packed'}, unlike their names"] += 1
            given = chain([first], given)
            yield from self._decoded(given if packed is None else self._unpacked(given, packed))

    def _unpacked(self, given: Iterator[bytes], kind: str) -> Iterator[bytes]:
        unpacker: Any = None
        try:
            for block in given:
                while block and (unpacker is not None or block.strip(b"\0")):
                    if unpacker is None:
                        new = zlib.decompressobj(31) if kind == "gzip" else zstandard.ZstdDecompressor().decompressobj()
                        unpacker = new
                    yield unpacker.decompress(block)
                    block = unpacker.unused_data if unpacker.eof else b""
                    unpacker = None if unpacker.eof else unpacker
        except (zlib.error, zstandard.ZstdError) as error:
            raise Refused(f"{self.path} is damaged ({error}): fetch it again") from None
        if unpacker is not None:
            raise Refused(f"{self.path} is cut short: its {kind} data have no end; fetch it again")

    def _decoded(self, given: Iterator[bytes]) -> Iterator[bytes]:
        given = filter(None, given)
        first = next(given, b"")
        mark, encoding = next(((m, e) for m, e in ENCODINGS if first.startswith(m)), (b"", None))
        if encoding is not None:
            self.notes["files with a byte order mark"] += 1
        if encoding in (None, "utf-8"):
            yield first[len(mark) :]
            yield from given
            return
        assert encoding is not None
        decode = codecs.getincrementaldecoder(encoding)().decode
        try:
            for block in chain([first], given):
                yield decode(block).encode()
            yield decode(b"", True).encode()
        except UnicodeError:  # half a character, or half of a pair
            raise Refused(f"{self.path} is not {encoding.upper()} text, as its first bytes say") from None

    def split(self) -> Iterator[bytes | None]:
        """Lines without their ends; None in the place of one that is too long."""
        parts: list[bytes] = []
        size = 0
        for block in self.blocks():
            head, *rest = block.split(b"\n")
            size += len(head)
            if size <= self.longest:
                parts.append(head)
            for line in rest:
                yield b"".join(parts) if size <= self.longest else None
                parts, size = [line] if len(line) <= self.longest else [], len(line)
        if size:
            yield b"".join(parts) if size <= self.longest else None

    def json_lines(self) -> Iterator[Row | Bad]:
        for line in self.split():
            if line is None:
                yield Bad("line is too long")
            elif not line.strip():
                self.notes["blank lines"] += 1
            else:
                yield self._object(line)

    def _object(self, line: bytes) -> Row | Bad:
        try:
            return parse_object(line, self.notes)
        except NotPlain as error:
            return Bad(error.reason, line[: 4 * SHOWN].decode("utf-8", "replace")[:SHOWN])

    def json(self) -> Iterator[Row | Bad]:
        """A list of rows, an object of them keyed by numbers, or JSON lines under another name."""
        scan = Scan(self.strings(), self.path, self.longest)
        begin = scan.peek()
        if begin == "{" and not scan.is_keyed():
            self.notes["files of JSON lines that are called .json"] += 1
            yield from self.json_lines()
            return
        if begin not in ("[", "{", ""):
            raise Refused(f"{self.path} must hold a list of objects, or an object of them")
        for value in scan.items():
            if not isinstance(value, dict):
                yield Bad("not a JSON object", str(value)[:SHOWN])
            else:
                yield from plain_rows([value], self.notes)

    def strings(self) -> Iterator[str]:
        decode = codecs.getincrementaldecoder("utf-8")().decode
        try:
            for block in self.blocks():
                yield decode(block)
            yield decode(b"", True)
        except UnicodeDecodeError:
            raise Refused(f"{self.path} is not UTF-8 text: convert it, as with iconv -f latin1 -t utf-8") from None

    def csv(self) -> Iterator[Row | Bad]:
        """An empty cell is a missing one."""
        csv.field_size_limit(self.longest)
        table = csv.reader(self._text_lines(), strict=True)
        try:
            header = next(table, [])
            if len(set(header)) < len(header):
                raise Refused(f"{self.path} has two columns of one name: {', '.join(header)}")
            for cells in table:
                if not cells:
                    self.notes["blank lines"] += 1
                elif len(cells) != len(header):
                    yield Bad("other number of cells than the header", ",".join(cells)[:SHOWN])
                else:
                    yield {name: cell or None for name, cell in zip(header, cells, strict=True)}
        except csv.Error as error:
            raise Refused(f"{self.path} line {table.line_num + 1} cannot be read as CSV ({error})") from None

    def _text_lines(self) -> Iterator[str]:
        rest = ""
        for piece in self.strings():
            *lines, rest = (rest + piece).split("\n")
            yield from (f"{line}\n" for line in lines)
        if rest:
            yield rest

    def text(self) -> Iterator[Row | Bad]:
        """The whole file as one row, or every so many lines."""
        lines = self.split()
        size = 0
        while self.lines is not None and (some := list(islice(lines, self.lines))):
            yield self._lines(some)
        if self.lines is None:
            pieces = []
            for block in self.blocks():
                size += len(block)
                pieces = [*pieces, block] if size <= self.longest else []
            if size:
                yield Bad("line is too long") if size > self.longest else self._text(b"".join(pieces))

    def _lines(self, some: list[bytes | None]) -> Row | Bad:
        if None in some or len(some) != self.lines:
            return Bad("not as many lines as a row has")
        try:
            return {"lines": [line.decode() for line in some if line is not None]}
        except UnicodeDecodeError:
            return Bad("not UTF-8 text")

    def _text(self, given: bytes) -> Row | Bad:
        try:
            return {"text": given.decode()}
        except UnicodeDecodeError:
            return Bad("not UTF-8 text", given[: 4 * SHOWN].decode("utf-8", "replace")[:SHOWN])


def rows_of(
    source: Source, path: Path | None, settings: ReadConfig, lines: int | None, notes: Counter[str]
) -> Iterator[Row | Bad]:
    """The rows of a source's file; without one, of a packaged corpus or of a hub's data set.

    Raises:
        Refused: they cannot be read.
    """
    if path is not None:
        return Reader(path, settings.longest_line, lines, notes).rows()
    if source.path.startswith(PACKAGED):
        return iter(corpus_rows(source.path.removeprefix(PACKAGED)))
    return plain_rows(_hub_rows(source), notes)


def plain_rows(rows: Iterable[Row], notes: Counter[str]) -> Iterator[Row | Bad]:
    """Of a table that has its own types."""
    for row in rows:
        try:
            yield plain(row, notes)
        except NotPlain as error:
            yield Bad(error.reason)


def _hub_rows(source: Source) -> Iterable[Row]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        found: Any = load_dataset(source.path, source.config, split=source.split, revision=source.revision)
    except (OSError, ValueError, DatasetsError) as error:  # not found, gated, no network, no such config or split
        reason = str(error).strip().partition("\n")[0]
        raise Refused(
            f"sources: {source.path} is no local file, nor could it be loaded from the hub: {reason}"
        ) from None
    return found


class Scan:
    """One JSON value after the other of a text that comes in pieces; holds no more than one of them and a piece."""

    def __init__(self, pieces: Iterable[str], path: Path, longest: int):
        self.pieces, self.path, self.longest = iter(pieces), path, longest
        self.buffer, self.at = "", 0
        self.decode = json.JSONDecoder().raw_decode

    def more(self) -> bool:
        """Twice as much as there is; False at the end."""
        rest, size = [self.buffer[self.at :]], 0
        while size <= len(rest[0]) and (piece := next(self.pieces, None)) is not None:
            rest.append(piece)
            size += len(piece)
        self.buffer, self.at = "".join(rest), 0
        if len(self.buffer) > 2 * self.longest + 2 * BLOCK * 1000:
            raise Refused(f"{self.path} holds a row of more than longest_line={self.longest} bytes, or is damaged")
        return size > 0

    def peek(self) -> str:
        """The next character that is no space, which stays; empty at the end."""
        while True:
            while self.at < len(self.buffer):
                if not self.buffer[self.at].isspace():
                    return self.buffer[self.at]
                self.at += 1
            if not self.more():
                return ""

    def take(self, wanted: str) -> str:
        if (found := self.peek()) not in wanted or not found:
            raise Refused(f"{self.path} is not whole JSON: {wanted!r} is missing behind a value")
        self.at += 1
        return found

    def value(self) -> Any:
        self.peek()
        while True:
            try:
                value, self.at = self.decode(self.buffer, self.at)
                return value
            except json.JSONDecodeError as error:
                if not self.more():
                    raise Refused(f"{self.path} is not whole JSON ({error.msg}): fetch it again") from None
            except RecursionError:
                raise Refused(f"{self.path} is nested too deeply to be read") from None

    def is_keyed(self) -> bool:
        """Of what begins with an object: whether that holds objects under numbers, as one row would not."""
        while "{" not in self.buffer[self.at + 1 :] and self.more():
            pass
        head = self.buffer[self.at + 1 :].lstrip()
        key, _, rest = head[1:].partition('"')
        return head == "" or head[0] == "}" or (key.isdigit() and rest.lstrip(" \t\r\n:").startswith("{"))

    def items(self) -> Iterator[Any]:
        """What the list or the object holds."""
        if not self.peek():
            return
        keyed = self.take("[{") == "{"
        end = "}" if keyed else "]"
        more = self.peek() != end or self.take(end) == ","
        while more:
            if keyed:
                self.value()
                self.take(":")
            yield self.value()
            more = self.take(f",{end}") == ","
        if self.peek():
            raise Refused(f"{self.path} holds something behind its list of rows")

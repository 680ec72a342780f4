"""Files and rows as people have them: each bad one is repaired and counted, dropped with its reason, or refused."""

import gzip
import json
from collections import Counter
from pathlib import Path

import orjson
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from conftest import ROOT
from preparation import dropped, kept, questions, run, settings_of, write_rows

from rlt.errors import Refused
from rlt.formats import FORMATS, Options, apply
from rlt.formats.corpora import CORPORA, corpus_rows
from rlt.formats.inputs import TASK_BYTES, Source, check_inputs, files_of, inputs_of, parse_sources
from rlt.formats.readers import Bad, Reader, rows_of
from rlt.formats.record import Dropped
from rlt.preparation.prerequisites import check_machine

FORMATS_HERE = ROOT / "tests" / "data" / "formats"
LINES = b'{"text": "one"}\n{"text": "two"}\n'
TWO = [{"text": "one"}, {"text": "two"}]
DROPPED_SHOWN = 1000


def written(folder: Path, name: str, content: bytes) -> Path:
    (folder / name).write_bytes(content)
    return folder / name


def read(path: Path, longest: int = 10**6, lines: int | None = None) -> tuple[list, Counter]:
    notes: Counter[str] = Counter()
    return list(Reader(path, longest, lines, notes).rows()), notes


def reasons(rows: list) -> list[str]:
    return [row.reason for row in rows if isinstance(row, Bad)]


def test_plain_and_packed_json_lines_give_the_same_rows(tmp_path):
    packed = {"a.jsonl": LINES, "b.jsonl.gz": gzip.compress(LINES), "c.jsonl.zst": zstandard.compress(LINES)}
    for name, content in packed.items():
        assert read(written(tmp_path, name, content)) == (TWO, Counter())


def test_files_packed_in_several_pieces_are_read_to_the_end(tmp_path):
    one, two = LINES.splitlines(keepends=True)
    for name, pack in (("a.jsonl.gz", gzip.compress), ("b.jsonl.zst", zstandard.compress)):
        assert read(written(tmp_path, name, pack(one) + pack(two)))[0] == TWO
    assert read(written(tmp_path, "padded.jsonl.gz", gzip.compress(LINES) + b"\0" * 100))[0] == TWO


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.ZstdCompressor(write_checksum=True).compress])
def test_a_file_that_is_cut_short_or_damaged_is_refused(tmp_path, pack):
    name = "a.jsonl.gz" if pack is gzip.compress else "a.jsonl.zst"
    whole = pack(b"".join(orjson.dumps({"text": str(n * 7919)}) + b"\n" for n in range(5000)))
    with pytest.raises(Refused, match=r"a\.jsonl\.\w+ is cut short"):
        read(written(tmp_path, name, whole[:-9]))
    damaged = whole[:2000] + bytes(255 - byte for byte in whole[2000:2100]) + whole[2100:]
    with pytest.raises(Refused, match=r"a\.jsonl\.\w+ is (damaged|cut short)"):
        read(written(tmp_path, name, damaged))


def test_a_packed_file_of_another_name_is_read_and_counted(tmp_path):
    for name, content, what in (
        ("a.jsonl", gzip.compress(LINES), "gzip"),
        ("b.jsonl.gz", zstandard.compress(LINES), "zstd"),
        ("c.jsonl.gz", LINES, "not packed"),
    ):
        assert read(written(tmp_path, name, content)) == (TWO, {f"files that are {what}, unlike their names": 1})


def test_a_file_of_another_kind_under_a_name_of_ours_is_refused(tmp_path):
    for magic, kind in ((b"PAR1....", "Parquet"), (b"PK\x03\x04..", "zip"), (b"BZh9....", "bzip2")):
        with pytest.raises(Refused, match=f"is a {kind} file"):
            read(written(tmp_path, "a.jsonl", magic))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_says_the_encoding_and_is_no_part_of_the_text(tmp_path, encoding):
    rows, notes = read(written(tmp_path, "a.jsonl", '{"text": "Zoë"}\n'.encode(encoding)))
    assert rows == [{"text": "Zoë"}] and notes == {"files with a byte order mark": 1}


def test_half_of_a_utf_16_file_is_refused(tmp_path):
    with pytest.raises(Refused, match="is not UTF-16 text"):
        read(written(tmp_path, "a.jsonl", LINES.decode().encode("utf-16")[:-1]))


def test_latin_1_is_dropped_line_by_line_and_refused_as_a_table(tmp_path):
    rows, _ = read(written(tmp_path, "a.jsonl", LINES + '{"text": "Zoë"}\n'.encode("latin-1")))
    assert rows[:2] == TWO and reasons(rows) == ["not UTF-8 text"]
    assert reasons(read(written(tmp_path, "a.txt", "Zoë".encode("latin-1")))[0]) == ["not UTF-8 text"]
    for name in ("a.csv", "a.json"):
        with pytest.raises(Refused, match="is not UTF-8 text: convert it"):
            read(written(tmp_path, name, '[{"text": "Zoë"}]'.encode("latin-1")))


def test_crlf_and_blank_lines_are_no_rows_and_blank_ones_are_counted(tmp_path):
    rows, notes = read(written(tmp_path, "a.jsonl", LINES.replace(b"\n", b"\r\n") + b"\r\n \n\n"))
    assert rows == TWO and notes == {"blank lines": 3}


BAD_LINES = {
    b'{"text": "one"': "not JSON",
    b'{"text": "one"}\0': "not JSON",
    b"\0\0\0\0": "not JSON",
    b"[1, 2]": "not a JSON object",
    b"7": "not a JSON object",
    b'"text"': "not a JSON object",
    b"null": "not a JSON object",
    b'{"text": "a", "text": "b"}': "two values of one key",
    b'{"text": ' + b"[" * 500 + b"]" * 500 + b"}": "nested too deeply",
    b'{"text": ' + b"[" * 50000 + b"]" * 50000 + b"}": "nested too deeply",
}


@pytest.mark.parametrize(("line", "reason"), BAD_LINES.items())
def test_a_line_that_is_no_row_is_dropped_alone(tmp_path, line, reason):
    rows, _ = read(written(tmp_path, "a.jsonl", LINES + line + b"\n" + LINES))
    assert [row for row in rows if not isinstance(row, Bad)] == TWO * 2 and reasons(rows) == [reason]
    assert len(rows[2].given) <= DROPPED_SHOWN


def test_a_key_may_stand_again_in_a_text_or_in_an_inner_object(tmp_path):
    row = {"id": "a", "text": 'said "id": 1, "id": 2', "inner": {"id": 1}}
    assert read(written(tmp_path, "a.jsonl", json.dumps(row).encode()))[0] == [row]


def test_half_of_a_surrogate_pair_becomes_a_sign_of_it_and_a_nan_becomes_null(tmp_path):
    line = b'{"text": "a\\ud83d b", "rank": NaN, "far": 1e999, "large": 123456789012345678901234567890}\n'
    rows, notes = read(written(tmp_path, "a.jsonl", line))
    assert rows == [{"text": "a\ufffd b", "rank": None, "far": None, "large": 1.2345678901234568e29}]
    assert notes == {"lone surrogates replaced": 1, "NaN, Infinity read as null": 2}
    orjson.dumps(rows)


def test_a_line_longer_than_the_longest_is_dropped_and_the_next_are_read(tmp_path):
    long = b'{"text": "' + b"a" * 300_000 + b'"}\n'
    rows, _ = read(written(tmp_path, "a.jsonl", LINES + long + LINES + long.strip()), longest=200_000)
    assert [row for row in rows if not isinstance(row, Bad)] == TWO * 2
    assert reasons(rows) == ["line is too long", "line is too long"]
    assert len(read(tmp_path / "a.jsonl", longest=400_000)[0]) == 6


def test_a_line_of_50_mb_is_a_row_like_others(tmp_path):
    path = written(tmp_path, "a.jsonl", b'{"text": "' + b"a" * 50_000_000 + b'"}\n')
    assert len(read(path, longest=100_000_000)[0][0]["text"]) == 50_000_000
    assert reasons(read(path, longest=10_000_000)[0]) == ["line is too long"]


def test_json_is_a_list_an_object_keyed_by_numbers_or_lines_under_another_name(tmp_path):
    assert read(written(tmp_path, "a.json", json.dumps(TWO, indent=1).encode())) == (TWO, {})
    keyed = json.dumps({"0": TWO[0], "1": TWO[1]}).encode()
    assert read(written(tmp_path, "b.json", keyed)) == (TWO, {})
    assert read(written(tmp_path, "c.json", LINES)) == (TWO, {"files of JSON lines that are called .json": 1})
    for empty in (b"[]", b"{}", b"", b" \n"):
        assert read(written(tmp_path, "d.json", empty))[0] == []


def test_rows_of_a_json_list_that_come_in_pieces_are_whole(tmp_path):
    rows = [{"text": "xé" * length, "n": [length, {"a": "]}"}]} for length in (0, 1, 70_000, 3, 200_000, 5)]
    assert read(written(tmp_path, "a.json", json.dumps(rows, ensure_ascii=False).encode()))[0] == rows


@pytest.mark.parametrize(
    "content", [b'[{"text": "one"}, {"te', b'[{"text": "one"} {"text": "two"}]', b"[1,]", b"7", b"[] x", b"[{}]]"]
)
def test_a_json_file_that_is_not_whole_is_refused(tmp_path, content):
    with pytest.raises(Refused, match=r"a\.json "):
        read(written(tmp_path, "a.json", content))


def test_other_values_in_a_json_list_are_dropped(tmp_path):
    rows, _ = read(written(tmp_path, "a.json", b'[{"text": "one"}, 7, [1], null, {"text": "two"}]'))
    assert reasons(rows) == ["not a JSON object"] * 3


def test_a_table_of_text_has_empty_cells_as_missing_ones_and_drops_rows_of_another_length(tmp_path):
    path = written(tmp_path, "a.csv", b'question,answer\r\n"one, ""1""\nmore",\r\n\r\nx,y,z\r\nq,a\r\n')
    rows, notes = read(path)
    assert rows[0] == {"question": 'one, "1"\nmore', "answer": None} and rows[2] == {"question": "q", "answer": "a"}
    assert reasons(rows) == ["other number of cells than the header"] and notes == {"blank lines": 1}


@pytest.mark.parametrize("content", [b'a,b\n"open,1\n', b"a,a\n1,2\n"])
def test_a_table_of_text_that_has_no_end_or_two_columns_of_one_name_is_refused(tmp_path, content):
    with pytest.raises(Refused, match=r"a\.csv"):
        read(written(tmp_path, "a.csv", content))


def test_a_text_file_is_one_row_or_as_many_as_its_format_has_lines(tmp_path):
    assert read(written(tmp_path, "a.txt", b"one\r\ntwo\0\n"))[0] == [{"text": "one\r\ntwo\0\n"}]
    assert read(written(tmp_path, "b.txt", b""))[0] == []
    assert reasons(read(written(tmp_path, "c.txt", b"a" * 100), longest=99)[0]) == ["line is too long"]
    rows, _ = read(written(tmp_path, "d.txt", b"a\nb\nc\nd\ne"), lines=2)
    assert rows[:2] == [{"lines": ["a", "b"]}, {"lines": ["c", "d"]}]
    assert reasons(rows) == ["not as many lines as a row has"]


def test_parquet_gives_values_that_json_has(tmp_path):
    from datetime import date
    from decimal import Decimal

    table = pyarrow.table(
        {"text": ["a"], "day": [date(2026, 11, 28)], "cost": [Decimal("1.50")], "raw": [b"\xff"], "said": [b"hi"]}
    )
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    rows, notes = read(tmp_path / "a.parquet")
    assert rows == [{"text": "a", "day": "2026-11-28", "cost": "1.50", "raw": None, "said": "hi"}]
    assert notes == {"binary values read as null": 1}


def test_parquet_without_row_groups_is_empty_and_a_damaged_one_is_refused(tmp_path):
    schema = pyarrow.schema([("text", pyarrow.string())])
    pyarrow.parquet.ParquetWriter(tmp_path / "a.parquet", schema).close()
    assert read(tmp_path / "a.parquet")[0] == []
    with pytest.raises(Refused, match="not a Parquet file, or a damaged one"):
        read(written(tmp_path, "b.parquet", b"PAR1 nothing"))


# Sources: what is found behind their names.


def test_a_folder_is_its_files_in_order_and_folders_called_like_files_are_none(tmp_path):
    (tmp_path / "x.jsonl").mkdir()
    for name in ("b.jsonl", "a.json", "c.csv.gz", "notes.md"):
        written(tmp_path, name, LINES)
    (source,) = parse_sources([str(tmp_path)])
    assert [path.name for path in files_of(source)] == ["a.json", "b.jsonl", "c.csv.gz"]


REFUSED_PLACES = {
    "x.jsonl": "is a folder without a file of",
    "*.csv": "matches no file",
    "loop.jsonl": "is a link that leads nowhere",
    "gone.jsonl": "does not exist",
    "lost.jsonl": "is a link that leads nowhere",
    "l*.jsonl": "is a link that leads nowhere",
    "a.md": "is none of .jsonl",
}


@pytest.mark.parametrize(("name", "said"), REFUSED_PLACES.items())
def test_a_place_that_holds_no_file_is_refused(tmp_path, name, said):
    (tmp_path / "x.jsonl").mkdir()
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "loop.jsonl")
    (tmp_path / "lost.jsonl").symlink_to(tmp_path / "gone")
    written(tmp_path, "a.md", b"")
    with pytest.raises(Refused, match=said):
        check_inputs(parse_sources([str(tmp_path / name)]))


def test_small_files_are_read_some_at_a_time_and_each_row_keeps_the_number_of_its_file(tmp_path):
    (tmp_path / "many").mkdir()
    for number in range(40):
        write_rows(tmp_path / "many" / f"{number:02d}.jsonl", questions(3, 3 * number))
    (tmp_path / "many" / "40.jsonl").write_text("x" * TASK_BYTES)
    (tmp_path / "many" / "41.jsonl").write_text("{}")
    given = inputs_of([str(tmp_path / "many")])
    assert [[number for number, _ in one.files] for one in given] == [[*range(41)], [41]]
    (tmp_path / "many" / "40.jsonl").unlink()
    (tmp_path / "many" / "41.jsonl").unlink()
    rows = kept(read_all(tmp_path, str(tmp_path / "many")))
    assert [row["id"].split(":")[1] for row in rows] == [f"{file}-{row}" for file in range(40) for row in range(3)]


def test_one_file_under_two_names_is_refused(tmp_path):
    path = written(tmp_path, "a.jsonl", LINES)
    (tmp_path / "b.jsonl").symlink_to(path)
    for entries in ([str(tmp_path)], [str(path), {"path": str(tmp_path / "b.jsonl")}]):
        with pytest.raises(Refused, match="is named twice"):
            check_inputs(parse_sources(entries))


@pytest.mark.parametrize(
    "entry",
    [
        *("BFCL_v3_simple.json", "data/humaneval.jsonl", "HumanEval.jsonl.gz", "cais/mmlu", "gsm8k/test.jsonl"),
        *("ARC-Challenge-Test.jsonl", "TheoremQA.json", "my/gsm8k_test.parquet"),
        {"path": "openai/gsm8k", "split": "test"},
        {"path": "allenai/ai2_arc", "config": "ARC-Easy", "split": "test"},
    ],
)
def test_an_evaluation_set_is_refused_by_its_name(entry):
    with pytest.raises(Refused, match="is an evaluation set, as its name says"):
        parse_sources([entry])


@pytest.mark.parametrize(
    "entry",
    [
        *("openai/gsm8k", "gsm8k/train.jsonl", "ARC-Easy-Train.jsonl", "my/latest.jsonl", "search/test.jsonl"),
        {"path": "cais/mmlu", "split": "auxiliary_train"},
    ],
)
def test_what_is_no_evaluation_set_is_not_refused(entry):
    parse_sources([entry])


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"path": "a.jsonl", "kind": "novel"}, "kind=novel of a.jsonl is none of prose, maths, code"),
        ({"path": "a.jsonl", "max_rows": 0}, "max_rows=0 of a.jsonl must be at least 1"),
        ({"path": "a.jsonl", "limit": 3}, "'limit' of a.jsonl is none of"),
    ],
)
def test_an_entry_with_a_wrong_key_is_refused(entry, said):
    with pytest.raises(Refused, match=said):
        parse_sources([entry])


# The stage.


def read_all(folder: Path, *sources, **keys):
    """The first stage's result."""
    return run(settings_of(folder / "out", list(sources), stages=["read"], **keys))["read"]


def plan(folder: Path, *sources, **keys) -> None:
    check_machine(settings_of(folder / "out", list(sources), stages=["read"], **keys))


def test_ids_say_source_file_and_row_and_differ_for_equal_rows(tmp_path):
    for name in ("a.jsonl", "b.jsonl"):
        written(tmp_path, name, LINES + LINES[:16])
    result = read_all(tmp_path, {"path": f"{tmp_path}/*.jsonl", "name": "s", "license": "MIT"})
    ids = [row["id"] for row in kept(result)]
    assert len(set(ids)) == 6 and {i.rpartition(":")[0] for i in ids} == {
        f"s:{f}-{n}" for f in (0, 1) for n in range(3)
    }
    assert {row["license"] for row in kept(result)} == {"MIT"}


def test_the_hash_of_an_id_is_of_the_content_alone(tmp_path):
    rows = [{"text": "one", "id": 5}, {"text": "one", "id": 5, "note": "x"}, {"text": "two", "id": 5}]
    result = read_all(tmp_path, write_rows(tmp_path / "a.jsonl", rows))
    hashes = [row["id"].rpartition(":")[2] for row in sorted(kept(result), key=lambda row: row["id"])]
    assert hashes[0] == hashes[1] != hashes[2]
    assert [row["meta"]["extra"]["id"] for row in kept(result)] == [5, 5, 5]


def test_at_most_so_many_rows_of_a_source_are_read_over_its_files(tmp_path):
    for name in ("a.jsonl", "b.jsonl"):
        written(tmp_path, name, LINES)
    result = read_all(tmp_path, {"path": f"{tmp_path}/*.jsonl", "name": "s", "max_rows": 3})
    assert sorted(row["text"] for row in kept(result)) == ["one", "one", "two"]


def test_bad_rows_are_dropped_with_reason_source_and_what_stood_there(tmp_path):
    path = written(tmp_path, "a.jsonl", LINES + b'{"text": 5}\n[1]\n{"text": "\n')
    result = read_all(tmp_path, path)
    assert result.counts.dropped == {"bad_column:text": 1, "not a JSON object": 1, "not JSON": 1}
    assert [(row["row"], row["given"]) for row in dropped(result)] == [
        ("2", {"text": 5}),
        ("3", "[1]"),
        ("4", '{"text": "'),
    ]


def test_repairs_are_counted_in_the_stages_notes(tmp_path):
    path = written(tmp_path, "a.jsonl", gzip.compress(b"\xef\xbb\xbf" + LINES + b"\n"))
    assert read_all(tmp_path, path).counts.notes == {
        "blank lines": 1,
        "files that are gzip, unlike their names": 1,
        "files with a byte order mark": 1,
    }


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_a_source_without_a_row_stops_the_run_unless_that_is_allowed(tmp_path, content):
    sources = [written(tmp_path, "a.jsonl", LINES), written(tmp_path, "empty.jsonl", content)]
    for start in (plan, read_all):
        with pytest.raises(Refused, match="empty.jsonl holds no row"):
            start(tmp_path, *sources)
    assert read_all(tmp_path, *sources, allow_empty_sources=True).counts.notes["files without a row"] == 1


def test_the_plan_refuses_columns_that_tell_no_format_before_anything_is_read(tmp_path):
    rows = [{"question": "Why?", "answer": "So."}]
    with pytest.raises(Refused, match="a.jsonl has columns answer, question, which gsm8k and orca-math and"):
        plan(tmp_path, write_rows(tmp_path / "a.jsonl", rows))
    with pytest.raises(Refused, match="format 'gsm9k' is none of gsm8k, orca-math"):
        plan(tmp_path, {"path": str(tmp_path / "a.jsonl"), "format": "gsm9k"})
    plan(tmp_path, {"path": str(tmp_path / "a.jsonl"), "format": "orca-math"})


def test_a_source_that_begins_with_lines_that_are_no_rows_is_refused_with_what_they_are(tmp_path):
    with pytest.raises(Refused, match=r"a.jsonl begins with 2 rows that cannot be read \(not JSON, not UTF-8 text\)"):
        plan(tmp_path, written(tmp_path, "a.jsonl", b"one\n\xff\n"))


def test_a_source_of_which_no_row_fits_its_format_stops_the_run(tmp_path):
    rows = [{"question": "Why?", "answer": None}] * 3
    with pytest.raises(Refused, match="read keeps none of the 3 rows of source a .*bad_column:answer: 3"):
        read_all(tmp_path, {"path": str(write_rows(tmp_path / "a.jsonl", rows)), "format": "gsm8k"})


def test_a_second_table_without_a_column_or_with_another_type_is_dropped_row_by_row(tmp_path):
    tables = [
        {"question": ["a", "b"], "solution": ["c", "d"]},
        {"question": ["e", "f"]},
        {"question": ["g"], "solution": [7]},
    ]
    for number, table in enumerate(tables):
        pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / f"{number}.parquet")
    counts = read_all(tmp_path, {"path": f"{tmp_path}/*.parquet", "name": "s"}).counts
    assert (counts.kept, counts.dropped) == (2, {"bad_column:answer": 2, "bad_column:solution": 1})


def test_trees_and_trajectories_are_put_together_over_the_whole_file(tmp_path):
    """The rows of a tree lie further apart than a block holds."""
    tree = [json.loads(line) for line in (FORMATS_HERE / "oasst.jsonl").read_text().splitlines()]
    others = [
        row | {"message_id": f"{n}-{row['message_id']}", "parent_id": row["parent_id"] and f"{n}-{row['parent_id']}",
               "message_tree_id": f"tree{n}"}
        for n in range(300)
        for row in tree[:3]
    ]  # fmt: skip
    rows = [tree[4], *others[:600], *tree[:4], *others[600:], *tree[5:]]
    result = read_all(tmp_path, write_rows(tmp_path / "oasst.jsonl", rows))
    assert result.counts.read == len(rows) == 912
    assert result.counts.kept == 2 + 600
    assert result.counts.dropped["inside of a path that is kept"] == 3 + 300
    (path,) = [row for row in kept(result) if row["meta"]["group"] == "t1" and len(row["messages"]) == 4]
    assert path["messages"][3]["content"] == "The sun's light blows gas away."


def test_a_text_file_of_eight_lines_a_problem_is_read_under_its_format(tmp_path):
    result = read_all(tmp_path, {"path": str(FORMATS_HERE / "logiqa.txt"), "format": "logiqa"})
    assert sorted(row["answer"] for row in kept(result)) == ["B", "D"]


def test_the_kind_that_a_source_says_is_noted_on_its_rows(tmp_path):
    result = read_all(tmp_path, {"path": str(written(tmp_path, "a.jsonl", LINES)), "kind": "code"})
    assert [row["meta"] for row in kept(result)] == [{"kind": "code"}] * 2


@pytest.mark.parametrize("tasks", [1, 3])
def test_the_number_of_tasks_moves_no_row_into_another_hand(tmp_path, tasks):
    path = write_rows(tmp_path / "a.jsonl", [{"text": f"row {n}"} for n in range(2500)])
    result = read_all(tmp_path, path, engine_tasks=tasks)
    assert len({row["id"] for row in kept(result)}) == result.counts.kept == 2500


def test_ten_thousand_rows_of_all_formats_are_all_accounted_for(tmp_path):
    """Nothing is lost in silence: what is not kept has a reason, and stands with it among the dropped."""
    sources, total = [], 0
    for path in sorted(FORMATS_HERE.glob("*.jsonl")):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        mixed = [repeated(row, n) for n in range(10_000 // 30 // len(rows) + 1) for row in rows]
        sources.append({"path": str(write_rows(tmp_path / path.name, mixed)), "format": path.stem})
        total += len(mixed)
    counts = (result := read_all(tmp_path, *sources)).counts
    assert total >= 10_000 and counts.read == total == len(kept(result)) + len(dropped(result))
    assert counts.kept == len({row["id"] for row in kept(result)}) and all(row["reason"] for row in dropped(result))
    assert set(counts.sources) == {source["format"] for source in sources}


def repeated(row: dict, number: int) -> dict:
    """A row of another tree, or of another query."""
    if "message_id" in row:
        own = {key: row[key] and f"{number}-{row[key]}" for key in ("message_id", "parent_id", "message_tree_id")}
        return row | own
    return row | {"id": f"{row['id']} ({number})"} if "id" in row else row


# Other places.


@pytest.mark.parametrize("name", CORPORA)
def test_a_packaged_corpus_gives_the_same_rows_each_time_in_a_form_that_a_format_has(name):
    once, again = ([row for row, _ in zip(corpus_rows(name), range(50), strict=False)] for _ in range(2))
    assert once == again and len(once) == 50
    named = {"word-problems": "prompt-answer", "python-functions": "harmony_completion", "kjv": "text"}[name]
    assert not any(isinstance(apply(FORMATS[named], row, Options()), Dropped) for row in once)


def test_chapters_of_the_bible_are_its_1189():
    rows = list(corpus_rows("kjv"))
    assert (
        len(rows) == 1189 and rows[0]["text"].startswith("In the beginning God") and rows[-1]["text"].endswith("Amen.")
    )


def test_an_unknown_corpus_and_a_hub_without_network_are_refused_in_one_line(tmp_path, monkeypatch):
    with pytest.raises(Refused, match="corpus/novels is none of corpus/word-problems"):
        plan(tmp_path, "corpus/novels")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(
        Refused, match=r"^sources: nobody/nothing is no local file, nor could it be loaded from the hub: .+$"
    ):
        plan(tmp_path, "nobody/nothing")


def test_an_input_that_changed_since_a_preparation_began_is_refused(tmp_path):
    path = written(tmp_path, "a.jsonl", LINES)
    read_all(tmp_path, path)
    written(tmp_path, "a.jsonl", LINES * 2)
    with pytest.raises(Refused, match="a.jsonl changed since this preparation began"):
        read_all(tmp_path, path)


def test_a_hubs_data_set_gives_its_rows_as_the_library_loads_them(tmp_path, monkeypatch):
    """From a folder that is laid out as a repository of the hub is."""
    (tmp_path / "owner" / "set").mkdir(parents=True)
    write_rows(tmp_path / "owner" / "set" / "train.jsonl", [{"text": "one", "n": 1}, {"text": "two", "n": 2}])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    keys = settings_of(tmp_path / "out", [])
    rows = list(rows_of(Source("s", "owner/set"), None, keys, None, Counter()))
    assert rows == [{"text": "one", "n": 1}, {"text": "two", "n": 2}]
    for wrong in ({"split": "validation"}, {"config": "no-such"}):
        with pytest.raises(Refused, match="sources: owner/set is no local file, nor"):
            list(rows_of(Source("s", "owner/set", **wrong), None, keys, None, Counter()))

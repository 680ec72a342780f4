"""The preparation as a job: what is counted, done again, left alone, refused, and what a kill leaves."""

import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas
import psutil
import pytest
from conftest import EMBEDDED, ROOT, config_of, launch
from preparation import QUICK, bytes_below, dropped, kept, questions, run, settings_of, write_rows

from rlt.data.sources import load_rows
from rlt.errors import Refused
from rlt.formats.record import Dropped
from rlt.planning.plan import make_plan
from rlt.preparation import stages
from rlt.preparation.clean import Clean
from rlt.preparation.engine import _run_in_processes
from rlt.preparation.ledger import LedgerError
from rlt.preparation.prerequisites import PACKAGES
from rlt.preparation.read import Read
from rlt.preparation.run import results_of
from rlt.preparation.shards import shard, writing
from rlt.preparation.stage import Pass, RowStage
from rlt.runs.folder import MARKER

LIMIT_S = 120
STARTED = "INFO rlt: "


def test_rows_in_are_rows_kept_and_rows_dropped_in_every_stage(tmp_path):
    rows = [*questions(50), {"question": "", "solution": "x"}, {"question": None, "solution": "x"}]
    results = run(settings_of(tmp_path / "out", [write_rows(tmp_path / "rows.jsonl", rows)]))
    read = results["read"].counts
    assert (read.read, read.kept, sum(read.dropped.values())) == (52, 50, 2)
    assert len(dropped(results["read"])) == 2
    before = read.kept
    for result in results.values():
        assert result.counts.read == result.counts.kept + sum(result.counts.dropped.values())
        assert len(kept(result)) == result.counts.kept
        if result.name != "read":
            assert result.counts.read == before
        before = result.counts.kept


def test_what_comes_out_is_read_by_every_other_run(tmp_path):
    source = write_rows(tmp_path / "rows.jsonl", questions(20))
    run(settings_of(tmp_path / "out", [source], validation_share=0.25))
    train, held_out = (load_rows(str(tmp_path / "out"), split=split).rows for split in ("train", "validation"))
    asked = {row["question"] for row in questions(20)}
    assert {row["question"] for row in train} | {row["question"] for row in held_out} == asked
    assert len(train) + len(held_out) == 20
    assert held_out


def test_a_second_run_does_nothing(tmp_path):
    settings = settings_of(tmp_path / "out", [write_rows(tmp_path / "rows.jsonl", questions(20))])
    run(settings)
    times = times_below(tmp_path / "out")
    run(settings)
    assert times_below(tmp_path / "out") == times


def times_below(folder: Path) -> dict[Path, int]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != MARKER]
    return {path: path.stat().st_mtime_ns for path in files}


def test_another_value_of_a_key_makes_its_stage_and_those_after_it_again(tmp_path):
    source = write_rows(tmp_path / "rows.jsonl", questions(20))
    first = run(settings_of(tmp_path / "out", [source]))
    times = {name: (result.folder / "stats.json").stat().st_mtime_ns for name, result in first.items()}
    again = run(settings_of(tmp_path / "out", [source], validation_share=0.5))
    made = {n for n, r in again.items() if (r.folder / "stats.json").stat().st_mtime_ns != times[n]}
    assert made == {"split", "write"}
    assert load_rows(str(tmp_path / "out"), split="validation").rows


def test_a_file_of_what_came_out_that_is_gone_is_made_again(tmp_path):
    settings = settings_of(tmp_path / "out", [write_rows(tmp_path / "rows.jsonl", questions(20))])
    run(settings)
    (tmp_path / "out" / "prepared" / "train-00000.jsonl").unlink()
    run(settings)
    assert len(load_rows(str(tmp_path / "out")).rows) == 20


def test_a_preparation_that_has_not_ended_again_is_not_read(tmp_path, monkeypatch):
    source = write_rows(tmp_path / "rows.jsonl", questions(20))
    run(settings_of(tmp_path / "out", [source]))
    monkeypatch.setitem(stages.STAGES, "clean", DropsAll)
    with pytest.raises(Refused, match="keeps none"):
        run(settings_of(tmp_path / "out", [source], max_characters=1000))
    with pytest.raises(Refused, match="a preparation that has not ended"):
        load_rows(str(tmp_path / "out"))


def test_rows_of_an_earlier_run_do_not_stay_among_those_of_a_later_one(tmp_path):
    source = write_rows(tmp_path / "rows.jsonl", questions(20))
    run(settings_of(tmp_path / "out", [source], engine_tasks=6))
    run(settings_of(tmp_path / "out", [source], engine_tasks=2))
    assert len(load_rows(str(tmp_path / "out")).rows) == 20


def test_the_number_of_tasks_changes_no_row(tmp_path):
    source = write_rows(tmp_path / "rows.jsonl", questions(8000))
    one = run(settings_of(tmp_path / "one", [source], engine_tasks=1))
    seven = run(settings_of(tmp_path / "seven", [source], engine_tasks=7))
    assert {row["id"] for row in kept(one["write"])} == {row["id"] for row in kept(seven["write"])}
    assert all(path.stat().st_size > 100 for path in (seven["read"].folder / "shards").iterdir())


def test_an_input_that_changed_stops_the_run(tmp_path):
    settings = settings_of(tmp_path / "out", [write_rows(tmp_path / "rows.jsonl", questions(20))])
    run(settings)
    write_rows(tmp_path / "rows.jsonl", questions(20, first=1))
    with pytest.raises(Refused, match=r"input .*rows.jsonl changed since this preparation began"):
        run(settings)


def test_a_file_that_joined_a_folder_stops_the_run(tmp_path):
    (tmp_path / "in").mkdir()
    write_rows(tmp_path / "in" / "a.jsonl", questions(20))
    settings = settings_of(tmp_path / "out", [tmp_path / "in"])
    run(settings)
    write_rows(tmp_path / "in" / "b.jsonl", questions(20, first=20))
    with pytest.raises(Refused, match=r"input .*b.jsonl was added"):
        run(settings)


class Loses(RowStage):
    """Writes every row but the first, and counts all of them."""

    name = "clean"

    def passes(self):
        return [Pass("rows", self.lose)]

    def lose(self, task):
        counts = self.task(task)
        rows = list(task.rows())
        counts.read, counts.kept = len(rows), max(0, len(rows) - 1)
        with writing(shard(task.place.shards, task.number)) as write:
            for row in rows[1:]:
                write(row)
        return counts

    def one(self, record):
        return record


class Forgets(Loses):
    """Counts only what it was so kind to look at."""

    def lose(self, task):
        counts = self.task(task)
        counts.read = counts.kept = max(0, counts.kept - 1)
        for source in counts.sources.values():
            source["in"] = source["kept"] = counts.read
        return counts


@pytest.mark.parametrize("stage", [Loses, Forgets])
def test_a_stage_that_loses_rows_ends_the_run(stage, tmp_path, monkeypatch):
    monkeypatch.setitem(stages.STAGES, "clean", stage)
    source = write_rows(tmp_path / "rows.jsonl", questions(20))
    with pytest.raises(LedgerError, match=r"rows in|came in"):
        run(settings_of(tmp_path / "out", [source]))


class LosesABlock(Read):
    """Between its two passes, as a file that vanishes on a network file system."""

    def deal(self, task):
        for block in sorted((task.place.work / "blocks").glob("*/*"))[1:2]:
            block.unlink()
        return super().deal(task)


def test_rows_that_vanish_within_a_stage_end_the_run(tmp_path, monkeypatch):
    monkeypatch.setitem(stages.STAGES, "read", LosesABlock)
    source = write_rows(tmp_path / "rows.jsonl", questions(3000))
    with pytest.raises(LedgerError, match="3000 rows in, 3000 of them kept, and the next one 2000"):
        run(settings_of(tmp_path / "out", [source], engine_tasks=1))


class LetsOneIn(Read):
    """While it reads, a file joins its folder."""

    def format(self, task):
        counts = super().format(task)
        write_rows(Path(self.settings.sources[0]) / "b.jsonl", questions(5, first=50))
        return counts


def test_a_file_that_joins_while_the_inputs_are_read_stops_the_run_and_nothing_of_it_stays(tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    for first, name in ((0, "a"), (10, "c")):
        write_rows(tmp_path / "in" / f"{name}.jsonl", questions(10, first=first))
    settings = settings_of(tmp_path / "out", [tmp_path / "in"])
    with monkeypatch.context() as patched:
        patched.setitem(stages.STAGES, "read", LetsOneIn)
        with pytest.raises(Refused, match="added"):
            run(settings)
    (tmp_path / "in" / "b.jsonl").unlink()
    assert {row["source"] for row in kept(run(settings)["read"])} == {"in"}
    assert len(load_rows(str(tmp_path / "out")).rows) == 20


class DropsAll(Clean):
    def some(self, records):
        return [Dropped("of no use") for _ in records]


def test_a_stage_that_keeps_no_row_of_a_source_ends_the_run_unless_that_is_allowed(tmp_path, monkeypatch):
    monkeypatch.setitem(stages.STAGES, "clean", DropsAll)
    source = write_rows(tmp_path / "rows.jsonl", questions(20))
    with pytest.raises(Refused, match=r"clean keeps none of the 20 rows of source rows .*of no use: 20"):
        run(settings_of(tmp_path / "out", [source]))
    results = run(settings_of(tmp_path / "out", [source], allow_empty_sources=True))
    assert results["write"].counts.kept == 0


def overrides(tmp_path: Path, source: Path, *more: str) -> list[str]:
    return ["prepare_tiny", f"sources=[{source}]", f"output_dir={tmp_path}", f"stages=[{','.join(QUICK)}]", *more]


def test_the_door_says_what_was_kept_and_the_report_says_it_again(tmp_path):
    source = write_rows(tmp_path / "rows.jsonl", questions(20))
    done = launch("prepare.py", *overrides(tmp_path / "out", source))
    assert done.returncode == 0, done.stderr
    assert "20 of 20 rows kept" in done.stdout
    report = launch("prepare.py", *overrides(tmp_path / "out", source, "stage=report"))
    assert report.returncode == 0
    assert report.stdout.splitlines()[0].split() == ["stage", "in", "kept", "share", "dropped"]
    assert [line.split()[0] for line in report.stdout.splitlines()[1:]] == QUICK
    card = (tmp_path / "out" / "DATA_CARD.md").read_text()
    assert "rows.jsonl" in card
    assert (tmp_path / "out" / "funnel.png").read_bytes()[1:4] == b"PNG"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["teacher_rlt_tiny"], "is no preparation"),
        (["sources=[nowhere.jsonl]"], "nowhere.jsonl does not exist"),
        (["sources=[]"], "sources is empty"),
        (["sources=[{format: gsm8k}]"], "must be a path"),
        (["sources=[{path: a.jsonl, licence: x}]"], "'licence' of a.jsonl is none of"),
        (["sources=[a.jsonl, other/a.csv]"], "two are called a"),
        (["stages=[read, polish]"], "'polish' does not exist"),
        (["stages=[clean, read]"], "in this order: read, clean"),
        (["engine=spark"], "use one of local, slurm, ray"),
        (["engine=slurm"], "slurm_partition"),
        (["engine_tasks=0"], "engine_tasks=0 must be at least 1"),
        (["validation_share=2"], "must be in [0, 1]"),
        (["stage=clean"], "use report"),
        (["near_similarty=0.9"], "did you mean near_similarity"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(arguments, said, tmp_path):
    done = launch("prepare.py", "prepare_tiny", f"output_dir={tmp_path / 'out'}", "sources=[]", *arguments)
    assert done.returncode == 1
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out" / "stages").exists()


def test_a_report_shows_only_stages_that_belong_together_and_needs_no_source(tmp_path, monkeypatch):
    source = write_rows(tmp_path / "rows.jsonl", questions(20))
    run(settings_of(tmp_path / "out", [source]))
    assert [result.name for result in results_of(tmp_path / "out")] == QUICK
    monkeypatch.setitem(stages.STAGES, "clean", DropsAll)
    with pytest.raises(Refused, match="keeps none"):
        run(settings_of(tmp_path / "out", [source], max_characters=1000))
    assert [result.name for result in results_of(tmp_path / "out")] == ["read", "clean"]
    before = bytes_below(tmp_path / "out")
    report = launch("prepare.py", "prepare_rlt", f"output_dir={tmp_path / 'out'}", "stage=report")
    assert report.returncode == 0, report.stderr
    assert len(report.stdout.splitlines()) == 3
    assert bytes_below(tmp_path / "out") == before


def test_an_overwrite_never_takes_its_own_source(tmp_path):
    source = write_rows(tmp_path / "rows.jsonl", questions(20))
    assert launch("prepare.py", *overrides(tmp_path / "out", source)).returncode == 0
    own = tmp_path / "out" / "prepared" / "train-00000.jsonl"
    done = launch("prepare.py", *overrides(tmp_path / "out", own, "overwrite_output_dir=true"))
    assert done.returncode == 1
    assert "would delete sources=" in done.stderr
    assert own.exists()


def test_a_report_of_nothing_is_refused(tmp_path):
    source = write_rows(tmp_path / "rows.jsonl", questions(2))
    done = launch("prepare.py", *overrides(tmp_path / "out", source, "stage=report"))
    assert done.returncode == 1
    assert "holds no stage that has ended" in done.stderr


@pytest.mark.parametrize("package", ["spacy", "rensa"])
def test_a_package_that_is_missing_is_named_before_anything_is_read(package, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == package else find(name, *a))
    source = write_rows(tmp_path / "rows.jsonl", questions(3))
    with pytest.raises(Refused, match=rf"packages that are missing \({package}\): ./setup.sh data"):
        make_plan(config_of(*overrides(tmp_path / "out", source)))


def test_what_trains_needs_no_package_of_preparations():
    extra = [name for name in PACKAGES if name not in ("orjson", "xxhash")]  # which the default set-up has too
    blocked = "import sys; sys.modules.update(dict.fromkeys(sys.argv[1:]))\n"
    script = f"{blocked}import trainers.build, rlt.commands.train, rlt.commands.launch, rlt.jobs.training"
    done = subprocess.run([sys.executable, "-c", script, *extra], capture_output=True, text=True, timeout=LIMIT_S)
    assert "zstandard" in extra
    assert done.returncode == 0, done.stderr


def test_a_file_is_found_whatever_characters_its_name_has(tmp_path):
    source = write_rows(tmp_path / "my 'odd' rows [1] ü*.jsonl", questions(3))
    assert run(settings_of(tmp_path / "out", [{"path": str(source), "name": "odd"}]))["write"].counts.kept == 3


def test_what_came_out_of_a_preparation_can_go_into_another(tmp_path):
    source = write_rows(tmp_path / "rows.jsonl", questions(12))
    run(settings_of(tmp_path / "first", [source]))
    assert run(settings_of(tmp_path / "second", [tmp_path / "first"]))["write"].counts.kept == 12


def test_devices_are_not_given_to_a_preparation(tmp_path):
    source = write_rows(tmp_path / "rows.jsonl", questions(2))
    done = launch("launch.py", "2", *overrides(tmp_path / "out", source))
    assert done.returncode == 1
    assert "uses no devices" in done.stderr


def start(arguments: list[str]) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "prepare.py"), *arguments]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def test_a_worker_that_is_killed_ends_the_run_in_one_line_and_the_next_one_goes_on(tmp_path):
    source = write_rows(tmp_path / "rows.jsonl", questions(60_000))
    arguments = overrides(tmp_path / "out", source, "engine_workers=2", "engine_tasks=8")
    process = start(arguments)
    end = time.monotonic() + LIMIT_S
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while time.monotonic() < end:
        workers = [int(pid) for pid in children.read_text().split() if _is_worker(int(pid))]
        if workers:
            os.kill(workers[0], signal.SIGKILL)
            break
        time.sleep(0.01)
    _, said = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 1
    assert "error: a process of this preparation was killed" in said
    assert launch("prepare.py", *arguments).returncode == 0
    assert results_of(tmp_path / "out")[-1].counts.kept == 60_000


class _Idle:
    def one(self, rank: int) -> None: ...


def test_a_worker_that_is_killed_while_tasks_are_given_is_refused_as_well():
    def ranks():
        yield 0
        for child in psutil.Process().children():
            if _is_worker(child.pid):
                child.kill()
        for number in range(1, 1000):
            time.sleep(0.02)
            yield number

    given = ranks()
    with pytest.raises(Refused, match="a process of this preparation was killed"):
        _run_in_processes(_Idle(), given, 1, lambda: False)
    assert next(given, None) is not None  # refused before the last task was given


def _is_worker(pid: int) -> bool:
    """Not multiprocessing's tracker of resources."""
    return "spawn_main" in " ".join(psutil.Process(pid).cmdline())


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], check=True)
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_is_too_small_is_refused_before_anything_is_read(small_disk, tmp_path):
    source = write_rows(tmp_path / "rows.jsonl", questions(8000))
    done = launch("prepare.py", *overrides(small_disk / "out", source))
    assert done.returncode == 1
    assert "GiB are free" in done.stderr
    assert not (small_disk / "out").exists()


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_disk_that_fills_up_ends_the_run_in_one_line_and_with_room_it_goes_on(workers, small_disk, tmp_path):
    source = tmp_path / "rows.parquet"  # a few kilobytes, and megabytes as rows
    pandas.DataFrame(questions(1) * 20_000).to_parquet(source)
    arguments = overrides(small_disk / "out", source, f"engine_workers={workers}")
    done = launch("prepare.py", *arguments)
    assert done.returncode == 1
    assert "is full" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    assert launch("prepare.py", *arguments).returncode == 0
    assert results_of(small_disk / "out")[-1].counts.kept == 20_000


def test_a_pipeline_begins_with_a_preparation_and_trains_on_its_rows(tiny_teacher, tmp_path):
    source = write_rows(tmp_path / "rows.jsonl", [{**row, "reasoning_trace": "Add."} for row in questions(12)])
    learns = f"model_name_or_path:{tiny_teacher},max_steps:1,train_batch_size:4,eval_size:0"
    stages = (
        f"{{name:data,run:prepare_rlt,set:{{sources:[{source}],stages:[{','.join(QUICK)}]}}}}",
        f"{{name:warmup,run:teacher_sft_tiny,set:{{dataset_id_or_path:'{{data}}',{learns}}}}}",
    )
    run = ["pipeline_tiny", f"stages=[{','.join(stages)}]", f"output_dir={tmp_path / 'out'}"]
    done = launch("train.py", *run)
    assert done.returncode == 0, done.stderr
    assert "12 of 12 rows kept" in done.stdout
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<h2>data</h2>" in page and "<h2>warmup</h2>" in page
    assert json.loads((tmp_path / "out" / "warmup" / "training_rows.json").read_text())["rows"] == 12


@pytest.mark.parametrize(
    ("workers", "stage"), [pytest.param(1, "01-clean", marks=pytest.mark.slow), (2, "01-clean"), (2, "00-read")]
)
def test_a_run_that_is_asked_to_stop_ends_between_two_tasks_and_the_same_command_goes_on(workers, stage, tmp_path):
    source = write_rows(tmp_path / "rows.jsonl", questions(60_000))
    arguments = overrides(tmp_path / "out", source, f"engine_workers={workers}", "engine_tasks=8")
    process = start(arguments)
    first = tmp_path / "out" / "stages" / stage / "counts" / "rows-00000.json"
    end = time.monotonic() + LIMIT_S
    while not first.exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 75 and "Traceback" not in errors, errors
    done = first.stat().st_mtime_ns
    process = start(arguments)
    while not (tmp_path / "out" / "stages" / "02-split").exists() and process.poll() is None:
        if first.exists():
            assert first.stat().st_mtime_ns == done
        time.sleep(0.002)
    process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0
    assert len(load_rows(str(tmp_path / "out")).rows) == 60_000


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("seed", range(5))
def test_a_run_that_is_killed_in_every_stage_leaves_the_same_bytes(seed, tmp_path):
    draw = random.Random(seed)
    source = write_rows(tmp_path / "rows.jsonl", questions(4000))
    workers = f"engine_workers={1 + seed % 2}"
    for folder in ("straight", "killed"):
        (tmp_path / folder).mkdir()
    arguments = [
        "prepare_rlt",
        f"sources=[{source}]",
        f"stages=[{','.join(stages.STAGES)}]",
        "validation_share=0.1",
        workers,
    ]
    arguments.append(f"tokenizer={EMBEDDED}")
    assert launch("prepare.py", *arguments, f"output_dir={tmp_path / 'straight' / 'out'}").returncode == 0
    names = [result.folder.name for result in results_of(tmp_path / "straight" / "out")]
    seconds = {n: json.loads((tmp_path / f"straight/out/stages/{n}/seconds.json").read_text()) for n in names}
    killed = 0
    for name in names:
        process = start([*arguments, f"output_dir={tmp_path / 'killed' / 'out'}"])
        begun = tmp_path / "killed" / "out" / "stages" / name / "key"
        end = time.monotonic() + LIMIT_S
        while process.poll() is None and not begun.exists() and time.monotonic() < end:
            time.sleep(0.001)
        time.sleep(draw.uniform(0, seconds[name]))
        killed += process.poll() is None
        followers = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.communicate(timeout=LIMIT_S)
        _, left = psutil.wait_procs(followers, timeout=10)
        assert not [one for one in left if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
    assert killed >= len(names) // 2
    assert launch("prepare.py", *arguments, f"output_dir={tmp_path / 'killed' / 'out'}").returncode == 0
    straight, after = (bytes_below(tmp_path / folder / "out" / "stages") for folder in ("straight", "killed"))
    assert straight == after
    written = [bytes_below(tmp_path / folder / "out" / "prepared") for folder in ("straight", "killed")]
    assert written[0] == written[1]

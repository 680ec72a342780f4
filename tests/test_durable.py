"""What a power cut or a bad disk leaves of a run's files is found, and taken for absent where it is not whole."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator, PartialState
from conftest import ROOT, build, config_of, launch, spawn_ranks

from rlt.durable import disk_errors, read_json_lines, write_whole, written_whole
from rlt.errors import Refused
from rlt.launching.environment import free_port
from rlt.runs.folder import MARKER, SAVING, is_complete
from rlt.runs.manifest import DAMAGED, MANIFEST, damage_of, last_checkpoint, seal, sums
from rlt.runs.parts import Parts
from rlt.survival.stop_signals import StopOnSignal
from trainers.checkpoints import written_by_ranks


def checkpoint(output: Path, step: int) -> Path:
    folder = output / f"checkpoint-{step}"
    (folder / "inner").mkdir(parents=True)
    (folder / "weights").write_bytes(os.urandom(100_000))
    (folder / "inner" / "state").write_bytes(os.urandom(10))
    seal(folder)
    return folder


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "cut short": (lambda f: os.truncate(f / "weights", 99_999), "weights has 99999 of 100000 bytes"),
    "empty": (lambda f: os.truncate(f / "inner" / "state", 0), "inner/state has 0 of 10 bytes"),
    "lost": (lambda f: (f / "weights").unlink(), "weights has 0 of 100000 bytes"),
    "one bit": (lambda f: flip_a_bit(f / "weights"), "weights has other bytes than were written"),
    "empty manifest": (lambda f: os.truncate(f / MANIFEST, 0), "no manifest.json that can be read"),
    "torn manifest": (lambda f: os.truncate(f / MANIFEST, 40), "no manifest.json that can be read"),
    "manifest of zeros": (lambda f: (f / MANIFEST).write_bytes(bytes(100)), "no manifest.json that can be read"),
    "lost manifest": (lambda f: (f / MANIFEST).unlink(), "no manifest.json that can be read"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_found_and_set_aside(name, tmp_path, caplog):
    older, newest = checkpoint(tmp_path, 2), checkpoint(tmp_path, 10)
    assert last_checkpoint(tmp_path) == newest
    damage, words = DAMAGES[name]
    damage(newest)
    assert damage_of(newest) == words
    assert last_checkpoint(tmp_path) == older
    assert words in caplog.text
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2", f"{DAMAGED}checkpoint-10"}


def test_a_checkpoint_from_before_the_sums_is_whole_by_its_sizes(tmp_path):
    folder = checkpoint(tmp_path, 1)
    (folder / MANIFEST).write_text(json.dumps({"weights": 100_000, "inner/state": 10}))
    assert damage_of(folder) is None
    os.truncate(folder / "weights", 5)
    assert damage_of(folder) == "weights has 5 of 100000 bytes"


@pytest.mark.slow
def test_a_damaged_checkpoint_does_not_crowd_out_those_that_follow(tiny_run, tmp_path):
    """One checkpoint is kept. The newest is damaged, and the next life is killed after it has saved an earlier step."""
    run = [*tiny_run, "max_steps=4", "save_steps=1", "save_total_limit=1", "eval_size=0", f"output_dir={tmp_path}"]
    launch("train.py", *run, RLT_KILL_AT="generation:4")
    flip_a_bit(tmp_path / "checkpoint-3" / "model.safetensors")
    launch("train.py", *run, RLT_KILL_AT="generation:3")
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    done = launch("train.py", *run)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"resuming from {tmp_path}/checkpoint-2" in done.stderr


@pytest.mark.parametrize("content", [b"", b'{"steps": 1', bytes(20)])
def test_a_marker_that_was_cut_marks_nothing(content, tmp_path):
    config = config_of(f"output_dir={tmp_path}", "max_steps=1")
    (tmp_path / MARKER).write_bytes(content)
    assert not is_complete(config)
    assert not is_complete(config_of("run_cfg=collect_tiny", f"output_dir={tmp_path}"))


def test_lines_count_up_to_the_first_that_is_not_whole(tmp_path):
    file = tmp_path / "metrics.jsonl"
    for content, expected in (
        (b'{"step": 1}\n{"step": 2}\n', [1, 2]),
        (b'{"step": 1}\n{"st', [1]),
        (b'{"step": 1}\n\0\0\0\0\n{"step": 3}\n', [1]),
        (b'{"step": 1}\n7\n', [1]),
        (b'{"step": 1}\n\xff\n', [1]),
    ):
        file.write_bytes(content)
        assert [row["step"] for row in read_json_lines(file)] == expected
    assert read_json_lines(tmp_path / "none") == []


@pytest.mark.slow
def test_a_torn_last_line_of_the_metrics_stops_neither_a_run_nor_its_report(tiny_run, tmp_path):
    run = [*tiny_run, "save_steps=1", "eval_size=0", f"output_dir={tmp_path}"]
    assert launch("train.py", *run, "max_steps=1").returncode == 0
    whole = (tmp_path / "metrics.jsonl").read_bytes()
    (tmp_path / "metrics.jsonl").write_bytes(whole + b'{"step": 2, "lo')
    assert launch("report.py", str(tmp_path), f"--out={tmp_path / 'report.html'}").returncode == 0
    done = launch("train.py", *run, "max_steps=2")
    assert done.returncode == 0, done.stderr[-2000:]
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 1, 2, 2]


def test_the_old_content_stays_where_writing_fails(tmp_path):
    file = tmp_path / "file"
    write_whole(file, "old")
    with pytest.raises(UnicodeEncodeError):
        write_whole(file, "new \ud800")
    with pytest.raises(RuntimeError), written_whole(file) as aside:
        aside.write_text("half")
        raise RuntimeError
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


WRITES_TOO_MUCH = """
import resource, sys, torch
from pathlib import Path
from rlt.durable import disk_errors
folder, by_path = Path(sys.argv[1]), sys.argv[2] == "path"
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
with disk_errors(folder):
    with (folder / "state").open("wb") as file:
        torch.save(torch.ones(10**6), folder / "state" if by_path else file)
"""


@pytest.mark.parametrize("way", ["path", "file"])
def test_what_torch_cannot_write_is_named_by_the_system(way, tmp_path):
    command = [sys.executable, "-c", WRITES_TOO_MUCH, str(tmp_path), way]
    ended = subprocess.run(command, cwd=ROOT, timeout=120, check=False, capture_output=True, text=True)
    assert ended.stderr.splitlines()[-1] == "OSError: [Errno 27] File too large"


def test_other_errors_stay_as_they_are(tmp_path):
    with pytest.raises(RuntimeError, match="of something else"), disk_errors(tmp_path):
        raise RuntimeError("of something else")


@pytest.mark.parametrize("damage", [lambda f: os.truncate(f, 0), lambda f: os.truncate(f, 30), flip_a_bit])
def test_a_part_that_is_not_as_it_was_written_is_made_again(damage, tmp_path):
    alone = Accelerator(cpu=True)
    parts = Parts(tmp_path, 6, 2)
    parts.work(alone, StopOnSignal(), lambda part: [{"number": number, "text": "x" * 40} for number in part])
    assert parts.missing(alone) == []
    damage(parts.folder / "00001.jsonl")
    assert parts.missing(alone) == [1]
    parts.work(alone, StopOnSignal(), lambda part: [{"number": -number} for number in part])
    assert [row["number"] for row in parts.read()] == [0, 1, -2, -3, 4, 5]


def test_everything_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    """In the order of the system's calls: the file is flushed, renamed, and then its folder is flushed."""
    order, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda handle: order.append(os.readlink(f"/proc/self/fd/{handle}")) or fsync(handle)
    )
    monkeypatch.setattr(os, "replace", lambda old, new: order.append((str(old), str(new))) or replace(old, new))
    write_whole(tmp_path / "marker", "x")
    assert order == [f"{tmp_path}/marker.tmp", (f"{tmp_path}/marker.tmp", f"{tmp_path}/marker"), str(tmp_path)]


def test_a_checkpoint_is_on_the_disk_before_it_gets_its_name_and_that_before_an_older_one_goes(
    tiny_run, tmp_path, monkeypatch
):
    order, fsync, rename, rmtree = [], os.fsync, os.rename, shutil.rmtree
    run = [*tiny_run, "eval_size=0", "max_steps=2", "save_steps=1", "save_total_limit=1", "use_vllm=false"]
    trainer, _ = build(run, tmp_path)

    def watch(module, name, note, call):
        monkeypatch.setattr(module, name, lambda *a, **k: order.append(note(*a)) or call(*a, **k))

    watch(os, "fsync", lambda handle: os.readlink(f"/proc/self/fd/{handle}"), fsync)
    watch(os, "rename", lambda old, new, **_: (str(old), str(new)), rename)
    watch(shutil, "rmtree", lambda folder, *_: ("removed", str(folder)), rmtree)
    trainer.train()
    new, aside = tmp_path / "checkpoint-2", tmp_path / SAVING / "checkpoint-2"
    named = order.index((str(aside), str(new)))
    files = {str(aside / path.relative_to(new)) for path in new.rglob("*") if path.is_file()}
    assert files and files | {str(aside)} <= {*order[:named]}
    assert order[named + 1] == str(tmp_path)
    assert order.index(("removed", str(tmp_path / "checkpoint-1"))) > named + 1


def apart(rank: int, folder: str, port: int) -> None:
    """One of two ranks, whose machine does not show the files of the other."""
    from rlt.jobs.training import agreed

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    PartialState(cpu=True)
    mine = Path(folder) / str(rank)
    mine.mkdir()
    for name in (f"rng_state_{rank}.pth", f"rollouts-{rank}.pt"):
        (mine / name).write_text(f"{name} of rank {rank}")
    if rank == 0:
        (mine / "model.safetensors").write_text("weights")
        (mine / "rng_state_1.pth").write_text("")  # as a cache may show it
    written = written_by_ranks(mine, rank)
    if rank == 0:
        seal(mine, written)
    assert agreed(lambda: mine / "checkpoint-8", rank == 0) == Path(folder) / "0" / "checkpoint-8"
    assert agreed(lambda: None, rank == 0) is None

    def refuse() -> Path:
        raise Refused(f"resume_from of rank {rank}")

    with pytest.raises(Refused, match="resume_from of rank 0"):
        agreed(refuse, rank == 0)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_ranks_that_see_other_files_note_their_own_and_go_on_from_the_firsts_choice(tmp_path):
    spawn_ranks(apart, (str(tmp_path), free_port()))
    first, second = tmp_path / "0", tmp_path / "1"
    noted = json.loads((first / MANIFEST).read_text())
    names = {f"{kind}{rank}{end}" for kind, end in (("rng_state_", ".pth"), ("rollouts-", ".pt")) for rank in range(2)}
    assert noted.keys() == {"model.safetensors", *names}
    assert damage_of(first) == "rng_state_1.pth has 0 of 25 bytes"
    for name in ("rng_state_1.pth", "rollouts-1.pt"):
        shutil.copy(second / name, first / name)
    assert damage_of(first) is None
    (first / "rollouts-1.pt").unlink()
    assert (damage_of(first) or "").startswith("rollouts-1.pt has 0 of")


def test_a_manifest_has_what_another_machine_wrote_by_its_sum_and_not_by_what_is_seen_here(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
        (folder / "weights").write_text("w")
    (there / "rng_state_1.pth").write_text("state")
    (here / "rng_state_1.pth").write_text("")  # as a cache may show it
    seal(here, sums(there, [there / "rng_state_1.pth"]))
    assert damage_of(here) == "rng_state_1.pth has 0 of 5 bytes"
    shutil.copy(there / "rng_state_1.pth", here)
    assert damage_of(here) is None


SAVED_TWICE = """
import json, sys
sys.path.insert(0, "tests")
from pathlib import Path
from conftest import build
words = ["max_steps=1", "save_steps=1", "save_total_limit=1", "eval_size=0"]
trainer, _ = build(json.loads(sys.argv[1]), Path(sys.argv[2]), *words)
trainer.train()
trainer._save_checkpoint(trainer.model, None)
"""


@pytest.mark.slow
def test_a_step_that_is_saved_again_is_there_at_any_moment(tiny_run, tmp_path):
    """The process is killed when the first of the two has lost its name, and the second has none yet."""
    environment = {**os.environ, "RLT_KILL_AT": "replacing", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SAVED_TWICE, json.dumps(tiny_run), str(tmp_path)]
    ended = subprocess.run(command, cwd=ROOT, env=environment, timeout=120, check=False, capture_output=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr[-2000:]
    assert not (tmp_path / "checkpoint-1").exists()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-1"
    assert damage_of(tmp_path / "checkpoint-1") is None

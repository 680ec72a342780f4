"""Each file of a real checkpoint cut, emptied, lost, or with one bit of it turned: it is found, and the run goes on."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import launch
from figures import record
from test_faults import assert_ends_as

from rlt.runs.manifest import damage_of, last_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
STEPS = ["save_steps=1", "eval_size=0", "use_vllm=false"]


def turn_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], None]] = {
    "cut": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "emptied": lambda file: file.write_bytes(b""),
    "lost": Path.unlink,
    "a bit turned": turn_a_bit,
}


@pytest.mark.parametrize("limit", [1, 2])
def test_whatever_is_damaged(limit, tiny_run, tmp_path):
    run = [*tiny_run, *STEPS, f"save_total_limit={limit}"]
    for name, steps in (("straight", 4), ("run", 2)):
        done = launch("train.py", *run, f"max_steps={steps}", f"output_dir={tmp_path / name}")
        assert done.returncode == 0, done.stderr[-2000:]
    files = [path.relative_to(tmp_path / "run") for path in (tmp_path / "run" / "checkpoint-2").rglob("*")]
    found, tried = 0, 0
    for file in (file for file in files if (tmp_path / "run" / file).is_file()):
        for damage in DAMAGE.values():
            copy = tmp_path / "copy"
            shutil.copytree(tmp_path / "run", copy)
            damage(copy / file)
            left = last_checkpoint(copy)
            found += (left.name if left else None) == (None if limit == 1 else "checkpoint-1")
            tried += 1
            shutil.rmtree(copy)
    turn_a_bit(tmp_path / "run" / "checkpoint-2" / "training_state.pt")
    (tmp_path / "run" / "COMPLETE").unlink()
    done = launch("train.py", *run, "max_steps=4", f"output_dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr[-2000:]
    kept = last_checkpoint(tmp_path / "run")
    assert kept is not None and kept.name == "checkpoint-4" and damage_of(kept) is None
    assert_ends_as(tmp_path / "run", tmp_path / "straight")
    record("5. damage to a file of a checkpoint", **{f"limit {limit}": f"{found} of {tried} found"})
    assert found == tried

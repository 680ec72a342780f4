"""`push_to_hub`: a real run pushes to a server on this machine that speaks the hub's API; what it got is looked at."""

import base64
import hashlib
import json
import socket
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from conftest import config_of, launch

from rlt.errors import Refused
from rlt.planning.plan import make_plan
from rlt.reports.model_card import made_by, model_card, paired_figures
from rlt.runs.hub import make_repository

TOKEN = "hf_a_token_that_nobody_may_read"


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's API as a push needs: repositories, pre-upload, large files, commits.

    State is kept on the server: `files` by path, `messages` of commits, `tokens` that came.
    """

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        """Nothing on standard error."""

    def body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def answer(self, content: dict, status: int = 200) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)

    def do_PUT(self):
        content = self.body()
        if self.server.large is None:
            self.answer({"error": "no room"}, 400)
            return
        assert hashlib.sha256(content).hexdigest() == self.path.removeprefix("/large/")
        self.server.large[self.path.removeprefix("/large/")] = content
        self.answer({})

    def do_GET(self):
        self.answer({"error": "no such file"}, 404)

    do_HEAD = do_GET

    def do_POST(self):
        content, path = self.body(), self.path.partition("?")[0]
        self.server.tokens.add(self.headers.get("Authorization"))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer({"error": "Invalid username or password."}, 401)
        elif path == "/api/repos/create":
            asked = json.loads(content)
            self.answer({"url": f"{self.server.url}/{asked.get('organization') or 'me'}/{asked['name']}"})
        elif path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            files = json.loads(content)["files"]
            modes = {f["path"]: "lfs" if f["path"].endswith(".safetensors") else "regular" for f in files}
            answers = [{"path": p, "uploadMode": mode, "shouldIgnore": False} for p, mode in modes.items()]
            self.answer({"files": answers})
        elif path.endswith("/info/lfs/objects/batch"):
            wanted = json.loads(content)["objects"]
            upload = [
                {**one, "actions": {"upload": {"href": f"{self.server.url}/large/{one['oid']}"}}} for one in wanted
            ]
            self.answer({"transfer": "basic", "objects": upload})
        elif "/commit/" in path:
            self.commit([json.loads(line) for line in content.splitlines()])
        else:
            self.answer({"error": path}, 404)

    def commit(self, lines: list[dict]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.server.messages.append(value["summary"])
            elif line["key"] == "file":
                self.server.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.server.files[value["path"]] = self.server.large[value["oid"]]
        self.answer({"commitUrl": f"{self.server.url}/me/teacher/commit/{'0' * 40}", "commitOid": "0" * 40})


@contextmanager
def serving():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.files, server.large, server.messages, server.tokens = {}, {}, [], set()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join(timeout=10)
        server.server_close()


@pytest.fixture
def hub():
    with serving() as server:
        yield server


def pushed(tiny_run, folder: Path, hub, *more: str):
    given = [*tiny_run, f"output_dir={folder}", "max_steps=2", "save_steps=1", "push_to_hub=true"]
    arguments = [word for word in given if not word.startswith("run_cfg=")]
    environment = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    return launch("train.py", "teacher_rlt_tiny", *arguments, f"hub_token={TOKEN}", *more, **environment)


def test_a_finished_run_is_on_the_hub_with_its_card_and_nothing_that_is_private(tiny_run, tmp_path, hub):
    folder = tmp_path / "run"
    done = pushed(tiny_run, folder, hub, "hub_model_id=me/teacher", "report_to=[wandb,tensorboard,trackio]")
    assert done.returncode == 0, done.stderr
    assert hub.messages == ["teacher_rlt_tiny"]  # one commit, though a checkpoint was saved at each step
    assert set(hub.files) == {
        *("README.md", "config.yaml", "metrics.jsonl", "evaluations.jsonl", "held_out.jsonl", "curves.png"),
        *("training_rows.json", "config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    }
    assert all(content == (folder / name).read_bytes() for name, content in hub.files.items())
    assert hub.tokens == {f"Bearer {TOKEN}"}
    on_disk = [path for path in folder.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    assert on_disk == [], "the token was written"
    assert TOKEN not in done.stdout + done.stderr
    _, head, text = hub.files["README.md"].decode().split("---\n", 2)
    assert yaml.safe_load(head)["tags"] == ["trl", "grpo", "arxiv:2506.08388"]
    assert "cfgs/run_cfg/teacher_rlt_tiny.yaml" in text
    gain = done.stdout.partition("paired difference ")[2].partition(" (")[0]
    assert gain and f"| {gain} |" in text  # the run's own sentence, with its interval
    assert "`reasoning_gym/gsm_symbolic`, 12 rows, seed 0" in text


@pytest.mark.slow
def test_a_push_that_fails_is_made_up_for_by_the_same_command(tiny_run, tmp_path):
    folder = tmp_path / "run"
    with serving() as hub:
        hub.large = None  # large files break
        failed = pushed(tiny_run, folder, hub)
        assert failed.returncode != 0
        assert "error: push_to_hub=true: me/run was not pushed" in failed.stderr
        assert "the same command tries again" in failed.stderr
        assert not (folder / "COMPLETE").exists()
        hub.large = {}
        again = pushed(tiny_run, folder, hub)
        assert again.returncode == 0, again.stderr
        assert hub.files["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert max(steps) == 2  # nothing was trained again


def test_a_hub_that_lets_nobody_in_or_is_not_there_is_noticed_before_training(tmp_path, monkeypatch, hub):
    config = config_of(f"output_dir={tmp_path}/run", "push_to_hub=true", "hub_token=hf_wrong")
    for endpoint in (hub.url, "http://127.0.0.1:9"):
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        with pytest.raises(Refused, match=rf"run cannot be made on {endpoint} .*hub_token") as refused:
            make_repository(config)
        assert "hf_wrong" not in str(refused.value)
    assert make_repository({**config, "push_to_hub": False}) is None


def test_a_hub_that_takes_the_call_and_says_nothing_is_given_up(tmp_path, monkeypatch):
    config = config_of(f"output_dir={tmp_path}/run", "push_to_hub=true", "hub_token=hf_wrong")
    monkeypatch.setattr("rlt.runs.hub.ANSWERS_WITHIN_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(Refused, match="timed out"):
            make_repository(config)


def test_pushes_in_between_are_refused(tmp_path):
    with pytest.raises(Refused, match="hub_strategy: runs here need it as it is"):
        make_plan(config_of("hub_strategy=every_save", f"output_dir={tmp_path}"))


def test_differences_on_a_card_are_paired_and_of_the_weights_that_were_kept():
    records = [{"reward": [1.0, 3.0], "step": 0}, {"reward": [2.0, 4.0], "step": 1}, {"reward": [0.0, 0.0], "step": 2}]
    assert "| reward | 2.000 [1.000, 3.000] | 3.000 [2.000, 4.000] | +1.000 [+1.000, +1.000] |" in paired_figures(
        records, 1
    )
    assert "Step 1 was chosen on these questions from 2 evaluations." in paired_figures(records, 1)
    assert "| -2.000 [-3.000, -1.000] |" in paired_figures(records, None)


def test_a_card_names_the_data_and_the_licence_of_all_runs_behind_it(tmp_path):
    start, own = tmp_path / "warm-up", tmp_path / "teacher"
    warm_up = config_of("teacher_sft", "model_name_or_path=embedded/smollm2-135m-instruct", f"output_dir={start}")
    teacher = config_of("teacher_rlt_tiny", f"model_name_or_path={start}", f"output_dir={own}", "hub_token=hf_x")
    for config in (warm_up, teacher):
        Path(config["output_dir"]).mkdir()
        (Path(config["output_dir"]) / "config.yaml").write_text(yaml.safe_dump(config))
    text = model_card(own)
    head = yaml.safe_load(text.split("---\n")[1])
    assert head["license"] == "apache-2.0"
    assert head["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert head["datasets"] == ["bespokelabs/Bespoke-Stratos-17k"]
    assert "None were taken." in text
    assert "hf_x" not in text
    (start / "README.md").write_text("---\nlicense: mit\n---\n")  # of a run, whose base is what counts
    assert "under apache-2.0" in model_card(own)


def test_a_card_says_which_keys_a_run_was_given(tmp_path):
    text = made_by(config_of("teacher_rlt_tiny", "learning_rate=2e-5", "student_model=a/b", "report_to=null"))
    assert "./launch_mono.sh teacher_rlt_tiny \\\n  learning_rate=2e-05 \\\n  student_model='a/b'\n```" in text

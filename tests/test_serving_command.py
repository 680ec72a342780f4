"""`serve.py`: its one line, its keys, and how it ends."""

import os
import signal
import subprocess
import sys

import httpx
import pytest
from conftest import ROOT

pytest.importorskip("sqlalchemy")

LIMIT_S = 60


def serve(folder, *words: str, key: str | None = None) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    environment.pop("RLT_API_KEY", None)
    environment |= {"RLT_API_KEY": key} if key else {}
    command = [sys.executable, str(ROOT / "serve.py"), "port=0", f"state_dir={folder}", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def code(address: str, key: str) -> int:
    return httpx.get(f"{address}/api/v1/get_server_capabilities", headers={"X-API-Key": key}).status_code


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_key_is_made_and_said_and_the_server_ends_on_a_signal_without_a_word(tmp_path, number):
    process = serve(tmp_path)
    word, address, _, key = process.stdout.readline().replace(",", "").split()
    assert word == "serving"
    assert (code(address, key), code(address, "tml-another-key")) == (200, 401)
    process.send_signal(number)
    _, errors = process.communicate(timeout=LIMIT_S)
    assert (process.returncode, errors) == (0, "")
    assert key.encode() not in (tmp_path / "state.db").read_bytes()


def test_each_tenant_has_a_key_of_its_own(tmp_path):
    process = serve(tmp_path, key="ann=tml-aaaaaaaaaaaa,bob=tml-bbbbbbbbbbbb")
    line = process.stdout.readline()
    assert "tml-" not in line
    address = line.split()[1]
    assert [code(address, f"tml-{name * 12}") for name in "abc"] == [200, 200, 401]
    process.kill()
    process.communicate(timeout=LIMIT_S)


def test_a_model_is_served_by_the_name_that_clients_know(tmp_path):
    name = "Qwen/Qwen3-4B-Instruct-2507"
    process = serve(tmp_path, f"base_models=[{name}=embedded/smollm2-135m-instruct]", key="tml-aaaaaaaaaaaa")
    address = process.stdout.readline().split()[1]
    headers = {"X-API-Key": "tml-aaaaaaaaaaaa"}
    said = httpx.get(f"{address}/api/v1/get_server_capabilities", headers=headers).json()
    assert [each["model_name"] for each in said["supported_models"]] == [name]
    process.kill()
    process.communicate(timeout=LIMIT_S)


@pytest.mark.parametrize(
    ("words", "key", "said"),
    [
        (["prot=1"], None, "prot"),
        (["port=70000"], None, "70000"),
        (["base_models=[x]"], None, "'x'"),
        (["base_models=[x=/nowhere]"], None, "/nowhere"),
        (["base_models=embedded/gpt"], None, "base_models"),
        (["base_models=[embedded/gpt]"], None, "embedded/smollm2-135m-instruct"),
        ([], "abc", "tml-"),
        ([], "ann=tml-aaaaaaaaaaaa,bob", "RLT_API_KEY"),
        ([], "ann=tml-aaaaaaaaaaaa,bob=tml-aaaaaaaaaaaa", "its own"),
    ],
)
def test_what_cannot_be_served_ends_in_one_line(tmp_path, words, key, said):
    process = serve(tmp_path, *words, key=key)
    _, errors = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 1
    assert len(errors.strip().splitlines()) == 1
    assert said in errors

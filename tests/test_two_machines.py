"""Two hosts with addresses of their own on one machine: `./run_tests.sh -m slow tests/test_two_machines.py` as root."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, launch
from test_faults import weights
from test_launch import END_LIMIT_S, reached, wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="makes network namespaces"),
]
FIXED = "tests/fixed_launch.py"
KEY = "the-key-of-both-hosts"
HOSTS = {"rlt-host0": "10.77.0.1", "rlt-host1": "10.77.0.2"}


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, timeout=10)


@pytest.fixture
def hosts():
    for host in HOSTS:
        ip("netns", "add", host)
    try:
        ip("link", "add", "rlt0", "netns", "rlt-host0", "type", "veth", "peer", "name", "rlt1", "netns", "rlt-host1")
        for number, (host, address) in enumerate(HOSTS.items()):
            ip("-n", host, "addr", "add", f"{address}/24", "dev", f"rlt{number}")
            for device in ("lo", f"rlt{number}"):
                ip("-n", host, "link", "set", device, "up")
        yield list(HOSTS)
    finally:
        for host in HOSTS:
            ip("netns", "delete", host)


def start_one(
    node: int, host: str, *arguments: str, devices: str = "1", script: str = "launch.py", **environment: str
) -> subprocess.Popen:
    return subprocess.Popen(
        # One core each: with as many threads as two processes of one machine, the sums are the same to the last bit.
        [
            "ip",
            "netns",
            "exec",
            host,
            "taskset",
            "-c",
            str(node),
            sys.executable,
            str(ROOT / script),
            devices,
            *arguments,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "NNODES": "2", "NODE_RANK": str(node), "MASTER_ADDR": "10.77.0.1", **environment},
    )


def start_on(hosts: list[str], *arguments: str, **environment: str) -> list[subprocess.Popen]:
    """The same command on each host."""
    return [start_one(node, host, *arguments, **environment) for node, host in enumerate(hosts)]


def assert_trained(launchers: list[subprocess.Popen]) -> None:
    for launcher in launchers:
        _, said = launcher.communicate(timeout=240)
        assert launcher.returncode == 0, said[-3000:]


def assert_same_weights(folder: Path, expected: Path) -> None:
    ours, theirs = weights(folder), weights(expected)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-4, rtol=0)


def test_two_machines_train_as_two_processes_of_one(hosts, tiny_run, tmp_path):
    run = [*tiny_run, "max_steps=3", "eval_size=0", "use_vllm=false"]
    assert_trained(start_on(hosts, *run, f"output_dir={tmp_path / 'apart'}"))
    done = launch("launch.py", "2", *run, f"output_dir={tmp_path / 'together'}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_weights(tmp_path / "apart", tmp_path / "together")


def test_servers_on_one_machine_write_for_both(hosts, tiny_run, tmp_path):
    run = [*tiny_run, "max_steps=3", "eval_size=0", "use_vllm=true"]
    place = {"SERVER_HOST": "10.77.0.1", "SERVER_PORT": "8123", "RLT_SERVER_KEY": KEY}
    served = [*run, "use_vllm_server=true", "vllm_server_base_url=[http://10.77.0.1:8123]"]
    before = set(os.listdir("/dev/shm"))
    server = start_one(0, hosts[0], "0", *run, devices="--servers=1", **place)
    try:
        wait_until_reachable(hosts[1], "10.77.0.1", 8123)
        assert_trained(start_on(hosts, *served, f"output_dir={tmp_path / 'apart'}", RLT_SERVER_KEY=KEY))
    finally:
        server.send_signal(signal.SIGTERM)
        _, said = server.communicate(timeout=60)
    assert server.returncode == 0, said[-3000:]
    assert set(os.listdir("/dev/shm")) <= before
    done = launch("launch.py", "2", *run, f"output_dir={tmp_path / 'together'}")
    assert done.returncode == 0, done.stderr[-3000:]
    ours, theirs = (steps_of(tmp_path / name) for name in ("apart", "together"))
    assert len(ours) == 3
    for (loss, length), (expected_loss, expected_length) in zip(ours, theirs, strict=True):
        assert loss == pytest.approx(expected_loss, abs=1e-4)
        assert length == expected_length


def steps_of(folder: Path) -> list[tuple[float, float]]:
    """Loss and mean length of each step."""
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(record["loss"], record["completions/mean_length"]) for record in records if "loss" in record]


def wait_until_reachable(host: str, address: str, port: int) -> None:
    probe = f"import urllib.request; urllib.request.urlopen('http://{address}:{port}/health', timeout=5)"
    call = ["ip", "netns", "exec", host, sys.executable, "-c", probe]
    wait_until(lambda: subprocess.run(call, capture_output=True, timeout=30, check=False).returncode == 0)


def test_a_cut_link_ends_both_with_the_reason(hosts, tiny_run, tmp_path):
    run = [*tiny_run, "max_steps=1000", "eval_size=0", "use_vllm=false", f"output_dir={tmp_path}"]
    launchers = start_on(hosts, *run)
    wait_until(lambda: reached(tmp_path, 2))
    ip("-n", "rlt-host0", "link", "set", "rlt0", "down")
    for launcher in launchers:
        _, said = launcher.communicate(timeout=END_LIMIT_S)
        assert launcher.returncode not in (0, -signal.SIGKILL)
        assert "was not heard of for 30 s" in said.splitlines()[-1], said[-3000:]


def test_a_rank_that_is_killed_ends_the_other_machine_too(hosts, tiny_run, tmp_path):
    run = [*tiny_run, "max_steps=1000", "eval_size=0", "use_vllm=false", f"output_dir={tmp_path}"]
    launchers = start_on(hosts, *run, RLT_KILL_AT="backward:3", RLT_KILL_RANK="1")
    wait_until(lambda: reached(tmp_path, 1))
    said = [launcher.communicate(timeout=END_LIMIT_S)[1] for launcher in launchers]
    assert all(launcher.returncode != 0 for launcher in launchers)
    assert "rank 1 ended first, with signal SIGKILL" in said[1]
    assert "machine 1: rank 1 ended first, with signal SIGKILL" in said[0] or "onnection" in said[0], said[0][-3000:]


@pytest.mark.parametrize(
    ("others", "said"),
    [
        ({"devices": "1"}, "beta=0.01 with NODE_RANK=0 and 0.02 with NODE_RANK=1"),
        ({"devices": "2"}, "devices=1 with NODE_RANK=0 and 2 with NODE_RANK=1"),
    ],
)
def test_other_configurations_on_two_machines_are_named_before_anything_starts(others, said, hosts, tiny_run, tmp_path):
    run = [*tiny_run, "max_steps=1", "eval_size=0", "use_vllm=false", f"output_dir={tmp_path / 'run'}"]
    betas = ["beta=0.01", "beta=0.02" if others["devices"] == "1" else "beta=0.01"]
    launchers = [
        start_one(0, hosts[0], *run, betas[0]),
        start_one(1, hosts[1], *run, betas[1], **others),
    ]
    for launcher in launchers:
        _, text = launcher.communicate(timeout=60)
        assert launcher.returncode == 1
        assert said in text.splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_when_a_machine_is_lost_the_other_ends_the_run(hosts, tiny_run, tmp_path):
    run = [*tiny_run, "max_steps=6", "save_steps=1", "eval_size=0", "max_completion_length=40"]
    apart = [*run, f"output_dir={tmp_path / 'apart'}"]
    first, second = start_on(hosts, *apart, script=FIXED, NNODES="1:2")
    wait_until(lambda: reached(tmp_path / "apart", 2))
    second.kill()  # and what it started, with it
    _, said = first.communicate(timeout=240)
    assert first.returncode == 0, said[-3000:]
    second.communicate(timeout=10)
    assert "machine 1 was not heard of" in said or "onnection" in said
    assert "resuming from" in said
    done = launch(FIXED, "2", *run, f"output_dir={tmp_path / 'together'}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_weights(tmp_path / "apart", tmp_path / "together")


def test_a_machine_that_comes_back_joins_without_losing_a_step(hosts, tiny_run, tmp_path):
    run = [*tiny_run, "max_steps=40", "save_steps=100", "eval_size=0", "use_vllm=false", f"output_dir={tmp_path}"]
    first = start_one(0, hosts[0], *run, NNODES="1:2")
    wait_until(lambda: reached(tmp_path, 2))
    second = start_one(1, hosts[1], *run, NNODES="1:2")
    for launcher in (first, second):
        _, said = launcher.communicate(timeout=240)
        assert launcher.returncode == 0, said[-3000:]
    records = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert [record["step"] for record in records if "loss" in record] == list(range(1, 41))
    assert (tmp_path / "logs" / "rank-1.log").is_file()

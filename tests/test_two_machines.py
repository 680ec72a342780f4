"""Two hosts with addresses of their own on one machine: `./run_tests.sh -m slow tests/test_two_machines.py` as root."""

import os
import signal
import subprocess
import time

import pytest
import torch
from conftest import launch
from test_faults import weights
from test_launch import command, reached, wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="makes network namespaces"),
]
HOSTS = {"rlt-host0": "10.77.0.1", "rlt-host1": "10.77.0.2"}
COLLECTIVE_LIMIT_S = 20


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


def start_one(node: int, host: str, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        ["ip", "netns", "exec", host, *command("1", *arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "NNODES": "2", "NODE_RANK": str(node), "MASTER_ADDR": "10.77.0.1"},
    )


def start_on(hosts: list[str], *arguments: str) -> list[subprocess.Popen]:
    """The same command on each host."""
    return [start_one(node, host, *arguments) for node, host in enumerate(hosts)]


def test_two_machines_train_as_two_processes_of_one(hosts, tiny_run, tmp_path):
    run = [*tiny_run, "max_steps=3", "eval_size=0", "use_vllm=false"]
    apart = start_on(hosts, *run, f"output_dir={tmp_path / 'apart'}")
    for launcher in apart:
        _, said = launcher.communicate(timeout=240)
        assert launcher.returncode == 0, said[-3000:]
    done = launch("launch.py", "2", *run, f"output_dir={tmp_path / 'together'}")
    assert done.returncode == 0, done.stderr[-3000:]
    a, b = weights(tmp_path / "apart"), weights(tmp_path / "together")
    for name in b:  # sums differ in their last bits with the number of threads
        torch.testing.assert_close(a[name], b[name], atol=1e-4, rtol=0)


def test_a_cut_link_ends_both_with_the_reason(hosts, tiny_run, tmp_path):
    limit = f"ddp_timeout={COLLECTIVE_LIMIT_S}"
    run = [*tiny_run, "max_steps=1000", "eval_size=0", "use_vllm=false", limit, f"output_dir={tmp_path}"]
    launchers = start_on(hosts, *run)
    wait_until(lambda: reached(tmp_path, 2))
    ip("-n", "rlt-host0", "link", "set", "rlt0", "down")
    since = time.monotonic()
    for launcher in launchers:
        _, said = launcher.communicate(timeout=2 * COLLECTIVE_LIMIT_S + 60)
        assert launcher.returncode not in (0, -signal.SIGKILL)
        assert "Timed out" in said or "imeout" in said or "Connection" in said or "closed" in said, said[-3000:]
    assert time.monotonic() - since < 2 * COLLECTIVE_LIMIT_S + 60


def test_other_configurations_on_two_machines_are_named(hosts, tiny_run, tmp_path):
    limit = f"ddp_timeout={COLLECTIVE_LIMIT_S}"  # for the machine that waits for the other
    run = [*tiny_run, "max_steps=1", "eval_size=0", "use_vllm=false", limit, f"output_dir={tmp_path / 'run'}"]
    launchers = [start_one(node, host, *run, f"beta=0.0{node + 1}") for node, host in enumerate(hosts)]
    said = [launcher.communicate(timeout=240)[1] for launcher in launchers]
    assert all(launcher.returncode != 0 for launcher in launchers)
    # The second machine may find the first one's configuration in the folder before they meet.
    assert "beta=0.01 on rank 0 and 0.02 on rank 1" in said[1] or "a different run (beta: 0.01" in said[1], said[1][
        -3000:
    ]

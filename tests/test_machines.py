"""Launchers of several machines: who is missing, or was started otherwise, is said before anything starts."""

import os
import socket
import threading
import time
from collections.abc import Callable

import psutil
import pytest

from backends.roll_call import open_store_on_loopback
from rlt.launching.environment import Machines, free_port
from rlt.launching.meeting import Meeting, draw

RUN = {"beta": 0.04, "devices": 8}


def meeting(node: int | None, port: int, nodes: int = 2, limit_s: float = 10.0, least: int | None = None) -> Meeting:
    return Meeting(Machines(least or nodes, nodes, node, "127.0.0.1", port), "run", limit_s)


def beside(*actions: Callable) -> threading.Thread:
    """Another machine, in a thread: its actions one after the other."""
    thread = threading.Thread(target=lambda: [action() for action in actions])
    thread.start()
    return thread


def test_they_meet_and_agree_on_the_start(tmp_path):
    port, prepared = free_port(), []

    def other():
        second = meeting(1, port)
        second.compare(RUN)
        second.start(tmp_path)
        prepared.append("seen")

    thread = beside(other)
    first = meeting(0, port)
    first.compare(RUN)
    time.sleep(0.5)
    prepared.append("by the first")
    first.start(tmp_path)
    thread.join(10)
    assert prepared == ["by the first", "seen"]


def test_a_folder_that_is_not_the_first_machines_is_refused(tmp_path, monkeypatch):
    """Another run may have been in it, and have left all that a run leaves: what this one draws it has not."""
    monkeypatch.setattr("rlt.launching.meeting.SEEN_LIMIT_S", 0.5)
    port, seen = free_port(), []
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for folder in (ours, theirs):
        folder.mkdir()
        (folder / "config.yaml").write_text("trainer: grpo")
    draw(theirs)

    def other():
        second = meeting(1, port)
        second.compare(RUN)
        with pytest.raises(ValueError, match=f"output_dir={theirs} is not the folder of NODE_RANK=0") as refused:
            second.start(theirs)
        seen.append(str(refused.value))
        second.start(ours)
        seen.append("shared")

    thread = beside(other)
    first = meeting(0, port)
    first.compare(RUN)
    first.start(ours)
    thread.join(10)
    assert len(seen) == 2 and "\n" not in seen[0]


def test_machines_without_numbers_get_them_in_the_order_of_their_coming():
    port = free_port()
    first = meeting(0, port, nodes=3)
    assert [meeting(None, port, nodes=3).node for _ in range(3)] == [1, 2, 1]
    assert first.node == 0


@pytest.mark.parametrize("objecting", [0, 1])
def test_what_stands_in_the_way_on_one_is_told_to_both(objecting):
    port, told = free_port(), []
    said = f"machine {objecting}: 8 devices asked for, and 4 GPUs are visible"

    def one(node: int):
        problem = said.partition(": ")[2] if node == objecting else ""
        with pytest.raises(ValueError, match=said):
            meeting(node, port).compare(RUN, problem)
        told.append(node)

    thread = beside(lambda: one(1))
    one(0)
    thread.join(10)
    assert sorted(told) == [0, 1]


def test_the_missing_are_named():
    with pytest.raises(ValueError, match=r"NODE_RANK=1, NODE_RANK=2 did not come within 1 s"):
        meeting(0, free_port(), nodes=3, limit_s=1.0).compare(RUN)
    with pytest.raises(ValueError, match=r"MASTER_ADDR=127.0.0.1, MASTER_PORT=\d+ did not answer within 1 s"):
        meeting(1, free_port(), limit_s=1.0).compare(RUN)


def test_of_a_range_the_least_number_is_enough_and_one_that_comes_later_is_compared_too(monkeypatch, tmp_path):
    monkeypatch.setattr("rlt.launching.meeting.LAST_CALL_S", 0.5)
    port = free_port()
    first = meeting(0, port, least=1)
    first.compare(RUN)
    first.start(tmp_path)
    late = meeting(1, port, least=1)
    with pytest.raises(ValueError, match="beta=0.04 with NODE_RANK=0 and 0.0 with NODE_RANK=1"):
        late.compare({**RUN, "beta": 0.0})
    again = meeting(1, port, least=1)
    again.compare(RUN)
    again.start(tmp_path)


@pytest.mark.parametrize(
    ("nodes", "node", "run", "said"),
    [
        (2, 1, {**RUN, "beta": 0.0}, "beta=0.04 with NODE_RANK=0 and 0.0 with NODE_RANK=1"),
        (2, 1, {**RUN, "devices": 4}, "devices=8 with NODE_RANK=0 and 4 with NODE_RANK=1"),
        (3, 2, {**RUN, "more": 1}, "more=None with NODE_RANK=0 and 1 with NODE_RANK=2"),
    ],
)
def test_both_sides_are_told_of_a_difference(nodes, node, run, said):
    port, told = free_port(), []

    def other():
        with pytest.raises(ValueError, match=said) as caught:
            meeting(node, port, nodes).compare(run)
        told.append(caught)

    thread = beside(other)
    with pytest.raises(ValueError, match=said):
        meeting(0, port, nodes).compare(RUN)
    thread.join(10)
    assert told


def test_one_that_comes_twice_is_sent_away():
    port = free_port()
    first = meeting(0, port)
    second = beside(lambda: meeting(1, port).compare(RUN))
    first.compare(RUN)
    second.join(10)
    with pytest.raises(ValueError, match="NODE_RANK=1 came twice"):
        meeting(1, port).compare(RUN)


def test_a_stranger_is_sent_away_and_a_port_in_use_is_named():
    port = free_port()
    first = meeting(0, port)
    with socket.create_connection(("127.0.0.1", port), timeout=1) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        thread = beside(lambda: meeting(1, port).compare(RUN))
        first.compare(RUN)
        thread.join(10)
    with socket.create_server(("", 0)) as taken:
        number = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"MASTER_PORT={number} cannot be had"):
            meeting(0, number)


def test_the_store_of_one_machines_ranks_listens_on_the_loopback_alone(monkeypatch):
    port = free_port()
    for name in ("MASTER_ADDR", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.setenv(name, "")  # to be as before when this is over
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("MASTER_PORT", str(port))
    store = open_store_on_loopback(10)
    here = [c.laddr for c in psutil.Process().net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    assert [place.ip for place in here if place.port == port] == ["127.0.0.1"]
    assert (os.environ["MASTER_ADDR"], os.environ["TORCHELASTIC_USE_AGENT_STORE"]) == ("127.0.0.1", "True")
    del store

"""Launchers of several machines: who is missing, or was started otherwise, is said before anything starts."""

import socket
import threading

import pytest

from rlt.launching.environment import free_port
from rlt.launching.machines import Link, Machines

RUN = {"beta": 0.04, "devices": 8}


def link(node: int, port: int, nodes: int = 2, limit_s: float = 10.0) -> Link:
    return Link(Machines(nodes, node, "127.0.0.1", port), limit_s)


def test_they_meet_agree_on_a_port_and_hear_of_a_failure():
    port = free_port()
    first, second = link(0, port), link(1, port)
    agreed = []
    thread = threading.Thread(target=lambda: (second.meet(RUN), agreed.append(second.agree(0)), second.start()))
    thread.start()
    first.meet(RUN)
    assert first.agree(4321) == 4321
    first.start()
    thread.join(10)
    assert agreed == [4321]
    second.announce("rank 9 ended first, with exit code 1")
    assert first.given_up.wait(10)
    assert first.last_words() == "\nmachine 1: rank 9 ended first, with exit code 1\n"
    first.close(False)
    second.close(False)


def test_an_end_that_went_well_is_no_failure():
    port = free_port()
    first, second = link(0, port), link(1, port)
    thread = threading.Thread(target=lambda: (second.meet(RUN), second.agree(0), second.start(), second.close(True)))
    thread.start()
    first.meet(RUN)
    first.agree(1)
    first.start()
    thread.join(10)
    assert not first.given_up.wait(1.0)
    first.close(True)


def test_the_missing_are_named():
    with pytest.raises(ValueError, match=r"NODE_RANK=1, NODE_RANK=2 did not come within 1 s"):
        link(0, free_port(), nodes=3, limit_s=1.0).meet(RUN)
    with pytest.raises(ValueError, match=r"MASTER_ADDR=127.0.0.1, MASTER_PORT=\d+ did not answer within 1 s"):
        link(1, free_port(), limit_s=1.0).meet(RUN)


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
            link(node, port, nodes).meet(run)
        told.append(caught)

    thread = threading.Thread(target=other)
    thread.start()
    with pytest.raises(ValueError, match=said):
        link(0, port, nodes).meet(RUN)
    thread.join(10)
    assert told


def test_a_stranger_is_sent_away_and_a_port_in_use_is_named():
    port = free_port()
    first, second = link(0, port), link(1, port)

    def stranger_then_second():
        while True:
            try:
                with socket.create_connection(("127.0.0.1", port), timeout=1) as stranger:
                    stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
                break
            except OSError:
                pass
        second.meet(RUN)

    thread = threading.Thread(target=stranger_then_second)
    thread.start()
    first.meet(RUN)
    thread.join(10)
    first.close(True)
    second.close(True)
    with socket.create_server(("", 0)) as taken:
        number = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"MASTER_PORT={number} cannot be had"):
            link(0, number).meet(RUN)

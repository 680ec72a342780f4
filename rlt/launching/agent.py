"""The ranks of one machine, by PyTorch's elastic agent (what torchrun is made of), which starts them, restarts them
together with those of other machines, and gives them their numbers.

Ours is what the agent lacks: what a rank started ends with it; a rank whose peer is dead is ended instead of asked to
save; a signal lets all ranks save, for as long as that takes; a machine that is silent counts as gone; the end of the
failed rank's log comes last. Each rank leads a process group of its own; no other process is ever touched.
"""

import logging
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch.distributed import DistError, PrefixStore
from torch.distributed.elastic.agent.server.api import RunResult, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs, SignalException
from torch.distributed.elastic.rendezvous import RendezvousError

from rlt.launching.lifetime import (
    PREEMPTED,
    REFUSED,
    end_followers,
    end_group,
    end_of,
    has_ended,
    is_held,
    last_words,
    stop_signals,
)
from rlt.launching.meeting import SILENCE_S, Meeting, rendezvous
from rlt.launching.servers import Servers
from rlt.launching.watchdog import Watchdog

POLL_S = 0.2
WAITING_S = 1.5  # the agent is told what the rendezvous saw up to a second ago
EXIT_LIMIT_S = 600.0  # for the other machines, once the ranks of this one have come to their end
HELD_S = 30.0  # a rank that is stopped for so long (SIGSTOP) counts as hung: the others wait for it
COPY_LIMIT_S = 5.0  # for what a rank wrote last
FAILED, MACHINE = "failed", "machine"  # of a round: why it ended, and which machines are in it
GONE = f"was not heard of for {SILENCE_S} s, or ended without a word"
NOT_BEGUN = "stopped before the first step: the same command begins it\n"

logger = logging.getLogger("rlt")


@dataclass(frozen=True)
class Failure:
    """Why the ranks of a round were ended."""

    words: str
    code: int = 1
    final: bool = False  # what no restart would mend


class RankLogs(LogsSpecs):
    """`rank-N.log` has all that a rank says; the first of this machine speaks on the terminal, too.

    Args:
        environment: what the ranks get beside their numbers.
        words: a folder for what a rank says last.
    """

    def __init__(self, folder: Path, environment: dict[str, str], words: Path):
        self.folder, self.environment, self.words = folder, environment, words

    @property
    def root_log_dir(self) -> str:
        return str(self.folder)

    def log(self, rank: int | str) -> Path:
        return self.folder / f"rank-{rank}.log"

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        self.folder.mkdir(parents=True, exist_ok=True)
        logs = {}
        for local, environment in envs.items():
            environment |= self.environment
            last_words(self.words, environment["RANK"]).unlink(missing_ok=True)
            log = self.log(environment["RANK"])
            if log.is_file():  # why an earlier life of the rank ended
                log.replace(log.with_suffix(".before.log"))
            logs[local] = str(log)
        return LogsDest(dict.fromkeys(envs, ""), logs, {}, {}, dict.fromkeys(envs, os.devnull))


class Agent(LocalElasticAgent):
    """PyTorch's agent with another eye on its ranks: `_monitor_workers` is what it asks about them."""

    _pcontext: Any
    _rdzv_handler: Any
    round: PrefixStore  # what the machines of a round tell each other; at node 0, as any other may be lost

    def __init__(
        self,
        spec: WorkerSpec,
        logs: RankLogs,
        servers: Servers | None,
        meeting: Meeting | None,
        watchdog: Watchdog | None,
    ):
        super().__init__(spec, logs, exit_barrier_timeout=EXIT_LIMIT_S)
        self.logs, self.servers, self.meeting, self.watchdog = logs, servers, meeting, watchdog
        self.failure: Any = None  # a `Failure`, once a round has failed
        self.stopped = False  # whether a rank has saved and stopped
        self.rejoins = False  # whether ranks were asked to stop so that a machine can join
        self.stops = self.interrupts = 0  # signals that asked for it, and Ctrl-C among them
        self.shown: list[subprocess.Popen] = []  # copies a log to the terminal
        self.watched: list[int] = []  # groups that the watchdog was told of
        self.ran: dict[int, float] = {}  # when a rank, by its process, was last seen not to be held

    @property
    def running(self) -> list:
        handlers = self._pcontext.subprocess_handlers.values() if self._pcontext else ()
        return [handler.proc for handler in handlers if handler.proc.returncode is None]

    def stop(self, number: int, frame) -> None:
        """A signal: the ranks are asked to save and stop; at a second Ctrl-C they are ended.

        SIGTERM may come more than once: from a scheduler to all processes of a job, and from whoever passes it on.
        """
        self.stops += 1
        self.interrupts += number == signal.SIGINT
        self._remaining_restarts = 0
        if self.interrupts > 1:
            self.end_all()
        elif self.stops > 1:
            return
        elif not self._ask_to_stop():
            raise SignalException("asked to stop while no rank ran", signal.Signals(number))

    def _ask_to_stop(self) -> bool:
        asked = self.running
        for process in asked:
            os.kill(process.pid, signal.SIGTERM)  # it was not waited for: its id is its own
        return bool(asked)

    def end_all(self) -> None:
        for process in self.running:
            end_group(process)

    def _start_workers(self, worker_group: Any) -> dict:
        self.failure, self.stopped = None, False
        if self.meeting is not None:
            self.round = PrefixStore(f"{worker_group.master_addr}:{worker_group.master_port}", self.meeting.store)
            self.round.set(f"{MACHINE}/{worker_group.group_rank}", str(self.meeting.node))
        ids = super()._start_workers(worker_group)
        if self.watchdog is not None:
            for group in self.watched:
                self.watchdog.forget(group)
            self.watched = list(ids.values())
            for group in self.watched:
                self.watchdog.watch(group)
        log, ends_with = self.logs.log(worker_group.workers[0].global_rank), f"--pid={ids[0]}"
        copy = ["tail", "--bytes=+1", "--follow", "--sleep-interval=0.1", ends_with, str(log)]
        self.shown.append(subprocess.Popen(copy, stdout=2, start_new_session=True))
        return ids

    def _stop_workers(self, worker_group: Any) -> None:
        """Before the next round. Where a machine waits to join, the ranks of this one save and stop first."""
        self.rejoins = self._ask_to_stop()
        while self.running:
            time.sleep(POLL_S)
            self._monitor_workers(worker_group)
        self.rejoins = False
        self._shutdown()

    def _shutdown(self, death_sig=signal.SIGTERM, timeout: int = 30) -> None:
        self.end_all()
        super()._shutdown(death_sig, timeout)
        while self.shown:
            copy = self.shown.pop()
            try:
                copy.wait(COPY_LIMIT_S)
            except subprocess.TimeoutExpired:
                copy.kill()

    def _monitor_workers(self, worker_group: Any) -> RunResult:
        """The state of the round: whoever has failed, here or elsewhere, ends all that is left of it here."""
        self.failure = self._failure_here(worker_group) or self._failure_around(worker_group)
        if self.failure is not None:
            self._shutdown()
            if self.failure.final or self.stops:
                self._remaining_restarts = 0
            if self._remaining_restarts:
                sys.stderr.write(self.failure.words)
                logger.warning("the ranks are started again, from the newest checkpoint")
            return RunResult(WorkerState.FAILED)
        # Where another machine's agent had them stop, so that one can join, this one has yet to see it.
        if self.running or (self.stopped and not self.stops and self._somebody_waits()):
            return RunResult(WorkerState.HEALTHY)
        return RunResult(WorkerState.SUCCEEDED, return_values={w.global_rank: None for w in worker_group.workers})

    def _somebody_waits(self) -> bool:
        time.sleep(WAITING_S if self.meeting else 0)
        return self._rdzv_handler.num_nodes_waiting() > 0

    def _failure_here(self, worker_group: Any) -> Failure | None:
        """The first of this machine's ranks that has failed; whatever ended ranks had started is ended."""
        first = None
        for process in self.running:
            if not has_ended(process.pid) and not self._end_if_held(process):
                continue
            end_followers(process)  # while its id is still its own
            code = process.wait()
            self.stopped |= code == PREEMPTED
            if code not in (0, PREEMPTED) and first is None:
                first = next(w.global_rank for w in worker_group.workers if w.id == process.pid), code
        if first is None:
            return None
        self._shutdown()  # so that none of them writes behind the last words
        if (self.stops or self.rejoins) and first[1] == -signal.SIGTERM:  # no step has begun
            title = f"rank {first[0]} was asked to stop at its start"
            failure = Failure(NOT_BEGUN if self.stops else "", PREEMPTED, final=bool(self.stops))
        else:
            title, failure = _failure_of(*first, self.logs.log(first[0]), last_words(self.logs.words, first[0]))
        if self.meeting is None:
            return failure
        if (told := self._told()) is None:
            self.round.set(FAILED, f"machine {self.meeting.node}: {title}\n{failure.code if failure.final else ''}")
            return failure
        return replace(failure, words=failure.words + told.words, final=failure.final or told.final)

    def _end_if_held(self, process: subprocess.Popen) -> bool:
        """End a rank that was held too long; whether it was."""
        now = time.monotonic()
        if not is_held(process.pid):
            self.ran[process.pid] = now
        if now - self.ran.setdefault(process.pid, now) < HELD_S:
            return False
        logger.warning("process %d, a rank, was held (SIGSTOP) for %.0f s, and is ended", process.pid, HELD_S)
        end_group(process)
        return True

    def _failure_around(self, worker_group: Any) -> Failure | None:
        """Servers that cannot go on, and what other machines say or no longer say."""
        if self.servers is not None and self.servers.given_up.is_set():
            return Failure(self.servers.last_words(), final=True)
        return (self._told() or self._silence(worker_group)) if self.meeting else None

    def _told(self) -> Failure | None:
        if not self.round.check([FAILED]):
            return None
        title, _, code = self.round.get(FAILED).decode().partition("\n")
        return Failure(f"\n{title}\n", PREEMPTED if self.stops and code == str(PREEMPTED) else 1, final=bool(code))

    def _silence(self, worker_group: Any) -> Failure | None:
        """Which machines of this round are gone; the agent's `num_nodes_waiting` has brought the rendezvous' state.

        A machine that has left the round for the next one waits for that.
        """
        state = self._rdzv_handler._state_holder.state
        gone = sorted(set(range(worker_group.group_world_size)) - set(state.participants.values()))
        if state.wait_list or not state.complete or not gone:
            return None
        names = " and ".join(f"machine {self.round.get(f'{MACHINE}/{rank}').decode()}" for rank in gone)
        return Failure(f"\n{names} {GONE}\n")


def _failure_of(rank: int, code: int, log: Path, words: Path) -> tuple[str, Failure]:
    """In a few words for the other machines, and in full.

    Args:
        words: a file with what the rank said last, if it could: its log's disk may be full.
    """
    refused = code == REFUSED
    code = 1 if refused else code
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    title = f"rank {rank} ended first, with {how}"
    said = end_of(words)
    end = said if said and said.splitlines()[-1] not in end_of(log) else end_of(log)
    return title, Failure(f"\n{title} (all of it in {log}):\n{end}\n", code if code > 0 else 128 - code, refused)


def run_ranks(
    command: list[str],
    devices: int,
    logs: Path,
    environment: dict[str, str],
    words: Path,
    restarts: int = 0,
    servers: Servers | None = None,
    meeting: Meeting | None = None,
    watchdog: Watchdog | None = None,
) -> int:
    """Run a command as each of this machine's ranks until all have ended.

    `stop_signals` to this process ask the ranks to save and stop. When one rank fails, the others are ended, and all
    are started again `restarts` times; the last words of the one that failed are printed last.

    Args:
        devices: ranks of this machine.
        environment: of the ranks, beside what the agent gives them.
        words: a folder for what a rank says last; its log's disk may be full.
        servers: started before the ranks, and ended after them.
        meeting: with the other machines, each of which may be lost once more than `restarts` says.
        watchdog: ends what ranks have started where this process is killed.

    Returns:
        0, `PREEMPTED` when the ranks stopped and saved, or the exit code of the rank that failed first.
    """
    # Each round gets a store of its own, at the first rank: the agent's would not be told to machines that join later.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"  # the others are ours
    for name in [name for name in logging.root.manager.loggerDict if name.startswith("torch.distributed.elastic")]:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    may_be_lost = meeting.machines.most - meeting.machines.least if meeting else 0
    spec = WorkerSpec(
        role="rank",
        local_world_size=devices,
        rdzv_handler=rendezvous(meeting),
        entrypoint=command[0],
        args=tuple(command[1:]),
        max_restarts=restarts + may_be_lost,
        monitor_interval=POLL_S,
    )
    agent = Agent(spec, RankLogs(logs, environment, words), servers, meeting, watchdog)
    before = {number: signal.signal(number, agent.stop) for number in stop_signals()}
    try:
        return _outcome(agent)
    finally:
        agent.end_all()
        if servers is not None:
            servers.close()
        for number, handler in before.items():
            signal.signal(number, handler)


def _outcome(agent: Agent) -> int:
    """The exit code of a run, with its last words printed last."""
    try:
        if agent.servers is not None:
            agent.servers.start()
        result = agent.run()
        if result is None or not result.is_failed():
            return PREEMPTED if agent.stopped else 0
    except SignalException:
        return PREEMPTED  # before any rank ran: the same command starts it
    except DistError:
        agent.failure = agent.failure or Failure(f"\nmachine 0 {GONE}\n")
    except RendezvousError as error:
        agent.failure = agent.failure or Failure(f"\nthe machines did not come together again: {error}\n")
    if agent.meeting is not None:
        agent.meeting.let_hear()
    if agent.stops < 2:
        sys.stderr.write(agent.failure.words)
    return agent.failure.code

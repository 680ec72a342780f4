"""The ranks of one machine, by PyTorch's elastic agent (what torchrun is made of), which starts them, restarts them
together with those of other machines, and gives them their numbers.

Ours is what the agent lacks: what a rank started ends with it; a rank whose peer is dead is ended instead of asked to
save; a signal lets all ranks save, for as long as that takes; a machine that is silent counts as gone; the end of the
failed rank's log comes last. Each rank leads a process group of its own; no other process is ever touched.
"""

import logging
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch.distributed import DistError, HashStore
from torch.distributed.elastic.agent.server.api import RunResult, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs, SignalException
from torch.distributed.elastic.rendezvous import RendezvousError

from rlt.launching.lifetime import PREEMPTED, REFUSED, end_followers, end_group, end_of, has_ended, stop_signals
from rlt.launching.meeting import SILENCE_S, Meeting, rendezvous
from rlt.launching.servers import Servers

POLL_S = 0.2
EXIT_LIMIT_S = 600.0  # for the other machines, once the ranks of this one have come to their end
COPY_LIMIT_S = 2.0  # for what a rank wrote last
FAILED, MACHINE = "rlt/failed", "rlt/machine"  # in a round's store: why it ended, and which machines are in it

logger = logging.getLogger("rlt")


@dataclass(frozen=True)
class Failure:
    """Why the ranks of a round were ended: `words` for the terminal, `title` for the other machines."""

    words: str
    title: str = ""
    code: int = 1
    final: bool = False  # what no restart would mend


class RankLogs(LogsSpecs):
    """`rank-N.log` has all that a rank says; the first of this machine speaks on the terminal, too.

    Args:
        environment: what the ranks get beside their numbers.
    """

    def __init__(self, folder: Path, environment: dict[str, str]):
        super().__init__()
        self.folder, self.environment = folder, environment
        self.ends: list[int] = []  # where ranks write, until they have opened it
        self.copying: list[threading.Thread] = []

    @property
    def root_log_dir(self) -> str:
        return str(self.folder)

    def log(self, rank: int | str) -> Path:
        return self.folder / f"rank-{rank}.log"

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        self.folder.mkdir(parents=True, exist_ok=True)
        errors, outputs = {}, {}
        for local, environment in envs.items():
            environment |= self.environment
            log = self.log(environment["RANK"])
            if log.is_file():  # why an earlier life of the rank ended
                log.replace(log.with_suffix(".before.log"))
            source, end = os.pipe()
            copying = threading.Thread(target=_copy, args=(source, log, local == 0), daemon=True)
            copying.start()
            self.ends.append(end)
            self.copying.append(copying)
            errors[local] = f"/proc/self/fd/{end}"
            outputs[local] = errors[local] if local else ""
        return LogsDest(outputs, errors, {}, {}, dict.fromkeys(envs, os.devnull))

    def let_go(self) -> None:
        """Once the ranks have opened their ends, so that copying comes to one."""
        while self.ends:
            os.close(self.ends.pop())

    def finish(self) -> None:
        while self.copying:
            self.copying.pop().join(COPY_LIMIT_S)


def _copy(source: int, log: Path, shown: bool) -> None:
    """What a rank says, to its log and to the terminal (while there is one)."""
    with os.fdopen(source, "rb", buffering=0) as pipe, log.open("ab", buffering=0) as file:
        while chunk := pipe.read(65536):
            file.write(chunk)
            if shown:
                try:
                    os.write(2, chunk)
                except OSError:
                    shown = False


class Agent(LocalElasticAgent):
    """PyTorch's agent with another eye on its ranks: `_monitor_workers` is what it asks about them."""

    def __init__(self, spec: WorkerSpec, logs: RankLogs, servers: Servers | None, meeting: Meeting | None):
        super().__init__(spec, logs, exit_barrier_timeout=EXIT_LIMIT_S)
        self.logs, self.servers = logs, servers
        self.meeting: Any = meeting  # where it is asked, there is one
        self.failure: Any = None  # a `Failure`, once a round has failed
        self.stopped = False  # whether a rank has saved and stopped
        self.stops = 0  # signals that asked for it

    _pcontext: Any
    _rdzv_handler: Any

    @property
    def processes(self) -> list:
        return [h.proc for h in self._pcontext.subprocess_handlers.values()] if self._pcontext else []

    def stop(self, number: int, frame) -> None:
        """A signal: the ranks are asked to save and stop; the second time, they are ended."""
        self.stops += 1
        self._remaining_restarts = 0
        if self.stops > 1:
            self.end_all()
        elif not self._ask_to_stop():
            raise SignalException("asked to stop while no rank ran", signal.Signals(number))

    def _ask_to_stop(self) -> bool:
        asked = [process for process in self.processes if process.returncode is None]
        for process in asked:
            os.kill(process.pid, signal.SIGTERM)  # it was not waited for: its id is its own
        return bool(asked)

    def end_all(self) -> None:
        for process in self.processes:
            end_group(process)

    def _start_workers(self, worker_group: Any) -> dict:
        self.failure, self.stopped = None, False
        if self.meeting is not None:
            worker_group.store.set(f"{MACHINE}/{worker_group.group_rank}", str(self.meeting.machines.node))
        ids = super()._start_workers(worker_group)
        for handler in self._pcontext.subprocess_handlers.values():
            for file in {handler._stdout, handler._stderr} - {None}:
                file.close()  # the rank has its own
        self.logs.let_go()
        return ids

    def _stop_workers(self, worker_group: Any) -> None:
        """Before the next round. Where a machine waits to join, the ranks of this one save and stop first."""
        if self._ask_to_stop():
            while any(process.returncode is None for process in self.processes):
                time.sleep(POLL_S)
                self._monitor_workers(worker_group)
        self._shutdown()

    def _shutdown(self, death_sig=signal.SIGTERM, timeout: int = 30) -> None:
        self.end_all()
        super()._shutdown(death_sig, timeout)
        self.logs.finish()

    def _monitor_workers(self, worker_group: Any) -> RunResult:
        """The state of the round: whoever has failed, here or elsewhere, ends all that is left of it here."""
        found = self._failure_of_ranks(worker_group) or self._failure_around(worker_group)
        if found is not None:
            self.failure = found
            self.end_all()
            for process in self.processes:
                process.wait()
            return self._failed(worker_group)
        if any(process.returncode is None for process in self.processes):
            return RunResult(WorkerState.HEALTHY)
        if self.stopped and not self.stops and self._somebody_waits():
            return RunResult(WorkerState.HEALTHY)  # another machine's agent had them stop, so that one can join
        return RunResult(WorkerState.SUCCEEDED, return_values={w.global_rank: None for w in worker_group.workers})

    def _somebody_waits(self) -> bool:
        if self.meeting is None:
            return False
        time.sleep(1.5)  # the agent is told what it saw up to a second ago
        return self._rdzv_handler.num_nodes_waiting() > 0

    def _failure_of_ranks(self, worker_group: Any) -> Failure | None:
        """The first of this machine's ranks that has failed; whatever ended ranks had started is ended."""
        first = None
        for worker, process in zip(worker_group.workers, self.processes, strict=True):
            if process.returncode is not None or not has_ended(process.pid):
                continue
            end_followers(process)  # while its id is still its own
            code = process.wait()
            self.stopped |= code == PREEMPTED
            if code not in (0, PREEMPTED) and first is None:
                first = (worker.global_rank, code)
        if first is None:
            return None
        self.end_all()  # so that none of them writes behind the last words
        self.logs.finish()
        return _failure_of(*first, self.logs.log(first[0]))

    def _failure_around(self, worker_group: Any) -> Failure | None:
        """Servers that cannot go on, and what other machines say or no longer say."""
        if self.servers is not None and self.servers.given_up.is_set():
            return Failure(self.servers.last_words(), final=True)
        if self.meeting is None:
            return None
        silent = self._silent(worker_group)
        return self._told(worker_group) or (Failure(silent) if silent else None)

    def _told(self, worker_group: Any) -> Failure | None:
        if not worker_group.store.check([FAILED]):
            return None
        title, _, final = worker_group.store.get(FAILED).decode().partition("\n")
        return Failure(f"\n{title}\n", final=bool(final))

    def _silent(self, worker_group: Any) -> str:
        """Which machines of this round are gone, as a sentence; the agent's `num_nodes_waiting` has brought the state.

        A machine that has left the round for the next one waits for that.
        """
        state = self._rdzv_handler._state_holder.state
        if state.wait_list or not state.complete:
            return ""
        gone = sorted(set(range(worker_group.group_world_size)) - set(state.participants.values()))
        names = " and ".join(f"machine {worker_group.store.get(f'{MACHINE}/{rank}').decode()}" for rank in gone)
        return f"\n{names} was not heard of for {SILENCE_S} s, or ended without a word\n" if gone else ""

    def _failed(self, worker_group: Any) -> RunResult:
        """Tell the other machines, and decide whether there is to be another round."""
        if self.meeting is not None:
            self._compare_notes(worker_group)
        if self.failure.final or self.stops:
            self._remaining_restarts = 0
        if self._remaining_restarts:
            sys.stderr.write(self.failure.words)
            logger.warning("the ranks are started again, from the newest checkpoint")
        return RunResult(WorkerState.FAILED)

    def _compare_notes(self, worker_group: Any) -> None:
        """Which machine's failure came first; whether one is lost, which costs no restart where fewer can go on."""
        failure, told = self.failure, self._told(worker_group)
        if told is not None and told.words != failure.words:
            self.failure = replace(failure, words=failure.words + told.words, final=failure.final or told.final)
        elif failure.title:
            title = f"machine {self.meeting.machines.node}: {failure.title}"
            worker_group.store.set(FAILED, f"{title}\n{'final' if failure.final else ''}")
        if self.meeting.machines.elastic and (silent := self._wait_for_silence(worker_group)):
            self.failure = replace(self.failure, words=self.failure.words.removesuffix(silent) + silent)
            worker_group.spec.max_restarts += 1
            self._remaining_restarts += 1

    def _wait_for_silence(self, worker_group: Any) -> str:
        """Which machines are gone, if not all of the round say that they have seen its failure."""
        seen = [f"{FAILED}/{rank}" for rank in range(worker_group.group_world_size)]
        worker_group.store.set(seen[worker_group.group_rank], "")
        give_up = time.monotonic() + SILENCE_S + 10
        while time.monotonic() < give_up and not worker_group.store.check(seen):
            self._rdzv_handler.num_nodes_waiting()
            if silent := self._silent(worker_group):
                return silent
            time.sleep(POLL_S)
        return ""


def _failure_of(rank: int, code: int, log: Path) -> Failure:
    refused = code == REFUSED
    code = 1 if refused else code
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    title = f"rank {rank} ended first, with {how}"
    words = f"\n{title} (all of it in {log}):\n{end_of(log)}\n"
    return Failure(words, title, code if code > 0 else 128 - code, final=refused)


def run_ranks(
    command: list[str],
    devices: int,
    logs: Path,
    environment: dict[str, str],
    restarts: int = 0,
    servers: Servers | None = None,
    meeting: Meeting | None = None,
) -> int:
    """Run a command as each of this machine's ranks until all have ended.

    `stop_signals` to this process ask the ranks to save and stop. When one rank fails, the others are ended, and all
    are started again `restarts` times; the last words of the one that failed are printed last.

    Args:
        devices: ranks of this machine.
        environment: of the ranks, beside what the agent gives them.
        servers: started before the ranks, and ended after them.
        meeting: with the other machines.

    Returns:
        0, `PREEMPTED` when the ranks stopped and saved, or the exit code of the rank that failed first.
    """
    # Each round gets a store of its own, at the first rank: the agent's would not be told to machines that join later.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"  # the others are ours
    for name in [name for name in logging.root.manager.loggerDict if name.startswith("torch.distributed.elastic")]:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    handler = rendezvous(HashStore(), None) if meeting is None else rendezvous(meeting.whole, meeting)
    spec = WorkerSpec(
        role="rank",
        local_world_size=devices,
        rdzv_handler=handler,
        entrypoint=command[0],
        args=tuple(command[1:]),
        max_restarts=restarts,
        monitor_interval=POLL_S,
    )
    agent = Agent(spec, RankLogs(logs, environment), servers, meeting)
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
    meeting = agent.meeting
    try:
        if agent.servers is not None:
            agent.servers.start()
        result = agent.run()
    except SignalException:
        return PREEMPTED  # before any rank ran: the same command starts it
    except (RendezvousError, DistError) as error:
        agent.failure = agent.failure or Failure(meeting.words_on(error))
        result = RunResult(WorkerState.FAILED)
    if result is None or not result.is_failed():
        return PREEMPTED if agent.stopped else 0
    if meeting is not None:
        meeting.part()
    if agent.stops < 2:
        sys.stderr.write(agent.failure.words)
    return agent.failure.code

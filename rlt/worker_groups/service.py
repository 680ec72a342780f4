"""Many processes behind one object: `TrainingBackend` whose operations all ranks do together.

    service = await TrainingService.options(procs=4, backend="fsdp").as_service(model_name="...")
    service = TrainingService.options(procs=2, backend="pytorch").as_service(model_name="...").result(300)
    output = service.forward_backward(batch).result(60)
    service.close()

Ranks are processes of this machine (processes.py), or actors of a Ray cluster (ray_group.py). What goes to
them is plain data, so a loss has a name here. A rank that is lost fails the operation at hand and all later ones with
`RanksLost`; with `restarts`, ranks are started anew instead, go on from the last state that was saved, and do again
what was asked since.
"""

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from backends.futures import RanksLost, TrainFuture, Worker
from rlt.errors import Refused
from rlt.worker_groups.journal import MOVING, Journal
from rlt.worker_groups.rank import CREATORS

if TYPE_CHECKING:
    import torch

    from backends.protocol import AdamParams, Batch, ForwardOutput, Loss, StepOutput
    from rlt.worker_groups.sampling import Sample

LIMIT_S = 1800.0
RAY = "ray"
RAY_RESTARTS = 3

logger = logging.getLogger("rlt")


class WorkerGroup(Protocol):
    """Ranks, wherever they are. One thread asks; an answer is one of each rank."""

    def start(self) -> list[bytes]: ...
    def call(self, message: bytes) -> list[bytes]: ...
    def ask_sampler(self, message: bytes) -> bytes: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class Options:
    """How a service trains.

    Attributes:
        procs: ranks; None: one for each GPU that is there, or in a Ray cluster that `resources` ask for; else one.
        backend: "fsdp", "deepspeed" or "pytorch" (copies of the model), in processes of this machine; "ray": actors.
        sharding: one of the first three, of Ray's actors.
        resources: of Ray: of all training ranks together ("train"), and of a sampler ("sample"; none without).
        restarts: how often ranks that were lost are started anew; None: 3 with Ray, else 0.
        limit_s: for one rank to wait for another, and for an operation.
    """

    procs: int | None = None
    backend: str = "fsdp"
    sharding: str = "pytorch"
    resources: Mapping[str, Mapping[str, float]] | None = None
    restarts: int | None = None
    limit_s: float = LIMIT_S

    def as_service(self, model_name: str, checkpoint_dir: str | Path = "checkpoints", **arguments: Any):
        """Start the ranks; the future of a `TrainingService`.

        Args:
            arguments: of the backend's own function (backends/create_sharded.py): learning_rate, dtype, device, ...

        Raises:
            Refused: what is asked for cannot be.
        """
        self._check()
        given = {"model_name": model_name, "checkpoint_dir": str(Path(checkpoint_dir).absolute()), **arguments}
        try:
            json.dumps(given)
        except TypeError as error:
            raise Refused(f"arguments of a service are numbers and texts: {error}") from error
        service = TrainingService(self._group(given), self._restarts())
        return service._worker.submit(service._start)

    def _check(self) -> None:
        if self.backend not in (*CREATORS, RAY):
            raise Refused(f"backend={self.backend!r} is not known: {', '.join((*CREATORS, RAY))} would do")
        if self.sharding not in CREATORS:
            raise Refused(f"sharding={self.sharding!r} is not known: {', '.join(CREATORS)} would do")
        if self.procs is not None and (isinstance(self.procs, bool) or self.procs < 1):
            raise Refused(f"procs={self.procs!r}: a whole number of 1 or more would do")
        if self.resources is not None and self.backend != RAY:
            raise Refused("resources are those of backend='ray'")

    def _restarts(self) -> int:
        return self.restarts if self.restarts is not None else RAY_RESTARTS if self.backend == RAY else 0

    def _group(self, arguments: dict[str, Any]) -> WorkerGroup:
        if self.backend == RAY:
            from rlt.worker_groups.ray_group import RayWorkerGroup

            spec = {"backend": self.sharding, "arguments": arguments}
            return RayWorkerGroup(self.procs, spec, self.resources or {}, self.limit_s)
        import torch

        from rlt.worker_groups.processes import Processes

        on_cpu = arguments.get("device") == "cpu" or not torch.cuda.is_available()
        spec = {"backend": self.backend, "arguments": arguments, "on_cpu": on_cpu}
        procs = self.procs or (1 if on_cpu else torch.cuda.device_count())
        return Processes(procs, spec, self.limit_s)


class TrainingService:
    """`backends.protocol.TrainingBackend` of many processes; made by `TrainingService.options(...).as_service(...)`.

    Args:
        restarts: how often a group that was lost is started anew.
    """

    def __init__(self, group: WorkerGroup, restarts: int = 0):
        self.group, self.restarts_left = group, restarts
        self.journal = Journal()
        self._sampler_is_behind = True
        self._worker = Worker("a training service")

    @staticmethod
    def options(**options: Any) -> Options:
        """As of `Options`.

        Raises:
            Refused: another name.
        """
        known = [field.name for field in fields(Options)]
        if unknown := sorted(options.keys() - set(known)):
            raise Refused(f"a service has no option {unknown[0]!r}: {', '.join(known)} would do")
        return replace(Options(), **options)

    def forward(
        self, batch: "Batch", loss_fn: "Loss" = None, loss_fn_config: Mapping[str, float] | None = None
    ) -> "TrainFuture[ForwardOutput]":
        return self._ask("forward", batch, loss_fn, loss_fn_config)

    def forward_backward(
        self, batch: "Batch", loss_fn: "Loss" = None, loss_fn_config: Mapping[str, float] | None = None
    ) -> "TrainFuture[ForwardOutput]":
        return self._ask("forward_backward", batch, loss_fn, loss_fn_config)

    def optim_step(self, params: "AdamParams | None" = None) -> "TrainFuture[StepOutput]":
        return self._ask("optim_step", params)

    def get_weights(self) -> "TrainFuture[dict[str, torch.Tensor]]":
        return self._ask("get_weights")

    def load_weights(self, weights: "Mapping[str, torch.Tensor]") -> TrainFuture[None]:
        return self._ask("load_weights", weights)

    def save_state(
        self, name: str | None = None, with_optimizer: bool = True, overwrite: bool = False
    ) -> TrainFuture[Path]:
        return self._ask("save_state", name, with_optimizer, overwrite)

    def load_state(self, path: str | Path, with_optimizer: bool = True) -> TrainFuture[int]:
        return self._ask("load_state", path, with_optimizer)

    def sample(
        self, prompt: list[int], count: int = 1, max_tokens: int = 128, temperature: float = 1.0, seed: int = 0
    ) -> "TrainFuture[list[Sample]]":
        """Completions by the newest weights; of a service that has a sampler."""
        return self._worker.submit(self._sample, ["sample", prompt, count, max_tokens, temperature, seed])

    def close(self) -> None:
        """Finish what has begun, and end the ranks."""
        ended = self._worker.submit(self._end)
        ended.exception(LIMIT_S)
        self._worker.close()

    def __enter__(self) -> "TrainingService":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _ask(self, operation: str, *arguments: Any) -> TrainFuture:
        return self._worker.submit(self._do, operation, *arguments)

    def _start(self) -> "TrainingService":
        try:
            _value(self.group.start())
        except BaseException:
            self.group.close()
            raise
        return self

    def _end(self) -> None:
        self.group.close()
        for folder in self.journal.own:
            shutil.rmtree(folder, ignore_errors=True)

    def _do(self, operation: str, *arguments: Any) -> Any:
        from rlt.worker_groups.messages import pack

        message = pack([operation, *arguments])
        value = self._in_spite_of_losses(lambda: _value(self.group.call(message)))
        self._sampler_is_behind |= operation in MOVING
        if self.restarts_left:
            self.journal.note(operation, arguments, message, value)
            if self.journal.is_long():
                self._keep()
        return value

    def _sample(self, asked: list[Any]) -> Any:
        from rlt.worker_groups.messages import pack

        def draw() -> Any:
            if self._sampler_is_behind:
                _value([self.group.ask_sampler(self.group.call(pack(["get_weights"]))[0])])
                self._sampler_is_behind = False
            return _value([self.group.ask_sampler(pack(asked))])

        return self._in_spite_of_losses(draw)

    def _in_spite_of_losses(self, work: Callable[[], Any]) -> Any:
        while True:
            try:
                return work()
            except RanksLost as lost:
                self._begin_anew(lost)

    def _keep(self) -> None:
        """Save a state of the service's own, from which a restart goes on."""
        self.journal.own.add(self._do("save_state", self.journal.next_name(), True, True))

    def _begin_anew(self, lost: RanksLost) -> None:
        """Other ranks, in the state of those that were lost."""
        while True:
            if not self.restarts_left:
                raise lost
            self.restarts_left -= 1
            logger.warning("%s: ranks are started anew, from %s", lost, self.journal.state or "the beginning")
            try:
                self.group.close()
                _value(self.group.start())
                self._sampler_is_behind = True
                for message in self.journal.to_repeat():
                    _value(self.group.call(message))
                return
            except RanksLost as again:
                lost = again


def _value(answers: list[bytes]) -> Any:
    """What rank 0 says, or why some rank did not do it."""
    from rlt.worker_groups.messages import unpack

    said = [unpack(answer) for answer in answers]
    for rank, one in enumerate(said):
        if "error" in one:
            if one["error"] == Refused.__name__:
                raise Refused(one["text"])
            raise RuntimeError(f"rank {rank}: {one['error']}: {one['text']}")
    return said[0]["value"]

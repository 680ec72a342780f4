"""The ranks of a training service as actors of a Ray cluster, one a bundle of a placement group; a sampler beside them
has resources of its own.

    service = create_ray_backend("embedded/smollm2-135m-instruct", "/shared/runs/a", workers=2)

Ray brings messages between its own processes; they are bytes as of messages.py. Every actor is asked now and then
whether it is there, also while it works: one that is held, or whose machine is gone, counts as lost. States are saved
to a folder that all machines see.
"""

import logging
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backends.futures import RanksLost
from rlt.errors import Refused
from rlt.planning.versions import need_group
from rlt.worker_groups.actors import RayRank, RaySampler

if TYPE_CHECKING:
    from rlt.worker_groups.service import TrainingService

PAUSE_S = 5.0  # between two questions whether ranks are there
SILENCE_S = 30.0
TRAIN, SAMPLE = "train", "sample"
NAMED = {"CPU": "num_cpus", "GPU": "num_gpus"}  # how Ray's options call them


class RayWorkerGroup:
    """As `processes.Processes`; a cluster that nobody has begun is one of this machine alone.

    Args:
        procs: ranks; None: one for each GPU, or CPU, that they are to have.
        resources: of all ranks together, and of a sampler.
    """

    def __init__(
        self, procs: int | None, spec: dict[str, Any], resources: Mapping[str, Mapping[str, float]], limit_s: float
    ):
        need_group("ray", "ray")
        if unknown := sorted(resources.keys() - {TRAIN, SAMPLE}):
            raise Refused(f"resources of {unknown[0]!r}: {TRAIN} and {SAMPLE} would do")
        asked = resources.get(TRAIN, {"CPU": procs or 1})
        self.procs = procs or int(asked.get("GPU", 0)) or int(asked.get("CPU", 0)) or 1
        self.share = {name: amount / self.procs for name, amount in asked.items()}
        self.sampling = dict(resources.get(SAMPLE, {}))
        self.spec, self.limit_s = spec, limit_s
        self.ranks: list[Any] = []
        self.sampler: Any = None
        self.group: Any = None
        self._began_ray = False

    def start(self) -> list[bytes]:
        import ray

        if not ray.is_initialized():
            ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
            self._began_ray = True
        bundles = [self.share] * self.procs + ([self.sampling] if self.sampling else [])
        self.group = ray.util.placement_group(bundles, strategy="PACK")
        if not self.group.wait(self.limit_s):
            self.close()
            raise RanksLost(f"the cluster did not have {bundles} within {self.limit_s:.0f} s")
        self.ranks = [self._actor(RayRank, number, self.share) for number in range(self.procs)]
        address, port = self._answers([self.ranks[0].place.remote()])[0]
        shared = {"WORLD_SIZE": str(self.procs), "MASTER_ADDR": address, "MASTER_PORT": str(port), "LOCAL_RANK": "0"}
        spec = self.spec["backend"], self.spec["arguments"]
        begun = [rank.begin.remote({**shared, "RANK": str(n)}, *spec) for n, rank in enumerate(self.ranks)]
        if self.sampling:
            self.sampler = self._actor(RaySampler, self.procs, self.sampling)
            self._answers([self.sampler.begin.remote(spec[1])])
        return self._answers(begun)

    def _actor(self, kind: type, bundle: int, resources: Mapping[str, float]) -> Any:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        others = {name: amount for name, amount in resources.items() if name not in NAMED}
        place = PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=bundle)
        options = {option: resources.get(name, 0) for name, option in NAMED.items()}
        # Two threads: one says that it is there while the other works.
        return ray.remote(kind).options(
            resources=others, scheduling_strategy=place, max_concurrency=2, max_restarts=0, **options
        ).remote()  # fmt: skip

    def call(self, message: bytes) -> list[bytes]:
        """What each rank answers.

        Raises:
            RanksLost: some rank is gone.
        """
        if not self.ranks:
            raise RanksLost("the ranks of this service have ended")
        return self._answers([rank.answer.remote(message) for rank in self.ranks])

    def ask_sampler(self, message: bytes) -> bytes:
        """
        Raises:
            Refused: there is none.
            RanksLost: it is gone.
        """
        if not self.sampling:
            raise Refused("this service has no sampler: give it resources of 'sample'")
        if self.sampler is None:
            raise RanksLost("the ranks of this service have ended")
        return self._answers([self.sampler.answer.remote(message)])[0]

    def _answers(self, asked: list[Any]) -> list[Any]:
        import ray

        deadline, waiting = time.monotonic() + self.limit_s, asked
        try:
            while waiting:
                done, waiting = ray.wait(waiting, num_returns=1, timeout=PAUSE_S)
                ray.get(done)  # raises what it raised
                if not done:
                    self._ask_whether_there()
                if time.monotonic() > deadline:
                    raise RanksLost(f"no answer within {self.limit_s:.0f} s")
            return ray.get(asked)
        except ray.exceptions.RayTaskError:  # of its own doing, not lost
            raise
        except ray.exceptions.RayError as error:
            self.close()
            raise RanksLost(f"a rank of this service was lost: {str(error).strip().splitlines()[0]}") from error

    def _ask_whether_there(self) -> None:
        """
        Raises:
            RayError: some rank does not answer.
        """
        import ray

        actors = [*self.ranks, *([self.sampler] if self.sampler else [])]
        ray.get([actor.is_there.remote() for actor in actors], timeout=SILENCE_S)

    def close(self) -> None:
        """End the actors, and a cluster that this service has begun."""
        import ray

        if not ray.is_initialized():
            return
        for actor in [*self.ranks, *([self.sampler] if self.sampler else [])]:
            with suppress(ray.exceptions.RayError):
                ray.kill(actor)
        self.ranks, self.sampler = [], None
        if self.group is not None:
            with suppress(ray.exceptions.RayError):
                ray.util.remove_placement_group(self.group)
            self.group = None
        if self._began_ray:
            ray.shutdown()
            self._began_ray = False


def create_ray_backend(
    model_name: str,
    checkpoint_dir: str | Path,
    *,
    workers: int = 2,
    sharding: str = "pytorch",
    resources: Mapping[str, Mapping[str, float]] | None = None,
    limit_s: float = 1800.0,
    **arguments: Any,
) -> "TrainingService":
    """A service of Ray's actors that is ready; `close` ends it.

    Args:
        workers: ranks.
        sharding: "pytorch" (each has the whole model), "fsdp" or "deepspeed".
        resources: as of `TrainingService.options`.
        arguments: of the backend's own function.
    """
    from rlt.worker_groups.service import TrainingService

    options = TrainingService.options(
        procs=workers, backend="ray", sharding=sharding, resources=resources, limit_s=limit_s
    )
    return options.as_service(model_name, checkpoint_dir, **arguments).result(limit_s)

"""Generation by vLLM servers that take weights from the trainer's device, without files.

Nothing is kept that rank 0 could send again by itself: a server that failed gets its weights from all ranks together,
once all of them have asked for their completions.
"""

import logging
import secrets
from collections.abc import Callable
from functools import partial
from typing import Any

from accelerate.utils import broadcast_object_list, gather_object
from vllm.distributed.weight_transfer.base import TrainerWeightTransferEngine
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

from rlt.generation.served.client import CONTROL_LIMIT_S, UPDATE_LIMIT_S, Server, ServerError
from rlt.generation.served.direct import TRANSFERS, Abort, PolicySource, ServerGroup, check_meeting
from rlt.generation.served.engine import ServerEngine
from rlt.launching.lifetime import ends_within

# Of a transfer: its calls, each with its own limit, and a minute.
LIMIT_S = 4 * CONTROL_LIMIT_S + 3 * UPDATE_LIMIT_S + 60
FREED_S = 60  # for the sender to come back from a transfer that was aborted

logger = logging.getLogger("rlt")


class DirectEngine(ServerEngine):
    """`ServerEngine` with one of vLLM's own transfers of weights.

    Args:
        weight_transfer: a name of `TRANSFERS`.
        other arguments: as in `ServerEngine`.
    """

    def __init__(self, *args, weight_transfer: str, **kwargs):
        self.way = weight_transfer
        super().__init__(*args, **kwargs)

    def _init_vllm(self):
        # Overridden: no service keeps the weights.
        self._wait_for_servers(self.way)
        (self.run,) = broadcast_object_list([secrets.token_hex(8)])
        self.group, self.source = ServerGroup(self.servers), PolicySource(self._iter_engine_params, self._dtype)
        self.transfer: TrainerWeightTransferEngine | None = None

    def sync_weights(self):
        # Overridden: gathered by all ranks, sent by one, taken by every server. What failed is made once more.
        before = self.version
        self.number += 1
        self._send(before)

    def _send(self, before: str) -> None:
        """
        Args:
            before: the version of servers that know this trainer.

        Raises:
            ServerError: the weights did not arrive the second time either.
        """
        if not (why := self._attempt(before)):
            return
        logger.warning("weights are sent once more: %s", why)
        if why := self._attempt(before):
            raise ServerError(why)

    def _attempt(self, before: str) -> str:
        """Why the servers have not got the weights; empty where they have. The same on all ranks."""
        is_first = self.accelerator.is_main_process
        ready = is_first and self.group.all_have(before)  # asked at first, too: one that a lost trainer left waits on
        if self._as_rank_0_says(self.transfer is None or not ready):
            self.transfer = None
            if why := self._as_rank_0_says(self._failure(self._meet)):
                return why
        if why := self._as_rank_0_says(self._failure(self._pass_on)):
            self.transfer = None
        return why

    @staticmethod
    def _as_rank_0_says(value: Any) -> Any:
        return broadcast_object_list([value])[0]

    def _failure(self, act: Callable[[], None]) -> str:
        """Why rank 0 could not do its part, if it could not. The others' part does not depend on the servers."""
        if not self.accelerator.is_main_process:
            act()
            return ""
        try:
            limited = ends_within(LIMIT_S + self.start_limit_s, f"sending weights by {self.way}")
            with limited as limit, Abort(partial(self._abort, limit)) as self.group.abort:
                act()
        except (RuntimeError, OSError) as error:  # a server's, or of the connection to it
            if not TRANSFERS[self.way].fails_alone and self.accelerator.num_processes > 1:
                raise
            self.source.finish()
            self.group.end_those_without(self.version)
            return f"{type(error).__name__}: {error}"
        return ""

    def _abort(self, limit: Callable[[float], None]) -> None:
        """From a call's thread, as the sender waits for a server that does not come."""
        limit(FREED_S)
        if self.transfer is not None:
            TRANSFERS[self.way].abort(self.transfer)

    def _meet(self) -> None:
        """All servers and this trainer agree on a transfer: at first, and where one was started again."""
        if self.accelerator.is_main_process:
            for server in self.servers:
                server.wait_until_ready(self.start_limit_s)
        meeting = TRANSFERS[self.way].meet(self.group, self.accelerator.process_index)
        engine = WeightTransferTrainerFactory.trainer_init(meeting, client=self.group, source=self.source)
        check_meeting(engine)
        self.transfer = engine

    def _pass_on(self) -> None:
        assert self.transfer is not None  # they have met
        self.group.version = self.version
        self.source.begin()
        self.transfer.send_weights()

    def _ask_all(self, requests):
        # Overridden: what failed is asked once more by all ranks, behind weights that all of them send.
        answers = super()._ask_all(requests)
        failed = [number for number, answer in enumerate(answers) if isinstance(answer, ServerError)]
        if not any(gather_object([bool(failed)])):
            return answers
        is_first = self.accelerator.is_main_process
        if self._as_rank_0_says(is_first and not self.group.all_have(self.version)):
            self._send(self.version)
        for number, answer in zip(failed, super()._ask_all([requests[n] for n in failed]), strict=True):
            if isinstance(answer, ServerError):
                raise answer
            answers[number] = answer
        return answers

    def _ask(self, request: Callable[[Server], Any], cost: int) -> Any:
        # Overridden: an error is an answer, as one rank cannot mend it.
        with self._server_for(cost) as server:
            try:
                return self._ask_server(server, request)
            except ServerError as error:
                return error

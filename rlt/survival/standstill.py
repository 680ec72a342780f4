"""A training that stands still, as in a deadlock: it is named, and ended once others have waited enough."""

import faulthandler
import logging
import os
import sys
import threading
import time
import traceback
from types import TracebackType

from transformers import TrainerCallback

LOOK_S = 1.0
NAMED_S, TIMES = 60.0, 10.0  # the least time after which it is named, and how much longer than ever before
IDLE = 0.1  # of one core: who uses less only waits

logger = logging.getLogger("rlt")


class EndStandstill(TrainerCallback):
    """Inside its `with` block, a thread looks each second whether the training has gone on: to its next micro-batch,
    step, evaluation or save. Time in which the whole process was held (SIGSTOP) does not count, as the thread was, too.

    Args:
        limit_s: the process ends once it has only waited for so long, with code 1 and the stacks of all threads in its
            log; other ranks wait for as long (`ddp_timeout`). One that computes, as in a generation of an hour on one
            device, is named and goes on.
    """

    def __init__(self, limit_s: float):
        self.limit_s = limit_s
        self.still_s, self.longest_s = 0.0, 0.0  # since it has gone on; the longest of such times inside a step
        self.idle_s = 0.0  # the part of still_s in which the process only waited
        self.is_named = False
        self.ended = threading.Event()

    def __enter__(self) -> "EndStandstill":
        self.trains = threading.get_ident()
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self.ended.set()

    def on_step_begin(self, args, state, control, **kwargs):
        self.still_s, self.idle_s, self.is_named = 0.0, 0.0, False  # after an evaluation, maybe, which takes longer

    def _went_on(self, args, state, control, **kwargs):
        self.longest_s = max(self.longest_s, self.still_s)
        self.on_step_begin(args, state, control)

    on_substep_end = on_pre_optimizer_step = on_step_end = _went_on
    on_prediction_step = on_evaluate = on_save = on_step_begin

    def _watch(self) -> None:
        looked, used = time.monotonic(), time.process_time()
        while not self.ended.wait(LOOK_S):
            now, uses = time.monotonic(), time.process_time()
            passed_s = min(now - looked, 2 * LOOK_S)
            self.still_s += passed_s
            self.idle_s += passed_s if uses - used < IDLE * passed_s else 0.0
            looked, used = now, uses
            if self.idle_s > self.limit_s:
                self._end()
            if self.longest_s and not self.is_named and self.still_s > max(NAMED_S, TIMES * self.longest_s):
                self._name()

    def _name(self) -> None:
        self.is_named = True
        frame = sys._current_frames().get(self.trains)
        place = "".join(traceback.format_stack(frame)[-3:]) if frame else ""
        logger.warning(
            "the training has not gone on for %.0f s, and never took longer than %.0f s before: it stands in\n%s",
            *(self.still_s, self.longest_s, place),
        )

    def _end(self) -> None:
        sys.stderr.write(
            f"the training has not gone on for {self.still_s:.0f} s, and only waited in {self.idle_s:.0f} of them: "
            "this process ends; set a larger ddp_timeout if what it waits for may take longer\n"
        )
        faulthandler.dump_traceback(all_threads=True)
        sys.stderr.flush()
        os._exit(1)

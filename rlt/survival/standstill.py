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

logger = logging.getLogger("rlt")


class EndStandstill(TrainerCallback):
    """Inside its `with` block, a thread looks each second whether the training has gone on: to its next micro-batch,
    step, evaluation or save. Time in which the whole process was held (SIGSTOP) does not count, as the thread was, too.

    Args:
        limit_s: the process ends after it, with code 1 and the stacks of all threads in its log; other ranks wait for
            as long (`ddp_timeout`).
    """

    def __init__(self, limit_s: float):
        self.limit_s = limit_s
        self.still_s, self.longest_s = 0.0, 0.0  # since it has gone on; the longest of such times inside a step
        self.is_named = False
        self.ended = threading.Event()

    def __enter__(self) -> "EndStandstill":
        self.trains = threading.get_ident()
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self.ended.set()

    def on_step_begin(self, args, state, control, **kwargs):
        self.still_s, self.is_named = 0.0, False  # after an evaluation, maybe, which takes longer

    def _went_on(self, args, state, control, **kwargs):
        self.longest_s = max(self.longest_s, self.still_s)
        self.still_s, self.is_named = 0.0, False

    on_substep_end = on_pre_optimizer_step = on_step_end = _went_on
    on_prediction_step = on_evaluate = on_save = on_step_begin

    def _watch(self) -> None:
        looked = time.monotonic()
        while not self.ended.wait(LOOK_S):
            now = time.monotonic()
            self.still_s += min(now - looked, 2 * LOOK_S)
            looked = now
            if self.still_s > self.limit_s:
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
            f"the training has not gone on for {self.still_s:.0f} s: this process ends; set a larger ddp_timeout if a "
            "step or an evaluation takes longer\n"
        )
        faulthandler.dump_traceback(all_threads=True)
        sys.stderr.flush()
        os._exit(1)

"""What a launcher started ends with it, also where the launcher is killed and can end nothing itself.

Ranks and servers ask the kernel to end them with their launcher; what they have started in turn (vLLM's engine, data
loaders) is not asked. So a process of its own waits for the launcher's end, which it learns by the end of a pipe.
"""

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import TracebackType

from rlt.launching.lifetime import end_abandoned

DONE, FORGET = "done", "-"
END_LIMIT_S = 10.0


class Watchdog:
    """Waits inside its `with` block; a launcher that leaves the block has ended its processes itself."""

    def __enter__(self) -> "Watchdog":
        command = [sys.executable, "-m", __name__]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
        assert self.process.stdin is not None
        self.pipe = self.process.stdin
        return self

    def watch(self, what: int | Path) -> None:
        """A process group, to end, or a folder, to remove."""
        self._say(f"{what}\n")

    def forget(self, group: int) -> None:
        """A group that has ended: its number may become another's."""
        self._say(f"{FORGET}{group}\n")

    def _say(self, line: str) -> None:
        with contextlib.suppress(BrokenPipeError):  # it was ended, which is no reason to end a run
            self.pipe.write(os.fsencode(line))
            self.pipe.flush()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self._say(f"{DONE}\n")
        with contextlib.suppress(BrokenPipeError):
            self.pipe.close()
        try:
            self.process.wait(END_LIMIT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def main() -> None:
    watched: list[str] = []
    for line in map(os.fsdecode, sys.stdin.buffer):
        if line.strip() == DONE:
            return
        if line.startswith(FORGET):
            watched.remove(line.strip().removeprefix(FORGET))
        else:
            watched.append(line.strip())
    for group in (int(word) for word in watched if word.isdigit()):
        end_abandoned(group)
    for folder in (word for word in watched if not word.isdigit()):
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()

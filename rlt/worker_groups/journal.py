"""What was asked of a service's ranks since the last state that they saved: what others do again in their place.

A state has no gradients, so it is one to go on from where none were pending.
"""

from pathlib import Path
from typing import Any

LONGEST = 64 * 2**20  # bytes that may have to be repeated
MOST_STEPS = 20
OWN = "recovery"  # names of states that the service saves on its own account, in turns
MOVING = ("optim_step", "load_weights", "load_state")
CHANGING = ("forward_backward", *MOVING)


class Journal:
    """
    Attributes:
        state: the folder to go on from; None: the beginning.
        own: folders that the service has saved on its own account.
    """

    def __init__(self):
        self.state: Path | None = None
        self.own: set[Path] = set()
        self._messages: list[bytes] = []
        self._steps, self._pending, self._turn = 0, False, 0

    def note(self, operation: str, arguments: tuple, message: bytes, value: Any) -> None:
        """An operation that was done."""
        if operation == "save_state" and arguments[1] and not self._pending:
            self.state, self._messages, self._steps = value, [], 0
        elif operation in CHANGING:
            self._messages.append(message)
            self._pending = operation == "forward_backward"
            self._steps += operation == "optim_step"

    def is_long(self) -> bool:
        """Whether a state should be saved now."""
        return not self._pending and (self._steps >= MOST_STEPS or sum(map(len, self._messages)) > LONGEST)

    def next_name(self) -> str:
        self._turn = 1 - self._turn  # the one before stays until this one is whole
        return f"{OWN}_{self._turn}"

    def to_repeat(self) -> list[bytes]:
        """By ranks that have just begun."""
        from rlt.worker_groups.messages import pack

        begin = [] if self.state is None else [pack(["load_state", self.state, True])]
        return begin + self._messages

"""OpenAssistant's messages, of which each file holds whole trees: every path from a prompt to a last answer."""

from collections.abc import Iterator
from typing import Any

from rlt.formats.columns import Columns, Options, Unfit
from rlt.formats.record import Dropped, Record, make_record, message

ROLES = {"prompter": "user", "assistant": "assistant"}
WORST = 10**9  # where a message has no rank
INSIDE = "inside of a path that is kept"


def unfolded(row: Any) -> Iterator[Any]:
    """The messages of a row that is a whole tree, each below its `message_tree_id`, as exports have them: {"prompt":
    {..., "replies": [...]}}; every other row as it is. What is no message stays, for `oasst` to say why."""
    if not isinstance(row, dict) or "message_tree_id" not in row or not isinstance(row.get("prompt"), dict):
        yield row
        return
    shared = {key: value for key, value in row.items() if key != "prompt"}
    waiting = [(row["prompt"], None)]
    while waiting:
        given, parent = waiting.pop()
        if not isinstance(given, dict):
            yield {**shared, "reply": given}
            continue
        replies = given.get("replies")
        inner = replies if isinstance(replies, list) else []
        kept = {key: value for key, value in given.items() if key != "replies" or (value is not inner and value)}
        found = {key: value for key, value in kept.items() if value is not None or key not in shared}
        yield {**shared, **found, "parent_id": parent}
        waiting += [(reply, given.get("message_id")) for reply in reversed(inner)]


def tree_of(row: dict[str, Any]) -> str:
    """What the messages of one tree share."""
    found = row.get("message_tree_id")
    if not isinstance(found, str):
        raise Unfit("bad_column:message_tree_id")
    return found


def oasst(rows: list[Columns], options: Options) -> list[Record | Dropped]:
    """The messages of one tree, each once: as the end of a path, as a part of one, or with the reason why not.

    A path ends at an answer that no later answer follows; `answers_per_tree` keeps the best so many, by the ranks of
    its answers from the first on.
    """
    tree = Tree(rows)
    ends = sorted(tree.ends(), key=lambda n: (tree.ranks(n), n))
    kept = set(ends[: options.answers_per_tree])
    inside = {n for end in kept for n in tree.path(end)}
    others = {n for end in ends for n in tree.path(end)}
    results: list[Record | Dropped] = []
    for number in range(len(rows)):
        if (reason := tree.reasons[number]) is not None:
            results.append(Dropped(reason))
        elif number in kept:
            results.append(tree.record(number))
        elif number in inside:
            results.append(Dropped(INSIDE))
        else:
            results.append(Dropped("not among the best answers" if number in others else "no answer"))
    return results


class Tree:
    """Messages by number, their parents, and why a message is not used (None: it is)."""

    def __init__(self, rows: list[Columns]):
        self.rows = rows
        self.numbers: dict[str, int] = {}
        self.reasons = [self._own_reason(n) for n in range(len(rows))]
        self.parents = [self.numbers.get(str(row.row.get("parent_id"))) for row in rows]
        own = list(self.reasons)
        self.reasons = [own[n] or self._reason_of_path(n, own) for n in range(len(rows))]

    def _own_reason(self, number: int) -> str | None:
        row = self.rows[number].row
        for column in ("message_id", "text", "role"):
            if not isinstance(row.get(column), str):
                return f"bad_column:{column}"
        if self.numbers.setdefault(row["message_id"], number) != number:
            return "second message of its id"
        if row["role"] not in ROLES:
            return "unknown_role"
        if row.get("tree_state", "ready_for_export") != "ready_for_export":
            return "tree is not ready for export"
        if row.get("deleted"):
            return "deleted"
        if row.get("review_result") is False:
            return "rejected by its review"
        return None if row["text"].strip() else "empty_column:text"

    def _reason_of_path(self, number: int, own: list[str | None]) -> str | None:
        seen = {number}
        while self.rows[number].row.get("parent_id") is not None:
            parent = self.parents[number]
            if parent is None:
                return "orphan"
            if parent in seen:
                return "cycle"
            if own[parent] is not None:
                return "below a message that is left out"
            if self.rows[parent].row["role"] == self.rows[number].row["role"]:
                return "roles do not alternate"
            seen.add(parent)
            number = parent
        return None if self.rows[number].row["role"] == "prompter" else "tree begins with an answer"

    def path(self, number: int | None) -> list[int]:
        """From the root to a message that has no reason."""
        found = []
        while number is not None:
            found.append(number)
            number = self.parents[number]
        return found[::-1]

    def ends(self) -> list[int]:
        answers = [n for n in range(len(self.rows)) if not self.reasons[n] and self._role(n) == "assistant"]
        followed = {parent for n in answers for parent in self.path(n)[:-1]}
        return [n for n in answers if n not in followed]

    def _role(self, number: int) -> str:
        return ROLES[self.rows[number].row["role"]]

    def ranks(self, number: int) -> list[float]:
        given = [self.rows[n].row.get("rank") for n in self.path(number) if self._role(n) == "assistant"]
        return [rank if isinstance(rank, int | float) else WORST for rank in given]

    def record(self, number: int) -> Record:
        turns = [message(self._role(n), self.rows[n].row["text"]) for n in self.path(number)]
        self.rows[number].used |= {"text", "role", "message_tree_id", "parent_id"}
        return make_record("chat", messages=turns, meta={"group": tree_of(self.rows[number].row)})

"""Every format: one function from a source's row to a record, in one table; nothing is guessed, nothing made up."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from rlt.errors import Refused
from rlt.formats import chat, choice, general, harmony, math, tools, trees
from rlt.formats.columns import Columns, One, Options, Row, Unfit
from rlt.formats.record import Dropped, Record

Many = Callable[[list[Columns], Options], list[Record | Dropped]]


@dataclass(frozen=True)
class Format:
    """How rows of one shape are read.

    Args:
        columns: sets of columns, of which a row has one whole; what a file's format is told by.
        one: a row's record.
        many: the results of all rows of a group, for formats whose rows depend on one another.
        group: of a row, for `many`.
        looks: whether a row that has the columns is one of this format, where columns alone do not tell.
        lines: of a text file that are one row.
    """

    columns: tuple[str, ...]
    one: One | None = None
    many: Many | None = None
    group: Callable[[Row], str] | None = None
    looks: Callable[[Row], bool] = lambda row: True
    lines: int | None = None

    def sets(self) -> list[set[str]]:
        return [set(names.split()) for names in self.columns]

    def fits(self, row: Row) -> bool:
        return any(names <= row.keys() for names in self.sets()) and self.looks(row)


def _in_first(column: str, text: str) -> Callable[[Row], bool]:
    return lambda row: text in str(row[column])[:4000]


FORMATS: dict[str, Format] = {
    "gsm8k": Format(("question answer",), math.gsm8k),
    "orca-math": Format(("question answer",), math.orca_math),
    "openorca": Format(("system_prompt question response",), general.openorca),
    "cot-collection": Format(("source target rationale",), general.cot_collection),
    "mathinstruct": Format(("source instruction output",), math.mathinstruct, looks=_in_first("source", "data/")),
    "metamath": Format(("type query original_question response",), math.metamath),
    "glaive": Format(("system chat",), tools.glaive),
    "hermes": Format(("conversations tools category", "conversations category subcategory task"), tools.hermes),
    "gorilla": Format(("question function model_answer", "code api_call provider api_data"), tools.gorilla),
    "toolbench": Format(
        ("id conversations",),
        many=tools.toolbench,
        group=tools.toolbench_query,
        looks=lambda row: str(row["id"]).startswith("Step "),
    ),
    "logiqa": Format(
        (
            *("context query options correct_option", "label context question options"),
            *("answer text question options type", "lines"),
        ),
        choice.logiqa,
        lines=8,
    ),
    "logiqa2nli": Format(("label major_premise minor_premise conclusion",), choice.logiqa2nli),
    "arc": Format(("question choices answerKey", "question answerKey"), choice.arc),
    "alpaca": Format(("instruction input output", "instruction input output text"), general.alpaca),
    "dolly": Format(("instruction context response category",), general.dolly),
    "oasst": Format(("message_id parent_id text role message_tree_id",), many=trees.oasst, group=trees.tree_of),
    "harmony_code": Format(("content path", "text path"), harmony.code, looks=lambda row: "content" in row),
    "harmony_completion": Format(
        tuple(
            f"{asked} {done}" for asked in ("prompt", "instruction") for done in ("completion", "solution", "output")
        ),
        harmony.completion,
    ),
    "harmony_agent": Format(("task trajectory",), harmony.agent),
    "harmony_preference": Format(("prompt chosen rejected",), harmony.preference),
    "harmony_task": Format(("description starter_code tests",), harmony.task),
    "harmony_debug": Format(
        tuple(
            f"buggy_code {error} {fix}"
            for error in ("error_message", "compiler_error")
            for fix in ("fixed_code", "fix")
        ),
        harmony.debug,
    ),
    "messages": Format(("messages",), chat.messages),
    "sharegpt": Format(("conversations",), chat.sharegpt),
    "openr1": Format(("problem solution answer generations messages",), chat.openr1),
    "openthoughts": Format(
        ("conversations",), chat.openthoughts, looks=_in_first("conversations", "<|begin_of_thought|>")
    ),
    "numina": Format(("problem solution", "problem solution messages", "problem solution answer"), math.numina),
    "openmath2": Format(("problem generated_solution expected_answer",), math.numina),
    "prompt-answer": Format(
        ("prompt answer", "question answer", "problem answer", "question solution", "question solution answer"),
        chat.prompt_answer,
    ),
    "text": Format(("text",), chat.text),
}

# Evaluation sets that their columns give away.
EVALUATIONS: dict[str, Callable[[Row], bool]] = {
    "BFCL": lambda row: {"question", "function"} <= row.keys() and isinstance(row["question"], list),
    "HumanEval": lambda row: {"task_id", "prompt", "canonical_solution", "entry_point"} <= row.keys(),
    "MMLU": lambda row: {"question", "subject", "choices", "answer"} <= row.keys(),
}


def find_format(name: str | None, rows: Iterable[Row], place: str) -> Format:
    """The format of a source: the one it names, if its first rows have the columns; else the one that all of them tell.

    Rows that tell no format count where no other does; they are dropped when they are read.

    Raises:
        Refused: no such format, other columns than it has, columns that tell no format or several, or an evaluation.
    """
    if name is not None and name not in FORMATS:
        raise Refused(f"{place}: format {name!r} is none of {', '.join(FORMATS)}")
    seen, told = "", []
    for row in rows:
        for evaluation, shown in EVALUATIONS.items():
            if shown(row):
                raise Refused(f"{place} is the evaluation set {evaluation}: no run trains on it")
        found = tells(name, row)
        if found and found not in told:
            told.append(found)
        seen = seen or ", ".join(sorted(row))
    if name is not None:
        if seen and not told:
            columns = " or ".join(sorted(", ".join(names.split()) for names in FORMATS[name].columns))
            raise Refused(f"{place} has columns {seen}, and format {name} needs {columns}")
        return FORMATS[name]
    if not told:
        raise Refused(
            f"{place} has columns {seen or 'none'}, which no format has: name one, {{format: ...}}: "
            f"{', '.join(FORMATS)}"
        )
    names = " and ".join(sorted({one for found in told for one in found}))
    if len(told) > 1:
        raise Refused(f"{place} has rows of {names}: give each a source of its own, or say {{format: ...}}")
    if len(told[0]) > 1:
        raise Refused(f"{place} has columns {seen}, which {names} have: say {{format: ...}}")
    return FORMATS[told[0][0]]


def tells(name: str | None, row: Row) -> list[str]:
    """The formats that a row tells; of a source that names one: that, if the row has its columns."""
    if name is None:
        return told_by(row)
    return [name] if any(names <= row.keys() for names in FORMATS[name].sets()) else []


def told_by(row: Row) -> list[str]:
    """Formats that a row may have, without those that another one of them is a special case of."""
    fitting = {
        name: max((names for names in known.sets() if names <= row.keys()), key=len)
        for name, known in FORMATS.items()
        if known.fits(row)
    }
    fitting = {n: c for n, c in fitting.items() if not any(c < other for other in fitting.values())}
    special = [name for name in fitting if name in SPECIAL]
    return special or list(fitting)


SPECIAL = ("openthoughts",)  # what its tags tell, not its columns


def apply(known: Format, row: Row, options: Options) -> Record | Dropped:
    """The record of one row, or why there is none; columns that were not used go to `meta.extra`."""
    assert known.one is not None
    columns = Columns(row)
    try:
        record = known.one(columns, options)
    except Unfit as unfit:
        return Dropped(unfit.reason)
    return _with_extra(record, columns)


def apply_to_group(known: Format, rows: list[Row], options: Options) -> list[Record | Dropped]:
    """The results of the rows of one group, in their order."""
    assert known.many is not None
    columns = [Columns(row) for row in rows]
    results = known.many(columns, options)
    pairs = zip(results, columns, strict=True)
    return [result if isinstance(result, Dropped) else _with_extra(result, used) for result, used in pairs]


def _with_extra(record: Record, columns: Columns) -> Record:
    if rest := columns.rest():
        record["meta"]["extra"] = rest
    return record


__all__ = ["FORMATS", "Any", "Format", "Options", "apply", "apply_to_group", "find_format", "tells", "told_by"]

"""Instructions and answers of general topics."""

from rlt.formats.columns import Columns, Options, dialogue
from rlt.formats.record import Record, make_record

NO_INPUT = ("noinput", "<noinput>")


def openorca(row: Columns, options: Options) -> Record:
    """Open-Orca/OpenOrca: an empty system prompt is none; the id tells which collection a row is of."""
    system = row.optional("system_prompt")
    return make_record("chat", messages=dialogue(row.text("question"), row.text("response"), system=system))


def cot_collection(row: Columns, options: Options) -> Record:
    """kaist-ai/CoT-Collection: the rationale, where there is one, is the thought, the target the answer."""
    target = row.text("target")
    messages = dialogue(row.text("source"), target, thinking=row.optional("rationale"))
    return make_record("chat", messages=messages, answer=target.strip())


def alpaca(row: Columns, options: Options) -> Record:
    """tatsu-lab/alpaca: an instruction, often with an input, and its output. `text` repeats all three."""
    given = row.optional("input")
    if given and given.strip().lower() in NO_INPUT:
        given = None
    row.value("text")
    return _instruction(row.text("instruction"), given, row.text("output"))


def dolly(row: Columns, options: Options) -> Record:
    """databricks/databricks-dolly-15k."""
    return _instruction(row.text("instruction"), row.optional("context"), row.text("response"))


def _instruction(instruction: str, given: str | None, output: str) -> Record:
    asked = f"{instruction}\n\n{given}" if given else instruction
    return make_record("chat", messages=dialogue(asked, output))

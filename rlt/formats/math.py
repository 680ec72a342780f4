"""Mathematics: grade-school problems, their augmentations, competition problems."""

import re

from rlt.formats.columns import Columns, Options, Unfit, after_last, boxed, dialogue, without_commas
from rlt.formats.record import Record, make_record

CALCULATION = re.compile(r"<<[^<>]*>>")
MATHS = "maths"  # of `meta.kind`: whose rules of quality and personal data count
CODE = "code"


def gsm8k(row: Columns, options: Options) -> Record:
    """openai/gsm8k: steps with `<<48/2=24>>` calculations, then `#### 72`. The steps become the thought."""
    question, worked = row.text("question"), row.text("answer")
    if not options.keep_calculations:
        worked = CALCULATION.sub("", worked)
    answer = after_last(worked, "####")
    steps = worked.rpartition("####")[0].strip()
    messages = dialogue(question, answer, thinking=steps or None)
    return make_record("chat", messages=messages, answer=without_commas(answer), meta={"kind": MATHS})


def orca_math(row: Columns, options: Options) -> Record:
    """microsoft/orca-math-word-problems-200k: a worked answer in which nothing marks the final one."""
    messages = dialogue(row.text("question"), row.text("answer"))
    return make_record("chat", messages=messages, meta={"kind": MATHS})


def mathinstruct(row: Columns, options: Options) -> Record:
    """TIGER-Lab/MathInstruct: `data/PoT/` are programs; its TheoremQA rows are questions of that evaluation."""
    source = row.text("source")
    if "theoremqa" in source.lower():
        raise Unfit("evaluation set TheoremQA")
    output = row.text("output")
    program = "/PoT/" in source
    marked = None if program else re.findall(r"[Tt]he answer is:?\s*(.+?)\.?\s*$", output, re.MULTILINE)
    meta = {"kind": CODE if program else MATHS, "path": source}
    messages = dialogue(row.text("instruction"), output)
    return make_record("chat", messages=messages, answer=without_commas(marked[-1]) if marked else None, meta=meta)


def metamath(row: Columns, options: Options) -> Record:
    """MetaMathQA: many augmentations of one `original_question`, which are a group."""
    response = row.text("response")
    answer = without_commas(after_last(response, "The answer is:"))
    meta = {"kind": MATHS, "group": row.text("original_question")}
    return make_record("chat", messages=dialogue(row.text("query"), response), answer=answer, meta=meta)


def numina(row: Columns, options: Options) -> Record:
    r"""NuminaMath and OpenMathInstruct: the answer is a column's, or what the last `\boxed{}` holds."""
    problem, solution = row.text("problem"), row.text("solution", "generated_solution")
    answer = row.answer("expected_answer", "answer") or boxed(solution)
    meta = {"kind": MATHS, "group": problem}  # many solutions of one problem
    row.value("messages")  # the same two texts again
    return make_record("chat", messages=dialogue(problem, solution), answer=answer, meta=meta)

"""Multiple choice: the question with its lettered options, answered by the right option's line. No rationale exists."""

from typing import Any

from rlt.formats.columns import Columns, Options, Unfit, dialogue
from rlt.formats.record import Record, make_record

LETTERS = "ABCDEFGH"


def arc(row: Columns, options: Options) -> Record:
    """allenai/ai2_arc, as its tables have it (`choices`) or its files (`question.stem`); labels may be digits."""
    question = row.value("question")
    if isinstance(question, dict):
        inner = Columns(question)
        stem, choices = inner.text("stem"), inner.items("choices", of=dict)
        labels, texts = [c.get("label") for c in choices], [c.get("text") for c in choices]
    else:
        stem, choices = row.text("question"), row.value("choices")
        if not isinstance(choices, dict):
            raise Unfit("bad_column:choices")
        labels, texts = Columns(choices).items("label"), Columns(choices).items("text")
    if len(labels) != len(texts) or not all(isinstance(label, str) for label in labels):
        raise Unfit("bad_column:choices")
    key = row.text("answerKey").strip()
    if key not in labels:
        raise Unfit("answer is none of the options")
    return _choice(stem, labels, texts, labels.index(key))


def logiqa(row: Columns, options: Options) -> Record:
    """LogiQA 1 and 2: tables (`query`, `correct_option`), lettered ones (`label`), JSON lines (`text`, `answer`), and
    the first one's text files, eight lines a problem: blank, letter, context, question, four options."""
    if "lines" in row.row:
        _, letter, context, question, *texts = row.items("lines", of=str)
        texts = [text.strip().partition(".")[2].strip() if text.strip()[1:2] == "." else text.strip() for text in texts]
        return _choice(f"{context.strip()}\n\n{question.strip()}", None, texts, _number(letter, texts))
    context, question = row.text("context", "text"), row.text("query", "question")
    texts = row.items("options", of=str)
    right = _number(row.value("correct_option", "label", "answer"), texts)
    return _choice(f"{context}\n\n{question}", None, texts, right)


def logiqa2nli(row: Columns, options: Options) -> Record:
    """LogiQA2.0's inference set, another task: whether a conclusion follows from its premises."""
    minor = row.optional("minor_premise")
    premises = "\n".join(filter(None, (row.text("major_premise"), minor)))
    label = row.text("label").strip()
    return make_record("chat", messages=dialogue(f"{premises}\n\n{row.text('conclusion')}", label), answer=label)


def _number(answer: Any, texts: list[str]) -> int:
    """The place of an answer, which stands as a letter or as a number from zero."""
    if isinstance(answer, str) and len(letter := answer.strip().upper()) == 1 and letter in LETTERS:
        answer = LETTERS.index(letter)
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(texts):
        raise Unfit("answer is none of the options")
    return answer


def _choice(question: str, labels: list[str] | None, texts: list[Any], right: int) -> Record:
    labels = labels or list(LETTERS[: len(texts)])
    if not 2 <= len(texts) <= len(labels):
        raise Unfit("not two to eight options")
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise Unfit("empty option")
    lines = [f"{label}. {text.strip()}" for label, text in zip(labels, texts, strict=True)]
    messages = dialogue("\n".join((f"{question.strip()}\n", *lines)), lines[right])
    return make_record("chat", messages=messages, answer=labels[right])

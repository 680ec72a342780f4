"""The tags and system prompts of one reasoning style: what a teacher and a student are shown.

`stratos` are the tags of Bespoke-Stratos-17k, `r1` those of DeepSeek-R1; a user's own style is a YAML file with
the fields of `ReasoningFormat`. Rendering is in `rendering.py`.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from rlt.errors import Refused

TEACHER_PROMPT = (
    "You are a teacher. You are given a question together with its solution, which stands between {solution_start} "
    "and {solution_end}. Write, between {explanation_start} and {explanation_end}, the chain of thought that leads a "
    "student from the question to this solution: every step that is needed, in order, and nothing else."
)
STUDENT_PROMPT = (
    "Answer the question in two sections. First think it through, step by step, between {thought_start} and "
    "{thought_end}. Then write the final solution between {solution_start} and {solution_end}."
)


@dataclass(frozen=True)
class ReasoningFormat:
    """Tags are (start, end) pairs; `delimiter` stands between two sections.

    The system prompts may name the tags as {solution_start}, {explanation_end} and so on.
    """

    name: str
    explanation_tags: tuple[str, str] = ("<|begin_of_explanation|>", "<|end_of_explanation|>")
    thought_tags: tuple[str, str] = ("<|begin_of_thought|>", "<|end_of_thought|>")
    solution_tags: tuple[str, str] = ("<|begin_of_solution|>", "<|end_of_solution|>")
    delimiter: str = "\n\n"
    teacher_system_prompt: str = TEACHER_PROMPT
    student_system_prompt: str = STUDENT_PROMPT

    def __post_init__(self):
        for field in ("name", "delimiter", "teacher_system_prompt", "student_system_prompt"):
            text = getattr(self, field)
            if not isinstance(text, str):
                raise Refused(f"format {self.name!r}: {field} must be text, not {text!r}")
        for field in ("explanation_tags", "thought_tags", "solution_tags"):
            pair = getattr(self, field)
            listed = isinstance(pair, (list, tuple)) and len(pair) == 2
            if not listed or not all(isinstance(tag, str) and tag for tag in pair):
                raise Refused(f"format {self.name!r}: {field} must be two non-empty strings, not {pair!r}")
            object.__setattr__(self, field, tuple(pair))

    def _fill(self, prompt: str) -> str:
        for section in ("explanation", "thought", "solution"):
            start, end = getattr(self, f"{section}_tags")
            prompt = prompt.replace(f"{{{section}_start}}", start).replace(f"{{{section}_end}}", end)
        return prompt

    @property
    def teacher_system(self) -> str:
        return self._fill(self.teacher_system_prompt)

    @property
    def student_system(self) -> str:
        return self._fill(self.student_system_prompt)


def check_tags(style: ReasoningFormat, tokenizer: Any) -> None:
    """A tag that is a special token of the tokenizer would be left out where text is made of tokens.

    Raises:
        Refused: a tag is, or holds, such a token.
    """
    special = set(tokenizer.all_special_ids)
    for tag in (*style.explanation_tags, *style.thought_tags, *style.solution_tags):
        if special & set(tokenizer(tag, add_special_tokens=False)["input_ids"]):
            raise Refused(
                f"reasoning_format: the tag {tag} is a special token of this tokenizer, which texts are read without: "
                "add it as a plain token (special=False), or choose other tags"
            )


FORMATS = {
    "stratos": ReasoningFormat("stratos"),
    "r1": ReasoningFormat(
        "r1",
        explanation_tags=("<explanation>", "</explanation>"),
        thought_tags=("<think>", "</think>"),
        solution_tags=("<answer>", "</answer>"),
    ),
}


def load_format(name_or_path: str) -> ReasoningFormat:
    """A shipped format by name, or one from a YAML file.

    Raises:
        Refused: neither a known name nor an existing YAML file, or a file that is no YAML or has other fields.
    """
    if name_or_path in FORMATS:
        return FORMATS[name_or_path]
    path = Path(name_or_path).expanduser()
    if path.suffix not in (".yaml", ".yml") or not path.is_file():
        raise Refused(f"reasoning_format={name_or_path}: use one of {sorted(FORMATS)} or an existing .yaml file")
    try:
        values: Any = yaml.safe_load(path.read_bytes()) or {}
    except OSError as error:
        raise Refused(f"reasoning_format={name_or_path} cannot be read ({error.strerror})") from error
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise Refused(
            f"reasoning_format={name_or_path} is not YAML ({reason}): put a text with a colon in quotes"
        ) from error
    known = {field.name for field in fields(ReasoningFormat)}
    if not isinstance(values, dict) or set(values) - known:
        wrong = sorted(map(str, set(values) - known)) if isinstance(values, dict) else type(values).__name__
        raise Refused(f"reasoning_format={name_or_path}: {wrong} not among the fields {sorted(known)}")
    given: dict[str, Any] = {"name": path.stem, **values}
    return ReasoningFormat(**given)

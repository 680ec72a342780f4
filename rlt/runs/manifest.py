"""What a checkpoint holds, noted so that damage is found: a file that is missing, cut short, or has other bytes."""

import json
import logging
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rlt.durable import digest, flush_all, read_json, rename
from rlt.runs.folder import BEFORE, CHECKPOINTS, SAVING

MANIFEST = "manifest.json"  # the size and the SHA-256 of every other file
DAMAGED = "damaged-"  # before the name of a checkpoint that is set aside

logger = logging.getLogger("rlt")


def sums(folder: Path, files: list[Path]) -> dict[str, dict]:
    """Size and SHA-256 of files below a folder, by their names there."""
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(digest, files))
    return {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": one}
        for path, one in zip(files, found, strict=True)
    }


def seal(folder: Path, elsewhere: dict[str, dict] | None = None) -> None:
    """Note what a folder holds, and have all of it on the disk.

    Args:
        elsewhere: `sums` of what other machines wrote there, by their own eyes: this one may not see it yet.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    elsewhere = elsewhere or {}
    here = sums(folder, [path for path in files if str(path.relative_to(folder)) not in elsewhere])
    noted = dict(sorted({**here, **elsewhere}.items()))
    (folder / MANIFEST).write_text(json.dumps(noted, indent=1), encoding="utf-8")
    flush_all(folder)


def damage_of(folder: Path) -> str | None:
    """What a checkpoint lacks; None when it is whole. All of it is read."""
    noted = read_json(folder / MANIFEST)
    if not isinstance(noted, dict):
        return f"no {MANIFEST} that can be read"
    return next(_damages(folder, noted), None)


def _damages(folder: Path, noted: dict) -> Iterator[str]:
    """Sizes first, which are quick to see."""
    sums = {}
    for name, entry in noted.items():
        size = entry if isinstance(entry, int) else entry["bytes"]  # a number: of a checkpoint from before the sums
        found = (folder / name).stat().st_size if (folder / name).is_file() else 0
        if found != size:
            yield f"{name} has {found} of {size} bytes"
        if not isinstance(entry, int):
            sums[name] = entry["sha256"]
    with ThreadPoolExecutor() as pool:
        for name, found in zip(sums, pool.map(lambda name: digest(folder / name), sums), strict=True):
            if found != sums[name]:
                yield f"{name} has other bytes than were written"


def was_to_replace(new: Path, folder: Path) -> bool:
    """Whether a process was killed when it had taken a name from an older folder, and a newer one, which is sealed, was
    yet to get it."""
    return (new.parent / BEFORE).is_dir() and new.is_dir() and not folder.exists()


def last_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest checkpoint of a run that is whole. Newer ones that are not are set aside: they would count among those
    that are kept, and crowd out whole ones."""
    for new in (Path(output_dir) / SAVING).glob(CHECKPOINTS):
        if was_to_replace(new, folder := Path(output_dir) / new.name):
            rename(new, folder)
    found = [p for p in Path(output_dir).glob(CHECKPOINTS) if p.name.removeprefix("checkpoint-").isdigit()]
    for folder in sorted(found, key=lambda p: int(p.name.removeprefix("checkpoint-")), reverse=True):
        if (damage := damage_of(folder)) is None:
            return folder
        aside = folder.with_name(f"{DAMAGED}{folder.name}")
        shutil.rmtree(aside, ignore_errors=True)
        rename(folder, aside)
        logger.warning(
            "%s is damaged (%s), and set aside as %s: one before it is used, or the start", folder, damage, aside.name
        )
    return None

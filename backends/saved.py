"""A backend's state in a folder: whole or absent, on the disk before it has its name, and found out where damaged.

runs/a/step_0100/
    weights.safetensors      trained weights by name, and buffers that a model keeps
    optimizer.safetensors    KIND/NAME: what the optimizer remembers of each weight; absent where it was left out
    scheduler.pt             of a schedule, if there is one
    state.json               weight version, numbers of the optimizer, what the weights are of
    manifest.json            sizes and sums of the others (rlt/runs/manifest.py)
"""

import json
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from backends.gather import Tensors
from rlt.durable import disk_errors, rename
from rlt.errors import Refused
from rlt.runs.folder import BEFORE, SAVING
from rlt.runs.manifest import damage_of, seal, was_to_replace
from rlt.survival.kill_points import kill_point

WEIGHTS, OPTIMIZER, SCHEDULER, STATE = "weights.safetensors", "optimizer.safetensors", "scheduler.pt", "state.json"
NEW = "new"  # below the folder where it is written
NAMES = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._:-]{0,127}")


@dataclass
class Saved:
    """What a folder holds.

    Attributes:
        optimizer: of each weight, what the optimizer remembers: tensors and numbers; None: left out.
        about: what the weights are of, compared when they are loaded.
    """

    weights: Tensors
    buffers: Tensors
    optimizer: dict[str, dict[str, Any]] | None
    optimizer_kind: str
    scheduler: dict[str, Any] | None
    weight_version: int
    about: dict[str, Any] = field(default_factory=dict)


def check_name(name: str) -> None:
    """
    Raises:
        Refused: it could not be a folder's name anywhere, or would leave the folder that it is to be in.
    """
    if not NAMES.fullmatch(name):
        raise Refused(f"{name!r} cannot be a name here: 1 to 128 letters, digits and any of _-.: would do")


def place_of(root: Path, path: str | Path) -> Path:
    """The folder of a name below `root`, or of a path.

    Raises:
        Refused: there is none that is whole.
    """
    if isinstance(path, str) and "/" not in path:
        check_name(path)
        path = root / path
    folder = Path(path)
    if was_to_replace(new := _aside(folder) / NEW, folder):
        folder = new
    if not folder.is_dir():
        raise Refused(f"there is no saved state in {folder}")
    if (damage := damage_of(folder)) is not None:
        raise Refused(f"the saved state in {folder} is damaged ({damage}): load another one")
    return folder


def about(folder: Path) -> dict[str, Any]:
    """What the weights in a folder that `place_of` found whole are of."""
    return json.loads((folder / STATE).read_text(encoding="utf-8"))["about"]


def write(root: Path, name: str, saved: Saved, overwrite: bool) -> Path:
    """Returns the folder.

    Raises:
        Refused: a name that cannot be, or that is taken.
        OSError: the disk is full, say; nothing has changed.
    """
    check_name(name)
    folder, aside = root / name, _aside(root / name)
    if was_to_replace(aside / NEW, folder):
        rename(aside / NEW, folder)
    if folder.exists() and not overwrite:
        raise Refused(f"{folder} exists: take another name, or overwrite it")
    shutil.rmtree(aside, ignore_errors=True)  # of a process that was killed
    try:
        (aside / NEW).mkdir(parents=True)
        with disk_errors(aside):
            _fill(aside / NEW, saved)
        kill_point("saving")
        seal(aside / NEW)
        if folder.exists():
            rename(folder, aside / BEFORE)
            kill_point("replacing")
        rename(aside / NEW, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def _aside(folder: Path) -> Path:
    """Where a folder is written before it has its name."""
    return folder.with_name(f"{SAVING}-{folder.name}")


def _fill(folder: Path, saved: Saved) -> None:
    save_file(_own({**saved.weights, **saved.buffers}), folder / WEIGHTS)
    kept = saved.optimizer or {}
    if saved.optimizer is not None:
        pairs = {f"{key}/{name}": v for name, values in kept.items() for key, v in values.items() if _is_tensor(v)}
        save_file(_own(pairs), folder / OPTIMIZER)
    if saved.scheduler is not None:
        torch.save(saved.scheduler, folder / SCHEDULER)
    numbers = {name: {k: v for k, v in values.items() if not _is_tensor(v)} for name, values in kept.items()}
    state = {
        "weight_version": saved.weight_version,
        "optimizer": saved.optimizer_kind,
        "numbers": {name: values for name, values in numbers.items() if values},
        "buffers": sorted(saved.buffers),
        "about": saved.about,
    }
    (folder / STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")


def read(folder: Path) -> Saved:
    """What `write` has left in a folder that `place_of` found whole."""
    state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    tensors = load_file(folder / WEIGHTS)
    optimizer: dict[str, dict[str, Any]] | None = None
    if (folder / OPTIMIZER).is_file():
        optimizer = {name: dict(values) for name, values in state["numbers"].items()}
        for pair, value in load_file(folder / OPTIMIZER).items():
            key, _, name = pair.partition("/")
            optimizer.setdefault(name, {})[key] = value
    scheduler = folder / SCHEDULER
    return Saved(
        weights={name: value for name, value in tensors.items() if name not in state["buffers"]},
        buffers={name: tensors[name] for name in state["buffers"]},
        optimizer=optimizer,
        optimizer_kind=state["optimizer"],
        scheduler=torch.load(scheduler, weights_only=True) if scheduler.is_file() else None,
        weight_version=state["weight_version"],
        about=state["about"],
    )


def check_fits(weights: Tensors, own: dict[str, torch.Size], all_of_them: bool) -> None:
    """Weights by name are those of a model with these shapes.

    Raises:
        Refused: an unknown name, another shape, or with `all_of_them` a missing one.
    """
    unknown = sorted(weights.keys() - own.keys())
    missing = sorted(own.keys() - weights.keys()) if all_of_them else []
    if unknown or missing:
        what = f"has no {missing[0]}" if missing else f"has {unknown[0]}, which this model does not train"
        raise Refused(f"the weights are of another model: what is to be loaded {what}")
    for name, value in weights.items():
        if value.shape != own[name]:
            shapes = f"{name} is {tuple(value.shape)}, here {tuple(own[name])}"
            raise Refused(f"the weights are of another model: {shapes}")


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _own(tensors: Tensors) -> Tensors:
    """Each with a memory of its own, as safetensors asks for."""
    return {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}

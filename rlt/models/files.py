"""A look at a model's files before anything is loaded: the shapes of its tensors, and whether each file is whole."""

import contextlib
import json
from pathlib import Path

from rlt.durable import read_json
from rlt.errors import Refused

POINTER = b"version https://git-lfs"  # how a pointer begins, which stands for a file that git-lfs has yet to fetch


def tensor_shapes(path: Path) -> dict[str, list[int]]:
    """Shapes by name, of a safetensors file's header: its length in 8 bytes, JSON, then the tensors themselves.

    Raises:
        Refused: the file cannot be read, is a git-lfs pointer, or is cut short.
    """
    check_fetched(path)
    size = path.stat().st_size
    entries = None
    with path.open("rb") as file:
        begin = 8 + int.from_bytes(file.read(8), "little")  # of the tensors
        if begin <= size:
            with contextlib.suppress(ValueError, RecursionError):
                entries = json.loads(file.read(begin - 8))
    if not isinstance(entries, dict):
        raise Refused(f"{path} is cut short, or is no safetensors file: copy or download it again")
    entries.pop("__metadata__", None)
    whole = begin + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    if size < whole:
        raise Refused(f"{path} is cut short ({size} of {whole} bytes): copy or download it again")
    return {name: entry["shape"] for name, entry in entries.items()}


def is_whole(folder: Path) -> bool:
    """Whether a folder that was written here holds a model as it was written, as far as its files can say: a power cut
    leaves them empty or cut short."""
    files = [path for path in folder.glob("*") if path.is_file()]
    weights = [path for path in files if path.suffix == ".safetensors"]
    try:
        for path in weights:
            tensor_shapes(path)
        sizes = [path.stat().st_size for path in files]
    except (Refused, FileNotFoundError):  # the latter: another process has begun to make it anew
        return False
    settings = [read_json(path) for path in files if path.suffix == ".json"]
    return bool(weights) and None not in settings and 0 not in sizes


def model_settings(folder: Path) -> dict:
    """A model's config.json.

    Raises:
        Refused: it is no JSON object.
    """
    path = folder / "config.json"
    found = None
    with contextlib.suppress(ValueError, RecursionError):
        found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise Refused(f"{path} is no JSON object: copy or download it again")
    return found


def check_fetched(path: Path) -> None:
    """Refuse a file that git-lfs has not fetched.

    Raises:
        Refused: the file cannot be read, or is a git-lfs pointer.
    """
    try:
        with path.open("rb") as file:
            start = file.read(len(POINTER))
    except OSError as error:
        raise Refused(f"{path} cannot be read ({error.strerror})") from error
    if start == POINTER:
        raise Refused(f"{path} is a git-lfs pointer, not the file itself: run `git lfs pull` in its folder")


def check_files(folder: Path) -> None:
    """Refuse a model's folder in which a file is not whole.

    Raises:
        Refused: the first such file, for the reasons of `tensor_shapes` and `check_fetched`.
    """
    for path in sorted(folder.glob("*.json")):
        check_fetched(path)
    for path in sorted(folder.glob("*.safetensors")):
        tensor_shapes(path)

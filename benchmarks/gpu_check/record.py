"""What a part has measured, on disk after every figure, and the claims that did not hold."""

import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch


def write_atomically(path: Path, value: Any) -> None:
    """A reader finds the whole of the old or of the new file."""
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(json.dumps(value, indent=1), encoding="utf-8")
    os.replace(aside, path)


class Record:
    """Figures of a part, written to a file as they come.

    Args:
        path: of the file.
        device: "cuda" or "cpu".
    """

    def __init__(self, path: Path, device: str):
        self.path = path
        name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or "cpu"
        self.values: dict[str, Any] = {"machine": {"device": name, "torch": torch.__version__}, "unmet": []}
        self.add()

    def add(self, **figures: Any) -> None:
        """Keep figures by name; floats to six digits."""
        self.values |= {name: rounded(value) for name, value in figures.items()}
        write_atomically(self.path, self.values)

    def claim(self, text: str, holds: bool) -> None:
        """What must be true; the part goes on either way and fails at its end."""
        if not holds:
            self.add(unmet=[*self.values["unmet"], text])

    def finish(self) -> None:
        """Exit with 1 where a claim did not hold."""
        if self.values["unmet"]:
            sys.exit("did not hold: " + "; ".join(self.values["unmet"]))


def rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    return [rounded(one) for one in value] if isinstance(value, list | tuple) else value

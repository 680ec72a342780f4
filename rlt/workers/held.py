"""A base model that is held to read and sample with: alone, with an adapter that was saved, or whole as it was saved.

What was asked for last is kept ready, by its address, to which nothing else is ever written.
"""

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from rlt.models.devices import device_type, on
from rlt.models.loading import load_frozen
from rlt.workers.tensor_files import local_files

ADAPTERS, WHOLE = 8, 1  # that are kept ready
ADAPTER_FILE = "adapter_config.json"  # of PEFT
QUIET = r"Model (with|has) `tie_word_embeddings=True`|fan_in_fan_out is"  # of a head that is never merged here


class HeldModel:
    """
    Args:
        folder: of the base model.
    """

    def __init__(self, folder: str):
        self._base: Any = on(device_type(), load_frozen(folder, torch.float32))
        self._adapters: dict[str, str] = {}  # names in PEFT by addresses, the one that was asked for last at the end
        self._whole: dict[str, Any] = {}  # models by addresses, likewise
        self._made = 0
        self._lock = threading.Lock()

    @contextmanager
    def weights(self, address: str | None) -> Iterator[Any]:
        """A model with what an address holds, or the base alone; one caller at a time."""
        with self._lock, torch.no_grad():
            if address is None and isinstance(self._base, PeftModel):
                with self._base.disable_adapter():
                    yield self._base
            elif address is None:
                yield self._base
            else:
                yield self._with(address)

    def forget(self, address: str) -> None:
        with self._lock:
            self._whole.pop(address, None)
            if (inner := self._adapters.pop(address, None)) is not None:
                self._delete(inner)

    def _delete(self, inner: str) -> None:
        if self._adapters:
            self._base.set_adapter(next(iter(self._adapters.values())))
            self._base.delete_adapter(inner)
        else:
            self._base = self._base.unload()  # PEFT goes on naming the last adapter that it has deleted

    def _with(self, address: str) -> Any:
        if address not in self._adapters and address not in self._whole:
            with local_files(address) as folder:
                self._load(address, folder)
        if address in self._whole:
            self._whole[address] = self._whole.pop(address)
            return self._whole[address]
        inner = self._adapters[address] = self._adapters.pop(address)
        self._base.set_adapter(inner)
        self._base.requires_grad_(False)
        return self._base

    def _load(self, address: str, folder: Path) -> None:
        if (folder / ADAPTER_FILE).is_file():
            self._adapters[address] = self._load_adapter(folder)
            if len(self._adapters) > ADAPTERS:
                self._delete(self._adapters.pop(next(iter(self._adapters))))
            return
        while len(self._whole) >= WHOLE:
            del self._whole[next(iter(self._whole))]
        self._whole[address] = on(device_type(), load_frozen(str(folder), torch.float32))

    def _load_adapter(self, folder: Path) -> str:
        self._made += 1
        inner = f"rlt{self._made}"
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=QUIET)
            if isinstance(self._base, PeftModel):
                self._base.load_adapter(str(folder), inner)
            else:
                self._base = PeftModel.from_pretrained(self._base, str(folder), adapter_name=inner)
        self._base.eval()
        return inner

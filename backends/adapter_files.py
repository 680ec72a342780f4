"""An adapter in the form that PEFT and engines read."""

import shutil
from pathlib import Path

from peft import PeftModel

from rlt.durable import flush_all, rename
from rlt.errors import Refused


def export_adapter(model: PeftModel, inner: str, folder: Path) -> Path:
    """`folder` gets `adapter_model.safetensors` and its settings, written aside and renamed.

    Raises:
        Refused: the folder exists.
    """
    if folder.exists():
        raise Refused(f"{folder} exists: export to another folder")
    aside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)  # of a process that was killed
    try:
        # Without the embedding, which PEFT would add where the head has an adapter.
        model.save_pretrained(str(aside), selected_adapters=[inner], save_embedding_layers=False)
        flush_all(aside / inner)
        rename(aside / inner, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder

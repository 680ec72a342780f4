"""Toxicity by a sequence classifier of transformers, from a folder."""

import json
from pathlib import Path
from typing import Any

from rlt.errors import Refused

WINDOW = 512  # tokens, at most; a model that reads less gets less
OVERLAP = 8  # of a window, one in so many tokens is in the next one too
ROWS = 32  # windows at once, of about one length
HARMLESS = (
    "non-toxic",
    "nontoxic",
    "non_toxic",
    "not-toxic",
    "not_toxic",
    "neutral",
    "normal",
    "safe",
    "clean",
    "ok",
    "none",
)


def check_classifier(folder: Path) -> None:
    """Raises:
    Refused: there is no classifier, or its labels do not say which is harmless.
    """
    if not (folder / "config.json").is_file():
        raise Refused(f"toxicity_model={folder}: use svm, or the folder of a sequence classifier (with config.json)")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kind = str((config.get("architectures") or [None])[0])
    if not kind.endswith("ForSequenceClassification"):
        raise Refused(f"toxicity_model={folder} holds {kind}, which is no sequence classifier")
    labels = [str(label).lower() for label in (config.get("id2label") or {}).values()]
    if not by_label(config) and sum(label in HARMLESS for label in labels) != 1:
        raise Refused(
            f"toxicity_model={folder}: its labels ({', '.join(labels) or 'none'}) do not say which is harmless: name "
            "that one neutral in id2label of its config.json"
        )


def by_label(config: dict[str, Any]) -> bool:
    """Whether each label has a probability of its own, all of something toxic; else they share one."""
    return config.get("problem_type") == "multi_label_classification" or len(config.get("id2label") or {}) == 1


class Classifier:
    """The worst window of each record's texts."""

    def __init__(self, folder: Path):
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        from rlt.models.devices import device_type
        from rlt.models.loading import quiet_libraries

        quiet_libraries()
        self.device = device_type()
        dtype = torch.float32 if self.device == "cpu" else torch.bfloat16
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.tokenizer = tokenizer
        self.model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=dtype).to(self.device).eval()
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.by_label = by_label(config)
        harmless = [int(n) for n, label in config.get("id2label", {}).items() if str(label).lower() in HARMLESS]
        self.harmless = None if self.by_label else harmless[0]
        positions = getattr(self.model.config, "max_position_embeddings", WINDOW)
        self.window = min(WINDOW, positions, self.tokenizer.model_max_length)

    def __call__(self, records: list[list[str]]) -> list[float]:
        owners, windows = [], []
        for number, texts in enumerate(records):
            for text in filter(str.strip, texts):
                pieces = self.tokenizer(
                    text,
                    truncation=True,
                    max_length=self.window,
                    stride=self.window // OVERLAP,
                    return_overflowing_tokens=True,
                )["input_ids"]
                owners += [number] * len(pieces)
                windows += pieces
        worst = [0.0] * len(records)
        by_length = sorted(range(len(windows)), key=lambda n: len(windows[n]))
        for start in range(0, len(by_length), ROWS):
            rows = by_length[start : start + ROWS]
            for row, score in zip(rows, self.scores([windows[row] for row in rows]), strict=True):
                worst[owners[row]] = max(worst[owners[row]], score)
        return worst

    def scores(self, windows_BT: list[list[int]]) -> list[float]:
        """The probability of each window to be toxic."""
        import torch

        batch = self.tokenizer.pad({"input_ids": windows_BT}, return_tensors="pt").to(self.device)
        with torch.inference_mode():
            logits_BL = self.model(**batch).logits.float()
        if self.harmless is None:
            return logits_BL.sigmoid().amax(dim=1).tolist()
        return (1 - logits_BL.softmax(dim=1)[:, self.harmless]).tolist()

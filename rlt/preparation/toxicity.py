"""How toxic a record is: its worst passage, or one of the worst of a long record.

`svm` is alt-profanity-check's model (a linear SVM inside the package). It scores profanity rather than toxicity: "I
will kill you" .95, "kill all the background processes" .17, but "the cock crowed thrice" 1.0, and "Go back to your
country, you animals" .12. Any sequence classifier can stand in its place, from a folder.

Of the sixty lines in its test, at the default of .9: all 15 that insult with swear words, 7 of 15 threats and
slanders that mostly use none, and 2 of 30 harmless ones ("the cock crowed thrice", "he rode to town on an ass"):
precision .92, recall .73.

A passage is about one sentence long. In a longer one the insult drowns: the same insult scores 1.0 alone and .01
among twenty sentences about the weather. So the SVM takes the worst passage of a record, but lets one in fifty pass:
without, 66 of 186 documents of 20,000 characters from the King James Bible went for a word such as "ass" or "suck", and
5 of 120 modules of the standard library; with it 4 and none.
"""

import importlib.util
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from rlt.errors import Refused
from rlt.formats.record import Dropped, Record, texts_of
from rlt.preparation.stage import RowStage, Task

SVM = "svm"
ACTIONS = ("drop", "tag")
PASSAGE = 200  # characters, about; for the SVM
END = re.compile(r"(?<=[.!?…])\s+|\n+")
ALLOWED_IN = 50  # passages: one in so many may be as bad as it likes
DIGITS = 4  # of a score


class Toxicity(RowStage):
    """Notes `meta.toxicity`, in [0, 1]; drops what is over `max_toxicity` unless it is only to be noted."""

    name = "toxicity"
    score_keys = ("toxicity",)
    keys = ("toxicity_model", "max_toxicity", "toxicity_action")

    def check(self) -> None:
        if self.settings.toxicity_action not in ACTIONS:
            raise Refused(f"toxicity_action={self.settings.toxicity_action}: use one of {', '.join(ACTIONS)}")
        if self.settings.toxicity_model == SVM:
            if importlib.util.find_spec("profanity_check") is None:
                raise Refused("toxicity_model=svm needs the package alt-profanity-check: ./setup.sh data")
        else:
            from rlt.preparation.classifier import check_classifier

            check_classifier(Path(self.settings.toxicity_model))

    def files(self) -> list[Path]:
        if self.settings.toxicity_model == SVM:
            return []
        return sorted(path for path in Path(self.settings.toxicity_model).iterdir() if path.is_file())

    def start(self, task: Task) -> None:
        self.counts: Counter[str] = Counter()
        self.scores = svm() if self.settings.toxicity_model == SVM else classifier(self.settings.toxicity_model)

    def some(self, records: list[Record]) -> list[Record | Dropped]:
        worst = self.scores([list(texts_of(record)) for record in records])
        return [self.judged(record, round(score, DIGITS)) for record, score in zip(records, worst, strict=True)]

    def judged(self, record: Record, score: float) -> Record | Dropped:
        if score > self.settings.max_toxicity:
            if self.settings.toxicity_action == "drop":
                return Dropped("toxic", score)
            self.counts["over_threshold"] += 1
        return {**record, "meta": {**record["meta"], "toxicity": score}}

    def notes(self) -> dict[str, int]:
        return dict(self.counts)


Scores = Callable[[list[list[str]]], list[float]]  # of records, each by its texts: the worst passage's


def svm() -> Scores:
    from profanity_check import predict_prob

    def scores(records: list[list[str]]) -> list[float]:
        passages = [[p for text in texts for p in passages_of(text)] for texts in records]
        flat = [passage for some in passages for passage in some]
        found = iter(predict_prob(flat).tolist() if flat else ())
        return [worst([next(found) for _ in some]) for some in passages]

    return scores


def worst(scores: list[float]) -> float:
    """The highest, or the second of 50 and more, the third of 100 and more."""
    return sorted(scores, reverse=True)[len(scores) // ALLOWED_IN] if scores else 0.0


def classifier(folder: str) -> Scores:
    from rlt.preparation.classifier import Classifier

    return Classifier(Path(folder))


def passages_of(text: str, length: int = PASSAGE) -> list[str]:
    """Sentences and lines, short ones together, long ones in pieces, each of about `length` characters."""
    passages: list[str] = []
    for part in END.split(text):
        for start in range(0, len(part), length):
            piece = part[start : start + length]
            if passages and len(passages[-1]) + len(piece) < length // 2:
                passages[-1] += f" {piece}"
            else:
                passages.append(piece)
    return passages

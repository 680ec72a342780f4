"""The arms of the matrix: what their students learn from, and the teachers that write it."""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass

import settings

SENTENCE = re.compile(r"(?<=[.!?])\s+")


def shuffled(trace: str, question: str) -> str:
    """The sentences in an order that the question decides."""
    sentences = SENTENCE.split(trace)
    random.Random(question).shuffle(sentences)
    return " ".join(sentences)


def answer_first(trace: str, question: str) -> str:
    """The last sentence before the others."""
    *steps, last = SENTENCE.split(trace)
    return " ".join([last, *steps])


def answer_only(trace: str, question: str) -> str:
    """The last sentence alone."""
    return SENTENCE.split(trace)[-1]


@dataclass(frozen=True)
class Arm:
    """A student of each seed.

    Args:
        words: what its student learns from.
        kind: base (untrained), worked, traces, grpo (by itself) or opd (the teacher's distribution).
        teacher: a name of `TEACHERS`, where there is one.
        of: traces that are sampled of each question; the best by the reward is taken.
        edit: of each trace, with its question.
        whole: a second student learns from every question once, whatever the number of tokens.
        tokens: that its student is trained on, where it learns from texts.
    """

    words: str
    kind: str = "traces"
    teacher: str = ""
    of: int = 1
    edit: Callable[[str, str], str] | None = None
    whole: bool = False
    tokens: int = settings.TRAINED_TOKENS


# What trained them from the warm-up on; nothing: the warm-up itself.
TEACHERS: dict[str, tuple[str, ...]] = {
    "warm-up": (),
    "rl": ("reward_cfg=teacher",),
    "random": ("reward_cfg=random",),
    "solution-only": ("reward_cfg=solution_only",),
    "kl-only": ("reward_cfg=kl_only",),
    "mismatched": ("reward_cfg=teacher",),  # of another seed's student
}
ARMS = {
    "base": Arm("the model as it was published", "base"),
    "warm-up": Arm("the warm-up teacher's explanations", teacher="warm-up", whole=True),
    "best-of-n": Arm(f"its best of {settings.BEST_OF} by the reward", teacher="warm-up", of=settings.BEST_OF),
    "rl": Arm("explanations of the teacher trained with the reward", teacher="rl", whole=True),
    "random": Arm("of one trained with permuted rewards", teacher="random"),
    "worked": Arm("the generator's worked solutions", "worked"),
    "solution-only": Arm("of a teacher trained with r_SS alone", teacher="solution-only"),
    "kl-only": Arm("of a teacher trained with r_KL alone", teacher="kl-only"),
    "mismatched": Arm("of a teacher trained with another seed's student", teacher="mismatched"),
    "shuffled": Arm("of `rl`, sentences in a random order", teacher="rl", edit=shuffled),
    "answer-first": Arm("of `rl`, the last sentence first", teacher="rl", edit=answer_first),
    "answer-only": Arm("of `rl`, the last sentence alone", teacher="rl", edit=answer_only),
    "student-grpo": Arm("its own answers, checked", "grpo", teacher="rl"),
    "opd-warm-up": Arm(
        "the warm-up teacher's distribution over its own samples, and right solutions", "opd", "warm-up"
    ),
    "opd-rl": Arm("the distribution of `rl`'s teacher over its own samples, and right solutions", "opd", "rl"),
}
# Not of the plan: what was tried once its answer was there, on seeds for tuning alone (docs/results.md). Twice the
# tokens, as the plan's students are early in their training; the filter over the trained teacher, beside either alone.
TWICE = 2 * settings.TRAINED_TOKENS
TRIED = {
    "warm-up-twice": Arm("as `warm-up`, twice the tokens", teacher="warm-up", tokens=TWICE),
    "best-of-n-twice": Arm("as `best-of-n`, twice the tokens", teacher="warm-up", of=settings.BEST_OF, tokens=TWICE),
    "rl-twice": Arm("as `rl`, twice the tokens", teacher="rl", tokens=TWICE),
    "rl-best-of-n-twice": Arm(
        f"the best of {settings.BEST_OF} of `rl` by the reward, twice the tokens",
        teacher="rl",
        of=settings.BEST_OF,
        tokens=TWICE,
    ),
}
KNOWN = ARMS | TRIED
PRIMARY = ("base", "warm-up", "best-of-n", "rl", "random", "worked")


def seeds_of(arm: str) -> range:
    """The seeds that the plan gives an arm."""
    return settings.SEEDS["primary" if arm in PRIMARY else "other"]

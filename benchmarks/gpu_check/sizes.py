"""How large everything is, one table for each device: on the CPU the same code runs in tiny sizes."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Shape:
    """Of a model with random weights."""

    kind: Literal["qwen3", "qwen2"]
    hidden: int
    layers: int
    heads: int
    key_heads: int
    head_size: int
    intermediate: int
    vocabulary: int
    tied: bool = True


@dataclass(frozen=True)
class PassLayout:
    """Token sequences of one pass: `completions` of `completion` tokens behind one shared prompt of `prompt`."""

    name: str
    prompt: int
    completions: int
    completion: int


@dataclass(frozen=True)
class Sizes:
    """Of every part.

    Attributes:
        attention: the model of the attention part, `layouts` random rows of about `row_tokens` at most.
        attention_s: of each dtype's rows; what is not done by then is left out, and counted.
        head_positions, head: of the head part.
        residence: the model that moves.
        grpo, estimate, offload: models of the runs.
        memory_limit_gib: of the GRPO run's process.
        completion_tokens: of a completion in the runs.
        train_tokens: of a row in the estimate's runs.
        update, scoring: models of the passes, with `passes` as their inputs.
        matrix: side of the square product that the card's rate is measured with.
    """

    attention: Shape
    layouts: int
    row_tokens: int
    attention_s: float
    head: Shape
    head_positions: int
    residence: Shape
    grpo: Shape
    memory_limit_gib: float
    completion_tokens: int
    estimate: dict[str, Shape]
    train_tokens: int
    offload: Shape
    update: dict[str, Shape]
    scoring: dict[str, Shape]
    passes: tuple[PassLayout, ...]
    matrix: int


QWEN3_06B = Shape("qwen3", 1024, 28, 16, 8, 128, 3072, 151_936)
QWEN3_17B = Shape("qwen3", 2048, 28, 16, 8, 128, 6144, 151_936)
QWEN25_7B = Shape("qwen2", 3584, 28, 28, 4, 128, 18944, 152_064, tied=False)
TINY = Shape("qwen3", 64, 2, 2, 1, 32, 96, 1024)
TINY_QWEN2 = Shape("qwen2", 64, 2, 2, 1, 32, 96, 1024, tied=False)

CUDA = Sizes(
    attention=Shape("qwen3", 1024, 4, 16, 8, 128, 3072, 8192),
    layouts=40,
    row_tokens=2048,
    attention_s=30.0,
    head=Shape("qwen3", 1024, 1, 16, 8, 128, 3072, 151_936),
    head_positions=4096,
    residence=QWEN3_17B,
    grpo=QWEN3_06B,
    memory_limit_gib=12.0,
    completion_tokens=256,
    estimate={"0.6b": QWEN3_06B, "1.7b": QWEN3_17B},
    train_tokens=4096,
    offload=QWEN3_06B,
    update={"0.6b": QWEN3_06B, "1.7b": QWEN3_17B, "7b": QWEN25_7B},
    scoring={"0.6b": QWEN3_06B, "1.7b": QWEN3_17B, "7b": QWEN25_7B},
    passes=(
        PassLayout("1x16384", 1, 1, 16_383),
        PassLayout("2000+8x256", 2000, 8, 256),
        PassLayout("500+8x4096", 500, 8, 4096),
    ),
    matrix=8192,
)
CPU = Sizes(
    attention=TINY,
    layouts=8,
    row_tokens=256,
    attention_s=20.0,
    head=TINY,
    head_positions=256,
    residence=TINY,
    grpo=TINY,
    memory_limit_gib=12.0,
    completion_tokens=16,
    estimate={"tiny": TINY},
    train_tokens=2048,
    offload=TINY,
    update={"tiny": TINY},
    scoring={"tiny": TINY, "tiny_qwen2": TINY_QWEN2},
    passes=(PassLayout("1x512", 1, 1, 511), PassLayout("100+4x16", 100, 4, 16), PassLayout("30+4x128", 30, 4, 128)),
    matrix=1024,
)
SIZES = {"cuda": CUDA, "cpu": CPU}

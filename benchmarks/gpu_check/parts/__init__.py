"""The parts of the check, each a module with `run(record, sizes, device)`; by name, the most important first."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """A module of this package, and the seconds after which it is ended."""

    module: str
    limit_s: int


PARTS = {
    "attention": Part("attention", 130),
    "head": Part("head", 50),
    "residence": Part("residence", 50),
    "grpo_12gb": Part("grpo", 180),
    "estimate": Part("estimate", 90),
    "update": Part("update", 100),
    "scoring": Part("scoring", 80),
    "offload": Part("offload", 70),
}

"""The training API: the server, and the clients of it, which need no torch and nothing of the server."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlt.serving.client import AsyncClient, Client, FutureGroup, SamplingClient, TrainingClient

__all__ = ["AsyncClient", "Client", "FutureGroup", "SamplingClient", "TrainingClient"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'rlt.serving' has no attribute {name!r}")
    return getattr(import_module("rlt.serving.client"), name)

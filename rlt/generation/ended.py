"""An error that those know who do without vLLM."""


class EngineEnded(RuntimeError):
    """An engine has failed amid its work, and does no more."""

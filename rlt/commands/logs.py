"""What a command says on the terminal beside its results."""

import logging


def set_up_logging() -> None:
    """Warnings, this project's own words, and of libraries that warn of what nobody here can change only errors."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("rlt").setLevel(logging.INFO)
    for library in ("bitsandbytes", "trl", "torchao", "vllm"):
        logging.getLogger(library).setLevel(logging.ERROR)

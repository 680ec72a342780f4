"""Tables of a run, as far as they can be read."""

import logging
from pathlib import Path

logger = logging.getLogger("rlt")


def frame_of(path: Path):
    """A Parquet file's table; None, and a warning, where there is none or it was cut short."""
    import pandas
    import pyarrow

    if not path.is_file():
        return None
    try:
        return pandas.read_parquet(path)
    except (pyarrow.ArrowException, OSError) as error:
        logger.warning("%s is left out of the report, as it cannot be read (%s)", path, error)
        return None

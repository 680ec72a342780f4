"""`serve.py` as it is, but for the worker, which is one of numbers: `serving_real.py FLAGS_JSON WORDS...`

The flags are arguments of `serving_unigram.Unigram`, and `file_bytes`, the most that its process may write to a file.
"""

import json
import resource
import sys
from functools import partial

from serving_unigram import Unigram

from rlt.commands import serve


def make_unigram(flags: dict, *_: object) -> Unigram:
    if size := flags.pop("file_bytes", None):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    return Unigram(**flags)


if __name__ == "__main__":
    serve.make_worker = partial(make_unigram, json.loads(sys.argv.pop(1)))  # pyrefly: ignore[bad-assignment]
    serve.main()

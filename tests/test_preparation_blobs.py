"""Texts that no one wrote: none takes a stage a square of time, and each is kept or dropped for a reason."""

import base64
import random
import time

import pytest
from preparation_rows import chat, outcome, text

from rlt.preparation.clean import Clean
from rlt.preparation.language import Language
from rlt.preparation.pii import Pii
from rlt.preparation.quality import Quality
from rlt.preparation.toxicity import Toxicity

SIZE = 1_000_000
LIMIT_S = 60  # of one stage for all of them; a square of time would be hours
BLOB = base64.b64encode(random.Random(0).randbytes(SIZE * 3 // 4)).decode()
UNITS = (
    "a",
    "é",
    "\n",
    " \n",
    "1",
    "1 ",
    "+1 ",
    "call 212-555-0143 ",
    "$a",
    "\\(",
    "```\n",
    "(",
    "::",
    "ab:",
    "1.",
    ";",
    "😀",
)
UNITS += (
    "https://a:b",
    "-----BEGIN PRIVATE KEY-----",
    "eyJaaaaaaaaa.",
    "x=1;",
    "\u0301",
    "<think>",
    "a@",
    "等一下",
    "AB12",
    "= ",
)
BLOBS = [*((unit * SIZE)[:SIZE] for unit in UNITS), BLOB, f"{BLOB[: SIZE // 2]} a@b.co {BLOB[SIZE // 2 : -20]}"]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [Clean, Language, Quality, Pii, Toxicity])
def test_a_blob_takes_no_square_of_time(tmp_path, stage):
    records = [text(blob) for blob in BLOBS] + [chat("What is it?", blob) for blob in BLOBS]
    begin = time.process_time()
    found = outcome(stage, tmp_path, records, languages=None)
    assert time.process_time() - begin < LIMIT_S
    assert len(found.kept) + len(found.dropped) == len(records)


@pytest.mark.parametrize(
    "blob", ["a" * 20_000, BLOB[:20_000], "lorem ipsum dolor sit amet. " * 500, "one", "one two three four."]
)
def test_blobs_and_fragments_are_no_text_worth_keeping(tmp_path, blob):
    assert len(outcome(Quality, tmp_path, [text(blob)]).dropped) == 1

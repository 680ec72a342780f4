"""Ten million rows take no more memory than a hundred thousand, at any stage.

`MEMORY_ROWS=1000000 ./run_tests.sh -m slow tests/test_preparation_memory.py` asks it of fewer: of ten million it takes
hours, and 30 GB of disk.
"""

import os

import pytest

from benchmarks.preparation_memory import STAGES, measure, vocabulary, write_rows

ROWS = int(os.environ.get("MEMORY_ROWS", "10000000"))
FEW = 100_000
WORDS = (6, 8)  # of a question and of a solution, so that the disk holds all stages of so many rows
FLAT = 1.2


@pytest.mark.slow
@pytest.mark.timeout(8 * 3600)
def test_the_memory_of_every_stage_is_that_of_a_hundredth_of_the_rows(tmp_path):
    peak_mb = {}
    for count in (FEW, ROWS):
        source = tmp_path / f"{count}.jsonl"
        write_rows(source, count, vocabulary(), WORDS)
        for number in range(1, len(STAGES) + 1):
            found = measure(source, tmp_path / f"{count}", STAGES[:number])
            peak_mb[count, STAGES[number - 1]] = found["peak_mb"]
    grown = {stage: peak_mb[ROWS, stage] / peak_mb[FEW, stage] for stage in STAGES}
    assert max(grown.values()) <= FLAT, peak_mb

"""A frozen bfloat16 model's log-probs, without gradients."""

from benchmarks.gpu_check.passes import measure_all
from benchmarks.gpu_check.record import Record
from benchmarks.gpu_check.sizes import Sizes


def run(record: Record, sizes: Sizes, device: str) -> None:
    measure_all(record, sizes, sizes.scoring, device, trained=False)

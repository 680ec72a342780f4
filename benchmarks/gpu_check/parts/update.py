"""Forward and backward over a micro-batch, with float32 weights under autocast and gradient checkpointing."""

from benchmarks.gpu_check.passes import measure_all
from benchmarks.gpu_check.record import Record
from benchmarks.gpu_check.sizes import Sizes


def run(record: Record, sizes: Sizes, device: str) -> None:
    measure_all(record, sizes, sizes.update, device, trained=True)

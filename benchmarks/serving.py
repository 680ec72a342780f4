"""What the server of the training API costs, and what its samplers give, on the embedded model.

    python benchmarks/serving.py step      # forward_backward + optim_step of 8 x 256 tokens: server against in process
    python benchmarks/serving.py samples   # 64 samples of 32 tokens: vLLM against torch, base and adapters
    python benchmarks/serving.py start     # from the start of serve.py to the first answered step of a new adapter
    python benchmarks/serving.py passes    # 2 and 4 adapters with 4 x 64 tokens each: one pass for all, or one each

Each alternates between what it compares, `--repeats` times, and says the medians. Nothing else may run meanwhile.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from harness import MODEL, ROOT

KEY = "tml-benchmark-key"
LIMIT_S = 600
ROWS, LENGTH = 8, 256
SAMPLES, DRAWN = 64, 32


def alternated(ways: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each way, after one call of each that does not count."""
    for way in ways.values():
        way()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def said(seconds: dict[str, list[float]], **more: Any) -> None:
    figures = {name: {"median_s": round(median(each), 3), "runs": [round(x, 3) for x in each]}
               for name, each in seconds.items()}  # fmt: skip
    sys.stdout.write(json.dumps({**figures, **more}, indent=1) + "\n")


@contextmanager
def server(folder: str) -> Iterator[str]:
    command = [sys.executable, str(ROOT / "serve.py"), "port=0", f"state_dir={folder}", f"base_models=[{MODEL}]"]
    environment = {**os.environ, "RLT_API_KEY": KEY}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().split()[1]
    finally:
        process.terminate()
        process.wait(60)


def step(repeats: int) -> None:
    import torch

    from backends import AdapterSpec, SharedBase
    from backends.create import load_hf_model
    from backends.protocol import AdamParams as OwnParams
    from backends.protocol import Datum
    from rlt.serving.client import Client, datum
    from rlt.wire.values import AdamParams

    ids = torch.randint(0, 49152, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    theirs = [datum(row[:-1].tolist(), target_tokens=row[1:].tolist(), weights=[1.0] * LENGTH) for row in ids]
    ours = [Datum(row[:-1].tolist(), {"target_tokens": row[1:], "weights": torch.ones(LENGTH)}) for row in ids]
    with tempfile.TemporaryDirectory() as folder, server(folder) as address, Client(address, KEY) as service:
        remote = service.create_model(MODEL, rank=32, seed=0)
        local = (
            SharedBase(load_hf_model(MODEL), Path(folder) / "own").create("own", AdapterSpec(seed=0)).result(LIMIT_S)
        )

        def on_server() -> None:
            read, done = remote.forward_backward(theirs, "cross_entropy"), remote.optim_step(AdamParams(1e-4))
            read.result(LIMIT_S), done.result(LIMIT_S)

        def in_process() -> None:
            read, done = local.forward_backward(ours), local.optim_step(OwnParams(1e-4))
            read.result(LIMIT_S), done.result(LIMIT_S)

        seconds = alternated({"server": on_server, "in_process": in_process}, repeats)
    overheads = [a / b - 1 for a, b in zip(seconds["server"], seconds["in_process"], strict=True)]
    said(seconds, overhead=round(median(overheads), 4), threads=torch.get_num_threads())


def start(repeats: int) -> None:
    from rlt.serving.client import Client, datum
    from rlt.wire.values import AdamParams

    def until_a_step() -> None:
        with tempfile.TemporaryDirectory() as folder, server(folder) as address, Client(address, KEY) as service:
            model = service.create_model(MODEL, rank=32, seed=0)
            model.forward_backward([datum([1, 2, 3], target_tokens=[2, 3, 4])], "cross_entropy").result(LIMIT_S)
            model.optim_step(AdamParams(1e-4)).result(LIMIT_S)

    said(alternated({"start_to_first_step_and_end": until_a_step}, repeats))


def saved_adapter(folder: str) -> str:
    """Of rank 32 on all layers and the head, trained a little."""
    import torch

    from backends import AdapterSpec, SharedBase
    from backends.create import load_hf_model
    from backends.protocol import AdamParams, Datum

    base = SharedBase(load_hf_model(MODEL), folder)
    model = base.create("a", AdapterSpec(seed=0)).result(LIMIT_S)
    ids = torch.randint(0, 49152, (65,), generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        model.forward_backward([Datum(ids[:-1].tolist(), {"target_tokens": ids[1:]})]).result(LIMIT_S)
        model.optim_step(AdamParams(1e-3)).result(LIMIT_S)
    exported = model.export(Path(folder) / "exported").result(LIMIT_S)
    base.close()
    return str(exported)


def samples(repeats: int) -> None:
    import numpy as np
    import torch

    from rlt.models.paths import resolve_model_path
    from rlt.wire.json_form import SampleRequest
    from rlt.wire.values import SamplingParams
    from rlt.workers.torch_sampler import TorchSampler
    from rlt.workers.vllm_sampler import VLLMSampler

    prompt = np.random.default_rng(0).integers(0, 49152, 64)
    request = SampleRequest("s", 0, prompt, SAMPLES, SamplingParams(DRAWN, 0, []))
    with tempfile.TemporaryDirectory() as folder:
        adapter = saved_adapter(folder)
        model = str(Path(resolve_model_path(MODEL)).absolute())
        kinds = {"vllm": VLLMSampler(model), "torch": TorchSampler(model)}
        ways: dict[str, Callable[[], object]] = {}
        for name, sampler in kinds.items():
            ways[f"{name}_base"] = lambda sampler=sampler: sampler.sample(request, None)
            ways[f"{name}_adapter"] = lambda sampler=sampler: sampler.sample(request, adapter)
        seconds = alternated(ways, repeats)
    rates = {name: round(SAMPLES * DRAWN / median(each)) for name, each in seconds.items()}
    said(seconds, tokens_per_second=rates, threads=torch.get_num_threads())


def passes(repeats: int) -> None:
    """PEFT's rows with adapters of their own (`adapter_names`), with gradients for all of them."""
    import torch
    from torch.nn.functional import cross_entropy

    from backends import AdapterSpec, SharedBase
    from backends.create import load_hf_model

    ids = torch.randint(0, 49152, (4, 4, 65), generator=torch.Generator().manual_seed(0))
    base = SharedBase(load_hf_model(MODEL, attn_implementation="sdpa"), tempfile.gettempdir())
    inner = [base.create(f"m{i}", AdapterSpec(seed=i)).result(LIMIT_S).inner for i in range(4)]
    model: Any = base.model.eval()

    def read(rows: torch.Tensor, **how: Any) -> None:
        logits = model(input_ids=rows[:, :-1], use_cache=False, **how).logits
        cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum").backward()
        model.zero_grad(set_to_none=True)

    def one_each(count: int) -> None:
        for name, rows in zip(inner[:count], ids, strict=False):
            model.set_adapter(name)
            read(rows)

    def together(count: int) -> None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(any(f".{each}." in name for each in inner[:count]))
        read(ids[:count].flatten(0, 1), adapter_names=[name for name in inner[:count] for _ in range(4)])

    ways = {f"{way.__name__}_{count}": (lambda way=way, count=count: way(count))
            for count in (2, 4) for way in (one_each, together)}  # fmt: skip
    said(alternated(ways, repeats), threads=torch.get_num_threads())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = {each.__name__: each for each in (step, samples, start, passes)}
    parser.add_argument("what", choices=kinds)
    parser.add_argument("--repeats", type=int, default=7)
    given = parser.parse_args()
    kinds[given.what](given.repeats)

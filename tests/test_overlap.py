"""Generation in a process of its own: one batch behind, the same completions where the weights are, and no hang."""

import json
import multiprocessing
import os
import signal

import pandas
import pytest
import torch
from accelerate import Accelerator
from conftest import config_of, launch
from test_resume import succeed, weights

from rlt.generation import engine_process
from rlt.generation.engine_process import EngineProcess, limit_sends
from rlt.generation.vllm_engine import VLLMEngine
from rlt.models.embedded import embedded_model_path
from rlt.models.loading import load_policy, load_tokenizer
from rlt.planning.plan import make_plan


@pytest.fixture(scope="module")
def with_engine(tiny_run):
    return [o for o in tiny_run if not o.startswith("use_vllm")]


def completions(folder) -> list[list[str]]:
    return [pandas.read_parquet(path)["completion"].tolist() for path in sorted(folder.glob("completions/*.parquet"))]


@pytest.mark.slow
def test_batches_are_one_step_behind_and_a_killed_run_goes_on_with_them(with_engine, tmp_path):
    run = [*with_engine, "overlap_generation=true", "max_steps=3", "save_steps=1", "eval_size=0"]
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    succeed(launch("train.py", *run, f"output_dir={straight}"))
    logged = [json.loads(line) for line in (straight / "metrics.jsonl").read_text().splitlines()]
    assert [line["generation/staleness_steps"] for line in logged if "loss" in line] == [0, 1, 1]
    killed = launch("train.py", *run, f"output_dir={broken}", RLT_KILL_AT="backward:3")
    assert killed.returncode == -signal.SIGKILL
    succeed(launch("train.py", *run, f"output_dir={broken}"))
    assert len(completions(straight)) == 3
    assert completions(straight) == completions(broken)
    a, b = weights(straight), weights(broken)
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.slow
def test_it_writes_what_the_engine_in_process_does_and_its_end_is_no_hang():
    path = str(embedded_model_path())
    shared = {
        "model": load_policy(path),
        "accelerator": Accelerator(cpu=True),
        "processing_class": load_tokenizer(path),
        "engine_dtype": "float32",
        "max_model_length": 256,
        "max_num_seqs": 8,
        "max_completion_length": 200,
    }
    here, elsewhere = VLLMEngine(**shared), EngineProcess(**shared)
    prompts, seeds = [[504, 3575]] * 2 + [[28, 31, 30]], [1, 2, 3]
    written = []
    for engine in (here, elsewhere):
        engine.sync_weights()
        written.append(engine.generate_seeded(prompts, seeds, max_tokens=8)[0])
    assert written[0] == written[1]
    first, second = (elsewhere.submit(prompts, seeds, max_tokens=8) for _ in range(2))
    assert [elsewhere.collect(number)[0] for number in (second, first)] == [written[0]] * 2
    number = elsewhere.submit(prompts, seeds)
    os.kill(elsewhere._process.pid, signal.SIGSTOP)
    limit_sends(elsewhere._pipe, 1)
    with pytest.raises(TimeoutError, match="the engine's process has taken no request for"):
        elsewhere._send("x" * 2**22)  # more than a pipe holds
    os.kill(elsewhere._process.pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match="ended with exit code -9"):
        elsewhere.collect(number)
    elsewhere.close()
    assert not elsewhere._folder.exists()


class LikeOnAGPU:
    """What vLLM's executor does there first: it opens the port that the environment names, for one rank."""

    def __init__(self):
        torch.distributed.init_process_group("gloo", init_method="env://", rank=0, world_size=1)


def serve_like_on_a_gpu(pipe, folder) -> None:
    engine_process.LLM = LikeOnAGPU
    engine_process.serve(pipe, {}, 1, folder)


def test_an_engine_does_not_open_the_port_of_its_trainer(tmp_path, monkeypatch):
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve_like_on_a_gpu, args=(theirs, tmp_path / "weights"), daemon=True)
    process.start()
    theirs.close()
    try:
        assert ours.poll(120) and ours.recv() == (0, None)  # the engine is there
        ours.close()
        process.join(60)
        assert process.exitcode == 0
    finally:
        process.kill()


@pytest.mark.parametrize(
    "override", ["use_vllm=false", "vllm_enable_sleep_mode=true", "vllm_importance_sampling_correction=false"]
)
def test_what_overlap_cannot_work_with_is_refused(override):
    with pytest.raises(ValueError, match=f"overlap_generation=true .*{override.partition('=')[0]}"):
        make_plan(config_of("overlap_generation=true", override))

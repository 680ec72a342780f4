"""Many processes behind one object: the numbers of one process, plain data between them, and an end for all."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from conftest import ROOT
from test_backends_sharded import assert_same_outputs, assert_same_weights, plain, step_both

from backends import (
    AdamParams,
    Datum,
    RanksLost,
    TrainingBackend,
    TrainingService,
    create_pytorch_backend,
    create_ray_backend,
)
from backends.protocol import ForwardOutput, StepOutput
from rlt.errors import Refused
from rlt.worker_groups.journal import MOST_STEPS, Journal
from rlt.worker_groups.messages import pack, unpack
from rlt.worker_groups.sampling import Sampler

LIMIT_S = 240
LOST_WITHIN_S = 60
STEPS = 5
PARAMS = AdamParams(learning_rate=1e-3)


def data(step: int, count: int = 4) -> list[Datum]:
    own = torch.Generator().manual_seed(step)
    rows = [torch.randint(1000, (8 + number,), generator=own) for number in range(count)]
    return [Datum(row[:-1].tolist(), {"target_tokens": row[1:]}) for row in rows]


def test_messages_are_plain_data_and_come_back_as_they_were():
    batch = data(0) + [Datum([1], {"target_tokens": torch.ones(1, 2, dtype=torch.long), "w": torch.tensor([0.5])})]
    values = [
        batch,
        {"a:sum": float("inf"), "b": None},
        Path("x/y"),
        AdamParams(1e-3),
        StepOutput(1.5, 0.1, 3),
        ForwardOutput([torch.zeros(0), torch.ones(2)], [], {"loss:sum": -1.0}),
        {"tensor": {"map": [True, "ä"]}, "bf16": torch.ones(2, 2, dtype=torch.bfloat16).T},
    ]
    back = unpack(pack(values))
    assert pack(back) == pack(values) and b"pickle" not in pack(values)
    assert back[0][4].loss_inputs["target_tokens"].shape == (1, 2) and back[2] == Path("x/y")
    with pytest.raises(Refused, match="the function <lambda> cannot be sent to other processes"):
        pack(["forward", batch, lambda *given: given])
    with pytest.raises(Refused, match="object cannot be sent"):
        pack(object())


def test_a_journal_has_what_was_asked_since_the_last_state():
    journal = Journal()
    journal.note("forward_backward", ([],), b"fb", None)
    journal.note(
        "save_state", (None, True, False), b"s", Path("runs/mid")
    )  # amid accumulation: gradients are not in it
    journal.note("optim_step", (None,), b"st", None)
    assert journal.to_repeat() == [b"fb", b"st"] and not journal.is_long()
    journal.note("save_state", (None, False, False), b"s", Path("runs/bare"))
    journal.note("save_state", (None, True, False), b"s", Path("runs/a"))
    assert journal.to_repeat() == [pack(["load_state", Path("runs/a"), True])]
    journal.note("forward", ([],), b"f", None)
    for _ in range(MOST_STEPS):
        journal.note("forward_backward", ([],), b"fb", None)
        assert not journal.is_long()
        journal.note("optim_step", (None,), b"st", None)
    assert journal.is_long() and (journal.next_name(), journal.next_name()) == ("recovery_1", "recovery_0")


def test_what_cannot_be_is_refused_before_anything_starts():
    for options, said in (
        ({"backend": "horovod"}, "backend='horovod' is not known: fsdp, deepspeed, pytorch, ray would do"),
        ({"sharding": "x"}, "sharding='x' is not known"),
        ({"procs": 0}, "procs=0: a whole number of 1 or more"),
        ({"resources": {}}, "resources are those of backend='ray'"),
        ({"backend": "ray", "resources": {"eval": {}}}, "resources of 'eval': train and sample would do"),
    ):
        with pytest.raises(Refused, match=said):
            TrainingService.options(**options).as_service(model_name="embedded/smollm2-135m-instruct")
    with pytest.raises(Refused, match="a service has no option 'proc': procs, backend"):
        TrainingService.options(proc=2)
    with pytest.raises(Refused, match="arguments of a service are numbers and texts"):
        TrainingService.options().as_service(model_name="x", dtype=torch.float32)


def begin(model: str, folder: Path, backend: str, **options) -> TrainingService:
    options = TrainingService.options(procs=2, backend=backend, limit_s=LIMIT_S, **options)
    return options.as_service(model_name=model, checkpoint_dir=folder, learning_rate=1e-3).result(LIMIT_S)


def processes_of(service: TrainingService) -> list[psutil.Process]:
    return psutil.Process(service.group.launcher.pid).children(recursive=True)


def ranks_of(service: TrainingService) -> list[psutil.Process]:
    return [process for process in processes_of(service) if "rlt.worker_groups.rank" in process.cmdline()]


def assert_all_gone(processes: list[psutil.Process], folder: Path) -> None:
    assert psutil.wait_procs(processes, 10)[1] == []
    assert not folder.exists()


def test_a_service_has_the_numbers_of_one_process_and_ends_with_a_rank(tiny_teacher, tmp_path):
    """Plain data parallel, two processes; then one of them is killed."""
    one = create_pytorch_backend(tiny_teacher, tmp_path, learning_rate=1e-3, device="cpu")

    async def from_a_loop():
        options = TrainingService.options(procs=2, backend="pytorch", limit_s=LIMIT_S)
        service = await options.as_service(model_name=tiny_teacher, checkpoint_dir=tmp_path, learning_rate=1e-3)
        return service, await service.forward_backward(data(0)).result()

    service, output = asyncio.run(from_a_loop())
    assert isinstance(service, TrainingBackend)
    assert_same_outputs(one.forward_backward(data(0)).result(LIMIT_S), output)
    pairs = [backend.forward_backward(plain()).result(LIMIT_S) for backend in (one, service)]
    assert_same_outputs(*pairs)
    step_both(one, service, 1e-4)
    with pytest.raises(Refused, match="loss_fn='nothing' is not known"):
        service.forward(data(1), "nothing").result(LIMIT_S)
    assert service.save_state().result(LIMIT_S) == tmp_path / "step_0001"
    one.load_state("step_0001").result(LIMIT_S)
    for backend in (one, service):
        backend.forward_backward(data(1)).result(LIMIT_S)
    step_both(one, service, 1e-4)
    assert service.load_state("step_0001").result(LIMIT_S) == 1
    service.load_weights(one.get_weights().result(LIMIT_S)).result(LIMIT_S)
    assert_same_weights(one, service, 0)
    whoever, folder = processes_of(service), service.group.folder
    ranks_of(service)[1].kill()
    pending = [service.forward_backward(data(1)), service.optim_step(), service.get_weights()]
    begun = time.monotonic()
    for future in pending:
        with pytest.raises(RanksLost, match="rank 1 ended first, with signal SIGKILL|have ended"):
            future.result(LOST_WITHIN_S)
    assert time.monotonic() - begun < LOST_WITHIN_S
    assert_all_gone(whoever, folder)
    service.close()


@pytest.mark.slow
def test_a_rank_that_is_held_counts_as_lost_and_a_model_that_is_not_there_is_refused(tiny_teacher, tmp_path):
    with pytest.raises(Refused, match="embedded/nothing is not an embedded model"):
        begin("embedded/nothing", tmp_path, "pytorch")
    service = begin(tiny_teacher, tmp_path, "pytorch")
    with pytest.raises(Refused, match="the function .* cannot be sent to other processes"):
        service.forward(data(0), lambda data_, log_probs: log_probs[0].sum()).result(LIMIT_S)
    with pytest.raises(Refused, match="has no sampler"):
        service.sample([1]).result(LIMIT_S)
    whoever, folder = processes_of(service), service.group.folder
    ranks_of(service)[1].suspend()
    with pytest.raises(RanksLost, match="a rank of this service was lost"):
        service.forward_backward(data(1)).result(LOST_WITHIN_S)
    assert_all_gone(whoever, folder)
    service.close()


@pytest.mark.slow
def test_ranks_that_are_lost_are_started_anew_and_the_run_ends_as_the_undisturbed(tiny_teacher, tmp_path, monkeypatch):
    """From a state that the service has saved on its own account."""
    one = create_pytorch_backend(tiny_teacher, tmp_path, learning_rate=1e-3, device="cpu")
    monkeypatch.setattr("rlt.worker_groups.journal.MOST_STEPS", 2)
    with begin(tiny_teacher, tmp_path, "fsdp", restarts=1) as service:
        for step in range(STEPS):
            for backend in (one, service):
                backend.forward_backward(data(step)).result(LIMIT_S)
            if step == 3:
                ranks_of(service)[0].send_signal(signal.SIGKILL)
            step_both(one, service, 1e-4)
        assert service.restarts_left == 0 and service.journal.state == tmp_path / "recovery_1"
        whoever, folder = processes_of(service), service.group.folder
    assert_all_gone(whoever, folder)
    assert list(tmp_path.iterdir()) == []


PARENT = """
import sys, time
from backends import TrainingService
service = TrainingService.options(procs=2, backend="pytorch").as_service(sys.argv[1], sys.argv[2]).result(200)
sys.stdout.write(f"{service.group.folder}\\n"); sys.stdout.flush()
time.sleep(600)
"""


@pytest.mark.slow
def test_ranks_end_with_the_service_however_it_ends(tiny_teacher, tmp_path):
    command = [sys.executable, "-c", PARENT, tiny_teacher, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=dict(os.environ)) as parent:
        folder = Path(parent.stdout.readline().strip())
        whoever = psutil.Process(parent.pid).children(recursive=True)
        assert len([p for p in whoever if "rlt.worker_groups.rank" in p.cmdline()]) == 2
        parent.kill()
    assert psutil.wait_procs(whoever, 20)[1] == []
    assert not folder.exists()


def test_completions_have_the_log_probs_that_training_has_and_stop_at_the_end(tiny_teacher, tmp_path):
    sampler, prompt = Sampler(tiny_teacher, device="cpu"), [3, 14, 15]
    first, again, other = (sampler.sample(prompt, 3, 8, 1.0, seed) for seed in (1, 1, 2))
    assert first == again != other and {len(one.tokens) for one in first} == {8}
    backend = create_pytorch_backend(tiny_teacher, tmp_path, device="cpu")
    rows = [prompt + one.tokens for one in first]
    read = [Datum(row[:-1], {"target_tokens": torch.tensor(row[1:])}) for row in rows]
    for one, values in zip(first, backend.forward(read).result(LIMIT_S).logprobs, strict=True):
        assert values[2:].tolist() == pytest.approx(one.logprobs, abs=1e-5)
    sampler.ends = {first[0].tokens[2]}
    assert sampler.sample(prompt, 3, 8, 1.0, 1)[0].tokens == first[0].tokens[:3]
    with pytest.raises(Refused, match="a temperature above 0 would do"):
        sampler.sample(prompt, temperature=0)


@pytest.fixture
def one_machine_ray(tmp_path):
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, object_store_memory=100 * 2**20, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def train(backend) -> tuple[list[float], dict[str, torch.Tensor]]:
    losses = []
    for step in range(STEPS):
        metrics = backend.forward_backward(data(step)).result(LIMIT_S).metrics
        losses.append(metrics["loss:sum"] / metrics["tokens:sum"])
        backend.optim_step(PARAMS).result(LIMIT_S)
    found = backend.get_weights().result(LIMIT_S)
    backend.close()
    return losses, found


@pytest.mark.slow
def test_pytorch_fsdp2_zero3_and_ray_agree_over_five_steps(tiny_teacher, tmp_path, one_machine_ray):
    losses, weights = train(create_pytorch_backend(tiny_teacher, tmp_path, learning_rate=1e-3, device="cpu"))
    others = {
        "fsdp": lambda: begin(tiny_teacher, tmp_path, "fsdp"),
        "deepspeed": lambda: begin(tiny_teacher, tmp_path, "deepspeed"),
        "ray": lambda: create_ray_backend(tiny_teacher, tmp_path, workers=2, learning_rate=1e-3, limit_s=LIMIT_S),
    }
    for name, make in others.items():
        its_losses, its_weights = train(make())
        assert its_losses == pytest.approx(losses, rel=0, abs=1e-4), name
        for key, value in weights.items():
            torch.testing.assert_close(its_weights[key], value, rtol=0, atol=1e-4, msg=f"{name}: {key}")


@pytest.mark.slow
def test_ray_samples_beside_training_with_the_newest_weights(tiny_teacher, tmp_path, one_machine_ray):
    resources = {"train": {"CPU": 1}, "sample": {"CPU": 1}}
    options = TrainingService.options(backend="ray", resources=resources, limit_s=LIMIT_S)
    with options.as_service(tiny_teacher, tmp_path, learning_rate=1e-2).result(LIMIT_S) as service:
        drawn = [service.sample([3, 14], 2, 6, seed=5).result(LIMIT_S)]
        service.forward_backward(data(0)).result(LIMIT_S)
        service.optim_step().result(LIMIT_S)
        drawn.append(service.sample([3, 14], 2, 6, seed=5).result(LIMIT_S))
        own = Sampler(tiny_teacher, device="cpu")
        assert own.sample([3, 14], 2, 6, seed=5) == drawn[0] != drawn[1]
        own.load_weights(service.get_weights().result(LIMIT_S))
        assert own.sample([3, 14], 2, 6, seed=5) == drawn[1]
        with pytest.raises(Refused, match="a temperature above 0"):
            service.sample([3], temperature=-1.0).result(LIMIT_S)


@pytest.mark.slow
def test_a_node_of_ray_is_killed_and_the_run_ends_as_the_undisturbed(tiny_teacher, tmp_path):
    """Two nodes with room for one rank each; one is killed amid the run, and another comes in its place."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": 100 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    second = cluster.add_node(**node)
    one = create_pytorch_backend(tiny_teacher, tmp_path, learning_rate=1e-3, device="cpu")
    try:
        ray.init(address=cluster.address, log_to_driver=False)
        service = create_ray_backend(tiny_teacher, tmp_path, workers=2, learning_rate=1e-3, limit_s=LIMIT_S)
        for step in range(STEPS):
            for backend in (one, service):
                backend.forward_backward(data(step)).result(LIMIT_S)
            if step == 3:
                cluster.remove_node(second, allow_graceful=False)
                cluster.add_node(**node)
            step_both(one, service, 1e-4)
            if step == 1:
                service.save_state().result(LIMIT_S)
        assert service.restarts_left == 2 and service.journal.state == tmp_path / "step_0002"
        service.close()
    finally:
        ray.shutdown()
        cluster.shutdown()

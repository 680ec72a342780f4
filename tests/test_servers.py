"""Servers as a run has them: the same completions as in process, new weights that agree, and a death in between."""

import json
import os
import signal
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import pytest
import requests
import torch
from accelerate import Accelerator
from conftest import ROOT, config_of, launch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from test_distillation import SMALL as SMALL_DISTILLATION
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlt.generation.served.adapters import adapted_weights
from rlt.generation.served.client import Server, ServerError
from rlt.generation.served.engine import ServerEngine
from rlt.generation.served.vllm_server import socket_folder
from rlt.generation.served.weight_files import ChunkFiles, checksum, read_chunk
from rlt.generation.served.weight_service import WeightService
from rlt.generation.vllm_engine import VLLMEngine
from rlt.launching.servers import Servers

PROMPTS = [[100, 200, 300, 400]] * 3 + [[500, 600]] * 2
SEEDS = [11, 12, 13, 7, 8]
# In each process of a server: as a deadlock, it takes the main thread for as long as the process lives.
STANDS_STILL = """
import signal, time
signal.signal(signal.SIGUSR2, lambda *_: time.sleep(10_000))
"""


def engine_of(kind, path: str, **options):
    return kind(
        model=AutoModelForCausalLM.from_pretrained(path),
        accelerator=Accelerator(cpu=True),
        processing_class=AutoTokenizer.from_pretrained(path),
        mode="colocate",
        engine_dtype="float32",
        max_model_length=64,
        max_num_seqs=8,
        temperature=0.7,
        top_k=0,
        max_completion_length=12,
        generation_kwargs={},
        **options,
    )


@pytest.fixture(scope="module")
def server(tiny_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        config = config_of(*tiny_run, "use_vllm=true", "max_prompt_length=48", "weight_transfer=files")
        (folder / "plan.json").write_text(json.dumps({"config": config}))
        (folder / "sitecustomize.py").write_text(STANDS_STILL)
        patch.setenv("PYTHONPATH", str(folder))
        servers = Servers([""], 1, folder, folder / "plan.json")
        patch.setenv("RLT_SERVER_KEY", servers.key)
        servers.start()
        try:
            yield servers
        finally:
            servers.close()
    assert servers.processes[0].returncode is not None


@pytest.fixture(scope="module")
def served(server, tiny_teacher):
    return engine_of(ServerEngine, tiny_teacher, urls=server.urls, start_limit_s=300)


def test_completions_are_those_of_the_engine_in_process_also_after_new_weights(served, tiny_teacher):
    inside = engine_of(VLLMEngine, tiny_teacher)
    inside.model = served.model
    for _ in range(2):
        for engine in (served, inside):
            engine.sync_weights()
        (ours, our_values), (theirs, their_values) = (e.generate_seeded(PROMPTS, SEEDS) for e in (served, inside))
        assert ours == theirs
        for a, b in zip(our_values, their_values, strict=True):
            assert a == pytest.approx(b, abs=2e-4)
        ours, theirs = (e.next_token_log_probs(PROMPTS, SEEDS) for e in (served, inside))
        assert ours == pytest.approx(theirs, abs=2e-4)
        with torch.no_grad():
            for parameter in served.model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.05)


def test_of_an_adapter_only_the_factors_travel(served, server, tiny_teacher, monkeypatch):
    running = server.processes[0].pid
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    policy = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_teacher), config)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    inside = engine_of(VLLMEngine, tiny_teacher)
    plain = inside.generate_seeded(PROMPTS, SEEDS)
    monkeypatch.setattr(served, "model", policy)
    inside.model = policy
    for engine in (served, inside):
        engine.sync_weights()
    sent = {tensor["name"] for update in served.service.updates for tensor in update.tensors}
    assert sent and all(name.endswith((".lora_A", ".lora_B")) for name in sent)
    (ours, our_values), (theirs, their_values) = (e.generate_seeded(PROMPTS, SEEDS) for e in (served, inside))
    assert ours == theirs != plain[0]
    monkeypatch.setattr(policy.get_base_model(), "name_or_path", "another/model")
    with pytest.raises(RuntimeError, match="500"):
        served.sync_weights()
    with pytest.raises(RuntimeError, match="of the weights"):  # it has those from before, and writes nothing
        served._ask_server(served.servers[0], lambda one: one.complete(PROMPTS[0], 1, 3, served._sampling(4)))
    monkeypatch.setattr(policy.get_base_model(), "name_or_path", tiny_teacher)
    served.sync_weights()
    assert served.generate_seeded(PROMPTS, SEEDS)[0] == ours
    assert server.processes[0].pid == running
    for a, b in zip(our_values, their_values, strict=True):
        assert a == pytest.approx(b, abs=2e-4)


@pytest.mark.slow
def test_a_server_that_is_killed_comes_back_with_the_weights_and_answers(served, server):
    served.sync_weights()
    before = served.generate_seeded(PROMPTS, SEEDS)
    killed = server.processes[0]
    os.kill(killed.pid, signal.SIGKILL)
    assert served.generate_seeded(PROMPTS, SEEDS) == before
    assert server.processes[0].pid != killed.pid


@pytest.mark.slow
@pytest.mark.parametrize(
    "stop",
    [lambda engine: engine.suspend(), lambda engine: engine.send_signal(signal.SIGUSR2)],
    ids=["held", "in a deadlock"],
)
def test_a_server_that_hangs_is_replaced(stop, served, server, monkeypatch):
    """Its engine stands still, while vLLM's HTTP side answers on."""
    monkeypatch.setattr("rlt.launching.servers.HUNG_S", 3)
    before = served.generate_seeded(PROMPTS, SEEDS)
    held = server.processes[0]
    (engine,) = (p for p in psutil.Process(held.pid).children() if "EngineCore" in p.name())
    stop(engine)
    assert served.generate_seeded(PROMPTS, SEEDS) == before
    assert server.processes[0].pid != held.pid


def test_requests_that_meet_new_weights_are_asked_again_and_end_no_engine(served, server):
    """Two clients ask without a pause while weights come ten times; what they are answered is of one version."""
    running, stop, met = server.processes[0].pid, threading.Event(), []

    def ask_on() -> None:
        client = Server(server.urls[0])
        while not stop.is_set():
            try:
                client.complete(PROMPTS[0], 2, 3, {**served._sampling(24), "ignore_eos": True})
            except ServerError as error:
                met.append(str(error))

    clients = [threading.Thread(target=ask_on) for _ in range(2)]
    for client in clients:
        client.start()
    try:
        for _ in range(10):
            served.sync_weights()
    finally:
        stop.set()
        for client in clients:
            client.join(60)
    assert server.processes[0].pid == running
    assert met and all("was given other weights meanwhile" in words for words in met)
    served.sync_weights()
    assert served.generate_seeded(PROMPTS, SEEDS) == served.generate_seeded(PROMPTS, SEEDS)


def test_nothing_but_the_health_check_is_open_without_the_key(served, server):
    url = server.urls[0]
    assert requests.get(f"{url}/health", timeout=10).status_code == 200
    for path in ("/weight_info", "/v1/models"):
        assert requests.get(url + path, timeout=10).status_code == 401
    for path in ("/start_weight_update", "/end"):
        assert requests.post(url + path, json={}, timeout=10).status_code == 401
    assert requests.get(f"{url}/health", timeout=10).status_code == 200


def test_a_completion_of_other_weights_is_refused(served):
    served.number += 1
    server = served.servers[0]
    with pytest.raises(RuntimeError, match="of the weights"):
        served._ask_server(server, lambda one: one.complete(PROMPTS[0], 1, 3, served._sampling(4)))
    served.number -= 1


def test_chunks_carry_all_weights_and_their_sums(tmp_path, monkeypatch):
    monkeypatch.setattr("rlt.generation.served.weight_files.CHUNK_BYTES", 128)
    weights = {f"w{i}": torch.arange(10, dtype=torch.float32) + i for i in range(5)}  # 40 bytes each, padded to 64
    tied = {**weights, "w5": weights["w4"]}
    files = ChunkFiles(tmp_path)
    for _ in range(2):  # the same files again
        updates = list(files.write(iter(tied.items()), torch.float32))
        assert [len(update.tensors) for update in updates] == [2, 2, 2]
        assert [update.size for update in updates] == [128, 128, 64]
        last = read_chunk(updates[-1])
        assert [tensor["offset"] for tensor in updates[-1].tensors] == [0, 0]
        torch.testing.assert_close(last[:40].view(torch.float32), weights["w4"])
    assert checksum(torch.tensor([1, 2, 3]).view(torch.uint8)) == 6
    (tmp_path / "0.chunk").write_bytes(bytes(128))
    with pytest.raises(ValueError, match="sum to 0, sent were"):
        read_chunk(updates[0])


def test_an_adapter_is_added_before_anything_is_rounded(tmp_path):
    """1.0078125 + 0.0039 is nearer to 1.0078125 than to the next number of bfloat16; 0.0039, rounded by itself, is half
    a step."""
    weight = torch.tensor([[1.0078125]], dtype=torch.bfloat16)
    save_file({"layer.weight": weight}, tmp_path / "model.safetensors")
    factors = {"layer.lora_A": torch.tensor([[1.0]]), "layer.lora_B": torch.tensor([[0.0039]])}
    assert dict(adapted_weights(str(tmp_path), factors)) == {"layer.weight": weight}
    assert (weight + factors["layer.lora_B"].bfloat16()).item() == 1.015625


def test_strangers_that_say_nothing_are_sent_away_and_weights_go_on(tmp_path, monkeypatch):
    monkeypatch.setattr("rlt.generation.served.weight_service.Handler.timeout", 0.5)
    service = WeightService([], tmp_path, None, 1.0)
    try:
        place = service.http.server_address
        assert place[0] == "127.0.0.1"  # where nobody else is to fetch them
        strangers = [socket.create_connection(place, 10) for _ in range(20)]
        assert requests.get(f"{service.url}/0.chunk", timeout=10).status_code in (401, 404)
        assert [stranger.recv(1) for stranger in strangers] == [b""] * 20
    finally:
        service.close()


def test_sockets_stand_in_a_launchers_folder_unless_its_name_is_too_long(tmp_path):
    assert socket_folder(Path("/tmp/rlt-launch-x")) == "/tmp/rlt-launch-x"
    assert socket_folder(Path("/scratch/" + "x" * 100)) == "/tmp"


def test_chunks_are_fetched_with_the_key_where_memory_is_not_shared(tmp_path, monkeypatch):
    monkeypatch.setenv("RLT_SERVER_KEY", "right")
    service = WeightService([], tmp_path, "127.0.0.1", 1.0)
    weights = torch.arange(10, dtype=torch.float32)
    service.updates = list(service.chunks.write(iter([("w", weights)]), torch.float32))
    away = replace(service.updates[0], source=f"{service.url}/0.chunk")
    try:
        torch.testing.assert_close(read_chunk(away)[:40].view(torch.float32), weights)
        with pytest.raises(requests.HTTPError, match="404"):
            read_chunk(replace(away, source=f"{service.url}/1.chunk"))
        monkeypatch.setattr("rlt.generation.served.weight_files.KEY_VARIABLE", "NO_SUCH_VARIABLE")
        with pytest.raises(requests.HTTPError, match="401"):
            read_chunk(away)
    finally:
        service.close()


@pytest.fixture
def shared_memory() -> Iterator[str]:
    """A folder of this test alone: others run beside it."""
    with TemporaryDirectory(dir="/dev/shm") as folder:  # a short path, as sockets need it
        yield folder


@pytest.mark.slow
@pytest.mark.parametrize("trains", ["a teacher", "a student on its own samples"])
def test_a_run_with_a_server_is_the_run_with_its_engine_in_process(
    trains, tiny_run, tiny_teacher, tiny_student, tmp_path, shared_memory
):
    on_its_own = [*SMALL_DISTILLATION, f"model_name_or_path={tiny_student}", f"teacher_model={tiny_teacher}"]
    run = [*(tiny_run if trains == "a teacher" else on_its_own), "use_vllm=true", "max_steps=3", "eval_size=2"]
    run += ["report_to=null", "save_steps=100"]
    found = {}
    for name, start in {"inside": ("train.py",), "served": ("launch.py", "--servers=1", "1")}.items():
        script, *first = start
        done = launch(script, *first, *run, f"output_dir={tmp_path / name}", TMPDIR=shared_memory)
        assert done.returncode == 0, done.stderr[-3000:]
        records = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        found[name] = [(r["loss"], r["completions/mean_length"]) for r in records if "loss" in r]
    assert len(found["served"]) == 3
    for (ours, length), (theirs, expected_length) in zip(found["served"], found["inside"], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)
        assert length == expected_length
    assert not list(Path(shared_memory).glob("rlt-weights-*"))

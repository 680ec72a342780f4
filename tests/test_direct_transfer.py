"""Weights from device to device: vLLM's own NCCL transfer with a real server, over sockets instead of NCCL's wire.

What is not run here is NCCL itself, and `ipc`, whose trainer asks for a GPU as it is made.
"""

import base64
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import nccl_by_sockets
import psutil
import pytest
import torch
from conftest import ROOT, config_of, launch
from peft import LoraConfig, get_peft_model
from test_servers import PROMPTS, SEEDS, engine_of
from transformers import AutoModelForCausalLM
from vllm.distributed.weight_transfer.base import VLLMWeightSyncClient
from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferUpdateInfo

from rlt.errors import Refused
from rlt.generation.served import client
from rlt.generation.served.direct import Abort, PolicySource, ServerGroup, as_json
from rlt.generation.served.direct_engine import DirectEngine
from rlt.generation.served.engine import ServerEngine
from rlt.generation.served.weight_files import ChunkFiles
from rlt.generation.vllm_engine import VLLMEngine
from rlt.launching.servers import Servers

pytestmark = pytest.mark.timeout(600)
START_LIMIT_S = 240


@pytest.fixture(scope="module")
def server(tiny_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        found = os.environ.get("PYTHONPATH", "")
        patch.setenv("PYTHONPATH", f"{nccl_by_sockets.plugin_folder(folder / 'plugin')}:{found}")
        config = {**config_of(*tiny_run, "use_vllm=true"), "weight_transfer": "nccl"}
        (folder / "plan.json").write_text(json.dumps({"config": config}))
        servers = Servers([""], 1, folder, folder / "plan.json")
        patch.setenv("RLT_SERVER_KEY", servers.key)
        patch.setattr("rlt.launching.servers.RESTARTS", 9)
        servers.start()
        nccl_by_sockets.install()
        try:
            yield servers
        finally:
            servers.close()


@pytest.fixture(scope="module")
def direct(server, tiny_teacher):
    return engine_of(DirectEngine, tiny_teacher, urls=server.urls, start_limit_s=START_LIMIT_S, weight_transfer="nccl")


def digest(engine) -> str:
    """Of all weights as the server computes with them."""
    (found,) = engine.servers[0].ask("POST", "/collective_rpc", {"method": "digest"}, 60)["results"]
    return found


def send_files(engine, folder) -> None:
    """The same weights as the way through files has them."""
    updates = ChunkFiles(folder).write(engine._iter_engine_params(), engine._dtype())
    engine.servers[0].ask(
        "POST", "/collective_rpc", {"method": "by_files", "args": [[asdict(update) for update in updates]]}, 60
    )


def kill_once_it_has_weights(server, pid: int, version: str) -> None:
    give_up = time.monotonic() + START_LIMIT_S
    while server.version() == version and time.monotonic() < give_up:
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)


def shift(model) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)


@pytest.fixture(scope="module")
def inside(tiny_teacher):
    return engine_of(VLLMEngine, tiny_teacher)


@pytest.mark.slow
@pytest.mark.parametrize(("sharding", "loses_its_server"), [("fsdp", False), ("zero3", True)])
def test_a_run_of_two_processes_whose_weights_are_in_shards_is_the_run_with_engines_in_process(
    server, tiny_run, tmp_path, sharding, loses_its_server
):
    """Also where its server is killed right behind the first weights, and both ranks have to send them again.

    It stands before all that ask for `direct`, which holds the server to the end.
    """
    run = [*tiny_run, "use_vllm=true", "max_steps=2", "eval_size=2", "report_to=null"]
    served = ["use_vllm_server=true", f"vllm_server_base_url={server.urls[0]}", "weight_transfer=nccl"]
    one, first = client.Server(server.urls[0]), server.processes[0]
    one.wait_until_ready(START_LIMIT_S)
    if loses_its_server:
        threading.Thread(target=kill_once_it_has_weights, args=(one, first.pid, one.version()), daemon=True).start()
    found = {}
    for name, (script, more) in {"inside": ("launch.py", []), "served": ("tests/nccl_launch.py", served)}.items():
        done = launch(script, "2", sharding, *run, *more, f"output_dir={tmp_path / name}")
        assert done.returncode == 0, done.stderr[-3000:]
        records = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        found[name] = [(r["loss"], r["completions/mean_length"]) for r in records if "loss" in r]
    assert len(found["served"]) == 2
    assert (server.processes[0] is not first) == loses_its_server
    for (ours, length), (theirs, expected_length) in zip(found["served"], found["inside"], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)
        assert length == expected_length


@pytest.mark.slow
def test_completions_are_those_of_the_engine_in_process_also_after_new_weights(direct, inside, monkeypatch):
    monkeypatch.setattr(inside, "model", direct.model)
    for _ in range(2):
        for engine in (direct, inside):
            engine.sync_weights()
        (ours, our_values), (theirs, their_values) = (e.generate_seeded(PROMPTS, SEEDS) for e in (direct, inside))
        assert ours == theirs
        for a, b in zip(our_values, their_values, strict=True):
            assert a == pytest.approx(b, abs=2e-4)
        ours, theirs = (e.next_token_log_probs(PROMPTS, SEEDS) for e in (direct, inside))
        assert ours == pytest.approx(theirs, abs=2e-4)
        shift(direct.model)


@pytest.mark.slow
def test_the_server_has_bit_for_bit_what_files_bring_it(direct, tmp_path):
    direct.sync_weights()
    by_sockets = digest(direct)
    completions = direct.generate_seeded(PROMPTS, SEEDS)
    same = {name: value.clone() for name, value in direct.model.state_dict().items()}
    shift(direct.model)
    send_files(direct, tmp_path)
    assert digest(direct) != by_sockets
    direct.model.load_state_dict(same)
    send_files(direct, tmp_path)
    assert digest(direct) == by_sockets
    assert direct.generate_seeded(PROMPTS, SEEDS) == completions


@pytest.mark.slow
@pytest.mark.parametrize("packed", [True, False])
def test_packed_and_tensor_by_tensor_are_the_same(direct, monkeypatch, packed):
    direct.sync_weights()
    before = digest(direct)
    for way in (packed, True):
        direct.servers[0].ask("POST", "/collective_rpc", {"method": "pack", "args": [way]}, 60)
        monkeypatch.setattr(direct.transfer, "packed", way)
        direct.sync_weights()
        assert digest(direct) == before


@pytest.mark.slow
def test_an_adapter_is_merged_on_the_way_and_the_base_stays(direct, inside, tiny_teacher, monkeypatch):
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    policy = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_teacher), config)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    plain = inside.generate_seeded(PROMPTS, SEEDS)
    monkeypatch.setattr(direct, "model", policy)
    monkeypatch.setattr(direct.source, "_metadata", [])  # another policy's order
    monkeypatch.setattr(inside, "model", policy)
    for engine in (direct, inside):
        engine.sync_weights()
    assert direct.generate_seeded(PROMPTS, SEEDS)[0] == inside.generate_seeded(PROMPTS, SEEDS)[0] != plain[0]
    assert all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())


@pytest.mark.slow
def test_a_server_that_was_killed_meets_the_trainer_anew_and_answers(direct, server):
    direct.sync_weights()
    before, weights, met = direct.generate_seeded(PROMPTS, SEEDS), digest(direct), direct.transfer
    killed = server.processes[0]
    os.kill(killed.pid, signal.SIGKILL)
    assert direct.generate_seeded(PROMPTS, SEEDS) == before
    assert server.processes[0].pid != killed.pid
    assert direct.transfer is not met
    assert digest(direct) == weights


def restarts(caplog) -> int:
    return sum("is started again" in record.getMessage() for record in caplog.records)


def during(direct, monkeypatch, act) -> list[int]:
    """`act` is done once, while weights are on their way; how often they were sent."""
    weights, passes = direct.source.weights, []

    def interrupted():
        passes.append(0)
        for number, pair in enumerate(weights()):
            if len(passes) == 1 and number == 3:
                act()
            yield pair

    monkeypatch.setattr(direct.source, "weights", interrupted)
    return passes


@pytest.mark.slow
def test_a_server_that_dies_in_the_middle_of_a_transfer_is_replaced_and_gets_it_whole(
    direct, server, monkeypatch, caplog
):
    direct.sync_weights()
    shift(direct.model)
    killed = server.processes[0]
    passes = during(direct, monkeypatch, lambda: os.kill(killed.pid, signal.SIGKILL))
    caplog.clear()
    direct.sync_weights()
    assert server.processes[0].pid != killed.pid and len(passes) == 2
    weights = digest(direct)
    direct.sync_weights()
    assert digest(direct) == weights and len(passes) == 3
    assert restarts(caplog) == 1


@pytest.mark.slow
def test_a_server_in_which_a_lost_trainer_left_a_transfer_is_replaced(direct, server, monkeypatch):
    """It waits for weights that nobody sends, and the next trainer finds it so."""
    monkeypatch.setattr("rlt.generation.served.direct.CONTROL_LIMIT_S", 5)
    direct.sync_weights()
    weights, left = digest(direct), server.processes[0]
    lost = client.Server(server.urls[0])
    lost.begin_update()
    update = {"names": ["lm_head.weight"], "dtype_names": ["float32"], "shapes": [[1, 1]]}
    with pytest.raises(client.ServerError):
        lost.control("/update_weights", {"update_info": update}, 2)
    monkeypatch.setattr(direct, "transfer", None)
    direct.sync_weights()
    assert server.processes[0] is not left
    assert digest(direct) == weights


@pytest.mark.slow
def test_a_server_that_stands_still_in_a_transfer_is_given_up_at_its_limit(direct, server, monkeypatch, caplog):
    """Nothing comes from it, and the sender is blocked: the call's limit ends both, and another takes its place."""
    direct.sync_weights()
    monkeypatch.setattr(client, "UPDATE_LIMIT_S", 15)
    held = server.processes[0]
    (engine,) = (p for p in psutil.Process(held.pid).children() if "EngineCore" in p.name())
    passes = during(direct, monkeypatch, engine.suspend)
    caplog.clear()
    began = time.monotonic()
    direct.sync_weights()
    assert server.processes[0].pid != held.pid and len(passes) == 2
    assert time.monotonic() - began < START_LIMIT_S
    assert direct.generate_seeded(PROMPTS, SEEDS) == direct.generate_seeded(PROMPTS, SEEDS)
    assert restarts(caplog) == 1


@pytest.mark.slow
def test_what_a_server_was_not_started_for_is_refused(direct, tiny_teacher):
    with pytest.raises(Refused, match="takes weights by nccl, and this run sends them by files"):
        engine_of(ServerEngine, tiny_teacher, urls=[direct.servers[0].url], start_limit_s=10)


@pytest.mark.slow
def test_the_servers_are_a_client_as_vllm_asks_for_one(direct):
    assert isinstance(direct.group, VLLMWeightSyncClient)


def test_workers_of_several_servers_are_numbered_one_behind_the_other(monkeypatch):
    asked = []
    servers = [client.Server(f"http://127.0.0.1:{port}") for port in (1, 2, 3)]
    monkeypatch.setattr(ServerGroup, "workers", lambda self: [2, 1, 4])
    monkeypatch.setattr(client.Server, "control", lambda self, path, body, limit: asked.append((self.url, body)))
    ServerGroup(servers).init_weight_transfer_engine({"rank_offset": 1, "world_size": 8})
    found = {url: body["init_info"]["rank_offset"] for url, body in asked}
    assert found == {"http://127.0.0.1:1": 1, "http://127.0.0.1:2": 3, "http://127.0.0.1:3": 4}


def test_a_source_is_read_to_its_end_where_sending_failed():
    read = []

    def weights():
        for number in range(4):
            read.append(number)
            yield f"w{number}", torch.full((2, 3), float(number))

    source = PolicySource(weights, lambda: torch.bfloat16)
    assert [(m.name, m.dtype, m.shape) for m in source.metadata()][1] == ("w1", torch.bfloat16, (2, 3))
    read.clear()
    source.begin()
    name, value = next(iter(source))
    assert name == "w0" and value.dtype == torch.bfloat16
    source.finish()
    assert read == [0, 1, 2, 3]
    source.finish()  # nothing is left
    assert read == [0, 1, 2, 3]


def test_handles_of_memory_travel_pickled_as_vllm_takes_them(monkeypatch):
    handle = {"GPU-1": (1, "two", b"three")}
    update = {"names": ["w"], "dtype_names": ["float32"], "shapes": [[2]], "ipc_handles": handle, "tensor_sizes": [8]}
    sent = json.loads(json.dumps(as_json({**update, "ipc_handles_pickled": None})))
    assert pickle.loads(base64.b64decode(sent["ipc_handles_pickled"])) == handle
    with pytest.raises(ValueError, match="Refusing"):
        IPCWeightTransferUpdateInfo(**sent)
    monkeypatch.setattr("vllm.envs.VLLM_ALLOW_INSECURE_SERIALIZATION", True)  # as vllm_server.py sets it
    assert IPCWeightTransferUpdateInfo(**sent).ipc_handles == handle
    assert as_json({"names": []}) == {"names": []}


@pytest.mark.parametrize(("fails_with", "ended"), [(client.ServerGone, 0), (client.ServerError, 1)])
def test_only_a_server_that_is_there_and_does_not_answer_is_ended(monkeypatch, fails_with, ended):
    """One that has gone is being started again, and the new one is well."""
    server, ends = client.Server("http://127.0.0.1:9"), []

    def version(limit_s):
        raise fails_with("no answer")

    monkeypatch.setattr(server, "version", version)
    monkeypatch.setattr(server, "end", lambda: ends.append(1))
    ServerGroup([server]).end_those_without("3")
    assert not ServerGroup([server]).all_have("3")
    assert len(ends) == 2 * ended


def test_a_call_that_fails_late_ends_no_later_transfer():
    """The sender fails first, and the call is left behind with its thread: it fails once its server is ended."""
    began, ended, came = threading.Event(), threading.Event(), []

    def left_behind(server):
        began.set()
        ended.wait(10)
        raise client.ServerError("was ended")

    group = ServerGroup([client.Server("http://127.0.0.1:9")])
    with ThreadPoolExecutor(1) as pool:
        with Abort(lambda: came.append("first")) as group.abort:
            late = pool.submit(group._on_all, left_behind, group.servers)
            assert began.wait(10)
        with Abort(lambda: came.append("second")) as group.abort:
            ended.set()
            with pytest.raises(client.ServerError):
                late.result(10)
            assert came == []
            for _ in range(2):
                with pytest.raises(client.ServerError):
                    group._on_all(left_behind, group.servers)
    assert came == ["second"]  # once


def test_what_stands_still_inside_a_library_ends_its_process():
    code = (
        "import time\nfrom rlt.launching.lifetime import ends_within\n"
        "with ends_within(0.2, 'short') as limit:\n    limit(0.2)\n"
        "limit(0.2)\n"  # as from a thread that is late
        "time.sleep(0.5)\n"
        "with ends_within(60, 'sending') as limit:\n    limit(0.3)\n    time.sleep(60)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (1, "sending took longer than 0.3 s: this process ends\n")

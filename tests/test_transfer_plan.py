"""How weights reach servers is chosen by where both are, and what cannot work is refused in one line."""

import json
from pathlib import Path

import pytest
from conftest import ROOT, config_of

from rlt.commands.launch import check_machine
from rlt.commands.servers import servers_of
from rlt.errors import Refused
from rlt.generation.served.vllm_server import server_arguments, transfer_environment
from rlt.launching.environment import Machines
from rlt.launching.watchdog import Watchdog
from rlt.planning.memory import estimate_memory
from rlt.planning.plan import Plan
from rlt.planning.resolve import STARTING, resolve
from rlt.planning.transfer import devices_of_both, with_weight_transfer


@pytest.fixture
def config(tiny_run, in_root):
    return {**config_of(*tiny_run, "use_vllm=true"), "use_vllm_server": True, "vllm_server_base_url": STARTING}


@pytest.mark.parametrize(
    ("gpus", "devices", "servers", "way"),
    [
        (0, 1, 1, "files"),  # CPUs
        (8, 4, 4, "nccl"),  # devices of their own
        (4, 2, 1, "nccl"),
        (1, 1, 1, "ipc"),  # one GPU for both
        (4, 4, 4, "ipc"),
        (4, 4, 2, "ipc"),
        (4, 2, 4, "nccl"),  # refused for its devices: a server's would be no rank's
        (4, 8, 4, "nccl"),
        (1, 0, 1, "nccl"),  # servers for ranks elsewhere
        (8, 8, 0, "nccl"),  # servers that were there already
    ],
)
def test_the_way_is_chosen_by_where_ranks_and_servers_are(config, gpus, devices, servers, way):
    assert with_weight_transfer(config, gpus, devices, servers)["weight_transfer"] == way
    together = max(devices, servers) if way == "ipc" else devices + servers
    assert devices_of_both(config, gpus, devices, servers) == together


def test_a_run_that_needs_a_gpu_is_planned_for_one_where_there_is_none(config):
    assert with_weight_transfer({**config, "requires": "gpu"}, 0, 4, 4)["weight_transfer"] == "nccl"


@pytest.mark.parametrize(
    ("keys", "gpus", "servers", "words"),
    [
        ({"weight_transfer": "tcp"}, 8, 1, "weight_transfer=tcp: use one of auto, files, nccl, ipc"),
        ({"weight_transfer": "nccl"}, 0, 1, "weight_transfer=nccl needs GPUs, and none is visible"),
        ({"weight_transfer": "ipc"}, 0, 1, "weight_transfer=ipc needs GPUs, and none is visible"),
        ({"weight_transfer": "ipc"}, 8, 3, "ipc with 3 devices of servers and 2 that train"),
        (
            {"weight_transfer": "ipc", "vllm_server_base_url": ["http://127.0.0.1:8000", "http://host1:8000"]},
            *(8, 0, "vllm_server_base_url=http://host1:8000: memory is handed over within one machine"),
        ),
        ({"weight_transfer": "nccl", "use_vllm_server": False}, 8, 0, "weight_transfer=nccl without servers"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(config, keys, gpus, servers, words):
    with pytest.raises(Refused, match="weight_transfer=") as refused:
        with_weight_transfer({**config, **keys}, gpus, 2, servers)
    assert words in str(refused.value) and "\n" not in str(refused.value)


def test_memory_is_not_handed_over_between_machines(config):
    with pytest.raises(Refused, match="weight_transfer=ipc with NNODES=2: memory is handed over within one machine"):
        check_machine({**config, "weight_transfer": "ipc"}, 1, Machines(2, 2), 0)


def test_the_plan_of_a_run_with_servers_on_a_cpu_says_files_and_without_servers_nothing(tiny_run, in_root, tmp_path):
    run = [*tiny_run, "use_vllm=true", f"output_dir={tmp_path}"]
    served, alone = (resolve(config_of(*run), run, server_devices=number).plan for number in (1, 0))
    assert (served.config["weight_transfer"], alone.config["weight_transfer"]) == ("files", "auto")
    assert "weights to the servers        files" in served.report()
    assert "weights to" not in alone.report()
    with pytest.raises(Refused, match="weight_transfer=ipc needs GPUs"):
        resolve(config_of(*run, "weight_transfer=ipc"), run, server_devices=1)


@pytest.mark.parametrize(("way", "backend"), [("files", "chunks"), ("nccl", "nccl"), ("ipc", "ipc")])
def test_a_server_is_started_with_the_transfer_of_the_plan(config, way, backend):
    arguments = server_arguments({**config, "weight_transfer": way}, "model", False, "auto")
    given = dict(zip(arguments[::2], arguments[1::2], strict=False))
    assert json.loads(given["--weight-transfer-config"]) == {"backend": backend}
    assert given["--gpu-memory-utilization"] == ("0.7" if way == "ipc" else "0.9")


def test_a_server_of_a_run_that_does_not_train_takes_files(in_root):
    config = config_of("run_cfg=evaluate", "model_name_or_path=x")
    assert "weight_transfer" not in config
    arguments = server_arguments({**config, "max_prompt_length": 8}, "model", False, "auto")
    assert '{"backend": "chunks"}' in arguments


def test_pickles_are_taken_for_ipc_alone_and_nccl_listens_on_the_loopback_of_one_machine():
    inner = {"RLT_WEIGHT_TRANSFER": "nccl", "NCCL_SOCKET_IFNAME": "lo"}
    assert transfer_environment("nccl", "unix:/tmp/a.sock") == inner
    assert transfer_environment("nccl", "http://127.0.0.1:8000") == inner
    assert transfer_environment("nccl", "http://10.0.0.1:8000") == {"RLT_WEIGHT_TRANSFER": "nccl"}
    assert transfer_environment("ipc", "unix:/a")["VLLM_ALLOW_INSECURE_SERIALIZATION"] == "1"


def test_servers_take_the_devices_of_the_ranks_where_they_share_them(config, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    for way, devices in {"nccl": ["6", "7"], "ipc": ["4", "5"]}.items():
        plan = Plan({**config, "weight_transfer": way}, 2, 4, 1, 1)
        with Watchdog() as watchdog:
            assert servers_of(plan, 2, 2, tmp_path / "plan.json", Path(tmp_path), watchdog).devices == devices


def test_an_engine_on_the_ranks_own_device_is_in_the_estimate(config):
    own, shared = (
        estimate_memory({**config, "weight_transfer": way}, 80.0, 1, "ddp")["generation"] for way in ("nccl", "ipc")
    )
    assert shared - own == pytest.approx(0.7 * 80)


def test_the_key_stands_at_its_leaf():
    assert "weight_transfer: auto" in (ROOT / "cfgs" / "trainer_cfg" / "grpo.yaml").read_text()

"""Weights from device to device: vLLM's own NCCL transfer with a real server, over sockets instead of NCCL's wire.

What is not run here is NCCL itself, and `ipc`, whose trainer asks for a GPU as it is made.
"""

import json
import os

import nccl_by_sockets
import pytest
import torch
from conftest import ROOT, config_of
from test_servers import PROMPTS, SEEDS, engine_of

from rlt.generation.served.direct_engine import DirectEngine
from rlt.generation.vllm_engine import VLLMEngine
from rlt.launching.servers import Servers


@pytest.fixture(scope="module")
def server(tiny_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        found = os.environ.get("PYTHONPATH", "")
        patch.setenv("PYTHONPATH", f"{nccl_by_sockets.plugin_folder(folder / 'plugin')}:{found}")
        config = {**config_of(*tiny_run, "use_vllm=true", "max_prompt_length=48"), "weight_transfer": "nccl"}
        (folder / "plan.json").write_text(json.dumps({"config": config}))
        servers = Servers([""], 1, folder, folder / "plan.json")
        patch.setenv("RLT_SERVER_KEY", servers.key)
        servers.start()
        nccl_by_sockets.install()
        try:
            yield servers
        finally:
            servers.close()


@pytest.fixture(scope="module")
def direct(server, tiny_teacher):
    return engine_of(DirectEngine, tiny_teacher, urls=server.urls, start_limit_s=180, weight_transfer="nccl")


def digest(engine) -> str:
    (found,) = engine.servers[0].ask("POST", "/collective_rpc", {"method": "digest"}, 60)["results"]
    return found


def shift(model) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)


def test_completions_are_those_of_the_engine_in_process_also_after_new_weights(direct, tiny_teacher):
    inside = engine_of(VLLMEngine, tiny_teacher)
    inside.model = direct.model
    for _ in range(2):
        for engine in (direct, inside):
            engine.sync_weights()
        (ours, our_values), (theirs, their_values) = (e.generate_seeded(PROMPTS, SEEDS) for e in (direct, inside))
        assert ours == theirs
        for a, b in zip(our_values, their_values, strict=True):
            assert a == pytest.approx(b, abs=2e-4)
        shift(direct.model)

"""Packed log-probs of models that are sharded over two processes: ZeRO-3 and FSDP2, on gloo."""

import os
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import spawn_ranks
from test_logprobs import group_of_three, llama, one_row_at_a_time

from backends.collective import inside_forward
from rlt.logprobs import head, token_log_probs

RANKS = 2
LEARNING_RATE = 0.01
STEPS = 3  # in a step DeepSpeed compares with other ranks what modules the last one went through


def batch_of(rank: int):
    """Other sequences on each rank; with a budget of 14 the second rank makes one pass fewer, fewer tokens count."""
    sequences = group_of_three(offset=7 * rank)[rank:]
    return sequences, [list(range(len(s) - 1 if rank else 8, len(s))) for s in sequences]


def loss_of(log_probs) -> torch.Tensor:
    return torch.cat(log_probs).square().sum()


def agree(count: int) -> int:
    counts = torch.tensor([count])
    dist.all_reduce(counts, op=dist.ReduceOp.MAX)
    return int(counts)


def packed_loss(wrapped, inner, rank: int) -> torch.Tensor:
    sequences, counted = batch_of(rank)
    compute = partial(token_log_probs, inner, sequences, counted, token_budget=14, agree_on_forwards=agree)
    log_probs, _ = inside_forward(wrapped, inner, True, compute)
    return loss_of(log_probs)


def zero3(rank: int, model) -> dict[str, torch.Tensor]:
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    for _ in range(STEPS):
        engine.backward(packed_loss(engine, model, rank))
        engine.step()
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        return {name: p.detach().clone() for name, p in model.named_parameters()}


def fsdp2(rank: int, model) -> dict[str, torch.Tensor]:
    from torch.distributed.fsdp import fully_shard

    mesh = dist.device_mesh.init_device_mesh("cpu", (RANKS,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    for _ in range(STEPS):
        packed_loss(model, model, rank).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.full_tensor().detach().clone() for name, p in model.named_parameters()}


SHARDINGS = {"zero3": zero3, "fsdp2": fsdp2}


def run_rank(rank: int, sharding: str, folder: str) -> None:
    torch.set_num_threads(1)
    head.HEAD_CHUNK_ELEMENTS = 1  # a position at a time: the ranks have other numbers of them
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS), "DS_ACCELERATOR": "cpu"}
    store = dist.FileStore(f"{folder}/store", RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=timedelta(seconds=60))
    for tied in (True, False):  # one after the other, as processes take longer to start than to compute
        model = llama(tie_word_embeddings=tied).float()
        torch.save(SHARDINGS[sharding](rank, model), f"{folder}/{tied}-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=SHARDINGS)
def updated(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    spawn_ranks(run_rank, (request.param, str(folder)), RANKS)
    return folder


@pytest.mark.parametrize("tied", [True, False])
def test_updates_of_a_sharded_model_are_those_of_one_row_at_a_time(updated, tied):
    model = llama(tie_word_embeddings=tied).float()
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    for _ in range(STEPS):
        losses = [loss_of(one_row_at_a_time(model, *batch_of(rank), 1.0)) for rank in range(RANKS)]
        (sum(losses) / RANKS).backward()
        optimizer.step()
        optimizer.zero_grad()
    for rank in range(RANKS):
        sharded = torch.load(updated / f"{tied}-{rank}.pt")
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(sharded[name], parameter.detach(), rtol=1e-4, atol=1e-5)

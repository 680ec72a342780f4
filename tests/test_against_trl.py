"""Losses and gradients on packed rows against stock TRL's padded ones, on the same completions, in float32."""

from types import MethodType

import pytest
import torch
import trl
from conftest import build

LOSS_TYPES = ["grpo", "dapo", "cispo"]


def loss_and_gradients(trainer, inputs):
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, inputs, num_items_in_batch=inputs["num_items_in_batch"])
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in trainer.model.parameters()])


def assert_is_stock_trls(trainer) -> dict:
    """Loss and gradients of a batch are those that TRL computes; the batch."""
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    inputs["advantages"] += 1  # so that the loss is not a small difference of large terms
    with torch.no_grad():  # away from the policy that sampled, so that ratios and the KL are not trivial
        for parameter in trainer.model.parameters():
            parameter.add_(torch.randn_like(parameter) * 1e-3)
    loss, gradients = loss_and_gradients(trainer, inputs)
    stock = trl.GRPOTrainer._get_per_token_logps_and_entropies
    trainer._get_per_token_logps_and_entropies = MethodType(stock, trainer)
    stock_loss, stock_gradients = loss_and_gradients(trainer, inputs)
    assert loss == pytest.approx(stock_loss, rel=1e-5)
    assert (gradients - stock_gradients).norm() < 1e-5 * stock_gradients.norm()
    return inputs


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_losses_and_gradients_are_stock_trls(tiny_run, tmp_path, in_root, loss_type):
    trainer, _ = build(
        tiny_run, tmp_path, f"loss_type={loss_type}", "eval_size=0", "per_device_train_batch_size=8", "beta=0.1"
    )
    assert_is_stock_trls(trainer)

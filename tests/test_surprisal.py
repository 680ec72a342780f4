"""Surprising tokens count less: by hand, against the plain loss, and in a run."""

import math

import pytest
import torch
from conftest import config_of

from rlt.errors import Refused
from rlt.planning.plan import make_plan
from rlt.runs.folder import prepare_output
from trainers.build import build_trainer
from trainers.surprisal import surprisal_weights

LOG_PROBS = torch.tensor([-0.5, -0.9, -1.0, -7.0])


def test_tokens_beyond_the_limit_have_the_weight_that_is_given():
    assert surprisal_weights(LOG_PROBS, 0.9, 0.25).tolist() == [1.0, 1.0, 0.25, 0.25]
    assert surprisal_weights(LOG_PROBS, 7.0, 0.0).tolist() == [1.0] * 4
    assert surprisal_weights(LOG_PROBS, 0.1, 0.0).tolist() == [0.0] * 4


def test_masked_tokens_have_no_gradient_and_the_others_theirs():
    log_probs = LOG_PROBS.clone().requires_grad_()
    (-(log_probs * surprisal_weights(log_probs, 0.9, 0.5)).sum() / 4).backward()
    assert log_probs.grad.tolist() == [-0.25, -0.25, -0.125, -0.125]


@pytest.fixture
def sft(tiny_teacher, tmp_path):
    rows = ["train_batch_size=4", "per_device_train_batch_size=4", "max_steps=1", "dataset_size=4", "eval_size=0"]
    run = ["teacher_sft_tiny", f"model_name_or_path={tiny_teacher}", *rows, "report_to=null", "bf16=false"]

    def trained(name: str, *overrides: str):
        config = config_of(*run, "eval_steps=null", f"output_dir={tmp_path / name}", *overrides)
        plan = make_plan(config)
        prepare_output(config)
        trainer, _ = build_trainer(plan)
        batch = next(iter(trainer.get_train_dataloader()))
        trainer.model.train()
        return trainer, batch, trainer.compute_loss(trainer.model, batch)

    return trained


def test_without_a_limit_and_with_one_above_all_the_loss_is_the_plain_one_to_the_digit(sft):
    (_, _, plain), (_, _, above) = sft("plain"), sft("above", "max_surprisal=1000")
    assert torch.equal(plain, above)


def test_the_loss_is_the_weighted_sum_over_all_tokens_and_held_out_loss_is_of_all(sft):
    trainer, batch, loss = sft("some", "max_surprisal=11", "surprising_weight=0.1")
    from trainers.packed import sequences_of

    sequences, counted = sequences_of(batch)
    with torch.no_grad():
        nlls = []
        for ids, where in zip(sequences, counted, strict=True):
            logits = trainer.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            nlls += [-logits[i - 1, ids[i]].item() for i in where]
    assert any(nll > 11 for nll in nlls) and any(nll < 11 for nll in nlls)
    expected = math.fsum(nll if nll <= 11 else 0.1 * nll for nll in nlls) / len(nlls)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    with torch.no_grad():
        held_out = trainer.compute_loss(trainer.model, batch).item()
    assert held_out == pytest.approx(math.fsum(nlls) / len(nlls), rel=1e-5)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["max_surprisal=0"], "max_surprisal=0 must be above 0"),
        (["surprising_weight=2"], "surprising_weight=2 must be in 0 to 1"),
    ],
)
def test_what_cannot_be_meant_is_refused(overrides, said):
    with pytest.raises(Refused, match=said):
        make_plan(config_of("student_sft_tiny", *overrides, "dry_run=true"))

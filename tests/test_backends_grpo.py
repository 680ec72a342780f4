"""A GRPO loop over a backend against the trainer, on the same completions: the same losses, the same weights."""

import pytest
import torch
from conftest import build
from short_of_memory import generate

from backends import AdamParams, Datum, PyTorchTrainingBackend, create_adamw_optimizer, load_hf_model
from trainers.grpo import GRPOTrainer

LIMIT_S = 120
STEPS = 3


def watch(monkeypatch) -> list[tuple[dict, float]]:
    """What each micro-batch of the trainer holds, and its loss; completions are fixed, and what they are worth."""
    found, score, loss = [], GRPOTrainer._generate_and_score_completions, GRPOTrainer.compute_loss

    def scored(self, inputs):
        batch = score(self, inputs)
        generator = torch.Generator().manual_seed(self.state.global_step)
        return batch | {"advantages": torch.randn(batch["advantages"].shape, generator=generator)}

    def watched(self, model, inputs, *args, **kwargs):
        value = loss(self, model, inputs, *args, **kwargs)
        kept = {name: v.clone() if isinstance(v, torch.Tensor) else v for name, v in inputs.items()}
        found.append((kept, value.item()))
        return value

    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", generate)
    monkeypatch.setattr(GRPOTrainer, "_generate_and_score_completions", scored)
    monkeypatch.setattr(GRPOTrainer, "compute_loss", watched)
    return found


def as_data(batch: dict, weight_of) -> list[Datum]:
    """A datum for each completion: prompt and completion, shifted by one, with zeros on the prompt."""
    data = []
    for row, advantage in enumerate(batch["advantages"].tolist()):
        prompt, completion = (batch[f"{part}_ids"][row][batch[f"{part}_mask"][row].bool()] for part in PARTS)
        tokens = torch.cat([prompt, completion])
        count, before = len(completion), len(prompt) - 1

        def padded(values, before=before):
            return torch.nn.functional.pad(values, (before, 0))

        inputs = {
            "target_tokens": tokens[1:],
            "advantages": padded(torch.full((count,), advantage)),
            "weights": padded(torch.full((count,), weight_of(count))),
            "ref_logprobs": padded(batch["ref_per_token_logps"][row, :count]),
        }
        if "old_per_token_logps" in batch:
            inputs["logprobs"] = padded(batch["old_per_token_logps"][row, :count])
        data.append(Datum(tokens[:-1].tolist(), inputs))
    return data


PARTS = ("prompt", "completion")
SETTINGS = {  # what the trainer is told, and how many completions a step has in how many micro-batches
    "dapo": (["loss_type=dapo"], 2),
    "grpo": (["loss_type=grpo"], 2),
    "two updates of each batch": (["loss_type=dapo", "num_iterations=2"], 2),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_losses_and_weights_are_the_trainers(tiny_run, tiny_teacher, tmp_path, in_root, monkeypatch, name):
    settings, micro_batches = SETTINGS[name]
    more = ["eval_size=0", f"max_steps={STEPS}", "temperature=1.0", "beta=0.1", "save_steps=100"]
    more += ["lr_scheduler_type=constant", "warmup_steps=0", "weight_decay=0.0", *settings]
    trainer, _ = build(tiny_run, tmp_path / "run", *more)
    found = watch(monkeypatch)
    model = load_hf_model(tiny_teacher, device="cpu")
    backend = PyTorchTrainingBackend(model, create_adamw_optimizer(model), checkpoint_dir=tmp_path, device="cpu")
    trainer.train()
    assert len(found) == STEPS * micro_batches
    args = trainer.args
    params = AdamParams(
        args.learning_rate, args.adam_beta1, args.adam_beta2, args.adam_epsilon, 0.0, args.max_grad_norm
    )
    config = {"beta": args.beta, "epsilon": args.epsilon, "epsilon_high": args.epsilon_high or args.epsilon}
    for number, (batch, expected) in enumerate(found):
        items, rows = batch["num_items_in_batch"].item(), len(batch["advantages"])

        def weight_of(count, items=items, rows=rows):
            return 1 / items if args.loss_type == "dapo" else 1 / (count * rows * micro_batches)

        output = backend.forward_backward(as_data(batch, weight_of), "grpo", config).result(LIMIT_S)
        assert output.metrics["loss:sum"] == pytest.approx(expected, abs=1e-5)
        if (number + 1) % micro_batches == 0:
            backend.optim_step(params).result(LIMIT_S)
    backend.close()
    trained = dict(trainer.model.named_parameters())
    start = dict(load_hf_model(tiny_teacher, device="cpu").named_parameters())
    for name, parameter in backend.model.named_parameters():
        torch.testing.assert_close(parameter, trained[name], atol=1e-5, rtol=0)
        assert (parameter - start[name]).abs().max() > 1e-4

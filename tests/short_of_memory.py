"""Steps that run out of memory where a test says so: `python tests/short_of_memory.py PLANS LAUNCHER`, as a rank.

Every optimizer step is of the same rows with the same weights (the learning rate is next to nothing), so that the
gradients of each are to be those of the first, which nothing disturbs. The exceptions are real ones, thrown by hooks of
modules and by what calls them; the steps and places are read from `cases.json` beside the plans.
"""

import json
import os
import re
import sys
from pathlib import Path

import torch

import trainers.recovery
from rlt.commands import rank
from rlt.logprobs import engine
from rlt.survival.oom import TokenBudget
from trainers.grpo import GRPOTrainer
from trainers.recovery import RecoversMemory

BUDGET = 300  # tokens per pass: two of them in a micro-batch of eight rows
PLACES = ("before", "inside", "head", "between", "backward", "after")


class Shortages:
    """Throws `torch.OutOfMemoryError` at places of the step at hand.

    Args:
        cases: for each step a list of (rank, place, how manieth time the place is reached, from 1).
    """

    def __init__(self, cases: list[list]):
        self.cases, self.step, self.counts, self.thrown = cases, -1, {}, 0
        self.rank = int(os.environ.get("RANK", "0"))

    def budget(self, step: int) -> int:
        """Of a step that runs out of memory twice: a micro-batch, as its half must be of several rows."""
        return BUDGET if len(self.cases[step]) < 2 else 10 * BUDGET

    def begin(self, step: int) -> None:
        self.step, self.counts = step, dict.fromkeys(PLACES, 0)

    def reach(self, place: str) -> None:
        if self.step < 0:
            return
        self.counts[place] += 1
        if [self.rank, place, self.counts[place]] in [list(case) for case in self.cases[self.step]]:
            self.thrown += 1
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {place}")


def gradients_of(trainer) -> dict[str, torch.Tensor]:
    """Whole, in double precision; collective."""
    from backends import deepspeed, fsdp2

    inner = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    if deepspeed.is_zero(trainer.model_wrapped):
        from deepspeed.utils import safe_get_full_grad

        deepspeed.link_states(trainer.model_wrapped.optimizer)
        return {name: safe_get_full_grad(p).double().clone() for name, p in inner.named_parameters()}
    return {name: fsdp2.whole(p.grad).double().clone() for name, p in inner.named_parameters()}


def random_state() -> list:
    return [torch.get_rng_state().sum().item(), torch.get_rng_state()[:64].tolist()]


def install(patch, shortages: Shortages, found: list[dict], double: bool = True) -> None:
    """Watch and disturb GRPO trainers from here on.

    Args:
        patch: of pytest, or what has its `setattr`.
        found: gets gradients, random states, figures and the numbers of optimizer steps, step by step.
        double: train in float64.
    """
    share, go_back, head = trainers.recovery.share_gradients, RecoversMemory._go_back, engine.head_log_probs
    train, training_step, compute_loss = GRPOTrainer.train, GRPOTrainer.training_step, GRPOTrainer.compute_loss
    current = {}

    def starting(self, *args, **kwargs):
        model = self.accelerator.unwrap_model(self.model)
        if double:
            model.double()
        model.model.register_forward_pre_hook(lambda *_: reached("before"), prepend=True)
        model.model.layers[1].register_forward_hook(lambda *_: reached("inside"))
        model.model.norm.register_forward_hook(watch_backward)
        current["trainer"] = self
        return train(self, *args, **kwargs)

    def reached(place: str) -> None:
        if current.get("updating"):
            shortages.reach(place)

    def watch_backward(module, inputs, output):
        if output.requires_grad:
            output.register_hook(lambda _: reached("backward"))

    def step(self, model, inputs, num_items_in_batch=None):
        if not self._step_batches:
            self._update_budget = TokenBudget(shortages.budget(self.state.global_step), "lower max_length")
            shortages.begin(self.state.global_step)
        current["before"] = random_state()
        return training_step(self, model, inputs, num_items_in_batch)

    def loss(self, *args, **kwargs):
        current["updating"] = True
        value = compute_loss(self, *args, **kwargs)
        if not self._update_budget.lowered:
            reached("between")
        return value

    def going_back(self, value, last):
        if self._update_budget.lowered:
            reached("between")
        go_back(self, value, last)
        reached("after")

    def reading(*args, **kwargs):
        reached("head")
        return head(*args, **kwargs)

    def sharing(model):
        trainer = current["trainer"]
        current["updating"] = False
        is_ddp = isinstance(model, torch.nn.parallel.DistributedDataParallel)
        if is_ddp:
            share(model)
        noted = trainer._metrics["train"].items()
        figures = {f"{name} {i}": value for name, values in noted for i, value in enumerate(values)}
        found.append(
            {
                "gradients": gradients_of(trainer),
                "same_random_state": current["before"] == random_state(),
                "figures": {n: v for n, v in figures.items() if not re.search("second|step_time|num_tokens", n)},
                "step": trainer.state.global_step,
                "recovered": trainer._update_budget.recovered,
                "tokens": trainer._update_budget.tokens,
            }
        )
        if not is_ddp:
            share(model)

    patch.setattr(GRPOTrainer, "_generate_single_turn", generate)
    patch.setattr(GRPOTrainer, "train", starting)
    patch.setattr(GRPOTrainer, "training_step", step)
    patch.setattr(GRPOTrainer, "compute_loss", loss)
    patch.setattr(RecoversMemory, "_go_back", going_back)
    patch.setattr(engine, "head_log_probs", reading)
    patch.setattr(trainers.recovery, "share_gradients", sharing)


def text_of(place: int) -> str:
    """Another text of another length for each completion, of 42 to 54 tokens."""
    return " ".join(str(place * 5 + i) for i in range(14 + (7 * place) % 5))


def generate(self, prompt_ids, images, multimodal_fields, num_generations, **kwargs):
    first = self.accelerator.process_index * len(prompt_ids)
    texts = [text_of(first + i) for i in range(len(prompt_ids))]
    return [self.processing_class.encode(text, add_special_tokens=False) for text in texts], None


def difference(found: list[dict], step: int) -> float:
    """The greatest difference between the gradients of a step and of the first, as a share of the greatest gradient."""
    first, this = found[0]["gradients"], found[step]["gradients"]
    size = max(g.abs().max().item() for g in first.values())
    return max((this[name] - first[name]).abs().max().item() for name in first) / size


class Plain:
    setattr = staticmethod(setattr)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    setup = json.loads((folder / "cases.json").read_text())
    steps: list[dict] = []
    disturbances = Shortages(setup["cases"])
    install(Plain, disturbances, steps, setup["double"])
    try:
        rank.main()
    finally:
        torch.save({"steps": steps, "thrown": disturbances.thrown}, folder / f"found-{disturbances.rank}.pt")

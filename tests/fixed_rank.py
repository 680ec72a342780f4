"""A rank whose completions are made up from where they stand: `python tests/fixed_rank.py PLANS LAUNCHER`."""

from rlt.commands import rank
from trainers.distillation import DistillationTrainer
from trainers.grpo import GRPOTrainer


def completion_of(step: int, place: int) -> str:
    """Another text of another length for each completion of a step; every fifth lacks its end tag."""
    text = " ".join(str(place * 5 + step * 3 + i) for i in range(2 + (7 * place + step) % 5))
    return text if place % 5 == 4 else f"{text}<|end_of_explanation|>"


def reward_of_most(completions: list[str], **_) -> list[float | None]:
    """A text's length in tens of characters, and None where its first number is a multiple of seven."""
    firsts = [int(text.split("<")[0].split()[0]) for text in completions]
    return [None if first % 7 == 0 else len(text) / 10 for first, text in zip(firsts, completions, strict=True)]


def written(self, prompt_ids) -> list[list[int]]:
    first = self.accelerator.process_index * len(prompt_ids)
    texts = [completion_of(self.state.global_step, first + i) for i in range(len(prompt_ids))]
    return [self.processing_class.encode(text, add_special_tokens=False) for text in texts]


def generate(self, prompt_ids, *_, **__):
    return written(self, prompt_ids), None


def generate_alone(self, prompt_ids, *_, **__):
    self._log_generation(1.0, [1])  # as its own way to generate does
    return written(self, prompt_ids)


if __name__ == "__main__":
    GRPOTrainer._generate_single_turn = generate
    DistillationTrainer._generate_single_turn = generate_alone
    rank.main()

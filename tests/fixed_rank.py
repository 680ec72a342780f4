"""A rank whose completions are made up from where they stand: `python tests/fixed_rank.py PLAN LAUNCHER`."""

from launching import rank
from trainers.teacher_grpo import TeacherGRPOTrainer


def completion_of(step: int, place: int) -> str:
    """Another text of another length for each completion of a step; every fifth lacks its end tag."""
    text = " ".join(str(place * 5 + step * 3 + i) for i in range(2 + (7 * place + step) % 5))
    return text if place % 5 == 4 else f"{text}<|end_of_explanation|>"


def generate(self, prompt_ids, images, multimodal_fields, num_generations, **kwargs):
    first = self.accelerator.process_index * len(prompt_ids)
    texts = [completion_of(self.state.global_step, first + i) for i in range(len(prompt_ids))]
    return [self.processing_class.encode(text, add_special_tokens=False) for text in texts], None


if __name__ == "__main__":
    TeacherGRPOTrainer._generate_single_turn = generate
    rank.main()

"""Supervised fine-tuning on TRL's SFT trainer: a teacher's warm-up, and the distillation of a student.

Loss only on what comes after the explanation's start tag (teacher) or on the answer (student), and the head only there
too. Rows of a micro-batch share forward passes without seeing each other (logprobs/packing.py).
"""

from typing import Any

import torch
import trl

from backends.collective import is_sharded
from rlt.survival.kill_points import kill_point
from trainers.curriculum import CurriculumSampler, FollowsCurriculum
from trainers.packed import sequences_of
from trainers.recovery import RecoversMemory
from trainers.stopping import GivesUpSteps
from trainers.surprisal import surprisal_weights


class SFTTrainer(FollowsCurriculum, GivesUpSteps, trl.SFTTrainer, RecoversMemory):
    """Trains on rows with `input_ids` and `completion_mask`, or on packed rows.

    Args:
        answers: a `HeldOutAnswers`, asked at every evaluation; None: the loss alone.
        curriculum: draws packed rows; None: all of them, shuffled.
        other arguments: as in TRL's `SFTTrainer`.
    """

    args: Any  # SFTConfig

    def __init__(self, *args, answers=None, curriculum: CurriculumSampler | None = None, **kwargs):
        self.answers, self.curriculum = answers, curriculum
        super().__init__(*args, **kwargs)

    def evaluate(self, *args, **kwargs):
        # Extended by what a student answers, so that it can choose the best checkpoint.
        metrics = super().evaluate(*args, **kwargs)
        if self.answers is None:
            return metrics
        found = self.answers(self)
        self.log(dict(found))
        return metrics | found

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        # Overridden because TRL runs the output head on every position, three quarters of which carry no loss here.
        kill_point("backward")
        sequences, counted = sequences_of(inputs)
        inner = self.accelerator.unwrap_model(model)
        log_probs, _ = self._read(model, inner, sequences, counted, sharded=is_sharded(self.accelerator))
        log_probs_N = torch.cat(log_probs)
        if self.args.max_surprisal is not None and torch.is_grad_enabled():  # the held-out loss is of all tokens
            weights_N = surprisal_weights(log_probs_N, self.args.max_surprisal, self.args.surprising_weight)
            log_probs_N = log_probs_N * weights_N  # and divided by as many tokens as without weights
        loss = -log_probs_N.sum()
        if num_items_in_batch is None:
            loss = loss / sum(map(len, counted))
        else:  # of all ranks, over which gradients are averaged
            loss = loss * self.accelerator.num_processes / num_items_in_batch
        return (loss, {}) if return_outputs else loss

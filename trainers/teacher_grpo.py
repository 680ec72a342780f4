"""GRPO whose reward is a frozen student's understanding: adds the student and where frozen models stay.

The teacher's log-probs are those of the policy's own pass, wherever the text is tokenised as it was sampled.
"""

import logging

import torch
from trl.trainer.utils import use_adapter

from data.formats import ReasoningFormat
from logprobs import token_log_probs
from models.residence import resident
from rewards import Scored, TeacherReward
from schema import TeacherRewardConfig
from trainers.grpo import GRPOTrainer

logger = logging.getLogger(__name__)


class TeacherGRPOTrainer(GRPOTrainer):
    """Trains a teacher on the reward of arXiv 2506.08388.

    Args:
        student: a frozen causal model that shares the policy's tokenizer; None takes the reference model.
        style: tags and prompts.
        reward_config: coefficients, reductions, temperatures.
        other arguments: as in `GRPOTrainer`; rows need `question` and `solution`.
    """

    def __init__(self, *args, student, style: ReasoningFormat, reward_config: TeacherRewardConfig, **kwargs):
        self.student = student
        super().__init__(*args, reward_funcs=[self.teacher_reward], **kwargs)
        if student is None and self.beta == 0.0:
            raise ValueError("student_model=null takes the reference model, which beta=0 does not load: name a student")
        if student is None and self.args.sync_ref_model:
            logger.warning("the student is the reference model and sync_ref_model moves it: rewards drift with it")
        self.reward = TeacherReward(
            self.processing_class,
            style,
            reward_config,
            self.temperature,
            teacher_log_probs=self._teacher_log_probs,
            student_log_probs=self._student_log_probs,
        )

    def teacher_reward(self, prompts, completions, completion_ids, log_extra, log_metric, **columns):
        """TRL's reward-function signature; None where a reward is not finite."""
        keys = ("question", "solution", "teacher_system_prompt", "student_system_prompt")
        present = [key for key in keys if key in columns]
        rows = [dict(zip(present, values, strict=True)) for values in zip(*(columns[k] for k in present), strict=True)]
        scored = self.reward.score(rows, completions)
        self._log_parts(scored, log_extra, log_metric)
        return [s.reward if torch.isfinite(torch.tensor(s.reward)) else None for s in scored]

    def _log_parts(self, scored: list[Scored], log_extra, log_metric) -> None:
        for name in scored[0].as_dict():
            if name == "reward":
                continue
            values = [s.as_dict()[name] for s in scored]
            log_extra(name, values)
            finite = [v for v in values if torch.isfinite(torch.tensor(v))]
            if finite:
                log_metric(f"reward_parts/{name}", sum(finite) / len(finite))
        log_metric("reward_parts/format_rate", sum(s.match_reward == 0 for s in scored) / len(scored))

    def _student_log_probs(self, sequences, counted, temperature) -> list[torch.Tensor]:
        if self.student is not None:
            with resident(self.student, self.accelerator.device, self.args.offload_untrained_models):
                return self._frozen_log_probs(self.student, sequences, counted, temperature)
        if self.ref_model is not None:
            reference = self.accelerator.unwrap_model(self.ref_model)
            with resident(reference, self.accelerator.device, self._reference_waits):
                return self._frozen_log_probs(reference, sequences, counted, temperature)
        policy = self.accelerator.unwrap_model(self.model)
        with use_adapter(policy, adapter_name="ref" if "ref" in policy.peft_config else None):
            return self._frozen_log_probs(policy, sequences, counted, temperature)

    def _teacher_log_probs(self, sequences, counted, temperature) -> list[torch.Tensor]:
        """The policy's pass where it has these tokens, a pass of its own for the rest."""
        known = [self._from_policy_pass(row, ids, counted[row]) for row, ids in enumerate(sequences)]
        if temperature != self.temperature:
            known = [None] * len(sequences)
        missing = [row for row, values in enumerate(known) if values is None]
        mode = "train" if self.model.training else "eval"
        self._metrics[mode]["teacher/reused_share"].append(1 - len(missing) / len(sequences))
        if missing or self._sharded:  # passes of a sharded model are made by all ranks or by none
            policy = self.accelerator.unwrap_model(self.model)
            asked = [sequences[row] for row in missing], [counted[row] for row in missing]
            for row, values in zip(missing, self._frozen_log_probs(policy, *asked, temperature), strict=True):
                known[row] = values
        return known

    def _from_policy_pass(self, row: int, ids: list[int], counted: list[int]) -> torch.Tensor | None:
        if row not in self._policy_pass:
            return None
        sampled, first, values = self._policy_pass[row]
        end = counted[-1] + 1 if counted else 0
        if ids[:end] != sampled[:end] or (counted and counted[0] < first):
            return None
        return values[[i - first for i in counted]]

    @torch.no_grad()
    def _frozen_log_probs(self, model, sequences, counted, temperature) -> list[torch.Tensor]:
        # Neighbours answer one question; those that do not share a prefix simply share nothing.
        size = self.num_generations if self.model.training else self.num_generations_eval
        groups = [range(start, min(start + size, len(sequences))) for start in range(0, len(sequences), size)]
        log_probs, _ = token_log_probs(
            model,
            sequences,
            counted,
            groups,
            temperature=temperature,
            token_budget=self.args.logprob_token_budget,
            autocast=self.accelerator.autocast(),
            agree_on_forwards=self._agree_on_forwards if self._sharded and model is not self.student else None,
        )
        return log_probs

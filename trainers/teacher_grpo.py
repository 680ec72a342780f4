"""GRPO whose reward is a frozen student's understanding: adds the student and where frozen models stay.

Each text is tokenised once, right after generation, so that the passes which GRPO makes anyway read for the reward too:
the policy's own gives the teacher's log-probs, the reference's those of a student that is the reference model.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from trl.trainer.utils import use_adapter

from rlt.errors import Refused
from rlt.generation.answering import write_answers
from rlt.generation.seeds import request_seed
from rlt.logprobs import LogProbs
from rlt.models.residence import resident
from rlt.prompts.styles import ReasoningFormat
from rlt.rewards import Reading, Scored, TeacherReward
from rlt.rewards.permuted import permuted_within_groups
from rlt.rewards.terms import CHECKED, AddedTerms
from rlt.rewards.tokens import token_columns
from rlt.schema import RewardOptions, TeacherRewardConfig
from trainers.grpo import GRPOTrainer, Rider

ROW_KEYS = ("question", "solution", "teacher_system_prompt", "student_system_prompt")

logger = logging.getLogger("rlt")


@dataclass
class Batch:
    """What is known of a batch between two calls of TRL, in the order in which it becomes known.

    1. `rows`: TRL asks for a batch of them.
    2. `readings`: the completions were written; each text is tokenised once.
    3. `places`, `teacher_log_probs`: the policy's pass, which GRPO makes anyway, has read them. `places[i]` are the
       indices of explanation tokens among what the pass returned of row i; None where the teacher's reading is cut
       into other tokens than were sampled, and rode along as a sequence of its own.
    4. `student_log_probs`: the reference's pass has read the students' texts, where the student is the reference.
       With `report_rsr` the student's pass is one of its own, which gives ranks too.
    5. TRL calls `teacher_reward`, which asks for log-probs and is given those of 3 and 4.

    The next batch begins with another object. Passes that TRL does not make leave their fields at None; the reward
    then makes passes of its own.
    """

    rows: list[dict]
    readings: list[Reading] | None = None
    places: list[list[int] | None] = field(default_factory=list)
    teacher_log_probs: list[torch.Tensor] | None = None
    student_log_probs: list[torch.Tensor] | None = None


class TeacherGRPOTrainer(GRPOTrainer):
    """Trains a teacher on the reward of arXiv 2506.08388.

    Args:
        student: a frozen causal model; None takes the reference model.
        student_tokenizer: of a student that has one of its own.
        style: tags and prompts.
        reward_config: coefficients, reductions, temperatures.
        options: what is done beside; None: nothing.
        more_rewards: functions of TRL's signature, added with `reward_weights`.
        other arguments: as in `GRPOTrainer`; rows need `question` and `solution`.
    """

    def __init__(
        self,
        *args,
        student,
        style: ReasoningFormat,
        reward_config: TeacherRewardConfig,
        options: RewardOptions | None = None,
        student_tokenizer=None,
        more_rewards=(),
        **kwargs,
    ):
        self.options = options
        self.student = student
        self._batch: Batch | None = None
        super().__init__(*args, reward_funcs=[self.teacher_reward, *more_rewards], **kwargs)
        if student is None and self.beta == 0.0:
            raise Refused("student_model=null takes the reference model, which beta=0 does not load: name a student")
        if student is None and self.args.sync_ref_model:
            logger.warning("the student is the reference model and sync_ref_model moves it: rewards drift with it")
        self.reward = TeacherReward(
            self.processing_class,
            style,
            reward_config,
            self.temperature,
            teacher_log_probs=self._teacher_log_probs,
            student_log_probs=self._student_log_probs,
            student_tokenizer=student_tokenizer,
            student_ranked=self._student_ranked if options is not None and options.report_rsr else None,
        )

        if options is not None and options.generated is not None and student is None and self._sharded:
            raise Refused(
                "reward_cfg=generated: the student is the reference model, whose shards cannot answer: name another "
                "student_model, or train with ddp"
            )
        self.terms: AddedTerms | None = None
        if options is not None:
            read = student_tokenizer or self.processing_class
            self.terms = AddedTerms(options, style, read, self._student_writes, self.args.ddp_timeout)

    def _generate_and_score_completions(self, inputs):
        # Extended by what the reward needs to know of the batch meanwhile.
        self._batch = Batch([{key: row[key] for key in ROW_KEYS if key in row} for row in inputs])
        scored = super()._generate_and_score_completions(inputs)
        self._batch = None
        return scored

    def _generate(self, prompts):
        # Extended: what the reward will read is known as soon as the completions are.
        generated = super()._generate(prompts)
        if self._batch is not None:
            texts: Any = generated[3]
            self._batch.readings = self.reward.read(self._batch.rows, texts)
        return generated

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        # Extended for a control run, whose completions get rewards of their siblings.
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        if self.options is not None and self.options.permute_rewards and self.model.training:
            seed = request_seed(self.args.seed, "permuted", self._questions_before(self._step))
            rewards[:, 0] = permuted_within_groups(rewards[:, 0], self.num_generations, seed)  # of all ranks
        return rewards

    def teacher_reward(self, prompts, completions, completion_ids, log_extra, log_metric, **columns):
        """TRL's reward-function signature; None where a reward is not finite."""
        readings = self._batch.readings if self._batch is not None else None
        if readings is None:  # held-out questions, which are answered outside of a batch
            present = [key for key in ROW_KEYS if key in columns]
            values = zip(*(columns[key] for key in present), strict=True)
            readings = self.reward.read(
                [dict(zip(present, row, strict=True)) for row in values], [str(text) for text in completions]
            )
        scored = self.reward.score_readings(readings)
        if self.terms is not None:
            keys = [key for key in CHECKED if key in columns]
            rows = [dict(zip(keys, values, strict=True)) for values in zip(*(columns[k] for k in keys), strict=True)]
            texts, seeds = [str(text) for text in completions], self._request_seeds(len(completions))
            seeds = [request_seed(seed, "answers") for seed in seeds]
            scored = self.terms(rows, texts, readings, scored, seeds)
        self._log_parts(scored, log_extra, log_metric)
        matched = [reading.matched for reading in readings]
        log_extra("matched", matched)
        log_metric("reward_parts/format_rate", sum(matched) / len(matched))
        if self.model.training:
            log_extra("token_scores", token_columns(self.reward.student_tokenizer, readings, scored))
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

    # What is read in the passes of the policy and of the reference

    def _frozen_after(self, which):
        following = super()._frozen_after(which)
        student = self.student if self.args.offload_untrained_models else None
        return student if following is None else following

    def _riders(self, which, sequences, counted):
        batch = self._batch
        if batch is None or batch.readings is None:
            return []
        if which == "policy" and self.reward.teacher_temperature == self.temperature:
            batch.places = [
                r.places_among(ids, where) for ids, where, r in zip(sequences, counted, batch.readings, strict=True)
            ]
            anew = [row for row, places in enumerate(batch.places) if places is None]
            self._log_reuse(1 - len(anew) / len(sequences))
            asked = (batch.readings[row] for row in anew)
            return [Rider(r.teacher.ids, r.teacher_counted, self.temperature) for r in asked]
        if which == "reference" and self.student is None:
            temperature = self.reward.student_temperature
            return [Rider(r.student.ids, r.student_counted, temperature) for r in batch.readings]
        return []

    def _take(self, which, log_probs, of_riders):
        batch = self._batch
        if batch is None:
            return
        if which == "policy" and batch.places:
            anew = iter(of_riders)
            batch.teacher_log_probs = [
                next(anew) if places is None else values[places]
                for places, values in zip(batch.places, log_probs, strict=True)
            ]
        if which == "reference" and of_riders:
            batch.student_log_probs = of_riders

    def _log_reuse(self, share: float) -> None:
        self._metrics["train" if self.model.training else "eval"]["teacher/reused_share"].append(share)

    def _teacher_log_probs(self, sequences, counted, temperature) -> list[torch.Tensor]:
        if self._batch is not None and self._batch.teacher_log_probs is not None:
            return self._batch.teacher_log_probs
        self._log_reuse(0.0)
        return self._frozen_log_probs(self.accelerator.unwrap_model(self.model), sequences, counted, temperature)

    def _student_log_probs(self, sequences, counted, temperature) -> list[torch.Tensor]:
        if self._batch is not None and self._batch.student_log_probs is not None:
            return self._batch.student_log_probs
        with self._frozen_student() as (student, _):
            return self._frozen_log_probs(student, sequences, counted, temperature)

    def _student_ranked(self, sequences, counted, temperature) -> LogProbs:
        with self._frozen_student() as (student, sharded), torch.no_grad():
            how = {"temperature": temperature, "sharded": sharded, "entropy": "rank"}
            return self._read(student, student, sequences, counted, **how)

    def _student_writes(self, prompts: list[list[int]], seeds: list[list[int]]) -> list[list[list[int]]]:
        """The frozen student's answers, by a loop of its own: the engine holds the policy."""
        assert self.options is not None and self.options.generated is not None
        with self._frozen_student() as (student, _), self.accelerator.autocast():
            how = self.reward.student_tokenizer, self.reward.style, self.options.generated
            return write_answers(student, *how, prompts, seeds, self.args.logprob_token_budget)

    @contextmanager
    def _frozen_student(self) -> Iterator[tuple[Any, bool]]:
        """The student where it computes, and whether its passes are collective."""
        if self.student is not None:
            with resident(self.student, self.accelerator.device, self.args.offload_untrained_models):
                yield self.student, False
        elif self.ref_model is not None:
            reference: Any = self.accelerator.unwrap_model(self.ref_model)
            with resident(reference, self.accelerator.device, self._reference_waits):
                yield reference, self._sharded
        else:
            policy: Any = self.accelerator.unwrap_model(self.model)
            with use_adapter(policy, adapter_name="ref" if "ref" in policy.peft_config else None):
                yield policy, self._sharded

    @torch.no_grad()
    def _frozen_log_probs(self, model, sequences, counted, temperature) -> list[torch.Tensor]:
        sharded = self._sharded and model is not self.student
        return self._read(model, model, sequences, counted, temperature=temperature, sharded=sharded)[0]

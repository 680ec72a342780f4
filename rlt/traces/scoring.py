"""Rewards of completions that were just sampled, as a rule without a pass of the teacher.

The teacher's log-probs are those that the completions were sampled with. An explanation's first tokens belong to the
prompt; the engine is asked for their log-probs separately.
"""

from collections.abc import Callable
from typing import Any

import torch

from rlt.logprobs import LogProbs
from rlt.prompts.styles import ReasoningFormat
from rlt.rewards import Reading, Scored, TeacherReward
from rlt.schema import TeacherRewardConfig

Ranked = Callable[[Any, list[list[int]], list[list[int]], float], LogProbs]


def on_cpu(both: LogProbs) -> LogProbs:
    return [values.cpu() for values in both[0]], [values.cpu() for values in both[1]]


class TraceScorer:
    """The reward of training over a teacher's own samples.

    Args:
        teacher, student: frozen causal models.
        next_token_log_probs: of tokens behind prompts under the teacher, as its engine gives them.
        temperature: at which the teacher samples.
        log_probs: of counted tokens, from a model, sequences, the counted and a temperature.
        student_tokenizer: of a student that has one of its own.
        ranked: as `log_probs`, and ranks; where it is given, the student is read with it.
    """

    def __init__(
        self,
        tokenizer,
        style: ReasoningFormat,
        config: TeacherRewardConfig,
        teacher,
        student,
        next_token_log_probs: Callable[[list[list[int]], list[int]], list[float]],
        temperature: float,
        log_probs: Callable[[Any, list[list[int]], list[list[int]], float], list[torch.Tensor]],
        student_tokenizer=None,
        ranked: Ranked | None = None,
    ):
        self.teacher, self.student, self.temperature, self.read = teacher, student, temperature, log_probs
        self.next_token_log_probs, self.tokenizer = next_token_log_probs, tokenizer
        self.reward = TeacherReward(
            tokenizer,
            style,
            config,
            temperature,
            teacher_log_probs=lambda *_: self._of_teacher(),
            student_log_probs=lambda ids, counted, at: self._pass(self.student, ids, counted, at),
            student_tokenizer=student_tokenizer,
            student_ranked=None if ranked is None else lambda ids, where, at: on_cpu(ranked(student, ids, where, at)),
        )

    def score(
        self, rows: list[dict], prompts: list[list[int]], sampled: list[list[int]], log_probs: list[list[float]]
    ) -> tuple[list[str], list[Scored]]:
        """Texts and rewards.

        Args:
            rows: as `TeacherReward.score` takes them, one per completion.
            prompts: token ids of the teacher's prompts.
            sampled: token ids of its completions; `log_probs` are the log-probs that they were sampled with.
        """
        texts = self.tokenizer.batch_decode(sampled, skip_special_tokens=True)
        self.readings: list[Reading] = self.reward.read(rows, texts)
        self.prompts, self.sampled, self.log_probs = prompts, sampled, log_probs
        return texts, self.reward.score_readings(self.readings)

    def _of_teacher(self) -> list[torch.Tensor]:
        at = self.reward.teacher_temperature
        found: list[torch.Tensor | None] = [None] * len(self.readings)
        if at == self.temperature:
            found = self._as_sampled()
        anew = [row for row, values in enumerate(found) if values is None]
        asked = [self.readings[row] for row in anew]
        ids, counted = [r.teacher.ids for r in asked], [r.teacher_counted for r in asked]
        read = self._pass(self.teacher, ids, counted, at)
        for row, values in zip(anew, read, strict=True):
            found[row] = values
        return [values for values in found if values is not None]

    def _as_sampled(self) -> list[torch.Tensor | None]:
        """The teacher's log-probs of each reading; None where its text is tokenised otherwise than it was sampled."""
        tails, found = self._prompt_tails(), []
        for prompt, ids, values, reading in zip(self.prompts, self.sampled, self.log_probs, self.readings, strict=True):
            first = len(prompt) - len(tails[tuple(prompt)])
            known = torch.cat([tails[tuple(prompt)], torch.tensor(values)])
            places = reading.places_among(prompt + ids, list(range(first, len(prompt) + len(ids))))
            found.append(None if places is None else known[places])
        return found

    def _prompt_tails(self) -> dict[tuple[int, ...], torch.Tensor]:
        """Log-probs of each prompt's last tokens, from the first token that a reading counts: explanations begin inside
        the prompt."""
        firsts: dict[tuple[int, ...], int] = {}
        for prompt, reading in zip(map(tuple, self.prompts), self.readings, strict=True):
            firsts[prompt] = min([firsts.get(prompt, len(prompt)), *reading.teacher_counted[:1]])
        asked = [prompt[:end] for prompt, first in firsts.items() for end in range(first, len(prompt))]
        following = [prompt[end] for prompt, first in firsts.items() for end in range(first, len(prompt))]
        read = torch.tensor(self.next_token_log_probs([list(ids) for ids in asked], following))
        sizes = [len(prompt) - first for prompt, first in firsts.items()]
        return dict(zip(firsts, read.split(sizes), strict=True))

    def _pass(self, model, sequences, counted, temperature: float) -> list[torch.Tensor]:
        """Log-probs of the counted tokens."""
        if not sequences:
            return []
        return [values.cpu() for values in self.read(model, sequences, counted, temperature)]

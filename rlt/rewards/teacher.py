"""How well a frozen student understands the solution, given the teacher's explanation as its own thought.

The reward of Reinforcement-Learned Teachers (arXiv 2506.08388, eq. 2 to 5):

    r_SS = sum_j a_j * reduce_j(log p_student(solution tokens))
    r_KL = sum_j b_j * reduce_j(log p_teacher(t) - log p_student(t)), t in the explanation
    reward = r_SS - r_KL + match

`match` is 0, or the penalty when the explanation's end tag is missing or nothing stands before it.

Each model reads its own template's text in its own tokens. r_SS needs no more: it is reduced over the student's tokens
of the solution. r_KL compares the two over t, the shortest pieces of the explanation that both tokenizers cut out
(`align_spans`): of one tokenizer each token, of two as many tokens on either side as it takes until both have a
boundary at the same character. The log-probs of a piece are added up on each side, so that log p(t) is what the model
gives to these characters, in its own tokens, behind what comes before; other ways to cut the same characters are not
added. The reductions run over pieces: a mean is divided by their number, not by that of either side's tokens, and
clips, normalisers and Schulman's estimator see a piece as they see a token.

Three steps that can be read alone: text to spans (`rlt/prompts/spans.py`), spans to log-probs (`rlt/logprobs/`),
log-probs to reward (`reductions.py`). This module does not know which models are asked: they come in as functions.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from rlt.errors import Refused
from rlt.prompts.rendering import (
    render_student_reading,
    render_teacher_prompt,
    render_teacher_reading,
    split_completion,
)
from rlt.prompts.spans import Aligned, TokenizedText, align_spans, tokenize_with_spans
from rlt.prompts.styles import ReasoningFormat
from rlt.rewards.reductions import NORMALIZERS, kl_estimate, reductions_of, weighted_reductions
from rlt.rewards.suitability import likelihood, rank_surprisal_ratio
from rlt.schema import TeacherRewardConfig

# (sequences, counted indices, temperature) -> log-probs of the counted tokens, one tensor per sequence.
LogProbFunction = Callable[[list[list[int]], list[list[int]], float], list[torch.Tensor]]
# The same, and the ranks of the same tokens among the vocabulary, 1 for the likeliest.
RankedFunction = Callable[[list[list[int]], list[list[int]], float], tuple[list[torch.Tensor], list[torch.Tensor]]]


@dataclass(frozen=True)
class Scored:
    """A reward and its parts.

    `parts` holds the reductions by name. `log_probs` holds the log-probs that they were made of: the student's of the
    explanation's pieces and the solution's tokens, and the teacher's of the explanation's pieces.
    """

    reward: float
    solution_log_prob_reward: float
    kl_reward: float
    match_reward: float
    parts: dict[str, float]
    log_probs: tuple[torch.Tensor, torch.Tensor]

    def as_dict(self) -> dict[str, float]:
        """Its numbers, flat, in the names that logs and files use."""
        named = {k: v for k, v in vars(self).items() if k not in ("parts", "log_probs")}
        return {**named, **self.parts}


@dataclass(frozen=True)
class Reading:
    """Both texts of one completion, and the pieces of the explanation that they share, the teacher's on the left."""

    teacher: TokenizedText
    student: TokenizedText
    explanation: Aligned
    matched: bool

    @property
    def teacher_counted(self) -> list[int]:
        """Indices of the teacher's tokens whose log-probs the reward asks for."""
        return self.explanation.left

    @property
    def student_counted(self) -> list[int]:
        """Indices of the student's tokens whose log-probs the reward asks for: the explanation, then the solution."""
        return self.explanation.right + self.student.spans["solution"]

    def places_among(self, sampled: list[int], counted: list[int]) -> list[int] | None:
        """Places of the teacher's log-probs among the log-probs of the sampled tokens that count.

        None if the teacher's text is tokenised otherwise than it was sampled, or begins before the counted tokens.
        """
        asked = self.teacher_counted
        if not asked:
            return []
        end = asked[-1] + 1
        if self.teacher.ids[:end] != sampled[:end] or not counted or asked[0] < counted[0]:
            return None
        return [index - counted[0] for index in asked]


def solution_part(student_T: torch.Tensor, config: TeacherRewardConfig) -> tuple[float, dict[str, float]]:
    """r_SS of the student's log-probs (T,) of the solution tokens, with its reductions by name."""
    values_T = NORMALIZERS[config.normalize_log_prob_fn or "none"](student_T.float())
    if config.clip_log_prob is not None:
        values_T = values_T.clamp(min=-config.clip_log_prob)
    total, parts = weighted_reductions(
        values_T, config.reduction_log_prob_fn, config.answer_log_prob_coeff, reductions_of(config)
    )
    return total, {f"answer_log_prob_{name}": value for name, value in parts.items()}


def naturalness(values_T: torch.Tensor, config: TeacherRewardConfig) -> tuple[float, dict[str, float]]:
    """Minus the weighted sum of the reductions of the penalties of an explanation's pieces (T,), and the reductions by
    name.

    Zeros without a piece.
    """
    names = config.reduction_kl_fn
    if not values_T.numel():
        return 0.0, dict.fromkeys(names, 0.0)
    values_T = NORMALIZERS[config.normalize_kl_fn or "none"](values_T)
    if config.clip_kl is not None:
        values_T = values_T.clamp(max=config.clip_kl)
    total, parts = weighted_reductions(values_T, names, config.kl_penalty_reward_coeff, reductions_of(config))
    return -total, parts


def kl_part(
    teacher_T: torch.Tensor, student_T: torch.Tensor, config: TeacherRewardConfig
) -> tuple[float, float, dict[str, float]]:
    """The part of the reward that an explanation's pieces (T,) give by their log-probs, and the KL that is reported.

    Returns:
        the term of the reward; -r_KL; the reductions of the KL by name. The first two differ only with
        `include_teacher_think_entropy: false`, where -log p_student takes the KL's place in the reward.
    """
    k_T = kl_estimate(teacher_T.float(), student_T.float(), config.use_schulman_kl_estimation)
    kl, parts = naturalness(k_T, config)
    term = kl if config.include_teacher_think_entropy else naturalness(-student_T.float(), config)[0]
    return term, kl, {f"reasoning_kl_{name}": value for name, value in parts.items()}


def piece_log_probs(values_N: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """(T,) of pieces, from those of their tokens (N,): the sum of each piece."""
    if len(sizes) == len(values_N):
        return values_N
    return torch.segment_reduce(values_N, "sum", lengths=torch.tensor(sizes, device=values_N.device))


def suitability(reading: Reading, student_N: torch.Tensor, ranks_N: torch.Tensor) -> dict[str, float]:
    """Figures of the explanation's tokens, of the log-probs and ranks (N,) of explanation and solution."""
    thought = slice(len(reading.explanation.right))
    ratio = rank_surprisal_ratio(student_N[thought].float(), ranks_N[thought])
    return {"rsr": ratio, "likelihood": likelihood(student_N[thought].float())}


class TeacherReward:
    """Scores completions of a teacher; holds no model.

    Args:
        tokenizer: the teacher's.
        student_tokenizer: the student's, with its own chat template; None: the teacher's serves both.
        student_ranked: is asked for log-probs and ranks at temperature 1; parts then tell how well the explanation
            suits the student (`suitability.py`).
    """

    def __init__(
        self,
        tokenizer,
        style: ReasoningFormat,
        config: TeacherRewardConfig,
        teacher_temperature: float,
        teacher_log_probs: LogProbFunction,
        student_log_probs: LogProbFunction,
        student_tokenizer=None,
        student_ranked: RankedFunction | None = None,
    ):
        self.tokenizer = tokenizer
        self.student_tokenizer = student_tokenizer or tokenizer
        self.style = style
        self.config = config
        self.teacher_temperature = teacher_temperature if config.unbias_teacher_log_probs else 1.0
        self.student_temperature = config.unbias_student_log_probs_temp
        self.teacher_log_probs = teacher_log_probs
        self.student_log_probs = student_log_probs
        self.student_ranked = student_ranked

    def score(self, rows: list[dict], completions: list[str]) -> list[Scored]:
        """Rewards of completions.

        Args:
            rows: `question`, `solution` and optional `teacher_system_prompt`, `student_system_prompt` per completion.
            completions: what the teacher wrote after its prompt, special tokens left out.

        Returns:
            One `Scored` per completion. Any string gets one; its numbers are finite when the models' log-probs are.

        Raises:
            Refused: a solution without a token that lies wholly inside its tags (rows are checked at load).
        """
        return self.score_readings(self.read(rows, completions))

    def score_readings(self, readings: list[Reading]) -> list[Scored]:
        """Rewards of the readings that `read` gave."""
        teacher = self.teacher_log_probs(
            [r.teacher.ids for r in readings], [r.teacher_counted for r in readings], self.teacher_temperature
        )
        asked = [r.student.ids for r in readings], [r.student_counted for r in readings]
        student = self.student_log_probs(*asked, self.student_temperature)
        scored = [self._combine(r, t, s) for r, t, s in zip(readings, teacher, student, strict=True)]
        if self.student_ranked is None:
            return scored
        log_probs, ranks = self.student_ranked(*asked, 1.0)
        return [
            replace(one, parts={**one.parts, **suitability(r, s, ranked)})
            for one, r, s, ranked in zip(scored, readings, log_probs, ranks, strict=True)
        ]

    def read(self, rows: list[dict], completions: list[str]) -> list[Reading]:
        """The texts of both models, tokenised once, and which tokens count. Arguments and errors as in `score`."""
        teacher_texts, student_texts, matched = [], [], []
        for row, completion in zip(rows, completions, strict=True):
            prompt = render_teacher_prompt(
                self.tokenizer, self.style, row["question"], row["solution"], row.get("teacher_system_prompt")
            )
            completion = completion.encode("utf-8", "replace").decode()  # a lone surrogate has no tokens
            explanation, closed = split_completion(self.style, completion)
            teacher_texts.append(render_teacher_reading(self.style, prompt, completion))
            student_texts.append(
                render_student_reading(
                    self.student_tokenizer,
                    self.style,
                    row["question"],
                    row["solution"],
                    f"\n\n{explanation}",
                    row.get("student_system_prompt"),
                )
            )
            matched.append(closed and bool(explanation.strip()))
        teachers = tokenize_with_spans(self.tokenizer, teacher_texts)
        students = tokenize_with_spans(self.student_tokenizer, student_texts)
        readings = []
        for row, teacher, student, fine in zip(rows, teachers, students, matched, strict=True):
            if not student.spans["solution"]:
                raise Refused(f"solution {row['solution']!r} has no token wholly inside its tags")
            pieces = Aligned([], [], [], [])
            if fine or self._has_text(teacher):
                pieces = align_spans(teacher, "explanation", student, "thought", self._same_token)
            readings.append(Reading(teacher, student, pieces, fine and len(pieces) > 0))
        return readings

    def _same_token(self, teacher: int, student: int) -> bool:
        """Whether ids of both tokenizers stand for the same text, or for the same bytes of a character."""
        if self.student_tokenizer is self.tokenizer:
            return teacher == student
        token = self.tokenizer.convert_ids_to_tokens(teacher)
        return token == self.student_tokenizer.convert_ids_to_tokens(student)

    def _has_text(self, reading: TokenizedText) -> bool:
        """Whether the explanation has more than white space: only then is it compared token by token."""
        return bool(self.tokenizer.decode([reading.ids[i] for i in reading.spans["explanation"]]).strip())

    def _combine(self, reading: Reading, teacher: torch.Tensor, student: torch.Tensor) -> Scored:
        pieces = reading.explanation
        thought, solution_T = student.split([len(pieces.right), len(student) - len(pieces.right)])
        thought_T, teacher_T = piece_log_probs(thought, pieces.right_sizes), piece_log_probs(teacher, pieces.left_sizes)
        solution, solution_names = solution_part(solution_T, self.config)
        term, kl, kl_names = kl_part(teacher_T.to(thought_T.device), thought_T, self.config)
        match = 0.0 if reading.matched else self.config.not_matched_penalty
        parts = {**solution_names, **kl_names}
        log_probs = (torch.cat([thought_T, solution_T]).cpu(), teacher_T.cpu())
        return Scored(solution + term + match, solution, kl, match, parts, log_probs)

"""What `reward_cfg` adds to the paper's reward: right answers of the student (`generated.py`), a gate (`gate.py`).

This module knows no model: who writes the answers comes in as a function.
"""

from collections.abc import Callable
from dataclasses import replace

from rlt.prompts.rendering import split_completion
from rlt.prompts.styles import ReasoningFormat, check_tags
from rlt.rewards.gate import gate_penalty, own_result
from rlt.rewards.generated import answer_in, answer_prompt, drawn_share, kept_tokens
from rlt.rewards.teacher import Reading, Scored
from rlt.rewards.verifiers import DDP_TIMEOUT_S, Verifier
from rlt.schema import GeneratedRewardConfig, ResultGateConfig, RewardOptions

CHECKED = ("question", "solution", "task", "metadata")  # columns that a check reads
# (prompts, seeds of each prompt's answers) -> token ids of the answers, prompt by prompt.
Write = Callable[[list[list[int]], list[list[int]]], list[list[list[int]]]]


class AddedTerms:
    """Adds to scored completions what the options ask for; nothing where they ask for nothing.

    Args:
        tokenizer: the student's.
        write: how the frozen student answers, with a seed for each answer.
        ddp_timeout: seconds that other ranks wait for this one.

    Raises:
        Refused: the student is to answer, and its tokenizer would leave a tag out of what it writes.
    """

    def __init__(
        self,
        options: RewardOptions,
        style: ReasoningFormat,
        tokenizer,
        write: Write,
        ddp_timeout: float = DDP_TIMEOUT_S,
    ):
        self.generated, self.gate = options.generated, options.gate
        self.style, self.tokenizer, self.write = style, tokenizer, write
        if self.generated is not None:
            check_tags(style, tokenizer)  # of what the student writes, for which its tags have to be read
        parts = {"answers": self.generated, "results": self.gate}
        self._verifiers = {
            name: Verifier(part.verifier, part.verifier_limit_s, ddp_timeout)
            for name, part in parts.items()
            if part is not None
        }

    def __call__(
        self, rows: list[dict], completions: list[str], readings: list[Reading], scored: list[Scored], seeds: list[int]
    ) -> list[Scored]:
        """The same with larger or smaller rewards, and the terms among their parts.

        Args:
            rows: of each completion, with what its check reads.
            seeds: of each completion; with the same seeds the student draws the same.
        """
        if self.generated is not None:
            scored = self._with_answers(self.generated, rows, readings, scored, seeds)
        if self.gate is not None:
            scored = self._with_gate(self.gate, rows, completions, scored)
        return scored

    def _with_answers(
        self, config: GeneratedRewardConfig, rows: list[dict], readings: list[Reading], scored: list[Scored], seeds
    ) -> list[Scored]:
        """An explanation without its end tag, or without a token, is not answered after: its share is 0."""
        shares = [config.answers_cut or drawn_share(seed) for seed in seeds]
        asked = [place for place, reading in enumerate(readings) if reading.matched]
        prompts = []
        for place in asked:
            kept = kept_tokens(shares[place], len(readings[place].explanation.right))
            prompts.append(answer_prompt(self.tokenizer, self.style, readings[place], kept))
        count = config.answers_per_explanation
        written = self.write(prompts, [[seeds[place] + 1 + number for number in range(count)] for place in asked])
        texts = [self.tokenizer.decode(ids, skip_special_tokens=True) for some in written for ids in some]
        questions = [checked(rows[place]) for place in asked for _ in range(count)]
        answers = [answer_in(text, self.style, row["solution"]) for text, row in zip(texts, questions, strict=True)]
        verdicts = self._verifiers["answers"].check_batch(answers, questions)
        right = [0.0] * len(readings)
        for number, place in enumerate(asked):
            right[place] = sum(verdicts[number * count : (number + 1) * count]) / count
        return [
            with_term(one, config.answers_weight * value, answers_right=value, answers_cut=share)
            for one, value, share in zip(scored, right, shares, strict=True)
        ]

    def _with_gate(
        self, config: ResultGateConfig, rows: list[dict], completions: list[str], scored: list[Scored]
    ) -> list[Scored]:
        results = [
            own_result(split_completion(self.style, completion)[0], self.style, row["solution"])
            for row, completion in zip(rows, completions, strict=True)
        ]
        verdicts = self._verifiers["results"].check_batch(results, [checked(row) for row in rows])
        right = [None if result is None else value > 0 for result, value in zip(results, verdicts, strict=True)]
        penalties = [gate_penalty(each, config) for each in right]
        return [
            with_term(
                one, penalty, gate=penalty, result_found=float(each is not None), result_right=float(each is True)
            )
            for one, penalty, each in zip(scored, penalties, right, strict=True)
        ]


def checked(row: dict) -> dict:
    return {key: row[key] for key in CHECKED if row.get(key) is not None}


def with_term(scored: Scored, term: float, **parts: float) -> Scored:
    return replace(scored, reward=scored.reward + term, parts={**scored.parts, **parts})

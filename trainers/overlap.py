"""The next batch is written by an engine's own process while this one is trained on (`overlap_generation=true`).

What is trained on then comes from weights of one batch before. TRL's importance-sampling correction, which compares
the engine's log-probs with the policy's, accounts for that as it does for the engine's precision.
"""

from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any

Base: Any = object  # a mixin: what it asks of the GRPO trainer is there once it is mixed in


@dataclass(frozen=True)
class Ahead:
    """A batch that was asked for before it is needed."""

    prompt_ids: list[list[int]]
    policy_step: int  # optimizer steps behind the weights that write it
    request: int | None  # by which the engine knows it
    written: tuple[list[list[int]], list[list[float]]] | None = None  # once it has been collected


class OverlappedGeneration(Base):
    """Mixed into the GRPO trainer, whose `vllm_generation` is then an `EngineProcess`."""

    _ahead: Ahead | None = None

    def _generate_ahead(self, prompt_ids: list[list[int]]):
        """This batch, as written while the last was trained on; then ask for the next, with the present weights."""
        ahead, step = self._ahead, self.state.global_step
        self._ahead = None
        if ahead is None or ahead.prompt_ids != prompt_ids:  # the first batch
            self._sync_engine()
            ahead = Ahead(prompt_ids, step, self._submit(prompt_ids, self._phase()))
        self._metrics["train"]["generation/staleness_steps"].append(step - ahead.policy_step)
        written = ahead.written or self.vllm_generation.collect(ahead.request)
        following = self._step + self.args.steps_per_generation * self.num_iterations
        if following < self.state.max_steps * self.args.gradient_accumulation_steps:
            self._sync_engine()
            prompts = self._tokenize_prompts([row["prompt"] for row in self._rows_at(following)])[0]
            self._ahead = Ahead(prompts, step, self._submit(prompts, ("train", self._questions_before(following))))
        return written

    def _submit(self, prompt_ids: list[list[int]], phase: tuple[str, int]) -> int:
        return self.vllm_generation.submit(prompt_ids, self._request_seeds(len(prompt_ids), phase))

    def _rows_at(self, micro_step: int) -> list[dict]:
        """The rows that the data loader will give at a micro-step to come."""
        size = self._train_batch_size * self.args.steps_per_generation
        sampler = self._new_sampler()
        epoch, batch = divmod(micro_step, -(-len(sampler) // size))
        sampler.set_epoch(epoch)
        return [self.train_dataset[i] for i in islice(sampler, batch * size, (batch + 1) * size)]

    # Resume

    def _written_ahead(self) -> dict[str, Any] | None:
        """What was asked for, waited for: a resumed run must train on what older weights wrote, too."""
        if self._ahead is not None and self._ahead.written is None:
            written = self.vllm_generation.collect(self._ahead.request)
            self._ahead = replace(self._ahead, request=None, written=written)
        return asdict(self._ahead) if self._ahead else None

    def _take_up(self, state: dict[str, Any] | None) -> None:
        self._ahead = Ahead(**state) if state else None

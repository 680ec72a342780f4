"""The order of questions, by the number of an epoch."""

from typing import Any

from trl.trainer.utils import RepeatSampler


class EpochRepeatSampler(RepeatSampler):
    """TRL's sampler with a permutation that depends on the epoch's number, not on how often it was iterated."""

    @classmethod
    def like(cls, sampler: Any, seed: int) -> "EpochRepeatSampler":
        """In the place of TRL's `RepeatSampler`."""
        return cls(
            sampler.data_source,
            sampler.mini_repeat_count,
            sampler.batch_size,
            sampler.repeat_count,
            sampler.shuffle,
            seed,
        )

    def set_epoch(self, epoch: int) -> None:
        if self.shuffle:
            self.generator.manual_seed((self.seed or 0) + epoch)

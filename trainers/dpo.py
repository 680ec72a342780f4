"""Preference training of a teacher on its own ranked traces, on TRL's DPO trainer (arXiv 2305.18290)."""

import trl

from trainers.stopping import GivesUpSteps


class DPOTrainer(GivesUpSteps, trl.DPOTrainer):
    """TRL's, with checkpoints that are complete or absent. Rows have `prompt`, `chosen` and `rejected`, as text."""

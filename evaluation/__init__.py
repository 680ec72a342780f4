"""What answers are worth: accuracy, pass@k, intervals, comparisons."""

from evaluation.metrics import Estimate, bootstrap, paired_difference, pass_at_k

__all__ = ["Estimate", "bootstrap", "paired_difference", "pass_at_k"]

"""Where numbers of a configuration may lie, for every key that no other check looks at.

Outside of these a run would fail late, train without end, or train on nonsense.
"""

from collections.abc import Callable
from typing import Any

from rlt.errors import Refused

COUNTS = (
    *("num_iterations", "num_generations_eval", "ref_model_sync_steps", "per_device_eval_batch_size"),
    *("lora_r", "lora_alpha", "vllm_tensor_parallel_size", "ddp_timeout", "dataloader_prefetch_factor"),
    *("answers_per_explanation", "answers_max_length", "select_student_tokens"),
    *("max_length", "max_student_length", "model_max_length", "logprob_token_budget", "precompute_ref_batch_size"),
)
SIZES = (
    *("model_size", "logging_steps", "adam_epsilon", "repetition_penalty", "vllm_server_timeout"),
    *("sapo_temperature_neg", "sapo_temperature_pos"),
    *("max_surprisal", "log_sum_exp_temperature", "answers_temperature", "answers_weight"),
)
NOT_NEGATIVE = (
    *("beta", "epsilon", "epsilon_high", "weight_decay", "warmup_steps", "dataloader_num_workers"),
    *("eval_answers", "eval_steps", "min_margin", "clip_log_prob", "clip_kl"),
)
SHARES = ("top_p", "vllm_gpu_memory_utilization", "top_share")
BELOW_ONE = ("adam_beta1", "adam_beta2", "lora_dropout")
PARTS = ("surprising_weight", "min_p", "ref_model_mixup_alpha", "top_entropy_quantile")
RANGES: tuple[tuple[tuple[str, ...], Callable[[float], bool], str], ...] = (
    (COUNTS, lambda value: value >= 1, "at least 1"),
    (SIZES, lambda value: value > 0, "above 0"),
    (NOT_NEGATIVE, lambda value: value >= 0, "0 or more"),
    (SHARES, lambda value: 0 < value <= 1, "above 0 and at most 1"),
    (BELOW_ONE, lambda value: 0 <= value < 1, "0 or more and below 1"),
    (PARTS, lambda value: 0 <= value <= 1, "in 0 to 1"),
    (("answers_cut",), lambda value: 0 < value < 1, "above 0 and below 1, or null to draw it for each explanation"),
    (("wrong_result_penalty",), lambda value: value <= 0, "0 or less"),
    (("top_k",), lambda value: value >= -1, "-1 or 0 for all tokens, or at least 1"),
)


def check_ranges(config: dict[str, Any]) -> None:
    """Numbers that no run can work with are refused; null, where a key admits it, is none.

    Raises:
        Refused: the first key whose value lies outside, and what would do.
    """
    for key, value in config.items():
        if value != value:  # NaN, which no comparison refuses
            raise Refused(f"{key}={value} must be a number")
    for keys, fits, words in RANGES:
        for key in keys:
            if config.get(key) is not None and not fits(config[key]):
                raise Refused(f"{key}={config[key]} must be {words}")

"""What an engine that samples for GRPO asks of a run: its log-probs are compared with the policy's, token by token."""

import json
from collections.abc import Mapping
from typing import Any

from rlt.errors import Refused
from rlt.schema import Generating, GRPOSettings

MODE = "vllm_importance_sampling_mode"
# What of a request changes the distribution that is sampled from, and with it vLLM's log-probs, which are taken after
# all of it; and the values that leave it whole. All such fields of vLLM's `SamplingParams`, but for the temperature.
NOTHING = (None, [], {})
WHOLE: dict[str, tuple] = {
    "top_p": (1, None),
    "top_k": (0, -1, None),
    "min_p": (0, None),
    "repetition_penalty": (1, None),
    "presence_penalty": (0, None),
    "frequency_penalty": (0, None),
    "min_tokens": (0, None),  # the end of a text is not sampled before
    "logit_bias": NOTHING,
    "bad_words": NOTHING,
    "allowed_token_ids": NOTHING,
    "structured_outputs": NOTHING,
    "logits_processors": NOTHING,
    "extra_args": NOTHING,  # of logits processors and samplers that were plugged in
    "thinking_token_budget": NOTHING,
    "trace_decode_token_ids": NOTHING,
}


def check_generation(settings: Generating) -> None:
    """What every run that samples needs."""
    if settings.temperature <= 0:
        raise Refused(f"temperature={settings.temperature}: sampling needs a temperature above 0, such as 0.7")
    if not 0 <= settings.save_completions_probability <= 1:
        raise Refused(f"save_completions_probability={settings.save_completions_probability} must be in [0, 1]")
    cache = settings.trl.get("cache_implementation")
    if settings.use_vllm and cache is not None:
        raise Refused(f"cache_implementation={cache} is Hugging Face's: set use_vllm=false")
    if settings.use_vllm_server and not settings.trl.get("vllm_server_base_url"):
        raise Refused(
            "use_vllm_server=true needs vllm_server_base_url; launch_with_server.sh starts servers and sets it"
        )


def check_engine(settings: GRPOSettings) -> None:
    """Keys of sampling by vLLM that do not go together.

    Raises:
        Refused: the first of them.
    """
    if settings.overlap_generation:
        check_overlap(settings)
    trl = settings.trl
    if not settings.use_vllm:
        return
    if not trl.get("vllm_importance_sampling_correction", True):
        return
    given = {key: trl[key] for key in WHOLE if key in trl} | _generation_kwargs(trl)
    for key, whole in WHOLE.items():
        if given.get(key, whole[0]) not in whole:
            raise Refused(
                f"{key}={given[key]}: the engine's log-probs would be those of a cut distribution, and their ratio to "
                f"the policy's would leave little to learn from; leave {key} out, or set "
                "vllm_importance_sampling_correction=false"
            )
    if given.get("temperature") not in (None, settings.temperature):
        raise Refused(
            f"generation_kwargs: temperature={given['temperature']} is not the temperature={settings.temperature} that "
            "log-probs are taken at: set temperature alone"
        )
    if trl.get("loss_type") == "vespo" and not str(trl.get(MODE)).startswith("token_"):
        raise Refused(f"loss_type=vespo with {MODE}={trl.get(MODE)}: it weighs completions itself; set token_truncate")


def _generation_kwargs(trl: Mapping[str, Any]) -> dict[str, Any]:
    """What a request carries beside the settings; TRL takes it as a text of JSON, too."""
    given = trl.get("generation_kwargs") or {}
    try:
        given = json.loads(given) if isinstance(given, str) else given
    except json.JSONDecodeError as error:
        raise Refused(f"generation_kwargs={given} is not JSON ({error.msg}): write {{key: value}}") from None
    if not isinstance(given, dict):
        raise Refused(f"generation_kwargs={given}: write {{key: value}}")
    return given


def check_overlap(settings: GRPOSettings) -> None:
    """What another process generates while this one trains is one batch off-policy, and shares the device."""
    wanted = {"use_vllm": True, "use_vllm_server": False, "vllm_enable_sleep_mode": False}
    for key, value in wanted.items():
        if getattr(settings, key) != value:
            raise Refused(
                f"overlap_generation=true with {key}={getattr(settings, key)}: set {key}={str(value).lower()}"
            )
    if not settings.trl.get("vllm_importance_sampling_correction", True):
        raise Refused(
            "overlap_generation=true needs vllm_importance_sampling_correction=true, which accounts for older weights"
        )

"""What the configuration of a collection, an evaluation or a pipeline alone can tell; as checks.py of what trains."""

import re
from typing import Any

from rlt.errors import Refused
from rlt.planning.checks import check_context, context_length
from rlt.planning.reward_checks import check_reward, check_reward_options, check_verifier
from rlt.preparation.prerequisites import check_settings
from rlt.schema import CollectSettings, EvaluateSettings, PipelineSettings, PrepareSettings, RunConfig, Sampling
from rlt.traces.ranking import check_select


def check_job(settings: RunConfig) -> None:
    """Collections, evaluations, pipelines and preparations."""
    if isinstance(settings, PipelineSettings):
        check_stages(settings.stages)
    elif isinstance(settings, Sampling):
        check_sampling(settings)
    elif isinstance(settings, PrepareSettings):
        check_settings(settings)
    if isinstance(settings, CollectSettings):
        check_collection(settings)
    elif isinstance(settings, EvaluateSettings):
        check_evaluation(settings)


def check_sampling(settings: Sampling) -> None:
    for key in ("max_completion_length", "questions_at_once", "max_prompt_length", "logprob_token_budget"):
        if (value := getattr(settings, key)) is not None and value < 1:
            raise Refused(f"{key}={value} must be positive")
    for key in ("use_peft", "load_in_4bit", "load_in_8bit", "eval_dataset_id_or_path"):
        if getattr(settings, key):
            raise Refused(f"{key} is for runs that train; a {settings.trainer} run ignores it")
    check_context(settings)
    if settings.use_vllm_server and not settings.vllm_server_base_url:
        raise Refused("use_vllm_server=true needs vllm_server_base_url")
    if settings.vllm_tensor_parallel_size > 1 and not settings.use_vllm_server:
        raise Refused(
            f"vllm_tensor_parallel_size={settings.vllm_tensor_parallel_size}: here every device has questions of its "
            "own; ./launch_with_server.sh has servers with tensor parallelism"
        )


def check_stages(stages: list[dict[str, Any]]) -> None:
    seen: set[str] = set()
    for entry in stages:
        if not isinstance(entry, dict) or not {"name", "run"} <= set(entry) <= {"name", "run", "set"}:
            raise Refused(f"stages: {entry} must have name and run, and may have set")
        for key, value in (entry.get("set") or {}).items():
            for name in re.findall(r"{(.*?)}", str(value)):
                if name not in seen:
                    raise Refused(f"stages: {key} of {entry['name']} names {name!r}, which is no stage before it")
        if entry["name"] in seen:
            raise Refused(f"stages: the name {entry['name']} is used twice")
        seen.add(entry["name"])


def check_collection(settings: CollectSettings) -> None:
    check_reward(settings)
    check_reward_options(settings)
    if settings.permute_rewards:
        raise Refused("permute_rewards=true: it is for training; set select=random for traces drawn by chance")
    check_select(settings.select)
    if settings.select in ("likelihood", "rsr") and not settings.report_rsr:
        raise Refused(f"select={settings.select} needs the student's log-probs and ranks: set report_rsr=true")
    if settings.student_model is None:
        raise Refused("student_model=null: name the student whose understanding ranks the traces")
    if settings.temperature <= 0:
        raise Refused(f"temperature={settings.temperature}: sampling needs a temperature above 0, such as 0.7")
    if settings.top_p != 1:
        raise Refused(f"top_p={settings.top_p}: the log-probs of a cut distribution are not those of the reward")
    if settings.max_student_length > (context := context_length(settings)):
        raise Refused(f"max_student_length={settings.max_student_length} is longer than the context of {context}")
    count, kept = settings.traces_per_question, settings.keep_per_question
    if not 1 <= kept <= count:
        raise Refused(f"keep_per_question={kept} must be in 1 to traces_per_question={count}")
    for key in ("min_reward_quantile", "min_format_rate", "near_duplicate_similarity"):
        if not 0 <= getattr(settings, key) <= 1:
            raise Refused(f"{key}={getattr(settings, key)} must be in [0, 1]")


def check_evaluation(settings: EvaluateSettings) -> None:
    check_verifier(settings)
    if settings.eval_size:
        raise Refused(f"eval_size={settings.eval_size}: an evaluation asks all rows, none is held out; set it to 0")
    samples = settings.samples_per_question
    if samples < 1 or (samples > 1 and settings.temperature <= 0):
        raise Refused(f"samples_per_question={samples} with temperature={settings.temperature}: all are the same")
    for k in settings.pass_at:
        if not isinstance(k, int) or not 1 <= k <= samples:
            raise Refused(f"pass_at={settings.pass_at}: {k} is not in 1 to samples_per_question={samples}")

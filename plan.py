"""What a run will do, before anything heavy is loaded: batch arithmetic, memory estimate, checks across keys.

A run that cannot work is refused here with a `ValueError` of one line that names the key, its value and the values
that would do. Imports neither torch nor an engine.
"""

import contextlib
import json
import os
import shutil
import socket
import threading
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from checks import (
    JOBS,
    OFFLINE,
    check_batch,
    check_combinations,
    check_common,
    check_groups,
    check_keys,
    check_lengths,
    check_reward,
    check_sharding,
)
from data.benchmarks import BENCHMARKS
from data.formats import load_format
from data.learned import saved_configuration
from data.sources import inspect_source, load_rows
from data.splits import check_disjoint
from errors import Refused
from generation.parts import check_sources, models_of
from job_checks import check_job
from memory import GIB, ask_nvidia_smi, estimate_memory, gpu_memory_gib, parameters
from models.embedded import GGUF_FILES, is_embedded
from models.files import check_files
from models.paths import LOCAL_STARTS, MERGED, adapter_base, is_adapter

# A run may be continued with other values of these: lengths of the run, logging, saving, devices.
CONTINUABLE = frozenset(
    {
        *("max_steps", "num_train_epochs", "requires", "dry_run", "warmup_run"),
        *("output_dir", "results_dir", "run_name", "overwrite_output_dir"),
        *("logging_steps", "report_to", "eval_steps", "save_completions_probability"),
        *("save_steps", "save_total_limit", "save_merged_model"),
        *("per_device_train_batch_size", "logprob_token_budget", "gradient_checkpointing", "offload_untrained_models"),
        *("vllm_gpu_memory_utilization", "vllm_enable_sleep_mode", "use_vllm_server", "vllm_server_base_url"),
    }
)
# And with other values of these while it is not complete: they say what is made of its samples.
UNTIL_COMPLETE = frozenset(
    {
        *("min_format_rate", "min_reward_quantile", "keep_per_question", "max_student_length"),
        *("near_duplicate_similarity", "compare_with", "pass_at"),
    }
)
# What a run reads.
INPUTS = (
    *("model_name_or_path", "student_model", "dataset_id_or_path", "eval_dataset_id_or_path"),
    *("resume_from", "compare_with"),
)
NETWORK_TIMEOUT_S = 3.0
PORTS = {"https": 443, "http": 80}
MARKER = "COMPLETE"  # written last into an output folder, with what was done
SECRET = ("hub_token", "password", "secret", "api_key")  # how keys end whose values are not shown
BEFORE_A_RUN = ("config.yaml.tmp", "logs")  # a rank on another machine may be ahead


@dataclass(frozen=True)
class Plan:
    """A run that was found possible: its configuration, arithmetic, estimate, and what is missing on this machine."""

    config: dict[str, Any]
    devices: int
    gpus: int
    accumulation_steps: int
    steps_per_generation: int
    memory_gib: dict[str, float] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    warms_up_first: bool = False

    @property
    def is_grpo(self) -> bool:
        return self.config["trainer"] not in (*OFFLINE, *JOBS)

    def report(self) -> str:
        """The batch table and the estimate, as text."""
        c = self.config
        if c["trainer"] in JOBS:
            if c["trainer"] == "pipeline":
                return "\n".join(f"{number}. {s['name']}: {s['run']}" for number, s in enumerate(c["stages"], start=1))
            samples = c.get("traces_per_question") or c["samples_per_question"]
            return (
                f"devices              {self.devices}{'' if self.gpus else ' (CPU)'}\n"
                f"questions x answers  {c['dataset_size'] or 'all'} x {samples}, {c['questions_at_once']} at once"
            )
        lines = [
            f"devices                       {self.devices}{'' if self.gpus else ' (CPU)'}",
            f"rows per step                 {c['train_batch_size']}",
            f"  = per device                {c['per_device_train_batch_size']} x {self.devices} devices x "
            f"{self.accumulation_steps} accumulated",
        ]
        if self.is_grpo:
            prompts = c["train_batch_size"] // c["num_generations"]
            tokens = prompts * c["max_prompt_length"] + c["train_batch_size"] * c["max_completion_length"]
            batch = c["per_device_train_batch_size"] * self.devices * self.steps_per_generation
            lines += [
                f"prompts x completions         {prompts} x {c['num_generations']}",
                f"completions generated at once {batch} (every {self.steps_per_generation} micro-batches)",
                f"tokens per step, at most      {tokens:,}",
            ]
        lines += ["memory per device, estimated (GiB, at the longest batch):"]
        lines += [f"  {phase:<27} {gib:.1f}" for phase, gib in self.memory_gib.items()]
        return "\n".join(lines)


def count_gpus() -> int:
    """NVIDIA GPUs that this process may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([d for d in visible.split(",") if d.strip() not in ("", "-1")]) if shutil.which("nvidia-smi") else 0
    if not shutil.which("nvidia-smi"):
        return 0
    return sum(line.startswith("GPU ") for line in ask_nvidia_smi("-L"))


def make_plan(config: dict[str, Any], devices: int = 1, warms_up_first: bool = False, sharding: str = "ddp") -> Plan:
    """Check a resolved configuration and work out its arithmetic.

    Args:
        config: the flat configuration, interpolations resolved.
        devices: processes that train.
        warms_up_first: another run will first make the model at `model_name_or_path`.
        sharding: over the devices, one of `launching.SHARDINGS`.

    Raises:
        Refused: one line on the first thing that cannot work. What this machine merely lacks (files, network, a
            GPU) is in `Plan.missing` when `dry_run` is set, and raised like everything else when it is not.
    """
    check_keys(config)
    gpus = count_gpus()
    if config["trainer"] in JOBS:
        check_job(config)
        if config["trainer"] != "pipeline":  # whose stages are planned by themselves
            load_format(config["reasoning_format"])
        return _on_this_machine(Plan(config, devices, gpus, 0, 0))
    accumulation = check_batch(config, devices)
    generation = config.get("generation_aggregation_steps") or accumulation
    if config["trainer"] not in OFFLINE:
        check_groups(config, devices, generation)
        check_lengths(config)
        check_combinations(config)
    check_sharding(config, devices, sharding)
    if config["trainer"] == "teacher_grpo":
        check_reward(config)
    check_common(config)
    load_format(config["reasoning_format"])
    memory = estimate_memory(config, gpu_memory_gib(), devices, sharding)
    return _on_this_machine(Plan(config, devices, gpus, accumulation, generation, memory, [], warms_up_first))


def _on_this_machine(plan: Plan) -> Plan:
    """The plan, with what is missing here when it is only looked at."""
    config = plan.config
    of_the_plan = [partial(check, plan) for check in (check_device, check_servers, check_data, check_models)]
    of_its_folders = [partial(check, config) for check in (check_comparison, check_output, check_parts, check_disk)]
    for check in (*of_the_plan, *of_its_folders):
        try:
            check()
        except Refused as error:
            if not config["dry_run"]:
                raise
            plan.missing.append(str(error))
    return plan


def is_complete(config: dict) -> bool:
    """Whether an earlier life of the run came to the end that is asked for now."""
    marker = Path(config["output_dir"]) / MARKER
    if config["overwrite_output_dir"] or not marker.is_file():
        return False
    if config["trainer"] in JOBS:
        return True
    done = json.loads(marker.read_text())
    if config["max_steps"] > 0:
        return done["steps"] >= config["max_steps"]
    return done["epochs"] >= config["num_train_epochs"]


# What depends on this machine: raised before a run, listed by a dry run.


def check_device(plan: Plan) -> None:
    if plan.config["requires"] == "gpu" and not plan.gpus:
        raise Refused(f"run {plan.config['run_name']} needs a GPU and none is visible (requires=null tries the CPU)")


def check_servers(plan: Plan) -> None:
    """Servers that are said to be there already; those that the launcher starts have no port yet."""
    named = plan.config.get("vllm_server_base_url") if plan.config.get("use_vllm_server") else None
    for url in [named] if isinstance(named, str) else named or []:
        address = urlsplit(url)
        if address.hostname is None or address.port is None:
            raise Refused(f"vllm_server_base_url={url} is no address such as http://host:8000")
        if address.port and not _answers(address.hostname, address.port):
            raise Refused(f"vllm_server_base_url={url} does not answer")
        if address.port and not os.environ.get("RLT_SERVER_KEY"):
            raise Refused(f"vllm_server_base_url={url}: set RLT_SERVER_KEY to the servers' key")


def check_data(plan: Plan) -> None:
    config = plan.config
    sources = [config.get(key) for key in ("dataset_id_or_path", "eval_dataset_id_or_path")]
    for key, source in zip(("dataset_id_or_path", "eval_dataset_id_or_path"), sources, strict=True):
        if source is None:
            continue
        try:
            inspect_source(source)
        except Refused as error:
            raise Refused(f"{key}={source}: {error}") from None
        if source.startswith("benchmark/"):
            _check_hub(key, BENCHMARKS[source.removeprefix("benchmark/")].hub_name, "datasets")
        elif not source.startswith("reasoning_gym/") and not Path(source).expanduser().exists():
            _check_hub(key, source, "datasets")
    if sources[1] and sources[0] == sources[1]:
        raise Refused(
            f"eval_dataset_id_or_path={sources[1]}: the evaluation rows are among the training rows; name another "
            "source, or set eval_size to hold some out"
        )
    files = [source for source in sources if source and Path(source).expanduser().is_file()]
    if not files or config["trainer"] in (*JOBS, "dpo"):
        return
    style, held_out = load_format(config["reasoning_format"]), config["eval_size"]
    tags = (style.thought_tags, style.solution_tags)
    if len(files) == 2:
        check_disjoint(*(load_rows(source, tags=tags).rows for source in files))
    elif sources[1] is None and held_out:
        found = len(load_rows(files[0], size=held_out + 1, tags=tags).rows)
        if found <= held_out:
            raise Refused(f"eval_size={held_out} leaves nothing of {found} rows to train on")


def check_comparison(config: dict[str, Any]) -> None:
    other = config.get("compare_with")
    if other is not None and not (Path(other) / "evaluation.json").is_file():
        raise Refused(f"compare_with={other} holds no evaluation.json: name the output folder of an evaluation")


def check_models(plan: Plan) -> None:
    named = {key: plan.config.get(key) for key in ("model_name_or_path", "student_model")}
    if plan.warms_up_first:
        del named["model_name_or_path"]
    check_models_exist({key: name for key, name in named.items() if name is not None})


def check_models_exist(named: dict[str, str]) -> None:
    """Each model must be embedded, a local folder, in the hub's cache, or a hub name while the hub answers."""
    for key, name in named.items():
        if is_embedded(name):
            if name not in GGUF_FILES:
                raise Refused(f"{key}={name} is not embedded: use one of {', '.join(GGUF_FILES)}")
            continue
        path = Path(name).expanduser()
        if path.is_dir():
            check_files(path)
            if is_adapter(path) and not (path / MERGED).is_dir():
                check_models_exist({f"{key}={name}, base": _base_of(key, path)})
            elif not is_adapter(path) and not (path / "config.json").is_file():
                raise Refused(f"{key}={name}: the folder holds no model (no config.json)")
            continue
        if name.startswith(LOCAL_STARTS) or name.count("/") != 1:
            raise Refused(f"{key}={name}: model path does not exist")
        _check_hub(key, name, "models")


def _base_of(key: str, adapter: Path) -> str:
    try:
        return adapter_base(adapter)
    except Refused as error:
        raise Refused(f"{key}={adapter}: {error}") from None


def _check_hub(key: str, name: str, kind: str) -> None:
    """A hub name must be in the local cache, or the hub must answer."""
    from huggingface_hub import constants

    if (Path(constants.HF_HUB_CACHE) / f"{kind}--{name.replace('/', '--')}").is_dir():
        return
    address = urlsplit(constants.ENDPOINT)
    reason = "is not in the local cache, and the hub is switched off (HF_HUB_OFFLINE)"
    if not constants.HF_HUB_OFFLINE:
        if address.scheme in getproxies() or _answers(address.hostname, address.port or PORTS[address.scheme]):
            return
        reason = "is no local path, is not in the local cache, and the hub does not answer"
    raise Refused(f"{key}={name} {reason}")


def _answers(host: str, port: int) -> bool:
    """Whether a connection opens in time; in a thread, because looking up a name has no time limit of its own."""
    opened = []

    def connect() -> None:
        with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=NETWORK_TIMEOUT_S):
            opened.append(True)

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(NETWORK_TIMEOUT_S)
    return bool(opened)


def hide_secrets(value: Any, key: str = "") -> Any:
    """What may be printed and written of a configuration, of a stage's settings in it, or of one value."""
    if isinstance(value, dict):
        return {name: hide_secrets(inner, name) for name, inner in value.items()}
    if isinstance(value, list):
        return [hide_secrets(inner) for inner in value]
    return "<hidden>" if value and key.endswith(SECRET) else value


def check_output(config: dict[str, Any]) -> None:
    """The output folder must be new, or of the same run, and what it is emptied of none of the run's inputs."""
    folder = Path(config["output_dir"])
    begun = any(folder.glob("checkpoint-*"))  # and no longer in need of the checkpoint that it began with
    if config["resume_from"] is not None and not begun and not Path(config["resume_from"]).is_dir():
        raise Refused(f"resume_from={config['resume_from']} is not a checkpoint folder")
    if folder.exists() and not folder.is_dir():
        raise Refused(f"output_dir={folder} is a file: choose another output_dir")
    before, now = saved_configuration(folder), hide_secrets(config)
    if before is None:
        if folder.is_dir() and any(path.name not in BEFORE_A_RUN for path in folder.iterdir()):
            raise Refused(f"output_dir={folder} holds files that no run here wrote: choose another output_dir")
        return
    if config["overwrite_output_dir"]:
        check_overwriting(config, folder.resolve())
        return
    free = CONTINUABLE if (folder / MARKER).is_file() else CONTINUABLE | UNTIL_COMPLETE
    free |= {"resume_from"} if begun and config["resume_from"] is None else frozenset()
    changed = [k for k in sorted({*before, *now} - free) if before.get(k) != now.get(k)]
    if changed:
        key = changed[0]
        raise Refused(
            f"output_dir={config['output_dir']} holds a different run ({key}: {before.get(key)} there, "
            f"{now.get(key)} now): set output_dir, or overwrite_output_dir=true to delete it"
        )


def check_overwriting(config: dict, folder: Path) -> None:
    for key in INPUTS:
        named = config.get(key)
        places = [Path(named).expanduser().resolve()] if isinstance(named, str) else []
        if any(place == folder or folder in place.parents for place in places if place.exists()):
            raise Refused(f"overwrite_output_dir=true would delete {key}={named}: choose another output_dir")


def check_parts(config: dict[str, Any]) -> None:
    """A job's parts, finished or not, must be of the models that are there now."""
    check_sources(config, models_of(config))


def check_disk(config: dict[str, Any]) -> None:
    if config["trainer"] in JOBS or is_complete(config):
        return
    folder = Path(config["output_dir"]).absolute()
    while not folder.exists():
        folder = folder.parent
    trained = parameters(config) * (0.02 if config["use_peft"] else 1)
    per_checkpoint = trained * 16 + (parameters(config) * 4 if config.get("sync_ref_model") else 0)
    needed = per_checkpoint * ((config["save_total_limit"] or 5) + 1) + parameters(config) * 4
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise Refused(
            f"output_dir={config['output_dir']}: checkpoints need about {needed / GIB:.0f} GiB and "
            f"{free / GIB:.0f} GiB are free: lower save_total_limit or choose another disk"
        )

"""A model's card for a hub: what made it, what came of it, which data and licence stand behind it.

Made from the output folder alone, whose `config.yaml` has no secrets. TRL's own card names the trainer and its papers.
"""

from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from rlt.data.sources import BENCHMARK, GENERATOR
from rlt.durable import read_json_lines, write_whole
from rlt.estimates import bootstrap, paired_bootstrap
from rlt.models.embedded import is_embedded
from rlt.places import LOCAL_STARTS
from rlt.planning.configuration import as_value, compose_config, options
from rlt.reports.result import measure_of
from rlt.runs.dashboard import run_question
from rlt.runs.folder import CONFIG, EVALUATIONS, HELD_OUT, METRICS, MODEL_CARD, run_in
from rlt.runs.hidden import holds_secret
from rlt.runs.learned import lineage
from rlt.schema import profile_of

EMBEDDED_BASE = {"embedded/smollm2-135m-instruct": ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")}
LOGGED = ("eval_loss", "eval_accuracy", "eval_format_rate", "loss")  # where no question has a figure of its own
PLACES = ("run_name", "output_dir", "results_dir", "overwrite_output_dir", "report_to")  # say nothing of the model
LIBRARIES = ("trl", "transformers", "torch", "datasets")


def write_model_card(folder: Path, kept_step: int | None = None) -> None:
    """Into the output folder, under the name that a hub shows.

    Args:
        kept_step: of the weights that the run ended with; None: its last.
    """
    write_whole(folder / MODEL_CARD, model_card(folder, kept_step))


def model_card(folder: Path, kept_step: int | None = None) -> str:
    """Markdown below the YAML that a hub reads; arguments as of `write_model_card`."""
    config = run_in(folder)
    runs = [config, *lineage(Path(config["model_name_or_path"]).expanduser())]  # newest first
    base, licence = base_of(runs[-1]["model_name_or_path"])
    sections = [
        f"---\n{yaml.safe_dump(metadata(runs, base, licence), sort_keys=False)}---\n",
        f"# {config['run_name']}\n",
        f"{run_question(config)}\n",
        f"## Run\n\n{made_by(config)}",
        f"## Figures\n\n{figures(folder, kept_step)}",
        f"## Data\n\n{data(folder, runs)}",
        f"## Licence\n\n{licence_text(base, licence, runs)}",
    ]
    return "\n".join(sections)


def base_of(name: str) -> tuple[str, str | None]:
    """The model that a lineage began with, by its name on a hub where it has one, and the licence on its card."""
    if is_embedded(name):
        return EMBEDDED_BASE[name]
    return name, _licence_on_card(name)


def _licence_on_card(name: str) -> str | None:
    """None where the model has no card, it names no licence, or the hub cannot be asked."""
    from httpx import HTTPError
    from huggingface_hub import ModelCard
    from huggingface_hub.errors import HFValidationError

    own = Path(name).expanduser() / MODEL_CARD
    if is_local(name) and not own.is_file():
        return None
    try:
        card = ModelCard.load(own if own.is_file() else name, ignore_metadata_errors=True)
        return card.data.to_dict().get("license")
    except (HTTPError, OSError, HFValidationError):
        return None


def metadata(runs: list[dict[str, Any]], base: str, licence: str | None) -> dict[str, Any]:
    """What a hub searches by; names of its own alone, no paths."""
    datasets = [run["dataset_id_or_path"] for run in runs if is_hub_dataset(run["dataset_id_or_path"])]
    found = {
        "license": licence,
        "base_model": None if is_local(base) else base,
        "datasets": list(dict.fromkeys(datasets)),
        "library_name": "peft" if runs[0]["use_peft"] and not runs[0]["save_merged_model"] else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["trl", profile_of(runs[0]).config, "arxiv:2506.08388"],
    }
    return {key: value for key, value in found.items() if value}


def is_local(name: str) -> bool:
    return name.startswith(LOCAL_STARTS) or Path(name).expanduser().exists()


def is_hub_dataset(name: str) -> bool:
    return not is_local(name) and not name.startswith((GENERATOR, BENCHMARK)) and name.count("/") == 1


def made_by(config: dict[str, Any]) -> str:
    """The command, as far as the run differs from its file, and the versions that it ran with."""
    name = config["run_name"]
    own = name in options("run_cfg")
    default, _ = compose_config([name] if own else [])
    shown = {key: value for key, value in config.items() if key not in PLACES and not holds_secret(key)}
    changed = {key: value for key, value in shown.items() if default.get(key) != value}
    keys = "".join(f" \\\n  {key}={as_value(value)}" for key, value in sorted(changed.items()))
    versions = ", ".join(f"{library} {version(library)}" for library in LIBRARIES)
    file = f"Run file `cfgs/run_cfg/{name}.yaml`" if own else "Of no run file of its own"
    return (
        f"{file}, seed {config['seed']}; all settings are in `{CONFIG}`.\n\n```\n./launch_mono.sh "
        f"{name if own else default['run_name']}{keys}\n```\n\n{versions}.\n"
    )


def figures(folder: Path, kept_step: int | None) -> str:
    """Held-out questions at the start and at the end, with intervals; else what was logged."""
    records = read_json_lines(folder / EVALUATIONS)
    if len(records) > 1:
        return paired_figures(records, kept_step)
    logs = [record for record in read_json_lines(folder / METRICS) if record.keys() & set(LOGGED)]
    rows = []
    for name in LOGGED:
        values = [record[name] for record in logs if record.get(name) is not None]
        if values:
            rows.append(f"| {name} | {values[0]:.3f} | {values[-1]:.3f} |")
    if not rows:
        return "None were taken.\n"
    return "\n".join(["| as logged, without intervals | first | last |", "|---|---|---|", *rows, ""])


def paired_figures(records: list[dict], kept_step: int | None) -> str:
    first, last = records[0], next((record for record in records if record["step"] == kept_step), records[-1])
    main = measure_of(first)
    lines = [
        f"{len(first[main])} held-out questions, before step 1 and after step {last['step']}; means with 95 % "
        "bootstrap intervals over questions, the difference paired by question.",
        "",
        "| | start | end | difference |",
        "|---|---|---|---|",
    ]
    names = [name for name in first if name not in ("step", main) and name in last]
    for name in (main, *names):
        gain = paired_bootstrap(first[name], last[name])
        lines.append(f"| {name} | {bootstrap(first[name])} | {bootstrap(last[name])} | {gain.signed} |")
    if kept_step is not None:
        lines += ["", f"Step {last['step']} was chosen on these questions from {len(records) - 1} evaluations."]
    return "\n".join([*lines, ""])


def data(folder: Path, runs: list[dict[str, Any]]) -> str:
    """What the model learned from, its own run first, then those that it started from."""
    lines = []
    for run in runs:
        name = run["dataset_id_or_path"]
        size = f"{run['dataset_size']} rows" if run["dataset_size"] else "all rows"
        which = f"seed {run['dataset_seed']}" if name.startswith(GENERATOR) else f"split {run['dataset_split']}"
        lines.append(f"- {run['run_name']} ({run['trainer']}): `{name}`, {size}, {which}")
    if held_out := read_json_lines(folder / HELD_OUT):
        lines.append(f"- held out of the first: {len(held_out)} questions, in `{HELD_OUT}`")
    return "\n".join([*lines, ""])


def licence_text(base: str, licence: str | None, runs: list[dict[str, Any]]) -> str:
    known = f"`{base}`, which is under {licence}" if licence else f"`{base}`, whose licence its card does not name"
    sources = ", ".join(dict.fromkeys(f"`{run['dataset_id_or_path']}`" for run in runs))
    return f"The weights are derived from {known}. Data has licences of its own: {sources}.\n"

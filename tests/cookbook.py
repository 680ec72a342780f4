"""What the recipes of tinker-cookbook need to run without a hub, and the command of each.

The recipes are the installed package's own, unchanged. A folder named like a public model holds the small model's
tokenizer, and folders named like data sets hold a few rows.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

PUBLIC_NAME = "Qwen/Qwen3-4B-Instruct-2507"  # recipes know its chat form, which is the small model's too
LOCAL = "smollm2"  # a folder with the small model, which is served under its path
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json")
VERSION = "0.6.1"
INSTALL_S, RUN_S = 1200, 1200
# The package asks for a tml-renderers that no index has; only renderers of other models use it.
NEEDED = (
    *("tinker==0.38.0", "aiohttp", "blobfile", "chz", "cloudpickle", "datasets", "huggingface-hub", "pillow", "pyrage"),
    *("rich", "safetensors", "termcolor", "tiktoken", "tqdm", "tml-renderers", "math-verify", "pylatexenc", "sympy"),
    "torch==2.13.0",
)
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "rlt-grpo"


def python_of_cookbook() -> Path:
    folder = CACHE / f"tinker-cookbook-{VERSION}"
    python, done = folder / "bin" / "python", folder / "installed"
    if not done.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True, timeout=INSTALL_S)
        for words in (NEEDED, ("--no-deps", f"tinker-cookbook=={VERSION}")):
            if subprocess.run([python, "-m", "pip", "install", "--quiet", *words], timeout=INSTALL_S).returncode:
                pytest.skip(f"tinker-cookbook {VERSION} cannot be installed here")
        done.touch()
    return python


@dataclass(frozen=True)
class Recipe:
    module: str  # below tinker_cookbook.recipes
    words: tuple[str, ...]
    steps: int  # that its metrics must have
    after: str | None = None  # a recipe whose folder it goes on in
    local: bool = False  # the model by its path

    def command(self, name: str, folder: Path) -> list[str]:
        model = folder / LOCAL if self.local else PUBLIC_NAME
        log = f"log_path=runs/{self.after or name}"
        return ["-m", f"tinker_cookbook.recipes.{self.module}", f"model_name={model}", log, *self.words]


ARITHMETIC = ("env=arithmetic", "group_size=4", "groups_per_batch=4", "max_tokens=5", "loss_fn=importance_sampling")
GSM8K = ("env=gsm8k", "group_size=2", "groups_per_batch=2", "max_tokens=16", "loss_fn=importance_sampling")
SMALL = ("batch_size=4", "max_length=128")
RECIPES = {
    "arithmetic": Recipe("math_rl.train", (*ARITHMETIC, "max_steps=2", "save_every=1"), 2),
    "resume": Recipe(
        "math_rl.train", (*ARITHMETIC, "max_steps=3", "behavior_if_log_dir_exists=resume"), 3, after="arithmetic"
    ),
    "gsm8k": Recipe(
        "math_rl.train", (*GSM8K, "max_steps=1", "compute_post_kl=True", "num_substeps=2", "eval_every=1"), 1
    ),
    "off_policy": Recipe("math_rl.train", (*ARITHMETIC, "max_steps=2", "max_steps_off_policy=2"), 2),
    "streamed": Recipe(
        "math_rl.train",
        (
            *ARITHMETIC,
            *("max_steps=1", "stream_minibatch_config.groups_per_batch=4", "stream_minibatch_config.num_minibatches=2"),
        ),
        1,
    ),
    "role_colon": Recipe("math_rl.train", (*ARITHMETIC, "max_steps=1", "renderer_name=role_colon"), 1),
    "rl_loop": Recipe(
        "rl_loop", ("batch_size=2", "group_size=2", "max_tokens=16", "max_steps=2", "loss_fn=importance_sampling"), 2
    ),
    "rl_loop_cispo": Recipe(
        "rl_loop", ("batch_size=2", "group_size=2", "max_tokens=16", "max_steps=1", "loss_fn=cispo"), 1
    ),
    "rl_loop_gspo": Recipe(
        "rl_loop", ("batch_size=2", "group_size=2", "max_tokens=16", "max_steps=1", "loss_fn=gspo"), 1
    ),
    "sl_loop": Recipe("sl_loop", (*SMALL, "max_steps=3", "save_every=2"), 3),
    "sl_basic": Recipe("sl_basic", ("save_every=0",), 1),
    "chat_sl": Recipe("chat_sl.train", (*SMALL, "dataset=no_robots", "max_steps=2", "eval_every=0"), 2),
    "prompt_distillation": Recipe(
        "prompt_distillation.train", (*SMALL, "file_path=chat.jsonl", "max_steps=2", "eval_every=0"), 2
    ),
    "dpo": Recipe("preference.dpo.train", (*SMALL, "dataset=hhh", "max_steps=2"), 2),
    "dpo_local": Recipe(
        "preference.dpo.train", (*SMALL, "dataset=hhh", "max_steps=2", "renderer_name=role_colon"), 2, local=True
    ),
    "on_policy_distillation": Recipe(
        "distillation.on_policy_distillation",
        (
            *(f"teacher_model={PUBLIC_NAME}", "dataset=deepmath", "groups_per_batch=2", "group_size=2"),
            *("max_tokens=16", "max_steps=1", "eval_every=0"),
        ),
        1,
    ),
}


def question(number: int) -> tuple[str, str]:
    a, b = number % 7, number % 5
    return f"What is {a} + {b}?", str(a + b)


def _chat(number: int) -> dict:
    asked, answer = question(number)
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    return {"prompt": asked, "messages": messages}


def _math(number: int) -> dict:
    asked, answer = question(number)
    return {"question": asked, "answer": f"#### {answer}", "final_answer": answer}


def _pair(number: int) -> dict:
    asked, answer = question(number)
    start = f"\n\nHuman: {asked}\n\nAssistant: "
    return {"chosen": start + answer, "rejected": start + "I do not know."}


DATA_SETS = {
    "openai/gsm8k": ("main", _math),
    "HuggingFaceH4/no_robots": ("default", _chat),
    "Anthropic/hh-rlhf": ("default", _pair),
    "zwhe99/DeepMath-103K": ("default", _math),
}


def _write_rows(path: Path, row, count: int) -> None:
    path.write_text("".join(json.dumps(row(number)) + "\n" for number in range(count)))


def _write_data_set(folder: Path, config: str, row) -> None:
    folder.mkdir(parents=True)
    lines = ["---", "configs:", f"- config_name: {config}", "  data_files:"]
    for split, count in (("train", 160), ("test", 8)):
        _write_rows(folder / f"{split}.jsonl", row, count)
        lines += [f"  - split: {split}", f"    path: {split}.jsonl"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))


def make_place(folder: Path, model: Path) -> None:
    """The folder that recipes run in."""
    alias = folder / PUBLIC_NAME
    alias.mkdir(parents=True)
    for name in TOKENIZER_FILES:
        shutil.copy(model / name, alias / name)
    (folder / LOCAL).symlink_to(model)
    for name, (config, row) in DATA_SETS.items():
        _write_data_set(folder / name, config, row)
    _write_rows(folder / "chat.jsonl", _chat, 64)


def environment(folder: Path, address: str, key: str) -> dict[str, str]:
    """The data sets' cache is new, as one that is kept gives old rows."""
    variables = {name: os.environ[name] for name in ("PATH", "HOME", "OMP_NUM_THREADS") if name in os.environ}
    variables |= {"TINKER_BASE_URL": address, "TINKER_API_KEY": key, "TINKER_TELEMETRY": "0", "HF_HUB_OFFLINE": "1"}
    variables |= {"HF_DATASETS_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "datasets"), "WANDB_MODE": "disabled"}
    return variables | {"TINKER_COOKBOOK_RUNS_DIR": str(folder / "runs"), "CUDA_VISIBLE_DEVICES": ""}


def start_recipe(name: str, recipe: Recipe, folder: Path, variables: dict[str, str]) -> subprocess.Popen:
    command = [str(python_of_cookbook()), *recipe.command(name, folder)]
    with (folder / f"{name}.log").open("w") as out:
        return subprocess.Popen(command, cwd=folder, env=variables, stdout=out, stderr=out)


def run_recipe(name: str, recipe: Recipe, folder: Path, variables: dict[str, str]) -> list[dict]:
    """Its metrics, one row for each step."""
    with start_recipe(name, recipe, folder, variables) as running:
        try:
            code = running.wait(RUN_S)
        finally:
            running.kill()
    assert code == 0, (folder / f"{name}.log").read_text()[-3000:]
    metrics = folder / "runs" / (recipe.after or name) / "metrics.jsonl"
    return [json.loads(line) for line in metrics.read_text().splitlines()]

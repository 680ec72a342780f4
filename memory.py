"""How many parameters a policy has, and the memory that a run of it takes, estimated before it is loaded."""

import json
from pathlib import Path
from typing import Any

GIB = 2**30


def parameters(config: dict[str, Any]) -> float:
    """How many parameters the policy has: counted in a local folder's safetensors headers, else as the key says."""
    folder = Path(config["model_name_or_path"]).expanduser()
    total = 0
    for path in folder.glob("*.safetensors") if folder.is_dir() else ():
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        shapes = [entry["shape"] for name, entry in header.items() if name != "__metadata__"]
        total += sum(_product(shape) for shape in shapes)
    return total or config["model_size"] * 1e9


def _product(shape: list[int]) -> int:
    result = 1
    for size in shape:
        result *= size
    return result


def estimate_memory(config: dict[str, Any]) -> dict[str, float]:
    """GiB of one device by phase, from parameter counts; activations as 34 bytes x hidden size x layers per token.

    Source of the activation term: arXiv 2205.05198, eq. 1, without its quadratic part (SDPA keeps no scores).
    Sharding is not counted: this is what one device without it would hold.
    """
    size = parameters(config)
    weight_bytes = 0.55 if config["load_in_4bit"] else 2 if config["use_peft"] else 4
    trained = size * (0.02 if config["use_peft"] else 1)
    policy = size * weight_bytes + trained * 12 + (trained * 4 if config["use_peft"] else 0)
    width = (size / 12) ** (1 / 3) * 4  # hidden size x layers^(1/2) of a usual transformer, within a factor of 2
    tokens = min(config["logprob_token_budget"], config.get("max_length") or config["logprob_token_budget"])
    kept = 2 if config["gradient_checkpointing"] else 34
    update = policy + tokens * width * 24 * kept
    phases = {"update (policy, optimizer)": update / GIB}
    if config["trainer"] == "sft":
        return phases
    frozen = 0.0 if config["use_peft"] or not config["beta"] else size * 4
    student = size * 2 if config.get("student_model") else 0.0
    stays = 0.0 if config["offload_untrained_models"] else frozen + student
    phases["update (policy, optimizer)"] += stays / GIB
    phases["reference and student"] = (size * weight_bytes + frozen + student + tokens * width * 48) / GIB
    phases["generation (engine weights)"] = (size * 2 + size * weight_bytes) / GIB
    return phases

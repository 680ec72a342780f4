"""How many parameters a policy has, the memory that a run of it takes, and the profile that a GPU has the memory for.

All of it is estimated before anything is loaded. `benchmarks/memory.py` compares the estimate with real runs.
"""

import contextlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlt.models.embedded import cache_folder, is_embedded
from rlt.models.files import model_settings, tensor_shapes
from rlt.models.paths import MERGED, adapter_base, is_adapter
from rlt.schema import IPC, profile_of

GIB = 2**30
# Per parameter:
FLOAT32_BYTES, BFLOAT16_BYTES = 4, 2
FOUR_BIT_BYTES, EIGHT_BIT_BYTES = 0.6, 1.1  # with their scales, and the layers that stay as they are
GRADIENT_BYTES = 6  # a float32 gradient, and under autocast the weight's copy from the forward to the backward pass
ADAM_BYTES, ADAM_8BIT_BYTES, PAGED_BYTES = 8, 2, 0  # two moments; what is paged moves to the host when it has to
READING_BYTES = 40  # per hidden unit and token of a packed pass without gradients
ACTIVATION_BYTES = 50  # per hidden unit, layer and token of a step, kept for the way back under autocast
CHECKPOINT_BYTES = 4  # the same with gradient checkpointing: a layer's input
HEAD_BYTES = 2**26 * 6  # logits held at once (logprobs/head.py), in bfloat16 and float32
# Of a config.json with layers that read each prompt once per completion: state space, delta rule.
RECURRENT_KEYS = ("mamba_", "ssm_", "linear_num_")
ADAPTER_SHARE = 0.02  # of the policy's parameters, for rank 16 on all linear layers
WEIGHTS_SHARDED = ("zero3", "offload", "fsdp")
GRADIENTS_SHARDED = ("zero2", *WEIGHTS_SHARDED)
STATE_SHARDED = ("zero1", *GRADIENTS_SHARDED)

logger = logging.getLogger("rlt")


@dataclass(frozen=True)
class Shape:
    """What the estimate asks of a model: parameters, hidden size, layers, and whether some of these are recurrent."""

    parameters: float
    hidden: float
    layers: float
    recurrent: bool = False


def model_folder(config: dict[str, Any]) -> Path | None:
    """Where the policy's files are on this machine, with nothing loaded or converted; an adapter's are its base's."""
    name = config["model_name_or_path"]
    if name is None:
        return None
    folder = cache_folder() / name.removeprefix("embedded/") if is_embedded(name) else Path(name).expanduser()
    try:
        for place in (folder, folder / MERGED):
            if (place / "config.json").is_file() and not is_adapter(place):
                return place
        return model_folder({"model_name_or_path": adapter_base(folder)}) if is_adapter(folder) else None
    except (ValueError, OSError):  # said by the plan's check of models, or when it is loaded
        return None


def student_shape(config: dict[str, Any], policy: Shape) -> Shape | None:
    """The frozen student's, from its folder, else the policy's; None where no student is held: there is none, or the
    reference is it (`build_student` in trainers/build.py). Of a distillation it is the teacher's."""
    distils = profile_of(config).distils
    name = config["teacher_model"] if distils else config.get("student_model")
    if distils and name is None:  # the starting weights, which stand under an adapter
        return None if config["use_peft"] else policy
    moves = config.get("sync_ref_model") or config["load_in_4bit"] or config["load_in_8bit"]
    is_reference = not distils and config.get("beta") and not moves and name == config["model_name_or_path"]
    if name is None or is_reference:
        return None
    student = {"model_name_or_path": name, "model_size": policy.parameters / 1e9}
    return shape_of(student) if model_folder(student) else policy


def parameters(config: dict[str, Any]) -> float:
    """How many parameters the policy has: counted in a local folder's safetensors headers, else as the key says."""
    folder = model_folder(config)
    files = list(folder.glob("*.safetensors")) if folder else []
    sizes = []
    with contextlib.suppress(ValueError):  # a file that is not whole, which the plan's check of models names
        sizes = [_product(shape) for path in files for shape in tensor_shapes(path).values()]
    return sum(sizes) or config["model_size"] * 1e9


def _product(shape: list[int]) -> int:
    result = 1
    for size in shape:
        result *= size
    return result


def shape_of(config: dict[str, Any]) -> Shape:
    """From a local config.json; else that of a usual transformer, 100 hidden units per layer and 12 x hidden² each."""
    size, folder = parameters(config), model_folder(config)
    found = model_settings(folder) if folder else config.get("model_shape") or {}
    found = found.get("text_config", found)
    if not {"hidden_size", "num_hidden_layers"} <= found.keys():  # not here, or named otherwise
        layers = (size / 12 / 100**2) ** (1 / 3)
        return Shape(size, 100 * layers, layers)
    recurrent = any(key.startswith(RECURRENT_KEYS) for key in found)
    return Shape(size, found["hidden_size"], found["num_hidden_layers"], recurrent)


def estimate_memory(
    config: dict[str, Any], gpu_gib: float | None = None, devices: int = 1, sharding: str = "ddp"
) -> dict[str, float]:
    """GiB of one device by phase, at the longest batch.

    Weights, gradients and optimizer state by their bytes per parameter; activations by bytes per hidden unit, layer and
    token, measured (the term is that of arXiv 2205.05198, eq. 1, without its quadratic part, which our attention does
    not keep). Shards are as in ZeRO (arXiv 1910.02054): of the optimizer's state, of gradients, of weights.

    Args:
        config: the flat configuration.
        gpu_gib: of the GPU; gives the engine its share of it. None: the engine's weights alone are counted.
        devices: that the run has.
        sharding: over them, one of `launching.SHARDINGS`.
    """
    shape = shape_of(config)
    weights, gradients, state = _held_bytes(config, shape, devices, sharding)
    sharded = sharding in WEIGHTS_SHARDED
    gathered = 2 * FLOAT32_BYTES * shape.parameters / shape.layers if sharded else 0.0  # two layers at once
    resident = weights + state + gathered
    update = resident + gradients + _activation_bytes(config, shape) + HEAD_BYTES
    reference = _reference_bytes(config, shape, devices, sharding)
    if not profile_of(config).generates:
        return {"update (policy, optimizer)": (update + reference) / GIB}
    found = student_shape(config, shape)
    half = config["bf16"] is not False
    student = found.parameters * (BFLOAT16_BYTES if half else FLOAT32_BYTES) if found else 0.0
    engine = 0.0
    if config["use_vllm"] and (not config["use_vllm_server"] or config["weight_transfer"] == IPC):
        engine = config["vllm_gpu_memory_utilization"] * gpu_gib * GIB if gpu_gib else shape.parameters * BFLOAT16_BYTES
    asleep = config["vllm_enable_sleep_mode"]
    resident += 0.0 if asleep else engine
    frozen, waits = reference + student, config["offload_untrained_models"]
    # A reference that moves, or that DeepSpeed or FSDP holds, stays where the policy is (trainers/grpo.py).
    reference_waits = waits and sharding == "ddp" and not config.get("sync_ref_model")
    stays = (0.0 if reference_waits else reference) + (0.0 if waits else student)
    reading = token_budget(config) * max(shape.hidden, found.hidden if found else 0) * READING_BYTES + HEAD_BYTES
    phases = {
        "generation": resident + stays + (engine if asleep else 0.0),
        "log-probs and reward": resident + frozen + reading,
        "update (policy, optimizer)": update + stays + (0.0 if asleep else engine),
    }
    return {name: size / GIB for name, size in phases.items()}


def token_budget(config: dict[str, Any]) -> int:
    """Tokens of one packed forward pass; where the key is null, those of a micro-batch of one prompt's completions."""
    if config["logprob_token_budget"] is not None:
        return config["logprob_token_budget"]
    rows = config["per_device_train_batch_size"]
    if not profile_of(config).generates:
        return rows * config["max_length"]
    return config["max_prompt_length"] + min(rows, config["num_generations"]) * config["max_completion_length"]


def _reference_bytes(config: dict[str, Any], shape: Shape, devices: int, sharding: str) -> float:
    """Of an adapter's policy the base is the reference; shards of `offload` are in the host's memory."""
    if config["use_peft"] or not config.get("beta") or sharding == "offload" or profile_of(config).distils:
        return 0.0
    each = BFLOAT16_BYTES if _deepspeed_in_bfloat16(config, sharding) else FLOAT32_BYTES
    return shape.parameters * each / (devices if sharding in WEIGHTS_SHARDED else 1)


def _deepspeed_in_bfloat16(config: dict[str, Any], sharding: str) -> bool:
    """Whether DeepSpeed casts the models that it is given."""
    return sharding in STATE_SHARDED and sharding != "fsdp" and config["bf16"] is not False


def _policy_bytes(config: dict[str, Any], shape: Shape) -> float:
    if config["load_in_4bit"] or config["load_in_8bit"]:
        return shape.parameters * (FOUR_BIT_BYTES if config["load_in_4bit"] else EIGHT_BIT_BYTES)
    return shape.parameters * (BFLOAT16_BYTES if config["use_peft"] else FLOAT32_BYTES)


def _trained(config: dict[str, Any], shape: Shape) -> float:
    return shape.parameters * (ADAPTER_SHARE if config["use_peft"] else 1)


def _gradient_bytes(config: dict[str, Any], shape: Shape) -> float:
    return _trained(config, shape) * (FLOAT32_BYTES if config["use_peft"] else GRADIENT_BYTES)


def _state_bytes(config: dict[str, Any], shape: Shape) -> float:
    """Optimizer state, and an adapter's own float32 weights."""
    optimizer = str(config.get("optim"))
    state = PAGED_BYTES if "paged" in optimizer else ADAM_8BIT_BYTES if "8bit" in optimizer else ADAM_BYTES
    adapter = FLOAT32_BYTES if config["use_peft"] else 0
    return _trained(config, shape) * (state + adapter)


def _held_bytes(config: dict[str, Any], shape: Shape, devices: int, sharding: str) -> tuple[float, float, float]:
    """Weights, gradients and optimizer state on one device."""
    weights, gradients, state = (
        _policy_bytes(config, shape),
        _gradient_bytes(config, shape),
        _state_bytes(config, shape),
    )
    if _deepspeed_in_bfloat16(config, sharding) and not config["use_peft"]:
        # The float32 masters are counted among the optimizer's state.
        weights = gradients = shape.parameters * BFLOAT16_BYTES
        state += shape.parameters * FLOAT32_BYTES
    if sharding in STATE_SHARDED:
        state /= devices
    if sharding in GRADIENTS_SHARDED:
        gradients /= devices
    if sharding in WEIGHTS_SHARDED:
        weights /= devices
    return (0.0, gradients, 0.0) if sharding == "offload" else (weights, gradients, state)


def _activation_bytes(config: dict[str, Any], shape: Shape) -> float:
    """Activations of one micro-batch, whose prompts are read once per group, by recurrent layers once per row."""
    rows = config["per_device_train_batch_size"]
    profile = profile_of(config)
    if not profile.generates:
        tokens = rows * config["max_length"] * (2 if profile.learns_from == "pairs" else 1)
    else:
        prompts = rows if shape.recurrent else -(-rows // max(config["num_generations"], 1))
        tokens = prompts * config["max_prompt_length"] + rows * config["max_completion_length"]
    per_layer = CHECKPOINT_BYTES if config["gradient_checkpointing"] else ACTIVATION_BYTES
    one_layer_again = ACTIVATION_BYTES if config["gradient_checkpointing"] else 0
    return tokens * shape.hidden * (per_layer * shape.layers + one_layer_again)

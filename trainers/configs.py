"""TRL's configurations and the fields that the trainers here add."""

from dataclasses import dataclass, field

import trl


@dataclass
class SFTConfig(trl.SFTConfig):
    """TRL's configuration and the fields that this trainer adds."""

    logprob_token_budget: int | None = field(
        default=8192, metadata={"help": "Most tokens of one packed forward pass; None: the longest sequence's."}
    )
    max_surprisal: float | None = field(
        default=None, metadata={"help": "Nats from which on a token counts by surprising_weight; None: all count."}
    )
    surprising_weight: float = field(default=0.0, metadata={"help": "Of tokens beyond max_surprisal, in [0, 1]."})


@dataclass
class GRPOConfig(trl.GRPOConfig):
    """TRL's configuration and the fields that this trainer adds."""

    logprob_token_budget: int | None = field(
        default=8192, metadata={"help": "Most tokens of one packed forward pass; None: the longest sequence's."}
    )
    save_completions_probability: float = field(
        default=0.0, metadata={"help": "Share of the steps whose completions are written, in [0, 1]."}
    )
    overlap_generation: bool = field(
        default=False,
        metadata={"help": "The next batch is written while this one is trained on."},
    )
    vllm_server_base_url: str | list | None = field(  # pyrefly: ignore[bad-override]  # several servers
        default=None, metadata={"help": "Addresses of the servers that generate, with use_vllm_server."}
    )
    weight_transfer: str = field(default="files", metadata={"help": "How weights reach the servers: files, nccl, ipc."})
    offload_untrained_models: bool = field(
        default=False, metadata={"help": "Frozen models wait in the CPU's memory between their phases."}
    )


@dataclass
class DistillationConfig(trl.DistillationConfig):
    """TRL's configuration and the fields that this trainer adds."""

    logprob_token_budget: int | None = field(
        default=8192, metadata={"help": "Most tokens of one packed forward pass; None: the longest sequence's."}
    )
    num_generations: int = field(default=1, metadata={"help": "Completions of one prompt in a step."})
    num_generations_eval: int = field(default=1, metadata={"help": "Answers to each held-out question."})
    divergence_top_k: int | None = field(
        default=None,
        metadata={"help": "The student's likeliest tokens, and one bucket for all others; None: the vocabulary."},
    )
    vllm_server_base_url: str | list | None = field(  # pyrefly: ignore[bad-override]  # several servers
        default=None, metadata={"help": "Addresses of the servers that generate, with use_vllm_server."}
    )
    weight_transfer: str = field(default="files", metadata={"help": "How weights reach the servers: files, nccl, ipc."})
    offload_untrained_models: bool = field(
        default=False, metadata={"help": "The teacher waits in the CPU's memory between its phases."}
    )

"""Answers of a model that is not trained: the engines of training, for collections and evaluations."""

from typing import Any

import torch
from accelerate import Accelerator

from generation.vllm_engine import Completions, VLLMEngine
from models.allocator import keep_freed_memory
from models.loading import load_frozen, load_tokenizer, supports_bfloat16
from models.paths import resolve_model_path

MAX_SEQUENCES = 256  # that the engine runs at once


class Sampler:
    """A model on this rank's engine, or on servers.

    Args:
        config: the flat configuration of a job.
    """

    def __init__(self, config: dict[str, Any]):
        on_gpu = torch.cuda.is_available()
        low = supports_bfloat16("cuda" if on_gpu else "cpu") if config["bf16"] is None else config["bf16"]
        self.dtype = torch.bfloat16 if low else torch.float32
        keep_freed_memory()
        path = resolve_model_path(config["model_name_or_path"])
        self.accelerator = Accelerator(cpu=not on_gpu, mixed_precision="bf16" if low else "no")
        self.tokenizer = load_tokenizer(path, config["trust_remote_code"])
        self.model = load_frozen(path, dtype=self.dtype, trust_remote_code=config["trust_remote_code"])
        self.model.to(self.accelerator.device)
        self.engine = self._build(config)
        self.engine.sync_weights()

    def _build(self, config: dict[str, Any]) -> VLLMEngine:
        options = {
            "model": self.model,
            "accelerator": self.accelerator,
            "processing_class": self.tokenizer,
            "engine_dtype": str(self.dtype).removeprefix("torch."),
            "tensor_parallel_size": config["vllm_tensor_parallel_size"],
            "gpu_memory_utilization": config["vllm_gpu_memory_utilization"],
            "max_model_length": config["max_prompt_length"] + config["max_completion_length"],
            "max_num_seqs": MAX_SEQUENCES,
            "trust_remote_code": config["trust_remote_code"],
            "temperature": config["temperature"],
            "top_p": config["top_p"],
            "max_completion_length": config["max_completion_length"],
            "mode": "colocate",
            "generation_kwargs": {},
        }
        if not config["use_vllm_server"]:
            return VLLMEngine(**options)
        from generation.server_engine import ServerEngine

        urls = config["vllm_server_base_url"]
        urls = [urls] if isinstance(urls, str) else urls
        return ServerEngine(**options, urls=urls, start_limit_s=config["vllm_server_timeout"])

    def __call__(self, prompts: list[list[int]], seeds: list[int]) -> Completions:
        """One completion of each prompt (token ids), as `VLLMEngine.generate_seeded`."""
        return self.engine.generate_seeded(prompts, seeds)

    def next_token_log_probs(self, prompts: list[list[int]], tokens: list[int]) -> list[float]:
        """As `VLLMEngine.next_token_log_probs`."""
        return self.engine.next_token_log_probs(prompts, tokens)

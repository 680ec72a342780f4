"""The engines of training, built in one place; and answers of a model that is not trained, by one of them."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator

from rlt.generation.vllm_engine import Completions, VLLMEngine
from rlt.models.devices import device_type, uses_bfloat16
from rlt.models.loading import check_vocabulary, load_frozen, load_tokenizer
from rlt.models.paths import resolve_model_path
from rlt.prompts.styles import load_format
from rlt.prompts.tokenizers import check_tokenizer
from rlt.schema import FILES, Sampling, server_urls
from rlt.survival.host_memory import keep_freed_memory

if TYPE_CHECKING:
    from rlt.generation.adapter_engine import AdapterEngine

MAX_SEQUENCES = 256  # that the engine runs at once


def build_engine(
    urls: list[str] | None = None,
    start_limit_s: float = 0.0,
    own_process: bool = False,
    weight_transfer: str = FILES,
    holder: str = "",
    **options: Any,
) -> VLLMEngine:
    """The one place that chooses between the four engines; they have the same surface.

    Args:
        urls: of the servers that generate; none: an engine on this rank's device.
        start_limit_s: seconds for a server to be ready.
        weight_transfer: how weights reach the servers: `files`, or one of vLLM's own transfers.
        holder: the run's name for others that want its servers (`holder_of`).
        own_process: the engine writes ahead in a process of its own (`EngineProcess`).
        options: as in `VLLMEngine`.
    """
    options = {"mode": "colocate", "generation_kwargs": {}, **options}  # as TRL calls an engine beside its trainer
    served: dict[str, Any] = {"urls": urls, "start_limit_s": start_limit_s, "holder": holder}
    if urls and weight_transfer != FILES:
        from rlt.generation.served.direct_engine import DirectEngine

        return DirectEngine(**options, **served, weight_transfer=weight_transfer)
    if urls:
        from rlt.generation.served.engine import ServerEngine

        return ServerEngine(**options, **served)
    if own_process:
        from rlt.generation.engine_process import EngineProcess

        return EngineProcess(**options)
    return VLLMEngine(**options)


def holder_of(run_name: str, output_dir: str) -> str:
    """How servers name a run to others: the same in each of its lives."""
    return f"{run_name}, output_dir={Path(output_dir).absolute()}"


def build_adapter_engine(folder: str) -> "AdapterEngine":
    """The engine of the training API: for a base model and adapters that come and go, without a trainer beside it.

    Raises:
        ImportError, ValueError, NotImplementedError: there is no vLLM, or it does not run this model.
    """
    from rlt.generation.adapter_engine import AdapterEngine

    return AdapterEngine(folder)


class Sampler:
    """A model on this rank's engine, or on servers.

    Args:
        settings: of a job.
    """

    def __init__(self, settings: Sampling):
        low = uses_bfloat16(settings.bf16)
        self.dtype = torch.bfloat16 if low else torch.float32
        keep_freed_memory()
        path = resolve_model_path(settings.model_name_or_path)
        self.accelerator = Accelerator(cpu=device_type() == "cpu", mixed_precision="bf16" if low else "no")
        self.tokenizer = load_tokenizer(path, settings.trust_remote_code)
        check_tokenizer(load_format(settings.reasoning_format), self.tokenizer)
        self.model = load_frozen(path, dtype=self.dtype, trust_remote_code=settings.trust_remote_code)
        check_vocabulary(self.model, self.tokenizer, settings.model_name_or_path)
        self.model.to(self.accelerator.device)
        self.engine = self._build(settings)
        self.engine.sync_weights()

    def _build(self, settings: Sampling) -> VLLMEngine:
        return build_engine(
            server_urls(settings.vllm_server_base_url) if settings.use_vllm_server else [],
            settings.vllm_server_timeout,
            holder=holder_of(settings.run_name, settings.output_dir),
            model=self.model,
            accelerator=self.accelerator,
            processing_class=self.tokenizer,
            engine_dtype=str(self.dtype).removeprefix("torch."),
            tensor_parallel_size=settings.vllm_tensor_parallel_size,
            gpu_memory_utilization=settings.vllm_gpu_memory_utilization,
            max_model_length=settings.max_prompt_length + settings.max_completion_length,
            max_num_seqs=MAX_SEQUENCES,
            trust_remote_code=settings.trust_remote_code,
            temperature=settings.temperature,
            top_p=settings.top_p,
            max_completion_length=settings.max_completion_length,
        )

    def __call__(self, prompts: list[list[int]], seeds: list[int]) -> Completions:
        """One completion of each prompt (token ids), as `VLLMEngine.generate_seeded`."""
        return self.engine.generate_seeded(prompts, seeds)

    def next_token_log_probs(self, prompts: list[list[int]], tokens: list[int]) -> list[float]:
        """As `VLLMEngine.next_token_log_probs`."""
        return self.engine.next_token_log_probs(prompts, tokens)

"""vLLM in the trainer's own process, on a GPU or on the CPU.

TRL's `VLLMGeneration` with three differences: requests carry seeds of their own, the CPU backend is set up and gets
its weights in the way it can take them, and several completions of one prompt are one call.
"""

import os

import torch
from trl.generation.vllm_generation import VLLMGeneration, extract_logprobs
from vllm import LLM, SamplingParams

CPU_BLOCK_SIZE = 32  # the CPU backend takes multiples of 32 only
CPU_KV_CACHE_GIB = "1"


class VLLMEngine(VLLMGeneration):
    """In-process engine (`vllm_mode="colocate"`) with reproducible sampling.

    Args:
        engine_dtype: "bfloat16" or "float32", used on the CPU; a GPU takes the model's own.
        other arguments: as in TRL's `VLLMGeneration`.
    """

    def __init__(self, *args, engine_dtype: str = "auto", **kwargs):
        self.engine_dtype = engine_dtype
        super().__init__(*args, **kwargs)

    @property
    def on_cpu(self) -> bool:
        return self.accelerator.device.type == "cpu"

    def _init_vllm(self):
        # Overridden because TRL's constructor call has no place for what the CPU backend needs.
        if not self.on_cpu:
            super()._init_vllm()
            return
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", CPU_KV_CACHE_GIB)
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        if self.engine_dtype == "bfloat16" and torch.cpu._is_amx_tile_supported():
            torch.cpu._init_amx()  # without it the first bfloat16 product of the process may die with SIGILL
        threads = torch.get_num_threads()
        self.llm = LLM(
            model=self.model.name_or_path,
            dtype=self.engine_dtype,
            max_model_len=self.max_model_length,
            max_num_seqs=self.max_num_seqs,
            block_size=CPU_BLOCK_SIZE,
            # A prompt cut in two steps rewinds its request's generator, which only CUDA's can do.
            enable_chunked_prefill=False,
            enforce_eager=True,
            load_format="dummy",  # the trainer's weights arrive before the first request
            # A tied output head would keep its packed copy of the old weights.
            hf_overrides={"tie_word_embeddings": False},
            logprobs_mode="processed_logprobs",
            model_impl=self.model_impl,
            trust_remote_code=self.trust_remote_code,
        )
        torch.set_num_threads(threads)
        self._llm_weights_sleeping = False

    def _iter_engine_params(self):
        names = set()
        for name, param in self._iter_named_params():
            names.add(name)
            yield name, param.detach()
        if "lm_head.weight" not in names:
            base = self.accelerator.unwrap_model(self.model)
            yield "lm_head.weight", base.get_output_embeddings().weight.detach()

    def sync_weights(self):
        # Overridden because the CPU backend re-packs weights after loading: they can be reloaded, not written into.
        if not self.on_cpu:
            super().sync_weights()
            return
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": self._iter_engine_params()})
        self.llm.reset_prefix_cache()

    def generate_seeded(
        self, prompts: list[list[int]], seeds: list[int], max_tokens: int | None = None
    ) -> tuple[list[list[int]], list[list[float]]]:
        """One completion per prompt, each from its own seed.

        Args:
            prompts: token ids; equal prompts share their cached prefix.
            seeds: one per prompt.

        Returns:
            Token ids of the completions, and the log-prob of each at the sampling temperature.
        """
        if self.enable_sleep_mode:
            if self._llm_weights_sleeping:
                self.sync_weights()
            self.llm.wake_up(tags=["kv_cache"])
        shared = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p or 0.0,
            "repetition_penalty": self.repetition_penalty,
            "max_tokens": max_tokens or self.max_completion_length,
            "logprobs": 0,
            **self.generation_kwargs,
        }
        requests = [{"prompt_token_ids": ids} for ids in prompts]
        params = [SamplingParams(**{**shared, "seed": seed}) for seed in seeds]
        outputs = self.llm.generate(requests, sampling_params=params, use_tqdm=False)
        log_probs, _ = extract_logprobs(outputs)
        if self.enable_sleep_mode:
            self.llm.sleep(level=2)
            self._llm_weights_sleeping = True
        ids = [list(output.outputs[0].token_ids) for output in outputs]
        return ids, [[position[0] for position in sequence] for sequence in log_probs]

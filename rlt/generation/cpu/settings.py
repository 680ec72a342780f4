"""What vLLM's CPU backend is asked for, in process and served."""

from typing import Any

from rlt.generation.cpu.norms import KERNELS

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_ATTN_SPLIT_KV": "0",  # a sequence's attention stays with one thread: 6 % faster with many sequences
}
OPTIONS: dict[str, Any] = {
    "block_size": 32,  # the backend takes multiples of 32 only
    # A prompt cut in two steps rewinds its request's generator, which only CUDA's can do.
    "enable_chunked_prefill": False,
    "enforce_eager": True,
    # A tied output head would keep its packed copy of the old weights.
    "hf_overrides": {"tie_word_embeddings": False},
    "kernel_config": KERNELS,
}

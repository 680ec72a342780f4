"""Engines that write completions, and the seeds of their requests.

`VLLMEngine` lives in `generation.vllm_engine`: importing it imports vLLM, which not every run needs.
"""

from generation.seeds import request_seed

__all__ = ["request_seed"]

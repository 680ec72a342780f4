"""vLLM in the trainer's own process, on a GPU or on the CPU.

TRL's `VLLMGeneration` with four differences: requests carry seeds of their own, the completions of a prompt are one
request, the CPU backend is set up and gets its weights in the way it can take them, and an adapter is added on the way
to the engine instead of in the policy.
"""

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate, groupby
from typing import Any

import numpy
import torch
from accelerate.utils import is_peft_model
from trl.generation.vllm_generation import VLLMGeneration, ensure_master_addr_port, extract_logprobs
from vllm import LLM, SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from rlt.generation.cpu import norms as cpu_norms
from rlt.generation.cpu import sampling as cpu_sampling
from rlt.generation.cpu import settings as cpu_settings
from rlt.generation.merging import merged_params
from rlt.generation.served.client import Completions


class VLLMEngine(VLLMGeneration):
    """In-process engine (`vllm_mode="colocate"`) with reproducible sampling.

    Args:
        engine_dtype: "bfloat16" or "float32", used on the CPU; a GPU takes the model's own.
        other arguments: as in TRL's `VLLMGeneration`.
    """

    max_num_seqs: Any
    llm: LLM

    def __init__(self, *args, engine_dtype: str = "auto", **kwargs):
        self.engine_dtype = engine_dtype
        super().__init__(*args, **kwargs)

    @property
    def on_cpu(self) -> bool:
        return self.accelerator.device.type == "cpu"

    def _init_vllm(self):
        # Overridden because TRL's constructor call has no place for what the CPU backend needs, and asks for an engine
        # that is quantised when the policy is, which takes neither 8-bit weights nor merged ones.
        size, ranks = self.tensor_parallel_size, self.accelerator.num_processes
        if size > 1:  # neighbours share an engine
            groups = [list(range(first, first + size)) for first in range(0, ranks, size)]
            self.tp_group, _ = torch.distributed.new_subgroups_by_enumeration(groups)
        with unchanged_process():
            self.llm = LLM(**self._llm_options())
        if self.enable_sleep_mode:
            self.llm.sleep(level=2)
        self._llm_weights_sleeping = self.enable_sleep_mode
        self.accelerator.wait_for_everyone()  # as TRL does: other ranks may not go on while one still builds

    def _llm_options(self) -> dict:
        return {
            "model": self.model.name_or_path,
            "max_model_len": self.max_model_length,
            "max_num_seqs": self.max_num_seqs * self.tensor_parallel_size,
            "logprobs_mode": "processed_logprobs",
            "model_impl": self.model_impl,
            "trust_remote_code": self.trust_remote_code,
            **(self._for_a_group() if self.tensor_parallel_size > 1 else {}),
            **(self._for_the_cpu() if self.on_cpu else self._for_a_gpu()),
        }

    def _for_a_group(self) -> dict:
        return {
            "tensor_parallel_size": self.tensor_parallel_size,
            "distributed_executor_backend": "external_launcher",
            "seed": self.accelerator.process_index // self.tensor_parallel_size,
        }

    def _for_the_cpu(self) -> dict:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        for name, value in cpu_settings.ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        cpu_norms.install()
        cpu_sampling.install()
        if self.engine_dtype == "bfloat16":
            prepare_bfloat16()
        return {
            **cpu_settings.OPTIONS,
            "dtype": self.engine_dtype,
            "load_format": "dummy",  # the trainer's weights arrive before the first request
        }

    def _for_a_gpu(self) -> dict:
        """As TRL has it."""
        accelerator = self.accelerator
        os.environ["RANK"] = str(accelerator.process_index)
        os.environ["LOCAL_RANK"] = str(accelerator.local_process_index)
        os.environ["WORLD_SIZE"] = str(accelerator.num_processes)
        ensure_master_addr_port()
        return {
            "gpu_memory_utilization": self.gpu_memory_utilization,
            "enable_sleep_mode": self.enable_sleep_mode,
            "distributed_executor_backend": "external_launcher",
            "seed": accelerator.process_index // self.tensor_parallel_size,
            "max_num_batched_tokens": 4096,  # the engine's memory profile takes its high default for need
        }

    def _iter_named_params(self):
        # Extended by adapters: TRL would merge them into the base, which is the reference, and round it at every sync.
        policy: Any = self.accelerator.unwrap_model(self.model)
        if is_peft_model(policy):
            yield from merged_params(policy, self._dist.gather_params)
        else:
            yield from super()._iter_named_params()

    def _iter_engine_params(self):
        policy: Any = self.accelerator.unwrap_model(self.model)
        base = policy.get_base_model() if is_peft_model(policy) else policy
        embedding = base.get_input_embeddings().weight
        tied = base.get_output_embeddings().weight is embedding
        embedding_name = next(name for name, param in base.named_parameters() if param is embedding)
        for name, param in self._iter_named_params():
            yield name, param.detach()
            if tied and name == embedding_name:  # while it is gathered, where it is in shards
                yield "lm_head.weight", param.detach()

    def sync_weights(self):
        # Overridden because the CPU backend re-packs weights after loading: they can be reloaded, not written into.
        if not self.on_cpu:
            super().sync_weights()
            return
        load_weights(self.llm, self._iter_engine_params())

    def generate_seeded(self, prompts: list[list[int]], seeds: list[int], max_tokens: int | None = None) -> Completions:
        """One completion per prompt, sampled from seeds alone.

        Args:
            prompts: token ids; equal neighbours are one request for several completions.
            seeds: one per prompt; of a request, the first counts, and its completions take the numbers from there on.

        Returns:
            Token ids of the completions, and the log-prob of each at the sampling temperature.
        """
        if self.enable_sleep_mode:
            if self._llm_weights_sleeping:
                self.sync_weights()
            self.llm.wake_up(tags=["kv_cache"])
        prompts, seeds, mine = self._of_the_group(prompts, seeds)
        if self.tensor_parallel_size > 1 and not self.on_cpu and is_peft_model(self.model):
            # As TRL does: the small reductions of an adapter's gradients end before the engine's begin, which could
            # hang otherwise (https://github.com/huggingface/trl/issues/3671).
            torch.distributed.barrier(device_ids=[self.accelerator.local_process_index])
        ids, log_probs = generate(self.llm, prompts, seeds, self._sampling(max_tokens))
        if self.enable_sleep_mode:
            self.llm.sleep(level=2)
            self._llm_weights_sleeping = True
        return ids[mine], log_probs[mine]

    def next_token_log_probs(self, prompts: list[list[int]], tokens: list[int]) -> list[float]:
        """Log-prob, at the sampling temperature, of each token right behind its prompt (token ids).

        For an engine of one rank that is awake, as those of jobs are.
        """
        assert self.tensor_parallel_size == 1 and not self.enable_sleep_mode
        return next_token_log_probs(self.llm, prompts, tokens, self.temperature)

    def _of_the_group(self, prompts: list[list[int]], seeds: list[int]) -> tuple[list[list[int]], list[int], slice]:
        """What all ranks of an engine ask for (each runs it on its share of the weights), and its own part."""
        if self.tensor_parallel_size == 1:
            return prompts, seeds, slice(None)
        asked: list = [None] * self.tensor_parallel_size
        torch.distributed.all_gather_object(asked, (prompts, seeds), group=self.tp_group)
        place = self.accelerator.process_index % self.tensor_parallel_size
        first = sum(len(p) for p, _ in asked[:place])
        mine = slice(first, first + len(prompts))
        return [ids for p, _ in asked for ids in p], [seed for _, s in asked for seed in s], mine

    def _sampling(self, max_tokens: int | None) -> dict:
        return {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p or 0.0,
            "repetition_penalty": self.repetition_penalty,
            "max_tokens": max_tokens or self.max_completion_length,
            "logprobs": 0,
            **self.generation_kwargs,
        }


@contextmanager
def unchanged_process() -> Iterator[None]:
    """What building an engine sets for its whole process is put back: random generators, threads, and how float32
    matrices are multiplied."""
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    python, arrays = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        yield
    random.setstate(python)
    numpy.random.set_state(arrays)
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)


def prepare_bfloat16() -> None:
    """Without it the first bfloat16 product of a process may die with SIGILL on a processor with AMX."""
    if torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()


def load_weights(llm: LLM, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
    """New weights, and no prefix of the old ones' left in the cache."""
    llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
    llm.reset_prefix_cache()


def groups_of(prompts: list[list[int]], temperature: float) -> list[tuple[list[int], int]]:
    """Prompts, and how many completions one request asks of each: equal neighbours share it."""
    if temperature == 0:  # of which vLLM takes one a request
        return [(ids, 1) for ids in prompts]
    return [(ids, len(list(equal))) for ids, equal in groupby(prompts)]


def generate(llm: LLM, prompts: list[list[int]], seeds: list[int], sampling: dict[str, Any]) -> Completions:
    """Token ids and log-probs of one completion per prompt; see `VLLMEngine.generate_seeded`.

    Text is made only where strings to stop at have to be found in it.
    """
    groups = groups_of(prompts, sampling["temperature"])
    firsts = [0, *accumulate(count for _, count in groups)]
    llm.reset_prefix_cache()  # a prompt that is found there is rounded otherwise: numbers depend on this call alone
    outputs = llm.generate(
        [{"prompt_token_ids": ids} for ids, _ in groups],
        sampling_params=[
            _params({**sampling, "seed": seeds[first], "n": count, "detokenize": "stop" in sampling})
            for first, (_, count) in zip(firsts, groups, strict=False)
        ],
        use_tqdm=False,
    )
    log_probs, _ = extract_logprobs(outputs)
    assert log_probs is not None  # they were asked for
    ids = [list(completion.token_ids) for output in outputs for completion in output.outputs]
    return ids, [[position[0] for position in sequence] for sequence in log_probs]


def _params(options: dict[str, Any]) -> SamplingParams:
    options = dict(options)
    if structure := options.get("structured_outputs"):  # of `generation_kwargs`, where it is plain values
        options["structured_outputs"] = StructuredOutputsParams(**structure)
    return SamplingParams(**options)


def next_token_log_probs(llm: LLM, prompts: list[list[int]], tokens: list[int], temperature: float) -> list[float]:
    """See `VLLMEngine.next_token_log_probs`. What the cache still holds of a prompt is not read again, and may round
    the last digits otherwise."""
    outputs = llm.generate(
        [{"prompt_token_ids": ids} for ids in prompts],
        sampling_params=[
            SamplingParams(temperature=temperature, seed=0, max_tokens=1, logprob_token_ids=[token], detokenize=False)
            for token in tokens
        ],
        use_tqdm=False,
    )
    first: list[Any] = [output.outputs[0].logprobs for output in outputs]
    return [log_probs[0][token].logprob for log_probs, token in zip(first, tokens, strict=True)]

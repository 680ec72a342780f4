"""vLLM for many callers at once: a base model, alone or with adapters from their folders, each request with its own.

One thread drives the engine; what several threads ask for runs in one batch (continuous batching). An adapter keeps
one number for good, so that neither the engine's prefix cache nor its adapter cache takes one for another.
"""

import os
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.llm_engine import LLMEngine

from rlt.errors import Refused
from rlt.generation.cpu import adapters as cpu_adapters
from rlt.generation.cpu import norms as cpu_norms
from rlt.generation.cpu import sampling as cpu_sampling
from rlt.generation.cpu import settings as cpu_settings
from rlt.generation.ended import EngineEnded
from rlt.generation.vllm_engine import unchanged_process

MAX_SEQUENCES = 256  # that run at once
MAX_RANK = 64  # of an adapter; all take as much memory as one of this rank
AT_ONCE, KEPT = 4, 8  # adapters in one batch, and in memory
GPU_SHARE = 0.4  # of a GPU's memory: the trainer's process has the rest


@dataclass
class _Job:
    """What the engine's thread does.

    Attributes:
        begin: is given the engine and a new request's name.
        waits: whether that request's output is the answer.
    """

    begin: Callable[[LLMEngine, str], object]
    waits: bool
    answer: Future = field(default_factory=Future)


class AdapterEngine:
    """
    Args:
        folder: of a base model and its tokenizer.

    Raises:
        ValueError, NotImplementedError: vLLM does not run this model.
    """

    def __init__(self, folder: str):
        self.on_cpu = not torch.cuda.is_available()
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        with unchanged_process():
            self.llm = LLM(model=folder, **self._options())
        self.context = self.llm.model_config.max_model_len
        self._engine = self.llm.llm_engine
        self._jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        self._running: dict[str, _Job] = {}
        self._numbers = count(1)
        self._ended: BaseException | None = None
        threading.Thread(target=self._drive, name="engine", daemon=True).start()

    def _options(self) -> dict[str, Any]:
        options = {
            "dtype": "float32",  # as the trainer's
            "max_model_len": -1,  # the longest that fits
            "max_num_seqs": MAX_SEQUENCES,
            "max_logprobs": -1,
            "logprobs_mode": "raw_logprobs",
            "enable_lora": True,
            "max_lora_rank": MAX_RANK,
            "max_loras": AT_ONCE,
            "max_cpu_loras": KEPT,
        }
        if not self.on_cpu:
            return {**options, "gpu_memory_utilization": GPU_SHARE}
        for name, value in cpu_settings.ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        cpu_norms.install()
        cpu_sampling.install()
        cpu_adapters.install()
        # The weights come from the model's files and never again, so a tied head needs no copy of its own.
        plain = {name: value for name, value in cpu_settings.OPTIONS.items() if name != "hf_overrides"}
        return {**options, **plain}

    def new_adapter(self, folder: str) -> LoRARequest:
        """An adapter in PEFT's form, to be named in requests; its files stay for as long as it is in use."""
        number = next(self._numbers)
        return LoRARequest(f"rlt{number}", number, folder)

    def try_adapter(self, adapter: LoRARequest) -> str:
        """Why the engine does not take an adapter; nothing where it does, and has it in memory."""
        try:
            self._ask(_Job(lambda engine, _: engine.add_lora(adapter), waits=False))
        except Refused as error:
            return str(error)
        return ""

    def forget(self, adapter: LoRARequest) -> None:
        """No request that names it may come any more."""
        self._ask(_Job(lambda engine, _: engine.remove_lora(adapter.lora_int_id), waits=False))

    def generate(self, ids: list[int], params: SamplingParams, adapter: LoRARequest | None = None) -> RequestOutput:
        """Waits for its own answer; may be called from many threads.

        Raises:
            Refused: vLLM does not take the adapter, or the request.
            EngineEnded.
        """
        params.output_kind = RequestOutputKind.FINAL_ONLY
        prompt = {"prompt_token_ids": ids}
        return self._ask(
            _Job(lambda engine, name: engine.add_request(name, prompt, params, lora_request=adapter), True)
        )

    def _ask(self, job: _Job) -> Any:
        self._jobs.put(job)
        if self._ended is not None:
            raise EngineEnded("the engine has ended") from self._ended
        return job.answer.result()

    def _drive(self) -> None:
        try:
            for number in count():
                self._begin_jobs(number)
                for output in self._engine.step():
                    assert isinstance(output, RequestOutput)
                    if output.finished:
                        self._running.pop(output.request_id).answer.set_result(output)
        except BaseException as error:
            self._ended = error
            left = list(self._running.values())
            while not self._jobs.empty():
                left.append(self._jobs.get())
            for job in left:
                job.answer.set_exception(EngineEnded(f"the engine has ended: {error!r}"))
            raise

    def _begin_jobs(self, step: int) -> None:
        """All that wait; without any work, the next that comes."""
        place = 0
        while not self._running or not self._jobs.empty():
            job = self._jobs.get()
            name = f"{step}-{place}"
            place += 1
            try:
                job.begin(self._engine, name)
            except (ValueError, OSError) as error:
                job.answer.set_exception(Refused(f"vLLM does not take it: {error}"))
            else:
                if job.waits:
                    self._running[name] = job
                else:
                    job.answer.set_result(None)

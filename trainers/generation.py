"""Completions of a step, for every trainer that samples: by one of four engines, from seeds of their own.

vLLM in the process, on servers, or Hugging Face. Where a completion stands in the run decides its seed, so that a
resumed run, and one on another number of processes, samples the same.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import Sampler
from trl.trainer.utils import split_tensor_dict

from rlt.generation.seeds import request_seed
from rlt.prompts.rendering import prompt_token_ids
from rlt.schema import server_urls
from rlt.survival.kill_points import kill_point
from trainers.sampler import EpochRepeatSampler

MIN_SEQUENCES = 128  # that the engine may run at once: evaluations are larger than small training batches
Base: Any = object  # a mixin: what it asks of TRL's trainer is there once it is mixed in


class SeededGeneration(Base):
    """Mixed into TRL's trainers that generate, in front of them."""

    def _take_engine(self, config: Any, engine_dtype: str, batch_size: int, own_process: bool = False) -> None:
        """One of the project's engines, in the place of TRL's, which the CPU cannot run.

        Args:
            engine_dtype: of vLLM on the CPU, "bfloat16" or "float32".
            batch_size: completions that all ranks generate together.
            own_process: it writes ahead in a process of its own.
        """
        # Importing vLLM takes seconds that other runs need not spend.
        from rlt.generation.sampler import build_engine, holder_of

        config.use_vllm = self.use_vllm = True
        self._last_loaded_step = -1
        urls = server_urls(config.vllm_server_base_url)
        self.vllm_generation = build_engine(
            urls if config.vllm_mode == "server" else [],
            config.vllm_server_timeout,
            own_process,
            config.weight_transfer,
            holder_of(config.run_name, config.output_dir),
            model=self.model,
            accelerator=self.accelerator,
            processing_class=self.processing_class,
            engine_dtype=engine_dtype,
            tensor_parallel_size=config.vllm_tensor_parallel_size,
            gpu_memory_utilization=config.vllm_gpu_memory_utilization,
            max_model_length=config.vllm_max_model_length,
            max_num_seqs=max(MIN_SEQUENCES, batch_size // self.accelerator.num_processes),
            enable_sleep_mode=config.vllm_enable_sleep_mode,
            model_impl=config.vllm_model_impl,
            trust_remote_code=config.trust_remote_code,
            repetition_penalty=self.repetition_penalty,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            max_completion_length=self.max_completion_length,
            generation_kwargs=config.generation_kwargs,
        )

    def _get_train_sampler(self, dataset=None) -> Sampler:  # pyrefly: ignore[bad-override-param-name]  # as TRL
        # Overridden so that a run resumed in its second epoch sees that epoch's order.
        self._train_sampler = self._new_sampler(dataset)
        return self._train_sampler

    def _new_sampler(self, dataset=None) -> EpochRepeatSampler:
        return EpochRepeatSampler.like(self._repeating(super()._get_train_sampler(dataset)), self.args.seed)

    def _repeating(self, sampler: Any) -> Any:
        """TRL's `RepeatSampler`, as it is; for trainers that ask each question otherwise than TRL does."""
        return sampler

    def _run_epoch(self, *args, **kwargs) -> None:
        # Extended: accelerate and transformers look for the sampler at fixed depths, and on several processes the
        # loader of a resumed epoch is one deeper.
        self._train_sampler.set_epoch(kwargs["epoch"])
        super()._run_epoch(*args, **kwargs)

    def _tokenize_prompts(self, prompts: list):
        # Overridden because a rendered prompt has its special tokens, and is cut as the whole text will be.
        if not isinstance(prompts[0], str):
            return super()._tokenize_prompts(prompts)
        return prompt_token_ids(self.processing_class, prompts), None, {}

    def _write(self, prompt_ids: list[list[int]], by_hugging_face: Callable[[], Any], ahead: Callable | None = None):
        """Token ids of one completion per prompt, and what else the engine gives.

        Args:
            by_hugging_face: TRL's own way, where there is no engine.
            ahead: takes the completions that another process has written, where one does.
        """
        kill_point("generation")
        start = time.perf_counter()
        if not self.use_vllm:
            devices = [self.accelerator.device] if self.accelerator.device.type == "cuda" else []
            with torch.random.fork_rng(devices=devices):
                torch.manual_seed(request_seed(self.args.seed, *self._phase(), self.accelerator.process_index))
                written = by_hugging_face()
        elif ahead is not None and self.model.training:
            written = ahead(prompt_ids)
        else:
            self._sync_engine()
            written = self.vllm_generation.generate_seeded(prompt_ids, self._request_seeds(len(prompt_ids)))
        self._log_generation(time.perf_counter() - start, [len(ids) for ids in written[0]])
        if self.model.training:
            self.leave_if_asked()
        return written

    def _phase(self) -> tuple[str, int]:
        if self.model.training:
            return "train", self._questions_before(self._step)
        return "eval", self.state.global_step

    def _questions_before(self, micro_step: int) -> int:
        """How many were answered before a micro-step, by all ranks."""
        each = self.args.per_device_train_batch_size * self.accelerator.num_processes
        return micro_step * each // self.num_generations

    def _request_seeds(self, count: int, phase: tuple[str, int] | None = None) -> list[int]:
        """By a completion's question and place among all ranks', so that it is the same on any number of them."""
        phase = phase or self._phase()
        size = self.num_generations if phase[0] == "train" else self.num_generations_eval
        first = self.accelerator.process_index * count
        places = [divmod(place, size) for place in range(first, first + count)]
        return [request_seed(self.args.seed, *phase, question) + member for question, member in places]

    def _sync_engine(self) -> None:
        if self.state.global_step != self._last_loaded_step:
            self.vllm_generation.sync_weights()
            self._last_loaded_step = self.state.global_step

    def _log_generation(self, seconds: float, lengths: list[int]) -> None:
        """Seconds to the last token, weights' sync included; share of idle slots if all completions ran at once."""
        metrics = self._metrics["train" if self.model.training else "eval"]
        metrics["generation/seconds"].append(seconds)
        metrics["generation/tokens_per_second"].append(sum(lengths) / seconds)
        metrics["generation/idle_share"].append(1 - sum(lengths) / (len(lengths) * max(max(lengths), 1)))

    def _micro_batch(self, generation_batch: Any, steps: int, uses: int) -> dict[str, Any]:
        """The part of a generated batch that this micro-step trains on; the batch is generated where the last is used
        up.

        TRL shuffles completions over the micro-batches, and a group's prompt is shared only by siblings of one
        micro-batch.

        Args:
            steps: micro-batches of a generated batch.
            uses: micro-steps for which it serves.
        """
        if self._step % uses == 0 or self._buffered_inputs is None:
            batch = self._generate_and_score_completions(generation_batch)
            self._buffered_inputs = split_tensor_dict(batch, steps)
        return self._buffered_inputs[self._step % steps]

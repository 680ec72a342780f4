"""The engine in a process of its own, which writes the next batch while the trainer trains on this one.

Weights travel as a safetensors file in shared memory, requests and completions through a pipe. Every wait has a limit
and ends with an error when the process is gone; the process ends when the trainer does, however that ends.
"""

import multiprocessing
import os
import shutil
import signal
import socket
import struct
import time
import weakref
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from vllm import LLM

from rlt.generation.cpu import norms as cpu_norms
from rlt.generation.cpu import sampling as cpu_sampling
from rlt.generation.shared_memory import weights_folder
from rlt.generation.vllm_engine import Completions, VLLMEngine, generate, load_weights, prepare_bfloat16
from rlt.launching.environment import free_port

START_LIMIT_S = 600
ANSWER_LIMIT_S = 3600
SEND_LIMIT_S = 60  # without a byte taken: whoever asks has heard the last answer, so the other side reads
END_LIMIT_S = 10


class EngineProcess(VLLMEngine):
    """`VLLMEngine` with requests that need not be waited for. Arguments as there; the process starts at once."""

    def _init_vllm(self):
        # Overridden: the engine is built on the other side.
        options = self._llm_options()
        threads = max(1, torch.get_num_threads() // 2)  # on a CPU both sides compute at once
        torch.set_num_threads(threads)
        self._shared = weights_folder(sum(parameter.numel() * 4 for parameter in self.model.parameters()))
        self._folder = Path(self._shared.name)
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        limit_sends(self._pipe, SEND_LIMIT_S)
        self._process = context.Process(target=serve, args=(theirs, options, threads, self._folder), daemon=True)
        self._process.start()
        theirs.close()
        self.close = weakref.finalize(self, _end, self._process, self._pipe, self._folder)
        self._weights: str | None = None
        self._asked = 0
        self._open: set[int] = set()
        self._answers: dict[int, Completions] = {}
        try:
            self._wait_for(0, START_LIMIT_S)
        except BaseException:  # such as a signal to stop
            self._process.kill()  # amid loading, where it would not read the pipe's end for as long as that takes
            raise

    def sync_weights(self):
        # Overridden: they go out with the next request.
        self._weights = str(self._folder / f"{self._asked + 1}.safetensors")
        dtype = getattr(torch, self.engine_dtype) if self.on_cpu else self.model.dtype
        # A copy of each, because a tied head shares its memory.
        save_file({name: w.to("cpu", dtype, copy=True) for name, w in self._iter_engine_params()}, self._weights)

    def submit(self, prompts: list[list[int]], seeds: list[int], max_tokens: int | None = None) -> int:
        """Ask for completions with the weights that were synced last; returns the number to `collect` them by."""
        for earlier in sorted(self._open):  # two sides that both write would wait for each other
            self._answers[earlier] = self._wait_for(earlier, ANSWER_LIMIT_S)
        self._asked += 1
        self._open.add(self._asked)
        self._send((self._asked, self._weights, prompts, seeds, self._sampling(max_tokens)))
        self._weights = None
        return self._asked

    def collect(self, number: int) -> Completions:
        """What a request gave, as `generate_seeded` returns it.

        Raises:
            RuntimeError: the engine's process has ended.
            TimeoutError: it has not answered within `ANSWER_LIMIT_S`.
        """
        return self._wait_for(number, ANSWER_LIMIT_S)

    def generate_seeded(self, prompts, seeds, max_tokens=None):
        return self.collect(self.submit(prompts, seeds, max_tokens))

    def _send(self, message: Any) -> None:
        try:
            self._pipe.send(message)
        except BlockingIOError:
            raise TimeoutError(f"the engine's process has taken no request for {SEND_LIMIT_S} s") from None
        except OSError as error:
            raise self._gone() from error

    def _wait_for(self, number: int, limit_s: float) -> Completions:
        give_up = time.monotonic() + limit_s
        while number not in self._answers:
            try:
                if self._pipe.poll(1.0):
                    answered, completions = self._pipe.recv()
                    self._answers[answered] = completions
                    self._open.discard(answered)
            except (EOFError, OSError) as error:
                raise self._gone() from error
            if number not in self._answers and time.monotonic() > give_up:
                raise TimeoutError(f"the engine's process has not answered within {limit_s:.0f} s")
        return self._answers.pop(number)

    def _gone(self) -> RuntimeError:
        self._process.join(END_LIMIT_S)
        code = self._process.exitcode
        return RuntimeError(f"the engine's process has ended with exit code {code}; what it said stands above")


def limit_sends(pipe: Connection, limit_s: int) -> None:
    """Have a `send` end with a BlockingIOError when the other side has read nothing for that long."""
    with socket.socket(fileno=os.dup(pipe.fileno())) as ours:  # a duplex pipe is a pair of sockets
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", limit_s, 0))


def _end(process, pipe, folder: Path) -> None:
    pipe.close()  # the other side reads the end of the pipe, and stops
    process.join(END_LIMIT_S)
    if process.is_alive():
        process.kill()
        process.join(END_LIMIT_S)
    shutil.rmtree(folder, ignore_errors=True)


def serve(pipe, options: dict[str, Any], threads: int, folder: Path) -> None:
    """The other side: one request after the other, until the pipe ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the trainer's, whose end ends this process too
    os.environ["MASTER_PORT"] = str(free_port())  # the trainer has opened its own; vLLM on a GPU would open it again
    cpu_norms.install()
    cpu_sampling.install()
    if options.get("dtype") == "bfloat16":
        prepare_bfloat16()
    llm = LLM(**options)
    torch.set_num_threads(threads)
    try:
        pipe.send((0, None))
        while True:
            number, weights, prompts, seeds, sampling = pipe.recv()
            if weights is not None:
                load_weights(llm, _read_once(Path(weights)))
            pipe.send((number, generate(llm, prompts, seeds, sampling)))
    except (EOFError, ConnectionError):  # the trainer has ended; with a request or an answer on its way, as a reset
        shutil.rmtree(folder, ignore_errors=True)


def _read_once(path: Path):
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 (not a dictionary)
            yield name, file.get_tensor(name)
    path.unlink()

"""A worker without a neural network: a language model of one number a token, which does not look at what came before.

It trains, saves, loads and samples by the rules of every other worker, in microseconds: for
tests of everything that lies between a client and a worker.
"""

import io
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rlt.errors import Refused
from rlt.wire.json_form import SampleRequest
from rlt.wire.values import (
    AdamParams,
    BestTokens,
    Datum,
    ForwardBackwardOutput,
    ForwardBackwardRequest,
    SampledSequence,
    SampleResponse,
)
from rlt.workers.tensor_files import local_files, put_files

VOCABULARY = 256
END = 0  # the token that ends a text
MOST_TOKENS = 64  # of a sample without max_tokens
FILE = "state.npz"


@dataclass
class Numbers:
    """A model: its logits, their gradient, and AdamW's state."""

    logits: np.ndarray = field(default_factory=lambda: np.zeros(VOCABULARY))
    gradient: np.ndarray = field(default_factory=lambda: np.zeros(VOCABULARY))
    mean: np.ndarray = field(default_factory=lambda: np.zeros(VOCABULARY))
    square: np.ndarray = field(default_factory=lambda: np.zeros(VOCABULARY))
    steps: int = 0


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def loss_of(name: str, lp: np.ndarray, inputs: Mapping[str, np.ndarray]) -> tuple[float, np.ndarray]:
    """The sum over tokens, and its derivative by each log-prob."""
    if name == "cross_entropy":
        weights = inputs.get("weights", np.ones_like(lp))
        return -float((weights * lp).sum()), -weights
    if name == "importance_sampling":
        if missing := {"logprobs", "advantages"} - inputs.keys():
            raise Refused(f"importance_sampling needs {sorted(missing)}")
        weighted = np.exp(lp - inputs["logprobs"]) * inputs["advantages"]
        return -float(weighted.sum()), -weighted
    raise Refused(f"the loss {name!r} is not known here: cross_entropy and importance_sampling are")


class Unigram:
    def __init__(self, seconds: float = 0.0, log: str | None = None, fail_rate: float | None = None) -> None:
        self.fail_rate = fail_rate  # a step of this learning rate finds gradients that are not finite
        self.seconds = seconds  # that each request takes at least
        self.log = log  # a file that gets a line for each pass and step as it is executed
        self.models: dict[str, Numbers] = {}
        self.executed: list[tuple[str, int]] = []  # numbers of requests as they came

    def _model(self, model_id: str) -> Numbers:
        time.sleep(self.seconds)
        return self.models[model_id]

    def create_model(self, model_id: str, base_model: str, adapter: Mapping[str, Any]) -> None:
        self.models[model_id] = Numbers()

    def forward_backward(self, request: ForwardBackwardRequest) -> ForwardBackwardOutput:
        model = self._model(request.model_id)
        self.executed.append((request.model_id, request.seq_id))
        self._note(request.model_id, request.seq_id)
        lps, outputs, gradient, total = log_softmax(model.logits), [], np.zeros(VOCABULARY), 0.0
        for datum in request.data:
            targets = self._targets(datum)
            inputs = {name: each.dense() for name, each in datum.loss_inputs.items() if name != "target_tokens"}
            loss, slopes = loss_of(request.loss_fn, lps[targets], inputs)
            total += loss
            np.add.at(gradient, targets, slopes)
            gradient -= slopes.sum() * np.exp(lps)
            outputs.append({"logprobs": lps[targets].astype(np.float32)})
        if not request.forward_only:
            model.gradient += gradient
        return ForwardBackwardOutput(outputs, {"loss:sum": total})

    def _note(self, model_id: str, what: int | str) -> None:
        if self.log:
            with open(self.log, "a") as file:
                file.write(f"{model_id} {what}\n")

    def _targets(self, datum: Datum) -> np.ndarray:
        if "target_tokens" not in datum.loss_inputs:
            raise Refused("target_tokens is missing")
        targets = datum.loss_inputs["target_tokens"].dense().astype(np.int64)
        if targets.min() < 0 or targets.max() >= VOCABULARY:
            raise Refused(f"target_tokens from {targets.min()} to {targets.max()}: the vocabulary has {VOCABULARY}")
        return targets

    def optim_step(self, model_id: str, params: AdamParams) -> dict[str, float]:
        model = self._model(model_id)
        self._note(model_id, "step")
        norm = float(np.linalg.norm(model.gradient))
        if params.learning_rate == self.fail_rate:
            model.gradient = np.zeros(VOCABULARY)
            raise Refused("the norm of the gradients is not finite: they were dropped")
        if params.grad_clip_norm and norm > params.grad_clip_norm:
            model.gradient *= params.grad_clip_norm / norm
        model.steps += 1
        model.mean = params.beta1 * model.mean + (1 - params.beta1) * model.gradient
        model.square = params.beta2 * model.square + (1 - params.beta2) * model.gradient**2
        mean = model.mean / (1 - params.beta1**model.steps)
        square = model.square / (1 - params.beta2**model.steps)
        model.logits *= 1 - params.learning_rate * params.weight_decay
        model.logits -= params.learning_rate * mean / (np.sqrt(square) + params.eps)
        model.gradient = np.zeros(VOCABULARY)
        return {"grad_norm": norm}

    def embed(self, model_id: str, sequences: list[list[int]]) -> ForwardBackwardOutput:
        model = self._model(model_id)
        return ForwardBackwardOutput([{"embedding": model.logits[:4].astype(np.float32)} for _ in sequences], {})

    def save(self, model_id: str, kind: str, address: str) -> int:
        model, buffer = self._model(model_id), io.BytesIO()
        state: dict[str, Any] = {"logits": model.logits}
        if kind == "save_weights":
            state |= {"mean": model.mean, "square": model.square, "steps": np.array(model.steps)}
        np.savez(buffer, **state)
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / FILE).write_bytes(buffer.getvalue())
            time.sleep(self.seconds)
            return put_files(Path(folder), address)

    def load_weights(self, model_id: str, address: str, optimizer: bool) -> None:
        state = _read(address)
        model = Numbers(state["logits"])
        if optimizer:
            if "steps" not in state:
                raise Refused("these weights were saved without the optimizer's state: load them without it")
            model.mean, model.square, model.steps = state["mean"], state["square"], int(state["steps"])
        self.models[model_id] = model

    def sample(self, request: SampleRequest, base_model: str, address: str | None) -> SampleResponse:
        time.sleep(self.seconds)
        logits = _read(address)["logits"] if address else np.zeros(VOCABULARY)
        lps = log_softmax(logits)
        if request.prompt.max() >= VOCABULARY:
            raise Refused(f"the prompt holds the token {request.prompt.max()}: the vocabulary has {VOCABULARY}")
        sequences = [_sample(request, logits, lps, number) for number in range(request.num_samples)]
        prompt = best = None
        if request.prompt_logprobs:
            prompt = np.concatenate([[np.nan], lps[request.prompt[1:]]]).astype(np.float32)
        if k := request.best_of_prompt:
            ids = np.argsort(-lps, kind="stable")[:k].astype(np.int32)
            best = BestTokens(np.tile(ids, (request.prompt.size, 1)), np.tile(lps[ids], (request.prompt.size, 1)))
            best.token_ids[0], best.logprobs[0] = 0, -99999.0
        return SampleResponse(sequences, prompt, best)

    def unload(self, model_id: str) -> None:
        self.models.pop(model_id, None)

    def forget(self, address: str) -> None:
        """It keeps no weights that it sampled from."""


def _read(address: str) -> Mapping[str, np.ndarray]:
    with local_files(address) as folder:
        return dict(np.load(folder / FILE))


def _sample(request: SampleRequest, logits: np.ndarray, lps: np.ndarray, number: int) -> SampledSequence:
    params = request.params
    stops = [END] if params.stop is None else params.stop
    if any(isinstance(each, str) for each in stops):
        raise Refused("this worker knows no texts: stop must hold token numbers")
    chance = np.random.default_rng(None if params.seed is None else [abs(params.seed), number])
    shares = np.exp(log_softmax(logits / params.temperature)) if params.temperature else lps == lps.max()
    drawn = chance.choice(VOCABULARY, params.max_tokens or MOST_TOKENS, p=shares / shares.sum())
    ends = np.flatnonzero(np.isin(drawn, np.array(stops, int)))
    tokens = drawn[: ends[0] + 1] if ends.size else drawn
    return SampledSequence(tokens, lps[tokens].astype(np.float32), "stop" if ends.size else "length")

"""The worker that trains and samples real models: adapters on a base that they share (backends/adapters.py), or, where
it is allowed, all weights of a model of its own.

A base is loaded when a request first needs it: once for training, and once for sampling, which has its own copy and
mostly a process of its own. Nothing of a model is here that its requests would not bring about again.
"""

import logging
import shutil
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from backends.adapters import AdapterBackend, AdapterSpec, SharedBase
from backends.create import create_adamw_optimizer
from backends.protocol import AdamParams as BackendAdamParams
from backends.protocol import Datum as BackendDatum
from backends.protocol import ForwardOutput
from backends.pytorch import PyTorchTrainingBackend
from rlt.errors import Refused
from rlt.generation.seeds import request_seed
from rlt.launching.owned import WORKER, owned_folder
from rlt.models.loading import load_policy, load_tokenizer, quiet_libraries
from rlt.wire.json_form import SampleRequest
from rlt.wire.values import AdamParams, Datum, ForwardBackwardOutput, ForwardBackwardRequest, SampleResponse
from rlt.workers.merging import merge
from rlt.workers.tensor_files import local_files, put_files
from rlt.workers.torch_sampler import TorchSampler

STATE = "state"

logger = logging.getLogger("rlt")


class TorchWorker:
    """`rlt.workers.worker.Worker`.

    Args:
        folders: of the base models' weights and tokenizers, by the names that clients know.
        sampler: "vllm", for the models that it runs; "torch": the trainer's own forward pass, for all.
        full_finetuning: whether a rank of null is granted, which takes a copy of the base and twice its size in
            optimizer states for each such model.
    """

    def __init__(self, folders: Mapping[str, str], sampler: str = "vllm", full_finetuning: bool = False):
        quiet_libraries()
        self.folders, self.sampler, self.full_finetuning = folders, sampler, full_finetuning
        self.models: dict[str, PyTorchTrainingBackend] = {}
        self._bases: dict[str, SharedBase] = {}
        self._samplers: dict[str, Any] = {}
        self._building = threading.Lock()
        self._scratch = owned_folder(WORKER)

    def _model(self, model_id: str) -> PyTorchTrainingBackend:
        if model_id not in self.models:
            raise Refused(f"the model {model_id} is not here")
        return self.models[model_id]

    def _folder(self, base_model: str) -> str:
        if base_model not in self.folders:
            raise Refused(f"the base model {base_model!r} is not served: {', '.join(self.folders)} are")
        return self.folders[base_model]

    def _base(self, name: str) -> SharedBase:
        if name not in self._bases:
            place = Path(self._scratch.name) / str(len(self._bases))
            self._bases[name] = SharedBase(load_policy(self._folder(name)), place, name=name)
        return self._bases[name]

    def create_model(self, model_id: str, base_model: str, adapter: Mapping[str, Any]) -> None:
        """An adapter without a seed gets one of its model's name, so that after a restart it is the same again."""
        if adapter["rank"] is None:
            self._create_whole(model_id, base_model)
            return
        given = dict(adapter)
        if given["seed"] is None:
            given["seed"] = request_seed("adapter", model_id)
        base = self._base(base_model)
        self.unload(model_id)
        self.models[model_id] = base.create(model_id, AdapterSpec(**given)).result()

    def _create_whole(self, model_id: str, base_model: str) -> None:
        if not self.full_finetuning:
            raise Refused("all weights are not trained here: give a rank, or serve with full_finetuning=true")
        model: Any = load_policy(self._folder(base_model))
        self.unload(model_id)
        place = Path(self._scratch.name) / "whole" / model_id
        self.models[model_id] = PyTorchTrainingBackend(model, create_adamw_optimizer(model), checkpoint_dir=place)

    def forward_backward(self, request: ForwardBackwardRequest) -> ForwardBackwardOutput:
        model, data = self._model(request.model_id), [_read(datum) for datum in request.data]
        run = model.forward if request.forward_only else model.forward_backward
        # A text in the configuration is refused there.
        return _written(run(data, request.loss_fn, request.loss_config).result())  # pyrefly: ignore[bad-argument-type]

    def optim_step(self, model_id: str, params: AdamParams) -> dict[str, float]:
        done = self._model(model_id).optim_step(BackendAdamParams(**asdict(params))).result()
        return {"grad_norm": done.grad_norm}

    def embed(self, model_id: str, sequences: list[list[int]]) -> ForwardBackwardOutput:
        found = self._model(model_id).hidden_means(sequences).result()
        return ForwardBackwardOutput([{"embedding": each.numpy()} for each in found], {})

    def save(self, model_id: str, kind: str, address: str) -> int:
        """The whole state as backends/saved.py has it; else the adapter as PEFT has it, or the model as transformers
        does."""
        model = self._model(model_id)
        with tempfile.TemporaryDirectory(dir=self._scratch.name) as aside:
            if kind == "save_weights":
                shutil.move(model.save_state(STATE, overwrite=True).result(), aside)
                return put_files(Path(aside) / STATE, address)
            return put_files(self._export(model, kind, Path(aside)), address)

    def _export(self, model: PyTorchTrainingBackend, kind: str, aside: Path) -> Path:
        if not isinstance(model, AdapterBackend):
            whole = cast(PreTrainedModel, model.model)
            whole.save_pretrained(aside / "whole")
            if kind == "save_weights_merged":
                load_tokenizer(str(whole.name_or_path)).save_pretrained(aside / "whole")
            return aside / "whole"
        adapter = model.export(aside / "adapter").result()
        if kind == "save_weights_merged":
            return merge(adapter, self._folder(model.base.name), aside / "merged")
        return adapter

    def load_weights(self, model_id: str, address: str, optimizer: bool) -> None:
        with local_files(address) as folder:
            self._model(model_id).load_state(folder, optimizer).result()

    def sample(self, request: SampleRequest, base_model: str, address: str | None) -> SampleResponse:
        with self._building:
            if base_model not in self._samplers:
                self._samplers[base_model] = self._new_sampler(self._folder(base_model))
        return self._samplers[base_model].sample(request, address)

    def _new_sampler(self, folder: str) -> Any:
        if self.sampler == "torch":
            return TorchSampler(folder)
        try:
            from rlt.workers.vllm_sampler import VLLMSampler

            return VLLMSampler(folder)
        except (ImportError, ValueError, NotImplementedError) as error:
            logger.warning("vLLM does not run %s, so torch samples it: %s", folder, error)
            return TorchSampler(folder)

    def unload(self, model_id: str) -> None:
        model = self.models.pop(model_id, None)
        if isinstance(model, AdapterBackend):
            model.base.remove(model_id).result()
        elif model is not None:
            model.close()

    def forget(self, address: str) -> None:
        for sampler in self._samplers.values():
            sampler.forget(address)


def _read(datum: Datum) -> BackendDatum:
    tensors = {name: torch.from_numpy(each.dense().copy()) for name, each in datum.loss_inputs.items()}
    return BackendDatum(datum.tokens.tolist(), tensors)


def _written(output: ForwardOutput) -> ForwardBackwardOutput:
    """A loss that is not one of tokens has no elementwise losses."""
    outputs = [{"logprobs": values.numpy()} for values in output.logprobs]
    for each, values in zip(outputs, output.elementwise_loss, strict=False):
        each["elementwise_loss"] = values.numpy()
    return ForwardBackwardOutput(outputs, output.metrics)

"""Several models on one base: each is an adapter (LoRA, arXiv 2106.09685) with an optimizer and a life of its own.

    base = SharedBase(load_hf_model("embedded/smollm2-135m-instruct"), "runs")
    one = base.create("one", AdapterSpec(rank=8)).result(60)
    other = base.create("other", AdapterSpec(rank=16, train_mlp=False)).result(60)
    one.forward_backward(batch); other.forward_backward(batch); one.optim_step(); other.optim_step()

One thread does the operations of all, one after the other, each with its own adapter on the base, which never changes.
A new adapter adds nothing (B = 0). Its scale is 32 / rank, so that one learning rate suits many ranks.
"""

import warnings
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel

from backends import saved
from backends.adapter_files import export_adapter
from backends.adapter_targets import layers_by_part, wanted_layers
from backends.create import create_adamw_optimizer
from backends.futures import TrainFuture, Worker
from backends.protocol import Batch, ForwardOutput, Loss
from backends.pytorch import PyTorchTrainingBackend
from backends.reading import DEFAULT_LOSS, TOKEN_BUDGET, ReadsBatches
from rlt.errors import Refused

ALPHA = 32


@dataclass(frozen=True)
class AdapterSpec:
    """What an adapter is.

    Attributes:
        seed: of its random half, A; None: whatever the global generator holds.
        train_mlp, train_attn, train_unembed: which layers have it.
    """

    rank: int = 32
    seed: int | None = None
    train_mlp: bool = True
    train_attn: bool = True
    train_unembed: bool = True

    def wanted(self) -> dict[str, bool]:
        return {"attn": self.train_attn, "mlp": self.train_mlp, "unembed": self.train_unembed}


class SharedBase(ReadsBatches):
    """A frozen model and the adapters on it. `forward` reads with the base alone.

    Args:
        model: a Hugging Face causal model.
        checkpoint_dir: each adapter's states are in a folder of its name below it.
        name: of the base, compared when a state is loaded; empty: what the model was loaded from.
        device, token_budget, autocast: as of `PyTorchTrainingBackend`.
    """

    def __init__(
        self,
        model: Any,
        checkpoint_dir: str | Path = "checkpoints",
        device: str | torch.device = "auto",
        *,
        name: str = "",
        token_budget: int | None = TOKEN_BUDGET,
        autocast: torch.dtype | None = None,
    ):
        self._worker = Worker(f"the base of {checkpoint_dir}")
        self._prepare_reading(model.requires_grad_(False), DEFAULT_LOSS, device, token_budget, autocast)
        self.checkpoint_dir, self.name = Path(checkpoint_dir), name or model.config.name_or_path
        self.options = {"token_budget": token_budget, "autocast": autocast}
        self.adapters: dict[str, AdapterBackend] = {}
        self._layers, self._made = layers_by_part(model), 0

    def create(self, name: str, spec: AdapterSpec = AdapterSpec()) -> "TrainFuture[AdapterBackend]":
        """A new model of this name.

        Raises:
            Refused: by its future: the name is taken, or the base cannot have such an adapter.
        """
        return self._worker.submit(self._create, name, spec)

    def create_from_state(
        self, name: str, folder: str | Path, with_optimizer: bool = True
    ) -> TrainFuture["AdapterBackend"]:
        """A new model that goes on from what another one has saved; rank and layers are those of the state."""
        return self._worker.submit(self._create_from_state, name, Path(folder), with_optimizer)

    def remove(self, name: str) -> TrainFuture[None]:
        """Forget a model; what it has saved stays. It refuses everything from then on."""
        return self._worker.submit(self._remove, name)

    def close(self) -> None:
        """Finish what has begun, and end the thread of all."""
        self._worker.close()

    def _create(self, name: str, spec: AdapterSpec) -> "AdapterBackend":
        saved.check_name(name)
        if name in self.adapters:
            raise Refused(f"there is a model {name!r} on this base already")
        if isinstance(spec.rank, bool) or not isinstance(spec.rank, int) or spec.rank < 1:
            raise Refused(f"rank={spec.rank!r}: a whole number of 1 or more would do")
        layers = wanted_layers(self._layers, spec.wanted())
        config = LoraConfig(r=spec.rank, lora_alpha=ALPHA, target_modules=layers, task_type="CAUSAL_LM")
        self._made += 1
        inner = f"rlt{self._made}"  # PEFT's names are parts of module names; ours may have any characters
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices) if spec.seed is not None else nullcontext(), warnings.catch_warnings():
            # Of a tied head, which is never merged into the embedding here; of layers whose weight is transposed.
            warnings.filterwarnings("ignore", message=r"Model (with|has) `tie_word_embeddings=True`|fan_in_fan_out is")
            if spec.seed is not None:
                torch.manual_seed(spec.seed)
            self._put_on(inner, config)
        self.model.set_adapter(inner)
        self.adapters[name] = AdapterBackend(self, name, inner, spec)
        return self.adapters[name]

    def _create_from_state(self, name: str, folder: Path, with_optimizer: bool) -> "AdapterBackend":
        spec = dict(saved.about(saved.place_of(self.checkpoint_dir, folder)))
        if spec.pop("base", None) is None:
            raise Refused(f"{folder} is of a whole model, not of an adapter")
        backend = self._create(name, AdapterSpec(**spec))
        try:
            backend._load_state(folder, with_optimizer)
        except BaseException:
            self._remove(name)
            raise
        return backend

    def _put_on(self, inner: str, config: LoraConfig) -> None:
        if isinstance(self.model, PeftModel):
            self.model.add_adapter(inner, config)
        else:
            self.model = PeftModel(self.model, config, adapter_name=inner)

    def _remove(self, name: str) -> None:
        if name not in self.adapters:
            raise Refused(f"there is no model {name!r} on this base")
        removed = self.adapters.pop(name)
        if not self.adapters:
            self.model = self.model.unload()  # PEFT goes on naming the last adapter that it has deleted
            return
        self.model.set_adapter(next(iter(self.adapters.values())).inner)
        self.model.delete_adapter(removed.inner)

    def _forward(self, batch: Batch, loss_fn: Loss, config) -> ForwardOutput:
        with self.model.disable_adapter() if self.adapters else nullcontext():
            return super()._forward(batch, loss_fn, config)


class AdapterBackend(PyTorchTrainingBackend):
    """`TrainingBackend` of one model on a shared base; made by `SharedBase.create`.

    Attributes:
        name: of the model.
        inner: of its adapter in PEFT.
    """

    def __init__(self, base: SharedBase, name: str, inner: str, spec: AdapterSpec):
        super().__init__(
            base.model,
            create_adamw_optimizer(base.model),
            DEFAULT_LOSS,
            base.checkpoint_dir / name,
            base.device,
            worker=base._worker,
            **base.options,
        )
        self.base, self.name, self.inner, self.spec = base, name, inner, spec

    def export(self, folder: str | Path) -> TrainFuture[Path]:
        """Write the adapter as PEFT has it, for engines and `PeftModel.from_pretrained`; whole or absent."""
        return self._worker.submit(self._export, Path(folder))

    def _export(self, folder: Path) -> Path:
        self._activate()
        return export_adapter(self.model, self.inner, folder)

    def _activate(self) -> None:
        if self.base.adapters.get(self.name) is not self:
            raise Refused(f"the model {self.name!r} was removed")
        self.model.set_adapter(self.inner)

    def _public(self, name: str) -> str:
        # As PEFT names them in files, so that a state fits an adapter of any name.
        return name.replace(f".{self.inner}.", ".")

    def _buffers(self) -> dict[str, torch.Tensor]:
        return {}

    def _about(self) -> dict[str, Any]:
        spec = asdict(self.spec)
        del spec["seed"]
        return {"base": self.base.name, **spec}

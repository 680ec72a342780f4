"""What the configuration of a pretraining alone can tell; as checks.py of everything that trains."""

import importlib.util

from rlt.errors import Refused
from rlt.schema import PretrainSettings


def check_pretraining(settings: PretrainSettings) -> None:
    """Where weights come from, and what it is computed in."""
    if (settings.model_name_or_path is None) == (settings.model_shape is None):
        raise Refused(
            f"model_name_or_path={settings.model_name_or_path} and model_shape={settings.model_shape}: name a model to "
            "go on from, or the shape of a new one"
        )
    if settings.model_shape is not None and not settings.model_shape.get("model_type"):
        raise Refused("model_shape needs model_type, such as llama, and fields of its configuration")
    if settings.model_shape is not None and (settings.use_peft or settings.load_in_4bit or settings.load_in_8bit):
        raise Refused("use_peft=true with model_shape: random weights are trained as a whole")
    if settings.fp8 not in (False, True, "emulate"):
        raise Refused(f"fp8={settings.fp8}: use true, false, or emulate, which computes the same without the hardware")
    if settings.fp8 and importlib.util.find_spec("torchao") is None:
        raise Refused(f"fp8={settings.fp8} needs a package that is missing: pip install torchao")

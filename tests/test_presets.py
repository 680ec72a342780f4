"""The figures of the model presets, against models of the published shapes, built without memory."""

import pytest
import torch
from conftest import config_of
from transformers import AutoConfig, AutoModelForCausalLM

from rlt.planning.configuration import options

QWEN3 = {"model_type": "qwen3", "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}
QWEN3 |= {"vocab_size": 151936, "num_hidden_layers": 28, "max_position_embeddings": 40960, "tie_word_embeddings": True}
LLAMA32 = {"model_type": "llama", "vocab_size": 128256, "intermediate_size": 8192, "num_key_value_heads": 8}
LLAMA32 |= {"max_position_embeddings": 131072, "tie_word_embeddings": True}
GEMMA3_TEXT = {"model_type": "gemma3_text", "head_dim": 256, "sliding_window": 512}
# As their config.json files have them.
SHAPES = {
    "qwen3_06b": QWEN3 | {"hidden_size": 1024, "intermediate_size": 3072},
    "qwen3_17b": QWEN3 | {"hidden_size": 2048, "intermediate_size": 6144},
    "qwen3_4b": QWEN3
    | {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32},
    "qwen3_8b": QWEN3
    | {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32}
    | {"tie_word_embeddings": False},
    "qwen35_08b": {"model_type": "qwen3_5_text", "vocab_size": 248320, "hidden_size": 1024, "intermediate_size": 3584}
    | {"num_hidden_layers": 24, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 256}
    | {"linear_num_key_heads": 16, "linear_num_value_heads": 16, "max_position_embeddings": 262144}
    | {"tie_word_embeddings": True},
    "smollm3_3b": {"model_type": "smollm3", "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 11008}
    | {"num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 4, "pad_token_id": 128004}
    | {"max_position_embeddings": 65536, "tie_word_embeddings": True},
    "llama32_1bi": LLAMA32 | {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32},
    "llama32_3bi": LLAMA32 | {"hidden_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 24},
    "gemma3_1bi": GEMMA3_TEXT
    | {"vocab_size": 262144, "hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26}
    | {"num_attention_heads": 4, "num_key_value_heads": 1, "max_position_embeddings": 32768},
    "gemma3_4bi": {
        "model_type": "gemma3",
        "text_config": GEMMA3_TEXT
        | {"vocab_size": 262208, "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34}
        | {"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 131072},
        "vision_config": {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27}
        | {"num_attention_heads": 16, "image_size": 896, "patch_size": 14, "model_type": "siglip_vision_model"}
        | {"vision_use_head": False},
    },
}
OLDER = {"qwen05bi", "qwen15bi", "qwen3bi", "qwen7bi", "qwen32bi", "smollm2_135m"}


def test_every_preset_of_these_families_is_among_them():
    assert set(options("model_cfg")) - OLDER == SHAPES.keys()


@pytest.mark.parametrize("preset", SHAPES)
def test_a_presets_size_and_length_are_those_of_the_published_shape(preset):
    shape = dict(SHAPES[preset])
    published = AutoConfig.for_model(shape.pop("model_type"), **shape)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(published)
    config = config_of(f"model_cfg={preset}")
    assert config["model_size"] == pytest.approx(sum(p.numel() for p in model.parameters()) / 1e9, abs=0.006)
    assert config["model_max_length"] == published.get_text_config().max_position_embeddings

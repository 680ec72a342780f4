"""Loading, the embedded model, and where frozen models wait. One real conversion serves the whole file."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from rlt.models import embedded
from rlt.models.devices import supports_bfloat16
from rlt.models.embedded import embedded_model_path, is_embedded
from rlt.models.files import is_whole, tensor_shapes
from rlt.models.loading import load_frozen, load_policy, load_student, load_tokenizer
from rlt.models.paths import resolve_model_path
from rlt.models.residence import resident, send_for
from rlt.planning.machine import check_models_exist

ROOT = Path(__file__).resolve().parent.parent
NAME = "embedded/smollm2-135m-instruct"
DIES_HALF_WAY = """
import os, signal
from rlt.models import embedded
def convert(gguf, folder):
    (folder / "model.safetensors").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
embedded._convert = convert
embedded.embedded_model_path()
"""
CONVERTS = """
import os
from rlt.models import embedded
real = embedded._convert
def convert(gguf, folder):
    open(embedded.cache_folder() / f"converted_by_{os.getpid()}", "w").close()
    real(gguf, folder)
embedded._convert = convert
print(embedded.embedded_model_path())
"""


def start(code: str, cache: Path) -> subprocess.Popen:
    environment = {**os.environ, "RLT_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment, **pipes)


@pytest.fixture(scope="session")
def conversion(tmp_path_factory):
    """A cache that a killed process left half-written, then two processes that convert together."""
    cache = tmp_path_factory.mktemp("cache") / "not_there_yet"
    killed = start(DIES_HALF_WAY, cache)
    killed.communicate()
    left = sorted(path.name for path in cache.iterdir())
    both = [start(CONVERTS, cache) for _ in range(2)]
    said = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    return {"cache": cache, "killed": killed.returncode, "left": left, "said": said}


@pytest.fixture(scope="session")
def converted(conversion) -> str:
    return str(conversion["cache"] / "smollm2-135m-instruct")


def test_a_killed_conversion_leaves_no_model_folder(conversion):
    assert conversion["killed"] == -signal.SIGKILL
    assert conversion["left"] == ["smollm2-135m-instruct.lock", "smollm2-135m-instruct.partial"]


def test_two_processes_that_start_together_convert_once(conversion, converted):
    names = sorted(path.name for path in conversion["cache"].iterdir())
    assert [name for name in names if not name.startswith("converted_by_")] == [
        "smollm2-135m-instruct",
        "smollm2-135m-instruct.lock",
    ]
    assert len(names) == 3
    assert [out.strip() for out, _ in conversion["said"]] == [converted] * 2


def test_the_conversion_shows_no_progress_bar(conversion):
    assert not any("%|" in err or "it/s" in err for _, err in conversion["said"])


def test_converted_weights_give_the_logits_of_the_gguf(converted):
    gguf = embedded._gguf_path(NAME)
    original = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    ids = torch.tensor([[1, 9690, 198, 2683, 359, 253, 5356, 2]])
    with torch.no_grad():
        ours, theirs = (model.eval()(ids).logits for model in (load_frozen(converted, torch.float32), original))
    assert torch.equal(ours, theirs)


def convert_to(model: str, cache: Path, monkeypatch) -> None:
    """A small model stands for the converted one, in a cache of its own."""
    monkeypatch.setenv("RLT_CACHE_DIR", str(cache))
    monkeypatch.setattr(embedded, "_convert", lambda _, folder: shutil.copytree(model, folder, dirs_exist_ok=True))


TORN = {"weights": ("model.safetensors", 1000), "settings": ("config.json", 40), "template": ("chat_template.jinja", 0)}


@pytest.mark.parametrize("torn", TORN)
def test_a_converted_model_that_a_power_cut_tore_is_converted_anew(torn, tiny_teacher, monkeypatch, tmp_path):
    name, left = TORN[torn]
    monkeypatch.setenv("RLT_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(
        embedded, "_convert", lambda _, folder: shutil.copytree(tiny_teacher, folder, dirs_exist_ok=True)
    )
    folder = embedded_model_path(NAME)
    os.truncate(folder / name, left)
    assert embedded_model_path(NAME) == folder and is_whole(folder)
    made = (folder / name).stat()
    assert made.st_size == (Path(tiny_teacher) / name).stat().st_size
    assert embedded_model_path(NAME) == folder and (folder / name).stat().st_ino == made.st_ino  # once


def test_special_tokens_of_the_converted_model_are_those_it_was_trained_with(converted):
    tokenizer = load_tokenizer(converted)
    assert (tokenizer.eos_token, tokenizer.bos_token) == ("<|im_end|>", "<|im_start|>")
    assert (tokenizer.pad_token, tokenizer.unk_token) == ("<|endoftext|>", "<|endoftext|>")
    folder = Path(converted)
    config = json.loads((folder / "config.json").read_text())
    for ids in (config, GenerationConfig.from_pretrained(folder).to_dict(), ids_of(tokenizer)):
        assert (ids["bos_token_id"], ids["eos_token_id"], ids["pad_token_id"]) == (1, 2, 0)
    assert "quantization_config" not in config and config["dtype"] == "float32"


def ids_of(tokenizer) -> dict[str, int]:
    return {role: getattr(tokenizer, role) for role in ("bos_token_id", "eos_token_id", "pad_token_id")}


def test_the_converted_tokenizer_adds_nothing_has_offsets_and_keeps_its_chat_template(converted):
    tokenizer = load_tokenizer(converted)
    gguf = embedded._gguf_path(NAME)
    original = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    text = "Two and two , that's 4 .\n\n<|im_end|>é"
    encoded = tokenizer(text, return_offsets_mapping=True)
    assert tokenizer.is_fast and encoded["input_ids"] == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert encoded["input_ids"] == original(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(encoded["input_ids"]) == text
    assert encoded["offset_mapping"][0] == (0, 3) and encoded["offset_mapping"][-1][1] == len(text)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert tokenizer.chat_template == original.chat_template and "<|im_start|>user\nHi<|im_end|>\n" in chat


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("RLT_CACHE_DIR", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert embedded.cache_folder() == tmp_path / "own"
    monkeypatch.delenv("RLT_CACHE_DIR")
    assert embedded.cache_folder() == tmp_path / "rlt-grpo"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert embedded.cache_folder() == Path.home() / ".cache" / "rlt-grpo"


def test_waiting_for_another_conversion_ends_in_a_clear_error(monkeypatch, tmp_path):
    monkeypatch.setenv("RLT_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(embedded, "LOCK_TIMEOUT_S", 0)
    with (tmp_path / "smollm2-135m-instruct.lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(TimeoutError, match="locked by another process"):
            embedded_model_path(NAME)


@pytest.mark.parametrize("place", ["file/below", "x" * 300])
def test_a_cache_that_cannot_be_written_to_is_refused_with_the_remedy(monkeypatch, tmp_path, place):
    (tmp_path / "file").touch()
    monkeypatch.delenv("RLT_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / place))
    with pytest.raises(ValueError, match="cannot be made for the converted model .*: set RLT_CACHE_DIR to a folder"):
        embedded_model_path(NAME)


def test_a_cache_in_no_known_home_is_refused_with_the_remedy(monkeypatch):
    monkeypatch.delenv("RLT_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "~nobody-of-this-name/cache")
    with pytest.raises(ValueError, match="is in no known home: set RLT_CACHE_DIR to a folder"):
        embedded.cache_folder()


def test_an_unknown_embedded_model_is_refused_with_those_there_are():
    assert is_embedded("embedded/other") and not is_embedded("someone/model")
    with pytest.raises(ValueError, match=f"not an embedded model: use one of {NAME}"):
        resolve_model_path("embedded/other")


# Everything below runs on a model of a few thousand parameters.


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    """One layer, random, saved as safetensors."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2))
    folder = tmp_path_factory.mktemp("tiny")
    model.save_pretrained(folder)
    return str(folder)


def save_tokenizer(folder: Path, special: list[str], **roles: str) -> str:
    words = {word: i for i, word in enumerate([*special, "a", "b"])}
    plain = Tokenizer(models.WordLevel(words, unk_token=special[0]))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=plain, **roles)
    fast.add_special_tokens({"additional_special_tokens": special})
    fast.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("special", "roles", "pad"),
    [
        (["<eos>", "<mine>"], {"eos_token": "<eos>", "pad_token": "<mine>"}, "<mine>"),
        (["<|endoftext|>", "<|padding|>"], {"eos_token": "<|endoftext|>"}, "<|padding|>"),  # GPT-NeoX
        (["<|endoftext|>", "<|fim_pad|>"], {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}, "<|fim_pad|>"),
        (["<|im_end|>", "<|endoftext|>"], {"eos_token": "<|im_end|>"}, "<|endoftext|>"),
        (["<odd>", "</s>"], {"eos_token": "</s>", "unk_token": "<odd>"}, "<odd>"),
    ],
)
def test_the_pad_token_is_an_existing_one_that_ends_nothing(tmp_path, special, roles, pad):
    tokenizer = load_tokenizer(save_tokenizer(tmp_path, special, **roles))
    assert (tokenizer.pad_token, tokenizer.padding_side) == (pad, "left")
    assert tokenizer.pad_token_id != tokenizer.eos_token_id and len(tokenizer) == len(special) + 2


def test_a_tokenizer_without_a_free_token_is_refused_with_the_remedy(tmp_path):
    folder = save_tokenizer(tmp_path, ["<|endoftext|>"], **dict.fromkeys(("eos_token", "unk_token"), "<|endoftext|>"))
    with pytest.raises(ValueError, match="no special token is free to pad with .* tokenizer_config.json"):
        load_tokenizer(folder)


def test_a_policy_has_float32_weights_that_train(tiny):
    policy = load_policy(tiny)
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in policy.parameters())
    assert policy.config._attn_implementation == "shared_prefix"


def test_a_frozen_model_neither_trains_nor_drops_out(tiny):
    frozen = load_frozen(tiny, torch.bfloat16, device="cpu")
    assert {p.dtype for p in frozen.parameters()} == {torch.bfloat16}
    assert not frozen.training and not any(p.requires_grad for p in frozen.parameters())


def test_a_student_has_a_row_for_every_token_of_its_tokenizer(tiny_student):
    own = load_tokenizer(tiny_student)
    assert load_student(tiny_student, own, dtype=torch.float32)
    own.add_tokens(["<new>"])
    with pytest.raises(ValueError, match="its tokenizer has 49153 tokens and its embedding 49152 rows"):
        load_student(tiny_student, own, dtype=torch.float32)


def test_an_adapter_is_merged_into_its_base_once_and_again_when_it_changes(tiny_teacher, tmp_path):
    ids = torch.tensor([[1, 2, 3]])
    for _ in range(2):
        adapter = get_peft_model(load_frozen(tiny_teacher, torch.float32), LoraConfig(r=2, init_lora_weights=False))
        adapter.save_pretrained(tmp_path)
        os.utime(tmp_path / "adapter_model.safetensors", (7, 7))  # copied with its times, or by a clock that is behind
        path = resolve_model_path(str(tmp_path))
        written = (tmp_path / "merged" / "model.safetensors").stat().st_mtime_ns
        assert path == str(tmp_path / "merged") == resolve_model_path(str(tmp_path))
        assert (tmp_path / "merged" / "model.safetensors").stat().st_mtime_ns == written
        merged = load_frozen(path, torch.float32)
        assert {*merged.state_dict()} == {*load_frozen(tiny_teacher, torch.float32).state_dict()}
        torch.testing.assert_close(merged(ids).logits, adapter.eval()(ids).logits)
        assert not torch.allclose(merged(ids).logits, load_frozen(tiny_teacher, torch.float32)(ids).logits)
        assert load_tokenizer(path).eos_token == load_tokenizer(tiny_teacher).eos_token


@pytest.mark.parametrize(("name", "left"), [("made_from.json", 9), ("made_from.json", 0), ("model.safetensors", 1000)])
def test_a_merged_model_that_a_power_cut_tore_is_made_anew(name, left, tiny_teacher, tmp_path):
    ids = torch.tensor([[1, 2, 3]])
    adapter = get_peft_model(load_frozen(tiny_teacher, torch.float32), LoraConfig(r=2, init_lora_weights=False))
    adapter.save_pretrained(tmp_path)
    os.truncate(Path(resolve_model_path(str(tmp_path))) / name, left)
    merged = load_frozen(resolve_model_path(str(tmp_path)), torch.float32)
    torch.testing.assert_close(merged(ids).logits, adapter.eval()(ids).logits)


def test_a_model_that_is_made_here_is_on_the_disk_before_it_gets_its_name(
    tiny_teacher, tmp_path, monkeypatch, converted
):
    """In the order of the system's calls: every file, the folder, its name, and the folder with the name."""
    order, fsync, rename = [], os.fsync, os.rename
    get_peft_model(load_frozen(tiny_teacher, torch.float32), LoraConfig(r=2)).save_pretrained(tmp_path / "adapter")
    monkeypatch.setenv("RLT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(
        embedded, "_convert", lambda _, folder: shutil.copytree(tiny_teacher, folder, dirs_exist_ok=True)
    )
    monkeypatch.setattr(
        os, "fsync", lambda handle: order.append(os.readlink(f"/proc/self/fd/{handle}")) or fsync(handle)
    )
    monkeypatch.setattr(os, "rename", lambda old, new: order.append((str(old), str(new))) or rename(old, new))
    for name in (str(tmp_path / "adapter"), NAME):
        order.clear()
        folder = Path(resolve_model_path(name))
        aside = folder.with_suffix(".partial")
        assert {*order[:-3]} == {str(aside / path.name) for path in folder.iterdir()}
        assert order[-3:] == [str(aside), (str(aside), str(folder)), str(folder.parent)]


def test_an_adapter_of_an_adapters_folder_has_both(tiny_teacher, tmp_path):
    ids, path = torch.tensor([[1, 2, 3]]), tiny_teacher
    for name in ("first", "second"):
        folder = tmp_path / name
        adapter = get_peft_model(load_frozen(path, torch.float32), LoraConfig(r=2, init_lora_weights=False))
        adapter.save_pretrained(folder)
        expected = adapter.eval()(ids).logits
        path = resolve_model_path(str(folder))
    settings = tmp_path / "second" / "adapter_config.json"
    named = {**json.loads(settings.read_text()), "base_model_name_or_path": str(tmp_path / "first")}  # not its merged/
    settings.write_text(json.dumps(named))
    shutil.rmtree(path)
    again = load_frozen(resolve_model_path(str(tmp_path / "second")), torch.float32)
    torch.testing.assert_close(again(ids).logits, expected)


def test_an_adapter_with_settings_of_a_model_beside_it_is_merged_too(tiny_teacher, tmp_path):
    adapter = get_peft_model(load_frozen(tiny_teacher, torch.float32), LoraConfig(r=2, init_lora_weights=False))
    adapter.save_pretrained(tmp_path)
    shutil.copy(f"{tiny_teacher}/config.json", tmp_path)
    ids = torch.tensor([[1, 2, 3]])
    merged = load_frozen(resolve_model_path(str(tmp_path)), torch.float32)
    torch.testing.assert_close(merged(ids).logits, adapter.eval()(ids).logits)


def test_a_whole_model_with_an_adapters_settings_or_weights_left_in_it_is_read_as_it_is(
    tiny_teacher, tmp_path, monkeypatch, caplog
):
    monkeypatch.setenv("RLT_CACHE_DIR", str(tmp_path / "cache"))
    folder, ids = tmp_path / "model", torch.arange(30).view(1, 30)
    adapter = get_peft_model(load_frozen(tiny_teacher, torch.float32), LoraConfig(r=2, init_lora_weights=False))
    adapter.save_pretrained(folder)
    shutil.copytree(tiny_teacher, folder, dirs_exist_ok=True)
    expected = load_frozen(tiny_teacher, torch.float32)(ids).logits
    check_models_exist({"model_name_or_path": str(folder)})
    assert torch.equal(load_frozen(resolve_model_path(str(folder)), torch.float32)(ids).logits, expected)
    assert "the adapter is left out" in caplog.text
    caplog.clear()
    (folder / "adapter_model.safetensors").unlink()
    shard = (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensor_shapes(shard), shard.name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    path = resolve_model_path(str(folder))
    assert path == resolve_model_path(str(folder))
    assert torch.equal(load_frozen(path, torch.float32)(ids).logits, expected)
    assert load_tokenizer(path).get_vocab() == load_tokenizer(tiny_teacher).get_vocab()
    assert not caplog.text


def test_an_adapter_that_cannot_be_merged_is_refused_in_one_line(tiny_teacher, tmp_path):
    settings = tmp_path / "adapter_config.json"
    settings.write_text("{")
    with pytest.raises(ValueError, match="names no base model"):
        resolve_model_path(str(tmp_path))
    sizes = {
        "vocab_size": 8,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }
    other = LlamaForCausalLM(LlamaConfig(**sizes))
    get_peft_model(other, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "base_model_name_or_path": tiny_teacher}))
    with pytest.raises(ValueError, match=f"cannot be put on its base, {tiny_teacher} \\(size mismatch for .*\\)$"):
        resolve_model_path(str(tmp_path))
    weights = tmp_path / "adapter_model.safetensors"
    os.truncate(weights, 20)
    with pytest.raises(ValueError, match="cannot be put on its base"):
        resolve_model_path(str(tmp_path))
    half = LlamaForCausalLM(LlamaConfig.from_pretrained(tiny_teacher, num_hidden_layers=1))
    get_peft_model(half, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "base_model_name_or_path": tiny_teacher}))
    with pytest.raises(ValueError, match=f"is not one of its base, {tiny_teacher} .*layers.1"):
        resolve_model_path(str(tmp_path))
    assert not (tmp_path / "merged").exists()
    weights.unlink()
    with pytest.raises(ValueError, match="an adapter's settings and no weights"):
        resolve_model_path(str(tmp_path))


def test_an_adapter_is_not_trained_on_unmerged(tiny, tmp_path):
    get_peft_model(load_frozen(tiny, torch.float32), LoraConfig(r=2)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is an adapter"):
        load_policy(str(tmp_path))


def test_4_bit_loading_replaces_the_linear_layers(tiny):
    policy = load_policy(tiny, dtype=torch.float32, device="cpu", load_in_4bit=True)
    projection = policy.model.layers[0].mlp.up_proj
    assert type(projection).__name__ == "Linear4bit" and policy.lm_head.weight.dtype == torch.float32
    assert policy(torch.tensor([[1, 2, 3]])).logits.isfinite().all()
    expected = torch.bfloat16 if supports_bfloat16("cpu") else torch.float32
    assert projection.weight.quant_type == "nf4"
    assert policy.config.quantization_config.bnb_4bit_compute_dtype == expected


@pytest.mark.parametrize("bits", [4, 8])
def test_gradients_through_a_quantised_base_are_the_same_after_an_evaluation(bits, tiny):
    base = load_policy(tiny, device="cpu", load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    policy = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))

    def gradients() -> list[torch.Tensor]:
        policy.train().zero_grad()
        policy(torch.tensor([[1, 2, 3, 4]])).logits.square().sum().backward()
        return [value.grad.clone() for value in policy.parameters() if value.requires_grad]

    before = gradients()
    with torch.no_grad():
        policy.eval()(torch.tensor([[1, 2, 3, 4]]))
    after = gradients()
    assert all(value.any() for value in before)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_pickled_weights_are_not_loaded(tiny, tmp_path):
    model = load_policy(tiny)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="no file named model.safetensors"):
        load_policy(str(tmp_path))


def test_a_git_lfs_pointer_is_named_and_so_is_a_file_that_is_cut_short(tiny, tmp_path):
    load_policy(tiny).save_pretrained(tmp_path, max_shard_size="20KB")
    first, second, *_ = sorted(tmp_path.glob("*.safetensors"))
    os.truncate(second, second.stat().st_size - 1)
    with pytest.raises(ValueError, match=f"{second} is cut short"):
        load_policy(str(tmp_path))
    first.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 9\n")
    with pytest.raises(ValueError, match=f"{first} is a git-lfs pointer"):
        load_policy(str(tmp_path))


def test_a_tokenizer_that_is_a_git_lfs_pointer_is_named(converted, tmp_path):
    for path in Path(converted).glob("*token*"):
        shutil.copy(path, tmp_path)
    (tmp_path / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match="tokenizer.json is a git-lfs pointer"):
        load_tokenizer(str(tmp_path))


def test_local_paths_stay_and_hub_names_pass_through(tiny):
    assert resolve_model_path(tiny) == tiny
    assert resolve_model_path("Qwen/Qwen2.5-0.5B-Instruct") == "Qwen/Qwen2.5-0.5B-Instruct"


@pytest.mark.parametrize("name", ["./no_model", "/no/model", "~/no_model", "results/no_run"])
def test_a_model_path_that_does_not_exist_is_refused(name):
    with pytest.raises(ValueError, match=f"model path {name} does not exist"):
        resolve_model_path(name)


@pytest.mark.parametrize("load", [load_policy, load_tokenizer])
def test_a_hub_name_without_network_is_one_value_error(monkeypatch, load):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="nobody/nothing could not be loaded .*folder with safetensors") as caught:
        load("nobody/nothing")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("flags\t\t: fpu avx512f avx512_bf16", True),
        ("flags\t\t: fpu amx_tile amx_bf16", True),
        ("Features\t: fp asimd bf16", True),
        ("flags\t\t: fpu avx2 avx512f", False),
        ("model name\t: bf16", False),
    ],
)
def test_bfloat16_on_the_cpu_follows_the_processors_flags(monkeypatch, line, expected):
    monkeypatch.setattr(Path, "read_text", lambda self, **_: f"processor\t: 0\n{line}\n")
    assert supports_bfloat16("cpu") is expected


def test_bfloat16_is_not_claimed_for_an_unknown_device():
    assert supports_bfloat16("mps") is False


class Recorder(torch.nn.Linear):
    """Notes where it is sent. The meta device stands for a GPU: a move is a move of every parameter."""

    def __init__(self):
        super().__init__(2, 2)
        self.moves = []

    def to(self, device):
        self.moves.append(str(device))
        return self if str(device) == "cpu" else super().to(device)


@pytest.mark.parametrize(("offload", "moves"), [(True, ["meta", "cpu"]), (False, ["meta"])])
def test_a_frozen_model_moves_whole_and_comes_back_only_when_offloaded(offload, moves):
    model = Recorder()
    with resident(model, "meta", offload) as moved:
        assert moved is model and {p.device.type for p in model.parameters()} == {"meta"}
    assert model.moves == moves


def test_a_model_that_is_there_already_is_not_moved():
    model = Recorder()
    with resident(model, "cpu", offload=True):
        pass
    assert model.moves == []


def test_a_model_comes_back_after_an_exception_and_only_from_the_outer_of_two_uses():
    model = Recorder()
    with pytest.raises(RuntimeError), resident(model, "meta", True), resident(model, "meta", True):
        raise RuntimeError
    assert model.moves == ["meta", "cpu"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_an_offloaded_model_gives_its_gpu_memory_back(tiny):
    model = load_frozen(tiny, torch.float32)
    ids, before = torch.arange(20)[None], torch.cuda.memory_allocated()
    expected = model(ids).logits
    for _ in range(2):  # the second time from pinned memory that is there
        send_for(model, "cuda")
        with resident(model, "cuda", True):
            assert torch.cuda.memory_allocated() > before
            torch.testing.assert_close(model(ids.cuda()).logits.cpu(), expected, atol=1e-4, rtol=1e-4)
    assert torch.cuda.memory_allocated() == before and {p.device.type for p in model.parameters()} == {"cpu"}

"""The clients' texts, hidden states and pushed weights against the libraries that they stand in for."""

import numpy as np
import pytest
import torch
from conftest import load_tokenizer

pytest.importorskip("sqlalchemy")

from peft import PeftModel  # noqa: E402
from test_model_card import TOKEN, serving  # noqa: E402
from test_serving_worker import KEY, served, trained  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from rlt.errors import Refused  # noqa: E402
from rlt.serving import Client  # noqa: E402
from rlt.serving.client import RequestFailed  # noqa: E402

LIMIT_S = 120
TEXTS = ["What is 3 * 4?", "", "<|im_start|>user\nhi<|im_end|>", "ein Straßenübergang \U0001f600", "\ud800"]
MESSAGES = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yes?"},
    {"role": "user", "content": "x"},
]
SEQUENCES = [[5, 6, 7, 8], [900], [77, 78, 79]]


pytestmark = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")


@pytest.fixture(scope="module")
def client(tmp_path_factory, tiny_teacher):
    folder = tmp_path_factory.mktemp("serving") / "state"
    with (
        served(folder, f"base_models=[tiny={tiny_teacher}]", "sampler=torch") as address,
        Client(address, KEY) as service,
    ):
        yield service


@pytest.fixture(scope="module")
def model(client):
    made = client.create_model("tiny", rank=4, seed=3)
    trained(made, 2)
    return made


def logits(folder) -> torch.Tensor:
    read = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return read(torch.tensor([SEQUENCES[0]])).logits[0]


def test_tokens_and_texts_are_the_tokenizers(client, tokenizer):
    found = client.tokenize("tiny", TEXTS)
    whole = [text.encode("utf-8", "replace").decode() for text in TEXTS]
    assert found == [tokenizer(text, add_special_tokens=False).input_ids for text in whole]
    assert client.detokenize("tiny", found) == [tokenizer.decode(ids, skip_special_tokens=True) for ids in found]
    assert client.detokenize("tiny", found, special=True)[2] == TEXTS[2]


@pytest.mark.parametrize("generation", [True, False])
def test_a_conversation_is_rendered_as_transformers_does(client, tokenizer, generation):
    ours = client.apply_chat_template("tiny", MESSAGES, generation)
    assert ours == tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=generation)["input_ids"]


def test_texts_that_cannot_be_read_are_refused(client):
    for call, said in (
        (lambda: client.tokenize("gpt-5", ["x"]), "gpt-5"),
        (lambda: client.tokenize("tiny", [3]), "texts"),
        (lambda: client.detokenize("tiny", [[-1]]), "no tokens"),
        (lambda: client.apply_chat_template("tiny", ["hi"]), "role and content"),
        (lambda: client.apply_chat_template("tiny", [{"role": "user"}]), "chat template"),
    ):
        with pytest.raises(Refused, match=said):
            call()


def test_embeddings_are_the_means_of_the_last_hidden_states(client, model, tiny_teacher, tmp_path):
    fresh = client.create_model("tiny", rank=4)
    for made, folder in ((fresh, tiny_teacher), (model, model.download(tmp_path / "whole", merged=True))):
        found = made.embeddings(SEQUENCES).result(LIMIT_S)
        read = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        for ids, values in zip(SEQUENCES, found, strict=True):
            with torch.no_grad():
                hidden = read.model(torch.tensor([ids])).last_hidden_state[0].mean(0)
            np.testing.assert_allclose(values, hidden.numpy(), atol=1e-5)
    for bad in ([[10**6]], [[]], []):
        with pytest.raises(RequestFailed) as failed:
            model.embeddings(bad).result(LIMIT_S)
        assert failed.value.category == "user"


def test_a_merged_model_is_the_base_with_its_adapter(client, model, tiny_teacher, tmp_path):
    """With an adapter on the head, which the base ties to its embedding, and without."""
    for each in (model, client.create_model("tiny", rank=4, seed=3, train_unembed=False)):
        trained(each, 1)
        place = tmp_path / each.model_id.replace(":", "-")
        adapter, whole = each.download(place / "adapter"), each.download(place / "whole", merged=True)
        base = AutoModelForCausalLM.from_pretrained(tiny_teacher, dtype=torch.float32)
        with torch.no_grad():
            wanted = PeftModel.from_pretrained(base, str(adapter)).eval()(torch.tensor([SEQUENCES[0]])).logits[0]
        torch.testing.assert_close(logits(whole), wanted, atol=1e-4, rtol=0)
        assert not torch.allclose(logits(tiny_teacher), wanted, atol=1e-3)
        assert load_tokenizer(str(whole)).chat_template
    with pytest.raises(Refused, match="has files"):
        model.download(whole)


def test_weights_are_pushed_to_a_hub(model, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    with serving() as hub:
        where = model.push_to_hub("me/adapter", token=TOKEN, endpoint=hub.url)
        assert where.startswith(hub.url)
        assert {"adapter_model.safetensors", "adapter_config.json"} <= hub.files.keys()
        hub.files.clear()
        model.push_to_hub("me/whole", merged=True, token=TOKEN, endpoint=hub.url, commit_message="all of it")
        assert {"model.safetensors", "config.json", "tokenizer.json"} <= hub.files.keys()
        assert hub.messages[-1] == "all of it"
        with pytest.raises(Refused, match="no/adapter/at all"):
            model.push_to_hub("no/adapter/at all", token=TOKEN, endpoint=hub.url)
        with pytest.raises(Refused, match="401"):
            model.push_to_hub("me/adapter", token="wrong", endpoint=hub.url)
    listed = model.connection.start(model.connection.ask("GET", "checkpoints")).result(LIMIT_S).json()["checkpoints"]
    assert [each for each in listed if "download-" in each["checkpoint_id"]] == []

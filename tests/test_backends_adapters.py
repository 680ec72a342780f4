"""Several models on one base: none is moved by another, and the base by none."""

import threading

import pytest
import torch
from peft import PeftModel
from test_backends_pytorch import LIMIT_S, PARAMS, all_equal, backend_of, data, tiny
from transformers import GPT2Config, GPT2LMHeadModel

from backends import AdapterSpec, SharedBase, TrainingBackend
from rlt.errors import Refused

TIED = {"tie_word_embeddings": True}


def base_of(tmp_path, **options) -> SharedBase:
    return SharedBase(tiny(**options), tmp_path, "cpu", name="tiny")


def make(base: SharedBase, name: str, **spec):
    return base.create(name, AdapterSpec(**spec)).result(LIMIT_S)


def step(backend, number: int) -> float:
    batch = data(seed=number)
    loss = backend.forward_backward(batch[:2]).result(LIMIT_S).metrics["loss:sum"]
    loss += backend.forward_backward(batch[2:], "ppo").result(LIMIT_S).metrics["loss:sum"]
    backend.optim_step(PARAMS).result(LIMIT_S)
    return loss


def weights(backend) -> dict[str, torch.Tensor]:
    return backend.get_weights().result(LIMIT_S)


@pytest.mark.parametrize("tied", [False, True])
def test_interleaved_each_is_what_it_is_alone_and_the_base_never_moves(tmp_path, tied):
    specs = {"a": {"rank": 4, "seed": 1}, "b:train:0": {"rank": 8, "seed": 2, "train_mlp": False}}
    alone = {}
    for name, spec in specs.items():
        backend = make(base_of(tmp_path, tie_word_embeddings=tied), name, **spec)
        alone[name] = [step(backend, number) for number in range(3)], weights(backend)
    base = base_of(tmp_path, tie_word_embeddings=tied)
    before = {name: value.clone() for name, value in base.model.state_dict().items()}
    first = base.forward(data()).result(LIMIT_S)
    backends = {name: make(base, name, **spec) for name, spec in specs.items()}
    losses = {name: [] for name in specs}
    for number in range(3):
        for name, backend in backends.items():
            losses[name].append(step(backend, number))
    for name, backend in backends.items():
        assert isinstance(backend, TrainingBackend)
        assert losses[name] == alone[name][0]
        assert all_equal(weights(backend).values(), alone[name][1].values())
    causal = base.model.get_base_model()
    after = {name.replace(".base_layer", ""): value for name, value in causal.state_dict().items()}
    assert all(torch.equal(after[name], value) for name, value in before.items())
    again = base.forward(data()).result(LIMIT_S)
    for a, b in zip(first.logprobs, again.logprobs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_gradients_that_wait_for_a_step_are_not_touched_by_another_model(tmp_path):
    base = base_of(tmp_path)
    one, other = make(base, "one", rank=4, seed=0), make(base, "other", rank=4, seed=0)
    one.forward_backward(data()).result(LIMIT_S)
    step(other, 1)
    with pytest.raises(Refused):
        other.forward_backward([]).result(LIMIT_S)
    assert one.optim_step(PARAMS).result(LIMIT_S).grad_norm > 0
    alone = make(base_of(tmp_path), "one", rank=4, seed=0)
    alone.forward_backward(data()).result(LIMIT_S)
    alone.optim_step(PARAMS).result(LIMIT_S)
    assert all_equal(weights(one).values(), weights(alone).values())


@pytest.mark.parametrize("options", [{}, TIED], ids=["untied", "tied"])
def test_a_new_model_is_the_base(tmp_path, options):
    base = base_of(tmp_path, **options)
    expected = base.forward(data()).result(LIMIT_S)
    backend = make(base, "new", rank=4)
    for a, b in zip(expected.logprobs, backend.forward(data()).result(LIMIT_S).logprobs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    assert all(value.dtype == torch.float32 for value in weights(backend).values())


FLAGS = {
    "train_attn": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "train_mlp": {"gate_proj", "up_proj", "down_proj"},
    "train_unembed": {"lm_head"},
}


@pytest.mark.parametrize("flags", [("train_attn",), ("train_mlp",), ("train_unembed",), tuple(FLAGS)])
@pytest.mark.parametrize("options", [{}, TIED], ids=["untied", "tied"])
def test_flags_decide_what_is_trained_and_all_of_it_moves(tmp_path, flags, options):
    backend = make(base_of(tmp_path, **options), "a", rank=4, **{flag: flag in flags for flag in FLAGS})
    before = weights(backend)
    layers = {name.split(".lora_")[0].rpartition(".")[2] for name in before}
    assert layers == set.union(*(FLAGS[flag] for flag in flags))
    assert {name.rpartition(".lora_")[2] for name in before} == {"A.weight", "B.weight"}
    for number in range(2):  # A moves once B has
        step(backend, number)
    after = weights(backend)
    assert all(not torch.equal(before[name], after[name]) for name in before)
    optimized = {p for group in backend.optimizer.param_groups for p in group["params"]}
    assert len(optimized) == len(before)


def test_an_adapter_on_a_tied_head_leaves_the_input_embedding_alone(tmp_path):
    base = base_of(tmp_path, **TIED)
    backend = make(base, "a", rank=4, seed=0, train_attn=False, train_mlp=False)
    causal = base.model.get_base_model()
    hidden = causal.model(torch.tensor([[1, 2, 3]])).last_hidden_state
    for number in range(3):
        step(backend, number)
    assert torch.equal(causal.model(torch.tensor([[1, 2, 3]])).last_hidden_state, hidden)
    assert causal.lm_head.weight is causal.model.embed_tokens.weight
    assert not torch.equal(causal.lm_head(hidden), hidden @ causal.model.embed_tokens.weight.T)


def test_the_scale_is_32_over_the_rank_and_a_seed_repeats(tmp_path):
    base = base_of(tmp_path)
    one, same, other = (make(base, name, rank=4, seed=seed) for name, seed in (("a", 7), ("b", 7), ("c", 8)))
    assert all_equal(weights(one).values(), weights(same).values())
    assert not all_equal(weights(one).values(), weights(other).values())
    layer = base.model.get_base_model().model.layers[0].self_attn.q_proj
    assert layer.scaling[one.inner] == 8.0
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    make(base, "d", seed=0)
    assert torch.equal(torch.rand(1), expected)  # the seed is its own


def test_a_state_fits_an_adapter_of_another_name_and_no_other_shape(tmp_path):
    base = base_of(tmp_path)
    one = make(base, "one", rank=4, seed=0)
    step(one, 0)
    folder = one.save_state().result(LIMIT_S)
    assert folder == tmp_path / "one" / "step_0001"
    step(one, 1)
    other = make(base, "other", rank=4, seed=9)
    assert other.load_state(folder).result(LIMIT_S) == 1
    step(other, 1)
    assert all_equal(weights(one).values(), weights(other).values())
    for name, spec in (("wider", {"rank": 8}), ("fewer", {"rank": 4, "train_mlp": False})):
        with pytest.raises(Refused, match="is of {'base': 'tiny', 'rank': 4.* this backend trains"):
            make(base, name, **spec).load_state(folder).result(LIMIT_S)
    elsewhere = SharedBase(tiny(), tmp_path, "cpu", name="another")
    with pytest.raises(Refused, match="'base': 'tiny'.* trains {'base': 'another'"):
        make(elsewhere, "one", rank=4).load_state(folder).result(LIMIT_S)


def test_a_model_goes_on_from_a_state_as_another_one(tmp_path):
    base = base_of(tmp_path)
    one = make(base, "one", rank=4, seed=0, train_mlp=False)
    step(one, 0)
    folder = one.save_state("full").result(LIMIT_S)
    bare = one.save_state("bare", with_optimizer=False).result(LIMIT_S)
    other = base.create_from_state("other", folder).result(LIMIT_S)
    assert (other.spec.rank, other.spec.train_mlp, other.weight_version) == (4, False, 1)
    for backend in (one, other):
        step(backend, 1)
    assert all_equal(weights(one).values(), weights(other).values())
    with pytest.raises(Refused, match="bare has no optimizer state"):
        base.create_from_state("third", bare).result(LIMIT_S)
    assert base.create_from_state("third", bare, with_optimizer=False).result(LIMIT_S).weight_version == 1
    whole = backend_of(tmp_path).save_state("whole").result(LIMIT_S)
    with pytest.raises(Refused, match="whole is of a whole model"):
        base.create_from_state("fourth", whole).result(LIMIT_S)
    assert list(base.adapters) == ["one", "other", "third"]


@pytest.mark.parametrize("options", [{}, TIED], ids=["untied", "tied"])
def test_an_exported_adapter_is_the_model_elsewhere(tmp_path, options):
    backend = make(base_of(tmp_path, **options), "a", rank=4)
    step(backend, 0)
    folder = backend.export(tmp_path / "exported").result(LIMIT_S)
    assert {path.name for path in folder.iterdir()} >= {"adapter_model.safetensors", "adapter_config.json"}
    loaded = PeftModel.from_pretrained(tiny(**options), folder).eval()
    datum = data()[0]
    rows = torch.log_softmax(loaded(torch.tensor([datum.tokens])).logits[0], -1)
    expected = rows.gather(-1, datum.loss_inputs["target_tokens"][:, None])[:, 0]
    torch.testing.assert_close(backend.forward([datum]).result(LIMIT_S).logprobs[0], expected, atol=1e-5, rtol=0)
    with pytest.raises(Refused, match="exported exists"):
        backend.export(folder).result(LIMIT_S)


def test_a_removed_model_refuses_and_the_others_go_on(tmp_path):
    base = base_of(tmp_path)
    one, other = make(base, "one", rank=4), make(base, "other", rank=4, seed=0)
    step(other, 0)
    base.remove("one").result(LIMIT_S)
    with pytest.raises(Refused, match="the model 'one' was removed"):
        one.forward(data()).result(LIMIT_S)
    step(other, 1)
    base.remove("other").result(LIMIT_S)
    base.forward(data()).result(LIMIT_S)
    step(make(base, "one", rank=2), 0)
    with pytest.raises(Refused, match="no model 'other'"):
        base.remove("other").result(LIMIT_S)


def test_adapters_that_cannot_be_are_refused(tmp_path):
    base = base_of(tmp_path)
    make(base, "one", rank=4)
    for name, spec, said in (
        ("one", {}, "there is a model 'one' on this base already"),
        ("../a", {}, "cannot be a name here"),
        ("a", {"rank": 0}, "rank=0: a whole number"),
        ("a", {"rank": 2.5}, "rank=2.5"),
        ("a", dict.fromkeys(FLAGS, False), "nothing to train: one of train_attn, train_mlp, train_unembed must be"),
    ):
        with pytest.raises(Refused, match=said):
            make(base, name, **spec)
    assert list(base.adapters) == ["one"]


def test_other_architectures_name_their_layers_otherwise(tmp_path):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=53, n_positions=64, n_embd=32, n_layer=2, n_head=2))
    base = SharedBase(model, tmp_path, "cpu")
    attention = make(base, "a", rank=2, train_mlp=False, train_unembed=False)
    assert {name.split(".lora_")[0].split(".h.")[1][2:] for name in weights(attention)} == {
        "attn.c_attn",
        "attn.c_proj",
    }
    step(attention, 0)
    step(make(base, "b", rank=2), 0)


def test_clients_in_many_threads_are_served_one_after_the_other(tmp_path):
    base = base_of(tmp_path)
    backends = [make(base, str(number), rank=2, seed=number) for number in range(4)]

    def train(backend):
        for number in range(3):
            step(backend, number)

    threads = [threading.Thread(target=train, args=(backend,)) for backend in backends]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S)
    assert not any(thread.is_alive() for thread in threads)
    for number, backend in enumerate(backends):
        alone = make(base_of(tmp_path), str(number), rank=2, seed=number)
        train(alone)
        assert all_equal(weights(backend).values(), weights(alone).values())

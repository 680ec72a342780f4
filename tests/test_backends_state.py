"""What a backend saves: whole or absent, read back to the last bit, refused where it is of something else."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from test_backends_pytorch import LIMIT_S, PARAMS, all_equal, backend_of, data, gradients, tiny, weights

from backends import PyTorchTrainingBackend, create_warmup_scheduler
from rlt.errors import Refused


def steps(backend, numbers) -> None:
    for number in numbers:
        backend.forward_backward(data(seed=number)).result(LIMIT_S)
        backend.optim_step(PARAMS).result(LIMIT_S)


def test_a_state_goes_on_to_the_last_bit(tmp_path):
    straight, first, second = (backend_of(tmp_path) for _ in range(3))
    steps(straight, range(4))
    steps(first, range(2))
    folder = first.save_state().result(LIMIT_S)
    assert folder == tmp_path / "step_0002"
    steps(second, [7])
    second.forward_backward(data()).result(LIMIT_S)  # pending gradients, which go
    assert second.load_state("step_0002").result(LIMIT_S) == 2
    steps(second, [2, 3])
    assert all_equal(weights(straight), weights(second)) and second.weight_version == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_0002"]


def test_without_the_optimizer_it_begins_anew(tmp_path):
    saved, fresh = backend_of(tmp_path), backend_of(tmp_path)
    steps(saved, range(2))
    saved.save_state("full").result(LIMIT_S)
    bare = saved.save_state("bare", with_optimizer=False).result(LIMIT_S)
    fresh.load_weights(saved.get_weights().result(LIMIT_S)).result(LIMIT_S)
    steps(fresh, [5])
    for name in ("full", bare):
        saved.load_state(name, with_optimizer=False).result(LIMIT_S)
        assert not saved.optimizer.state
        steps(saved, [5])
        assert all_equal(weights(saved), weights(fresh))
    with pytest.raises(Refused, match="bare has no optimizer state: load it with_optimizer=False"):
        saved.load_state("bare").result(LIMIT_S)


def test_weights_are_copies_and_come_back_in_part(tmp_path):
    backend, other = backend_of(tmp_path), backend_of(tmp_path)
    kept = backend.get_weights().result(LIMIT_S)
    before = [value.clone() for value in kept.values()]
    steps(backend, [0])
    assert all_equal(before, kept.values()) and not all_equal(before, weights(backend))
    backend.forward_backward(data()).result(LIMIT_S)
    backend.load_weights(kept).result(LIMIT_S)
    assert all_equal(before, weights(backend)) and all(p.grad is None for p in backend.model.parameters())
    name = "model.norm.weight"
    other.load_weights({name: kept[name] + 1}).result(LIMIT_S)
    assert all_equal([other.get_weights().result(LIMIT_S)[name]], [kept[name] + 1])


def test_a_schedule_goes_on(tmp_path):
    found = []
    for _ in range(2):
        model = tiny()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        scheduler = create_warmup_scheduler(optimizer, 2, 8)
        found.append(PyTorchTrainingBackend(model, optimizer, checkpoint_dir=tmp_path, scheduler=scheduler))
    one, two = found
    for _ in range(3):
        one.forward_backward(data()).result(LIMIT_S)
        one.optim_step().result(LIMIT_S)
    one.save_state("a").result(LIMIT_S)
    two.load_state("a").result(LIMIT_S)
    for backend in found:
        backend.forward_backward(data()).result(LIMIT_S)
    assert one.optim_step().result(LIMIT_S) == two.optim_step().result(LIMIT_S)
    with pytest.raises(Refused, match="b has no schedule"):
        backend_of(tmp_path).save_state("b").result(LIMIT_S)
        two.load_state("b").result(LIMIT_S)


def sgd_backend(tmp_path) -> PyTorchTrainingBackend:
    model = tiny()
    return PyTorchTrainingBackend(model, torch.optim.SGD(model.parameters(), lr=0.1), checkpoint_dir=tmp_path)


def test_states_of_something_else_are_refused_and_change_nothing(tmp_path):
    backend = backend_of(tmp_path)
    steps(backend, [0])
    backend.save_state("whole").result(LIMIT_S)
    wider = backend_of(tmp_path, tiny(head_dim=16))
    tied = backend_of(tmp_path, tiny(tie_word_embeddings=True))
    before = weights(wider)
    for other, said in (
        (wider, r"self_attn.k_proj.weight is \(16, 32\), here \(32, 32\)"),
        (tied, "has lm_head.weight, which this model does not train"),
        (sgd_backend(tmp_path), "has the state of AdamW, and this backend's optimizer is SGD"),
    ):
        with pytest.raises(Refused, match=said):
            other.load_state("whole").result(LIMIT_S)
    with pytest.raises(Refused, match="has nothing, which this model does not train"):
        wider.load_weights({"nothing": torch.zeros(1)}).result(LIMIT_S)
    assert all_equal(before, weights(wider))


@pytest.mark.parametrize("name", ["..", "a/b", "", "-", ".hidden", "x" * 129, "a b", "a\n"])
def test_names_that_could_leave_the_folder_are_refused(tmp_path, name):
    backend = backend_of(tmp_path)
    if name:
        with pytest.raises(Refused, match="cannot be a name here"):
            backend.save_state(name).result(LIMIT_S)
    with pytest.raises(Refused, match="cannot be a name here|no saved state"):
        backend.load_state(name).result(LIMIT_S)


def test_a_name_is_taken_once_unless_it_is_to_be_overwritten(tmp_path):
    backend = backend_of(tmp_path)
    steps(backend, [0])
    backend.save_state("mine").result(LIMIT_S)
    steps(backend, [1])
    with pytest.raises(Refused, match="mine exists: take another name, or overwrite it"):
        backend.save_state("mine").result(LIMIT_S)
    backend.save_state("mine", overwrite=True).result(LIMIT_S)
    assert backend.load_state(tmp_path / "mine").result(LIMIT_S) == 2


def test_damage_is_found_out(tmp_path):
    backend = backend_of(tmp_path)
    folder = backend.save_state("mine").result(LIMIT_S)
    file = folder / "weights.safetensors"
    whole = bytearray(file.read_bytes())
    whole[-1] ^= 1
    file.write_bytes(whole)
    with pytest.raises(Refused, match="damaged .weights.safetensors has other bytes"):
        backend.load_state("mine").result(LIMIT_S)
    file.unlink()
    with pytest.raises(Refused, match="damaged"):
        backend.load_state("mine").result(LIMIT_S)
    with pytest.raises(Refused, match="there is no saved state in .*other"):
        backend.load_state("other").result(LIMIT_S)


def test_gradients_stay_while_a_state_is_written(tmp_path):
    backend = backend_of(tmp_path)
    backend.forward_backward(data()).result(LIMIT_S)
    before = gradients(backend)
    backend.save_state().result(LIMIT_S)
    assert all_equal(before, gradients(backend))


KILLED = """
import sys
sys.path.insert(0, "tests")
from pathlib import Path
from test_backends_state import backend_of, steps
backend = backend_of(Path(sys.argv[1]))
steps(backend, [0])
backend.save_state("mine").result(60)
steps(backend, [1])
backend.save_state("mine", overwrite=True).result(60)
"""


@pytest.mark.parametrize(("point", "version"), [("saving:2", 1), ("replacing", 2)])
def test_a_save_that_is_killed_leaves_the_state_before_or_its_own(point, version, tmp_path):
    """The latter where the state before has lost its name already."""
    environment = {**os.environ, "RLT_KILL_AT": point, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT, env=environment, timeout=120, check=False
    )
    assert ended.returncode == -signal.SIGKILL
    backend = backend_of(tmp_path)
    assert backend.load_state("mine").result(LIMIT_S) == version
    steps(backend, [1])
    with pytest.raises(Refused, match="mine exists"):
        backend.save_state("mine").result(LIMIT_S)
    assert backend.save_state("mine", overwrite=True).result(LIMIT_S).name == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    assert json.loads((tmp_path / "mine" / "state.json").read_text())["weight_version"] == version + 1


def test_a_disk_that_is_full_leaves_nothing_and_the_backend_goes_on(tmp_path):
    """A folder that cannot be written to stands for it."""
    (tmp_path / "taken").write_text("a file, where the folder should be")
    backend = backend_of(tmp_path / "taken")
    steps(backend, [0])
    with pytest.raises(OSError):
        backend.save_state("mine").result(LIMIT_S)
    steps(backend, [1])
    assert backend.weight_version == 2

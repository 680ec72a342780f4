"""C++ extensions are compiled by one process at a time, and a killed one is waited for by nobody."""

import subprocess
import sys
import time

import pytest

from backends import compilation

SOURCE = """
#include <Python.h>
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "tiny"};
PyMODINIT_FUNC PyInit_tiny() {
    PyObject* made = PyModule_Create(&module);
    PyModule_AddIntConstant(made, "answer", 42);
    return made;
}
"""
COMPILE = """
import os
from torch.utils import cpp_extension
from backends.compilation import Baton, compile_one_at_a_time
compile_one_at_a_time()
assert cpp_extension.FileBaton is Baton
print(cpp_extension.load("tiny", [os.environ["TORCH_EXTENSIONS_DIR"] + "/tiny.cpp"]).answer, flush=True)
"""
# A process that has begun to compile and does not end.
HELD = """
import sys, time
from torch.utils import cpp_extension
from backends.compilation import compile_one_at_a_time
if sys.argv[1] == "ours":
    compile_one_at_a_time()
baton = cpp_extension.FileBaton(sys.argv[2])
assert baton.try_acquire()
print("held", flush=True)
time.sleep(300)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch, in_root):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny.cpp").write_text(SOURCE)
    return tmp_path


@pytest.fixture
def hold(folder):
    """A process that compiles, with this project's baton or PyTorch's, until it is killed."""
    started = []

    def start(whose: str):
        command = [sys.executable, "-c", HELD, whose, str(folder / "tiny" / "lock")]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        assert started[-1].stdout.readline() == "held\n"
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait(10)


@pytest.mark.parametrize("whose", ["ours", "PyTorch's"])
def test_what_a_killed_process_left_is_removed(whose, folder, hold):
    holder = hold(whose)
    holder.kill()
    holder.wait(10)
    assert (folder / "tiny" / "lock").exists()
    baton = compilation.Baton(str(folder / "tiny" / "lock"))
    started = time.monotonic()
    assert baton.try_acquire()
    assert time.monotonic() - started < 5
    baton.release()
    assert not (folder / "tiny" / "lock").exists()


@pytest.mark.parametrize("whose", ["ours", "PyTorch's"])
def test_a_living_one_keeps_its_turn_and_is_waited_for_with_a_limit(whose, folder, hold, monkeypatch):
    hold(whose)
    monkeypatch.setattr(compilation, "LIMIT_S", 2)
    with pytest.raises(ValueError, match=r"tiny/lock has kept this run .* set TORCH_EXTENSIONS_DIR"):
        compilation.Baton(str(folder / "tiny" / "lock")).try_acquire()
    assert (folder / "tiny" / "lock").exists()


def test_ranks_that_need_it_at_once_all_get_it_where_another_was_killed(folder, hold):
    holder = hold("PyTorch's")
    ranks = [subprocess.Popen([sys.executable, "-c", COMPILE], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    time.sleep(5)
    assert [rank.poll() for rank in ranks] == [None, None]
    holder.kill()
    assert [rank.communicate(timeout=120)[0] for rank in ranks] == ["42\n", "42\n"]


def test_without_deepspeed_nothing_is_replaced(monkeypatch):
    from torch.utils import cpp_extension, file_baton

    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED", raising=False)
    compilation.compile_one_at_a_time()
    assert cpp_extension.FileBaton is file_baton.FileBaton

"""State in PostgreSQL and tensors in S3, on real servers: the same stories, kills in saves, lost databases."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

pytest.importorskip("sqlalchemy")
pytest.importorskip("obstore")
pytest.importorskip("psycopg")

from serving_kills import KEY, Mortal, unigram_folder  # noqa: E402
from serving_places import BUCKET, SECRET, SlowWire, postgresql, restart, s3_server, s3_variables  # noqa: E402
from serving_server import server  # noqa: E402
from test_serving_api import (  # noqa: E402, F401
    test_a_loop_of_four_operations_learns_saves_loads_and_samples,
    test_checkpoints_are_listed_published_and_deleted,
    test_frozen_samplers_stay_and_moving_ones_move,
    test_many_clients_at_once_lose_nothing,
    test_named_weights_are_sampled_from_and_downloaded,
    test_no_form_brings_the_server_to_an_error_of_its_own,
    test_one_tenant_never_sees_anothers,
    test_the_same_request_twice_gets_the_same_id,
    test_what_is_wrong_in_a_training_request_fails_its_future_and_not_the_next,
)
from test_serving_kills import LIMIT_S, check_equal, data, disturbed, run  # noqa: E402

from rlt.serving.client import Client  # noqa: E402
from rlt.wire.values import AdamParams  # noqa: E402
from rlt.workers.tensor_files import local_files, put_files  # noqa: E402

pytestmark = pytest.mark.slow
MIB = 2**20


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    with s3_server(tmp_path_factory.mktemp("s3")) as port:
        yield port


@pytest.fixture(scope="module")
def postgres(tmp_path_factory):
    with postgresql(tmp_path_factory.mktemp("postgres")) as server:
        yield server


def database(postgres, name: str) -> str:
    """The address of a new database, as a user writes it."""
    postgres.psql(f"CREATE DATABASE {name};")
    return postgres.get_uri(name)


@pytest.fixture(scope="module")
def client(tmp_path_factory, s3, postgres):
    """Of the stories of test_serving_api.py: here on PostgreSQL and S3."""
    folder = tmp_path_factory.mktemp("serving") / "state"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3_variables(s3).items():
            patch.setenv(name, value)
        flags = {"database": database(postgres, "stories"), "tensors": f"s3://{BUCKET}/stories"}
        with server(folder, hold_s=5, sweep_s=0.3, **flags) as (_, client):
            yield client
    assert SECRET not in (folder / "log").read_text()


@pytest.fixture
def calm(tmp_path):
    base_model = unigram_folder(tmp_path / "unigram")
    with Mortal(tmp_path / "calm", base_model, {"seconds": 0.02}) as server:
        return base_model, run(server, base_model, 40)


def test_kills_change_nothing_on_postgresql_and_s3(tmp_path, calm, s3, postgres):
    base_model, expected = calm
    words = [f"database={database(postgres, 'kills')}", f"tensors=s3://{BUCKET}/kills"]
    flags = {"seconds": 0.02}
    with Mortal(tmp_path / "killed", base_model, flags, words=words, **s3_variables(s3)) as server:
        check_equal(disturbed(server, base_model, 40, kills=6, seed=3, most_s=0.3), expected)
        assert SECRET not in server.log


def test_a_database_that_is_lost_for_a_while_loses_nothing(tmp_path, calm, postgres):
    base_model, expected = calm
    words = [f"database={database(postgres, 'lost')}"]
    with Mortal(tmp_path / "lost", base_model, {"seconds": 0.02}, words=words) as server:
        ended = threading.Event()

        def disturb() -> None:
            for _ in range(3):
                ended.wait(1.5)
                restart(postgres)

        disturber = threading.Thread(target=disturb, daemon=True)
        disturber.start()
        check_equal(run(server, base_model, 40), expected)
        ended.set()
        disturber.join(LIMIT_S)
        assert server.process.poll() is None
        assert "Traceback" not in server.log


def test_a_server_that_is_killed_in_the_middle_of_a_save_saves_it_after_its_restart(tmp_path, s3):
    base_model, wire = unigram_folder(tmp_path / "unigram"), SlowWire(s3, 4096)
    words = [f"tensors=s3://{BUCKET}/middle"]
    losses = []
    served = Mortal(tmp_path / "served", base_model, {}, words=words, **s3_variables(wire.port))
    with served as server, Client(server.address, KEY) as client:
        model = client.create_model(base_model)
        model.train_batch(data(1), "cross_entropy", AdamParams(0.1))
        saving, before = model.save_state("a"), wire.sent
        while wire.sent < before + 3000:  # of more than six thousand
            time.sleep(0.01)
        server.kill()
        wire.bytes_per_s = 1e9
        server.start()
        path = saving.result(LIMIT_S)["path"]
        for each in (model, client.model_from_state(path)):
            losses.append(each.train_batch(data(1), "cross_entropy", AdamParams(0.1))["loss:sum"])
    wire.close()
    assert losses[0] == losses[1]


PULL = """
import sys
from rlt.workers.tensor_files import local_files
with local_files(sys.argv[1]) as folder:
    print(sum(path.read_bytes().count(b"x") for path in folder.iterdir()))
"""


def test_a_pull_that_broke_goes_on_where_it_was(tmp_path, s3, monkeypatch):
    for name, value in s3_variables(s3).items():
        monkeypatch.setenv(name, value)
    source, address, size = tmp_path / "source", f"s3://{BUCKET}/pulls/one", 40 * MIB
    source.mkdir()
    (source / "weights").write_bytes(b"x" * size)
    assert put_files(source, address) == size
    wire = SlowWire(s3, 10 * MIB)
    environment = {**os.environ, **s3_variables(wire.port), "TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PULL, address]
    first = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE)
    part = tmp_path / "pulled" / "one" / "weights.part"
    end = time.monotonic() + 60
    while not (part.exists() and part.stat().st_size >= 16 * MIB) and time.monotonic() < end:
        time.sleep(0.01)
    first.kill()
    first.communicate(timeout=60)
    kept, before = part.stat().st_size, wire.received
    assert 16 * MIB <= kept < size
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    wire.close()
    assert ended.stdout.strip() == str(size), ended.stderr
    assert wire.received - before < size - kept + MIB
    assert not list((tmp_path / "pulled").iterdir())


def test_what_lies_in_s3_is_read_back_as_it_was(tmp_path, s3, monkeypatch):
    for name, value in s3_variables(s3).items():
        monkeypatch.setenv(name, value)
    source, address = tmp_path / "source", f"s3://{BUCKET}/read/one"
    source.mkdir()
    np.save(source / "a.npy", np.arange(9))
    put_files(source, address)
    with local_files(address) as folder:
        assert np.load(folder / "a.npy").tolist() == list(range(9))


def serve(folder: Path, *words: str, **variables: str) -> tuple[int, str]:
    command = [sys.executable, str(ROOT / "serve.py"), "port=0", f"state_dir={folder}", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RLT_API_KEY": KEY, **variables}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    return ended.returncode, ended.stderr.strip()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["database=postgresql://me:hidden@127.0.0.1:1/none"], "127.0.0.1:1"),
        (["database=mysql://me:hidden@127.0.0.1/none"], "postgresql"),
        (["database=nonsense:hidden"], "postgresql://"),
        ([f"tensors=s3://no-such-bucket/hidden-{SECRET[:0]}x"], "no-such-bucket"),
        (["tensors=/proc/none"], "/proc/none"),
    ],
)
def test_places_that_do_not_answer_end_in_one_line(tmp_path, s3, words, said):
    code, errors = serve(tmp_path, *words, **s3_variables(s3))
    assert code == 1
    assert len(errors.splitlines()) == 1
    assert said in errors
    assert SECRET not in errors and ":hidden@" not in errors

"""Exact duplicates, near duplicates and decontamination: speed on one core, what they find, memory.

    python benchmarks/preparation_duplicates.py exact near decontamination
    python benchmarks/preparation_duplicates.py memory --rows 100000 1000000

Speeds are of CPU seconds of this process. `near` runs datatrove's MinHash signatures on some of the same documents and
datasketch's MinHash with its index on all, and counts what is found, and what is kept, against exact Jaccard
similarities of all pairs.
"""

import argparse
import json
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

DATATROVE_DOCUMENTS = 600
SIMILARITY = 0.8
STAGES = ("exact", "near", "decontamination")


def report(**figures) -> None:
    rounded = {name: round(value, 3) if isinstance(value, float) else value for name, value in figures.items()}
    sys.stdout.write(f"{json.dumps(rounded)}\n")
    sys.stdout.flush()


def seconds_of(function) -> float:
    begin = time.process_time()
    function()
    return time.process_time() - begin


def exact(folder: Path) -> None:
    """Normal form, hash and the search for equal ones, of texts in memory; then the whole stage, files included."""
    import numpy as np
    from bible import as_records, corpus
    from stage_alone import lay_out, run_passes

    from rlt.preparation.exact import Exact
    from rlt.preparation.normal import text_hashes

    texts = corpus() * 4
    for name, some in (("ASCII", [t.encode().decode("ascii", "ignore") for t in texts]), ("as they are", texts)):

        def find(some=some) -> None:
            digests = [d for n in range(0, len(some), 128) for d in text_hashes(some[n : n + 128])]
            np.unique(np.frombuffer(b"".join(digests), "V16"))

        size = sum(len(text.encode()) for text in some) / 1e6
        beyond = sum(not text.isascii() for text in some) / len(some)
        best = min(seconds_of(find) for _ in range(5))
        report(what=f"exact, {name}", texts_beyond_ascii=beyond, mb=size, mb_per_s=size / best)
    lay_out(folder, as_records(texts))
    taken = seconds_of(lambda: run_passes(Exact, folder))
    report(what="exact, whole stage with files", mb_per_s=size / taken)


def near(folder: Path) -> None:
    from bible import as_records, best_kept, corpus, similar_pairs
    from stage_alone import lay_out, run_alone, run_passes

    from rlt.preparation.near import Near
    from rlt.preparation.shards import read_shard, shard

    texts = corpus()
    size, true, records = sum(len(t.encode()) for t in texts) / 1e6, similar_pairs(texts, SIMILARITY), as_records(texts)
    theirs = datatrove_seconds(texts[:DATATROVE_DOCUMENTS], folder) / DATATROVE_DOCUMENTS
    report(what="datatrove, signatures alone", documents_per_s=1 / theirs)
    report(what="datasketch, signatures and index", **datasketch_figures(texts, true))
    brute_force = sorted(records[number]["id"] for number in best_kept(texts, true))
    for name in ("rensa", "numpy", "torch"):
        run_alone(Near, folder, records[:100], near_signature=name)  # what is only loaded once
        lay_out(folder, records)
        begin = time.process_time()
        counts = run_passes(Near, folder, near_signature=name)
        taken = time.process_time() - begin
        kept = sorted(row["id"] for row in read_shard(shard(folder / "near" / "shards", 0)))
        alike, missed = counts.notes["pairs alike"], counts.notes["pairs alike that bands alone miss"]
        report(
            what=f"near, {name}, whole stage with files",
            documents_per_s=len(texts) / taken,
            mb_per_s=size / taken,
            times_datatrove=len(texts) / taken * theirs,
            true_pairs=len(true),
            recall=alike / len(true),
            recall_of_bands_alone=(alike - missed) / len(true),
            pairs_called_alike=alike,
            kept=len(kept),
            kept_by_brute_force=len(brute_force),
            the_same_rows=kept == brute_force,
        )


def datatrove_seconds(texts: list[str], folder: Path) -> float:
    from datatrove.data import Document
    from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupSignature
    from datatrove.utils.hashing import HashConfig

    hashes = HashConfig(hash_fc="sha1")  # its xxhash wants the package's version 3; most of its time is not hashing
    config = MinhashConfig(n_grams=5, num_buckets=14, hashes_per_bucket=8, hash_config=hashes)
    step = MinhashDedupSignature(str(folder / "datatrove"), config=config)
    documents = [Document(text=text, id=str(n)) for n, text in enumerate(texts)]
    step.run(iter(documents[:3]), rank=1, world_size=2)  # the tokenizer is loaded
    return seconds_of(lambda: step.run(iter(documents), rank=0, world_size=2))


def datasketch_figures(texts: list[str], true: dict[tuple[int, int], float]) -> dict[str, float]:
    """Of 128 hashes of the same runs of five words; nothing verifies the pairs of its index."""
    from bible import five_word_runs
    from datasketch import MinHash, MinHashLSH

    found: set[tuple[int, int]] = set()

    def find() -> None:
        index = MinHashLSH(threshold=SIMILARITY, num_perm=128)
        for number, text in enumerate(texts):
            signature = MinHash(num_perm=128)
            signature.update_batch([" ".join(run).encode() for run in five_word_runs(text)])
            found.update((earlier, number) for earlier in index.query(signature))
            index.insert(number, signature)

    taken = seconds_of(find)
    right = len(found & true.keys())
    return {"documents_per_s": len(texts) / taken, "recall": right / len(true), "precision": right / len(found)}


def decontamination(folder: Path) -> None:
    from bible import as_records, corpus
    from stage_alone import lay_out, run_passes

    from rlt.preparation.decontamination import Decontamination

    texts = corpus()
    size = sum(len(t.encode()) for t in texts) / 1e6
    lay_out(folder, as_records(texts))
    taken = seconds_of(lambda: run_passes(Decontamination, folder, evaluation_sets=["human-eval"]))
    report(what="decontamination, whole stage with files", mb_per_s=size / taken, documents_per_s=len(texts) / taken)


def rows(count: int, seed: int) -> Iterator[dict]:
    """Short texts of a Bible's words: of ten, one is an exact copy and one a near copy of the one before it."""
    from bible import chapters

    from rlt.formats.record import make_record

    generator, vocabulary = random.Random(seed), sorted({w for chapter in chapters("kjv") for w in chapter.split()})
    words: list[str] = []
    for number in range(count):
        if number % 10 == 8:
            words = [*words[:-1], "selah"]
        elif number % 10 != 9:
            words = generator.choices(vocabulary, k=50)
        own = {"id": f"bible:{number * 4 + seed}:0", "source": "bible"}
        yield {**make_record("text", text=" ".join(words)), **own}


def peak(stage: str, count: int) -> None:
    """One stage on so many rows in four shards, in this process, whose greatest memory is reported."""
    from omegaconf import OmegaConf

    from rlt.preparation.ledger import Counts
    from rlt.preparation.shards import shard, writing
    from rlt.preparation.stage import Place, Task
    from rlt.preparation.stages import STAGES as known

    folder = Path(tempfile.mkdtemp())
    begin = time.process_time()
    for number in range(4):
        with writing(shard(folder / "before" / "shards", number)) as write:
            for row in rows(count // 4, number):
                write(row)
    place, counts = Place(folder, folder / stage, folder / "before"), Counts()
    base = OmegaConf.to_container(OmegaConf.load(ROOT / "cfgs" / "preparation" / "base.yaml"))
    made = known[stage](SimpleNamespace(**{**base, "sources": ["bible.jsonl"], "engine_tasks": 4}))  # without torch
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    peaks = {}
    for one in made.passes():
        counts = Counts()
        for number in range(one.tasks or 4):
            counts.add(one.run(Task(place, number, one.tasks or 4, lambda read: None)) or Counts())
        peaks[one.name] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    shutil.rmtree(folder)
    report(
        what=f"memory, {stage}",
        rows=count,
        kept=counts.kept,
        mib_before=before,
        mib=peaks,
        s=time.process_time() - begin,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="+", choices=[*STAGES, "memory", "peak"])
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 300_000])
    parser.add_argument("--stages", nargs="+", default=STAGES)
    given = parser.parse_args()
    for what in given.what:
        if what == "peak":
            peak(given.stages[0], given.rows[0])
        elif what == "memory":
            for stage in given.stages:
                for count in given.rows:
                    command = [sys.executable, __file__, "peak", "--stages", stage, "--rows", str(count)]
                    subprocess.run(command, check=True)
        else:
            with tempfile.TemporaryDirectory() as folder:
                {"exact": exact, "near": near, "decontamination": decontamination}[what](Path(folder))


if __name__ == "__main__":
    main()

"""Near duplicates: what is dropped is exactly what brute force finds, and every dropped row is like a kept one."""

import pytest
from bible import as_records, corpus, five_word_runs, similar_pairs
from stage_alone import run_alone

from rlt.preparation.near import Near
from rlt.preparation.near.signature import SIGNATURES


def ids(records: list[dict]) -> list[str]:
    return sorted(record["id"] for record in records)


def best_kept(texts: list[str], pairs: dict[tuple[int, int], float]) -> set[int]:
    """The rule in plain Python: longest first, then earliest; what is like a kept one is not kept."""
    like: dict[int, set[int]] = {}
    for a, b in pairs:
        like.setdefault(a, set()).add(b)
        like.setdefault(b, set()).add(a)
    kept: set[int] = set()
    for number in sorted(range(len(texts)), key=lambda n: (-len(texts[n]), n)):
        if not like.get(number, set()) & kept:
            kept.add(number)
    return kept


@pytest.fixture(scope="module")
def some():
    texts = corpus(60)
    return texts, similar_pairs(texts, 0.8)


@pytest.mark.parametrize("signature", sorted(SIGNATURES))
@pytest.mark.parametrize("tasks", [1, 7])
def test_what_is_kept_is_what_brute_force_keeps_whatever_the_signature_and_the_shards(tmp_path, some, signature, tasks):
    texts, pairs = some
    counts, kept, dropped = run_alone(Near, tmp_path, as_records(texts), tasks, near_signature=signature)
    assert ids(kept) == ids([as_records(texts)[n] for n in best_kept(texts, pairs)])
    assert counts.notes["pairs alike"] == len(pairs) > 30
    assert len(dropped) > 30


def test_every_dropped_row_is_like_a_kept_one_and_no_two_kept_ones_are_alike(tmp_path, some):
    texts, _ = some
    _, kept, dropped = run_alone(Near, tmp_path, as_records(texts))
    sets = [five_word_runs(row["text"]) for row in kept]
    for row in dropped:
        own = five_word_runs(row["text"])
        most = max(len(own & other) / len(own | other) for other in sets)
        assert most >= 0.8
        assert row["score"] == pytest.approx(most, abs=1e-6)
    assert not similar_pairs([row["text"] for row in kept], 0.8)

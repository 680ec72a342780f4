"""Near duplicates: what is dropped is exactly what brute force finds, and every dropped row is like a kept one."""

import random
import re
import unicodedata

import numpy as np
import pytest
from bible import as_records, best_kept, chapters, corpus, edited, five_word_runs, licences, similar_pairs
from hypothesis import given
from hypothesis import strategies as st
from stage_alone import chat_record, run_alone, text_record

from rlt.errors import Refused
from rlt.preparation.near import Near, signature
from rlt.preparation.near.cluster import components
from rlt.preparation.near.signature import SIGNATURES, numpy_signatures
from rlt.preparation.words import SPACELESS, words


def numbers(records: list[dict]) -> list[int]:
    return sorted(int(record["id"].split(":")[1]) for record in records)


def ids(records: list[dict]) -> list[str]:
    return sorted(record["id"] for record in records)


@pytest.fixture(scope="module")
def some():
    texts = corpus(60)
    return texts, similar_pairs(texts, 0.8)


@pytest.mark.parametrize(("name", "tasks"), [("rensa", 1), ("numpy", 1), ("torch", 1), ("rensa", 7)])
def test_what_is_kept_is_what_brute_force_keeps_whatever_the_signature_and_the_shards(tmp_path, some, name, tasks):
    texts, pairs = some
    counts, kept, dropped = run_alone(Near, tmp_path, as_records(texts), tasks, near_signature=name)
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


def test_variants_of_one_problem_are_no_duplicates_unless_a_key_says_so(tmp_path):
    first, second = chapters("kjv")[:2]
    own = edited(first, 0.005, random.Random(0))
    rows = [
        text_record(0, first, meta={"group": "genesis 1"}),
        text_record(1, own, meta={"group": "genesis 1"}),
        text_record(2, own + " Amen.", meta={"group": "another"}),
        text_record(3, second),
    ]
    _, kept, _ = run_alone(Near, tmp_path, rows)
    assert numbers(kept) == [2, 3]  # the longest of the three, which is in another group than both
    _, kept, _ = run_alone(Near, tmp_path, rows[:2])
    assert numbers(kept) == [0, 1]
    _, kept, _ = run_alone(Near, tmp_path, rows[:2], near_in_group="drop")
    assert len(kept) == 1


def test_of_a_chain_the_ends_stay_where_they_are_not_alike(tmp_path):
    """A ~ B ~ C: 111 runs each, of which neighbours share 101 and the ends 91."""
    words = [f"w{n}" for n in range(100, 235)]
    texts = [" ".join(words[n : n + 115]) for n in (0, 10, 20)]
    assert similar_pairs(texts, 0.8) == {(0, 1): 101 / 121, (1, 2): 101 / 121}
    for best, left in ((0, [0, 2]), (1, [1]), (2, [0, 2])):
        rows = [text_record(n, text, license=None if n != best else "MIT") for n, text in enumerate(texts)]
        counts, kept, dropped = run_alone(Near, tmp_path, rows)
        assert numbers(kept) == left
        assert counts.notes["rows kept beside another of their component"] == len(left) - 1
        assert all(row["score"] == pytest.approx(101 / 121) for row in dropped)


def test_the_best_of_two_has_a_known_licence_then_more_text_then_is_the_first(tmp_path):
    text = chapters("kjv")[0]
    longer = text + " Amen."
    for rows, left in (
        ([text_record(0, longer), text_record(1, text, license="MIT")], [1]),
        ([text_record(0, text), text_record(1, longer)], [1]),
        ([text_record(1, text + " x"), text_record(0, text + " y")], [0]),
    ):
        _, kept, _ = run_alone(Near, tmp_path, rows)
        assert numbers(kept) == left


def test_all_identical_rows_leave_one_and_unique_ones_all(tmp_path):
    text = chapters("kjv")[0]
    _, kept, _ = run_alone(Near, tmp_path, [text_record(n, text) for n in range(300)], 3, near_alarm_share=1)
    assert numbers(kept) == [0]
    unique = [text_record(n, chapter) for n, chapter in enumerate(chapters("kjv")[:200])]
    counts, kept, _ = run_alone(Near, tmp_path, unique, 3)
    assert len(kept) == 200 and counts.notes["pairs alike"] == 0


def test_no_row_is_lost_to_a_header_that_all_share(tmp_path):
    """Function-calling rows under one system prompt: of 859,092 of these, one that verifies nothing keeps 2."""
    import reasoning_gym

    header = "You are a function calling model. " + " ".join(f"Tool {n} takes a value of type {n}." for n in range(60))
    sums = reasoning_gym.create_dataset("gsm_symbolic", size=300, seed=3)
    rows = [
        chat_record(n, ("system", header), ("user", row["question"]), ("assistant", row["answer"]))
        for n, row in enumerate(sums)
    ]
    said = [f"{row['question']}\n\n{row['answer']}" for row in sums]
    _, kept, _ = run_alone(Near, tmp_path, rows, near_alarm_share=1)
    assert numbers(kept) == sorted(best_kept(said, similar_pairs(said, 0.8)))
    texts = [f"{header}\n\n{body}" for body in chapters("kjv")[:150]]
    _, kept, _ = run_alone(Near, tmp_path, [text_record(n, text) for n, text in enumerate(texts)])
    assert numbers(kept) == sorted(best_kept(texts, similar_pairs(texts, 0.8)))
    assert len(kept) == 150


def test_numbers_make_a_difference_and_case_and_space_and_signs_do_not(tmp_path):
    problem = "A train leaves at {} and runs {} km at {} km per hour, then {} km at {} km per hour. When is it there?"
    rows = [text_record(n, problem.format(n, 10 + n, 20 + n, 30 + n, 40 + n)) for n in range(5)]
    _, kept, _ = run_alone(Near, tmp_path, rows)
    assert len(kept) == 5
    same = [text_record(9, rows[0]["text"].upper().replace(" ", "\n ").replace(".", " - "))]
    _, kept, _ = run_alone(Near, tmp_path, [*rows, *same])
    assert len(kept) == 5


def test_short_and_empty_texts_and_two_languages(tmp_path):
    chinese = "我们今天读书明天写字后天休息很高兴也很安静"
    russian = "В начале сотворил Бог небо и землю"
    short = ["Yes.", "yes!", "No.", "", "", "\U0001f600", "\U0001f600", "\u0301"]
    texts = [*short, chinese, chinese + "。", chinese[::-1], russian, russian.upper() + "!"]
    _, kept, _ = run_alone(Near, tmp_path, [text_record(n, text) for n, text in enumerate(texts)])
    assert numbers(kept) == [0, 2, 3, 4, 5, 6, 7, 9, 10, 12]


def test_a_source_that_mostly_goes_stops_the_run_and_is_named(tmp_path):
    text = chapters("kjv")[0]
    rows = [text_record(n, text, source="b") for n in range(40)]
    unique = [text_record(n, chapter) for n, chapter in enumerate(chapters("kjv")[1:60])]
    with pytest.raises(Refused, match="39 of 40 rows of source b are near duplicates, more than near_alarm_share=0.5"):
        run_alone(Near, tmp_path, [*rows, *unique])
    with pytest.raises(Refused, match=r"see \S+/stages/\*-near/dropped, then raise"):
        run_alone(Near, tmp_path, [*rows, *unique])
    run_alone(Near, tmp_path, [*rows, *unique], near_alarm_share=1.0)


@pytest.mark.parametrize("key", ["near_signature", "near_in_group"])
def test_an_unknown_value_is_refused(tmp_path, key):
    with pytest.raises(Refused, match=f"{key}=simhash"):
        run_alone(Near, tmp_path, [text_record(0, "x")], **{key: "simhash"})


def test_torch_computes_the_numbers_of_numpy_whatever_the_chunk(monkeypatch):
    hashes = np.random.default_rng(0).integers(0, 2**64, 5000, dtype=np.uint64)
    hashes[:3] = 0, 2**63, 2**64 - 1
    starts = np.array([0, 1, 2, 3, 50, 51, 4000, 5000])
    wanted = numpy_signatures(hashes, starts)
    assert wanted.dtype == np.uint32
    for chunk in (2**28, 8 * 5000 * 10, 1):
        monkeypatch.setattr(signature, "CHUNK", {"cpu": chunk, "cuda": chunk})
        assert np.array_equal(signature.torch_signatures(hashes, starts), wanted)


def test_a_signature_is_multiply_shift_in_wrapping_64_bits():
    """Half of all hashes are 2**63 or more, which a signed tensor does not take as they are."""
    hashes = [2**64 - 1, 2**63 + 12345, 7]
    columns = [(int(a), int(b)) for a, b in zip(*signature.factors(), strict=True)]
    wanted = [min((a * x + b) % 2**64 >> 32 for x in hashes) for a, b in columns]
    assert numpy_signatures(np.array(hashes, np.uint64), np.array([0, 3]))[0].tolist() == wanted
    assert all(a % 2 for a, _ in columns) and len(set(columns)) == 112


@pytest.mark.parametrize("name", sorted(SIGNATURES))
def test_the_share_of_columns_in_which_two_sets_agree_is_their_similarity(name):
    generator, shares = np.random.default_rng(1), np.linspace(0.05, 0.95, 40)
    errors = []
    for share in shares:
        both, rest = generator.integers(0, 2**64, 400, dtype=np.uint64), round(400 * (1 - share) / share / 2)
        a, b = (np.concatenate([both, generator.integers(0, 2**64, rest, dtype=np.uint64)]) for _ in range(2))
        one, other = SIGNATURES[name](np.concatenate([a, b]), np.array([0, len(a), len(a) + len(b)]))
        errors.append((one == other).mean() - 400 / (400 + 2 * rest))
    assert abs(np.mean(errors)) < 0.02
    assert np.std(errors) < 1.25 * np.mean((shares * (1 - shares) / 112) ** 0.5)  # what chance alone would leave


@given(st.lists(st.tuples(st.integers(0, 19), st.integers(0, 19))), st.randoms())
def test_components_do_not_depend_on_the_order_of_pairs(pairs, generator):
    found = components(np.array(pairs, np.int64).reshape(-1, 2), 20)
    generator.shuffle(pairs)
    swapped = [pair[::-1] for pair in pairs]
    assert components(np.array(swapped, np.int64).reshape(-1, 2), 20).tolist() == found.tolist()
    assert all(found[a] == found[b] for a, b in pairs)


def test_two_pairs_that_met_in_one_bucket_are_two_components():
    found = components(np.array([[1, 3], [2, 4]]), 5)
    assert found.tolist() == [0, 1, 2, 1, 2]


@pytest.mark.slow
def test_ten_thousand_copies_with_a_word_changed_leave_one(tmp_path):
    text, generator = chapters("kjv")[0], random.Random(0)
    rows = [text_record(n, edited(text, 0.001, generator)) for n in range(10_000)]
    counts, kept, _ = run_alone(Near, tmp_path, rows, 2, near_alarm_share=1)
    assert len(kept) == 1
    assert counts.notes["rows of the largest component"] == 10_000
    assert counts.notes["pairs passed over where more than 64 rows share a run"] > 0


@given(st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("aZ_9 '\u2019\u2014éÉe\u0301\u03a3ß\u4e2d")))
def test_words_are_those_of_a_regular_expression_in_lower_case(text):
    lowered = unicodedata.normalize("NFC", text).lower()
    spaced = re.sub(rf"([{SPACELESS}])", r" \1 ", lowered)  # characters of scripts without spaces are words
    assert [word.decode() for word in words(text)] == re.findall(r"\w+", spaced)


def test_licences_of_installed_packages_are_kept_as_brute_force_keeps_them(tmp_path):
    """Hundreds of copies of some texts, with other names and years: crowds, chains and headers, as they come."""
    texts = licences()[:500]
    pairs = similar_pairs(texts, 0.8)
    counts, kept, _ = run_alone(Near, tmp_path, [text_record(n, t) for n, t in enumerate(texts)], near_alarm_share=1)
    assert numbers(kept) == sorted(best_kept(texts, pairs))


def of_one_template(count: int) -> list[str]:
    """120 words, three of them one of six numbers, and in every second text one more word changed."""
    generator, template, texts = random.Random(0), chapters("kjv")[0].split()[:120], []
    for _ in range(count):
        own = list(template)
        for place in range(5, 120, 40):
            own[place] = str(generator.randrange(6))
        if generator.random() < 0.5:
            own[generator.randrange(120)] = f"x{generator.randrange(40)}"
        texts.append(" ".join(own))
    return texts


@pytest.mark.parametrize("name", sorted(SIGNATURES))
def test_in_a_crowd_of_one_template_at_most_a_few_rows_too_many_are_kept_and_what_was_passed_over_is_noted(
    tmp_path, name
):
    texts = of_one_template(500)
    pairs = similar_pairs(texts, 0.8)
    rows = [text_record(n, text) for n, text in enumerate(texts)]
    counts, kept, _ = run_alone(Near, tmp_path, rows, near_signature=name, near_alarm_share=1)
    assert (
        len(best_kept(texts, pairs)) <= len(kept) <= 1.05 * len(best_kept(texts, pairs))
    )  # 95 are kept by brute force
    assert counts.notes["pairs passed over where more than 64 rows share a run"] > 0

"""The matrix of controls: its rows, edits, measures, results and statistics; its runs are those of the other tests."""

import json
import shutil
import subprocess
import sys
from collections import Counter
from math import isnan, sqrt

import pandas
import pytest
from conftest import ROOT

from rlt.errors import Refused

sys.path.insert(0, str(ROOT / "benchmarks" / "controls"))
import arms  # noqa: E402
import measures  # noqa: E402
import over_seeds  # noqa: E402
import records  # noqa: E402
import rows  # noqa: E402
import settings  # noqa: E402
import tables  # noqa: E402

COMMAND = [sys.executable, str(ROOT / "benchmarks" / "controls")]
LIMIT_S = 120


def test_no_run_sees_a_question_that_is_evaluated_and_all_seeds_answer_the_same(tmp_path):
    for seed in (0, 1):
        rows.write_questions(tmp_path, seed)
    evaluated = {rows.problem_of(row) for row in rows.read(tmp_path / "evaluate.jsonl")}
    assert len(evaluated) == 2 * settings.SIZES["evaluate"]
    for seed in (0, 1):
        roles = {role: rows.read(tmp_path / str(seed) / f"{role}.jsonl") for role in rows.ROLES}
        seen = [rows.problem_of(row) for mine in roles.values() for row in mine]
        assert len(seen) == len(set(seen))
        assert not evaluated & set(seen)
        for role, mine in roles.items():
            assert set(Counter(row["task"] for row in mine).values()) == {settings.SIZES[role]}
            assert all(measures.worked_of(row) == row["reasoning_trace"] for row in mine)


def test_equations_in_another_letter_and_other_words_are_one_problem():
    asked = [{"question": f"Solve for {v}: 8*{v} = 64", "metadata": {"equation": f"8*{v} = 64"}} for v in "hx"]
    assert rows.problem_of(asked[0]) == rows.problem_of(asked[1]) == "8*x = 64"
    assert rows.problem_of({"question": "Simplify 2/4", "metadata": "{}"}) == "Simplify 2/4"


def test_every_set_has_the_same_tokens_and_small_ones_are_repeated():
    short, long = ([{"question": "q", "solution": "4", "reasoning_trace": "Two and two. " * n}] * 2 for n in (1, 9))
    counts = [len(rows.to_tokens(given, 1000)) for given in (short, long)]
    assert counts[0] > counts[1] > 2
    one = rows.to_tokens(long, 1000)
    assert len(rows.to_tokens(long, 2000)) in (2 * len(one), 2 * len(one) + 1)


def test_edits_by_hand():
    trace = "Step by step: 72 / 6 = 12. So it is. The result is 12."
    assert arms.answer_first(trace, "q") == "The result is 12. Step by step: 72 / 6 = 12. So it is."
    assert arms.answer_only(trace, "q") == "The result is 12."
    mixed = arms.shuffled(trace, "q")
    assert sorted(arms.SENTENCE.split(mixed)) == sorted(arms.SENTENCE.split(trace))
    assert arms.shuffled(trace, "q") == mixed
    assert {arms.shuffled(trace, str(n)) for n in range(50)} > {trace}
    assert arms.answer_first(".", "q") == arms.answer_only(".", "q") == "."


def test_right_steps_and_the_position_of_the_answer_by_hand():
    worked = ["Step by step: 8 / 2 = 4. 22 / 2 = 11. The result is 4/11."] * 3 + ["The result is 3."]
    texts = ["8/2 = 4, and 22 ÷ 2=11", "8 / 2 = 4. 22 / 11 = 2.", "4/11", "anything"]
    assert measures.right_steps(texts, worked) == pytest.approx(1 / 3)  # the last row has no step to be right
    assert measures.answer_position(["xx4/11", "14/11", "4/11 is it"], ["4/11"] * 3) == pytest.approx(0 / 2)
    assert measures.answer_position(["xx 4/11.."], ["4/11"]) == pytest.approx(3 / 9)


def test_an_answer_that_a_table_lacks_is_not_in_the_format():
    table = pandas.DataFrame({"answer": ["4/11", None, "", float("nan")]})
    assert measures.in_format(row["answer"] for row in table.to_dict("records")) == 2 / 4


def test_intervals_over_seeds_by_hand():
    one = over_seeds.t_interval([1.0, 2.0, 3.0])  # t of 2 degrees of freedom at 97.5 %: 4.302653; sd 1
    assert (one.mean, one.high - one.mean) == pytest.approx((2.0, 4.302653 / sqrt(3)))
    assert isnan(over_seeds.t_interval([1.0]).low)
    found = over_seeds.paired({0: 0.1, 1: 0.2, 5: 0.9}, {0: 0.3, 1: 0.6, 2: 0.0})
    assert (found.seeds, found.estimate.mean) == (2, pytest.approx(0.3))
    assert found.effect == pytest.approx(0.3 / (0.1 * sqrt(2)))


def test_the_correlation_by_hand():
    x, y = [1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 4.0, 3.0]
    r = over_seeds.correlation(x, y, [0, 1, 2, 3])
    assert r.mean == pytest.approx(0.8)
    assert r.low <= 0.8 <= r.high
    assert over_seeds.correlation(x, y, [5] * 4).low == pytest.approx(0.8)  # of one seed no other can be drawn


def some_results(folder, commit="abc"):
    for seed in range(3):
        for arm, accuracy in (("base", 0.0), ("warm-up", 0.1), ("rl", 0.2 + 0.1 * seed)):
            figures = {"accuracy": accuracy, "reward": accuracy - 1, "right steps of answers": 0.5}
            figures["accuracy of sums"] = accuracy / 2
            if arm in ("warm-up", "rl"):
                figures[measures.EVERY_QUESTION] = 0.5 + 0.1 * (arm == "rl")
            records.write(folder, arm, seed, commit, figures)


def test_tables_come_from_the_results_alone(tmp_path):
    some_results(tmp_path)
    done = subprocess.run(
        [*COMMAND, "--tables", "--results", str(tmp_path)], capture_output=True, text=True, timeout=LIMIT_S
    )
    assert done.returncode == 0, done.stderr
    assert "9 results at commit abc, seeds 0, 1, 2." in done.stdout
    lacking = sum(len(arms.seeds_of(arm)) for arm in arms.ARMS) - 9
    assert f"INCOMPLETE: {lacking} of the plan's results are not there yet." in done.stdout
    assert "| `warm-up`, every question once | 3 | +0.100 [+0.100, +0.100] |" in done.stdout
    assert "| **`warm-up`** | 3 | +0.200 [-0.048, +0.448] | +2.00 | +0.100, +0.200, +0.300 |" in done.stdout
    assert "| `warm-up`, sums alone | 3 | +0.100 [-0.024, +0.224] | +2.00 | +0.050, +0.100, +0.150 |" in done.stdout
    assert "| arm | what its student learns from | seeds | held-out accuracy | sums | reward |" in done.stdout
    assert "| reward | 6 | +1.000 [+1.000, +1.000] |" in done.stdout
    assert (tmp_path / tables.TABLES).read_text() == done.stdout
    assert (tmp_path / tables.FIGURE).stat().st_size > 10_000


@pytest.mark.parametrize("folder", ["results", "tried"])
def test_committed_tables_are_those_of_the_committed_results(folder, tmp_path):
    committed = ROOT / "benchmarks" / "controls" / folder
    for path in committed.glob("*.json"):
        shutil.copy(path, tmp_path)
    assert tables.write(tmp_path) == (committed / tables.TABLES).read_text()


def test_the_answer_stands_on_every_result_of_the_plan():
    results, others = records.read_all(records.RESULTS)
    assert {(one.arm, one.seed) for one in results} == {(a, seed) for a in arms.ARMS for seed in arms.seeds_of(a)}
    assert not others
    claim = tables.differences(results)["warm-up"]
    page = (ROOT / "docs" / "results.md").read_text().replace("−", "-")
    assert f"| `warm-up`: **the claim** | {claim.estimate.signed} | {claim.effect:+.2f} |" in page


def test_results_of_another_commit_or_other_settings_are_named_and_not_mixed(tmp_path):
    some_results(tmp_path)
    records.write(tmp_path, "worked", 0, "old", {"accuracy": 0.9})
    records.write(tmp_path, "random", 0, "abc", {"accuracy": 0.9})
    path = records.path_of(tmp_path, "random", 0)
    path.write_text(path.read_text().replace('"RL_STEPS": 20', '"RL_STEPS": 40'))
    text = tables.write(tmp_path)
    assert "of another commit or other settings: random-0 (abc), worked-0 (old)." in text
    assert "0.900" not in text
    with pytest.raises(Refused, match=r"worked-0.json is of commit old: name another --results, or take it away"):
        records.is_there(tmp_path, "worked", 0, "abc")
    with pytest.raises(Refused, match="random-0.json is of other settings"):
        records.is_there(tmp_path, "random", 0, "abc")
    assert records.is_there(tmp_path, "rl", 0, "abc")
    assert not records.is_there(tmp_path, "rl", 7, "abc")


def test_seeds_for_tuning_stand_in_no_table(tmp_path):
    some_results(tmp_path)
    records.write(tmp_path, "rl", 100, "abc", {"accuracy": 0.9})
    assert "0.900" not in tables.write(tmp_path)


def test_what_was_tried_afterwards_has_a_table_of_its_own_which_says_that_it_answers_nothing(tmp_path):
    for arm, accuracy in (("rl-twice", 0.4), ("rl-best-of-n-twice", 0.3)):
        records.write(tmp_path, arm, 100, "abc", {"accuracy": accuracy})
    text = tables.write(tmp_path)
    assert "2 results at commit abc, seeds 100.\nThese seeds are for tuning: they answer nothing" in text
    assert "INCOMPLETE" not in text
    assert "| `rl-best-of-n-twice` | 1 | +0.100 |  | +0.100 |" in text
    assert not arms.TRIED.keys() & arms.ARMS.keys()


def test_runs_of_other_settings_or_another_commit_have_another_folder(tmp_path, monkeypatch):
    before = records.place_of(tmp_path, "abc")
    assert records.place_of(tmp_path, "abd") != before == records.place_of(tmp_path, "abc")
    monkeypatch.setattr(settings, "RL_STEPS", 1)
    assert records.place_of(tmp_path, "abc") != before


def test_the_plan_names_every_arm_with_its_seeds():
    plan = (ROOT / "benchmarks" / "controls" / "PLAN.md").read_text()
    for name in arms.ARMS:
        last = arms.seeds_of(name)[-1]
        assert f"| `{name}` | 0 to {last} |" in plan
    assert f"\n({settings.TRAINED_TOKENS:,}, end of turn included)" in plan


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "name a folder for the runs"),
        (["--out", "x", "--arms", "magic"], "invalid choice: 'magic'"),
        (["--out", "x", "--seeds", "-1"], "from 0 on"),
        (["--out", "x", "--seeds", "1", "100"], "those from 100 on are for tuning"),
        (["--out", "x", "--arms", "rl", "rl-twice"], "--arms rl-twice: not of the plan"),
        (["--tables", "--results", "nowhere"], "holds no result"),
    ],
)
def test_a_command_that_cannot_work_is_refused(words, said):
    done = subprocess.run([*COMMAND, *words], capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode != 0
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_result_is_small(tmp_path):
    some_results(tmp_path)
    assert all(path.stat().st_size < 4000 for path in tmp_path.glob("*.json"))
    assert json.loads(records.path_of(tmp_path, "rl", 2).read_text())["figures"]["accuracy"] == 0.4

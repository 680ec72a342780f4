"""The table of all completions: its data, and what a browser without a network makes of it."""

import json
import math
import re
import shutil
import subprocess
from pathlib import Path
from urllib.parse import unquote

import pandas
import pytest
import yaml
from conftest import config_of

from rlt.reports.completion_table import completion_table, named, order, thinned
from rlt.reports.page import write_report
from rlt.reports.safe import sum_of

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER_LIMIT_S = 120
STEPS, OF_STEP = 30, 100  # of a training run with 3,000 completions
UGLY = "</script><b id=own>&amp; 'x' \"y\" <!-- \u2028 é</b>"


def embedded_in(text: str) -> dict:
    """The columns of a table by name, as a JSON parser finds them."""
    (data,) = re.findall('<script type="application/json">(.*?)</script>', text, flags=re.DOTALL)
    return {column["name"]: column for column in json.loads(data)["columns"]}


def texts_of(column: dict) -> list[str | None]:
    return [None if place is None else column["texts"][place] for place in column["values"]]


@pytest.fixture
def trained(tmp_path) -> Path:
    """A run of 30 steps; completion n of all has reward n modulo 1000, and the last of each step has none."""
    folder = tmp_path / "run"
    (folder / "completions").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config_of("teacher_rlt_tiny", f"output_dir={folder}")))
    for step in range(1, STEPS + 1):
        numbers = range((step - 1) * OF_STEP, step * OF_STEP)
        rows = [
            {
                "step": step,
                "prompt": "the prompt",
                "completion": f"completion {number}",
                "reward": number % 1000.0,
                "matched": number % 2 == 0,
                "question": f"question {number // 4}",
                "solution": str(number // 4),
                "reasoning_kl_mean": 0.5,
                "token_scores": None,
            }
            for number in numbers
        ]
        rows[-1]["reward"] = math.nan
        rows[0]["completion"] = UGLY if step == 1 else rows[0]["completion"]
        pandas.DataFrame(rows).to_parquet(folder / "completions" / f"step-{step:05d}.parquet")
    return folder


def test_the_data_are_all_rows_of_all_files_with_a_text_held_once(trained):
    text = completion_table(trained)
    columns = embedded_in(text)
    assert "3000 completions of 30 files" in text
    shown = [name for name, column in columns.items() if column["shown"]]
    assert shown == ["step", "reward", "matched", "question", "solution", "completion"]
    assert set(columns) - set(shown) == {"reasoning_kl_mean"}  # no prompt and no token scores
    assert columns["step"]["values"] == [step for step in range(1, 31) for _ in range(100)]
    assert columns["reward"]["values"][98:102] == [98, None, 100, 101]
    assert columns["matched"]["kind"] == "flag" and columns["matched"]["values"][:2] == [True, False]
    assert texts_of(columns["question"])[7:9] == ["question 1", "question 2"]
    assert len(columns["question"]["texts"]) == 750
    assert texts_of(columns["completion"])[0] == UGLY
    assert text.count("</script>") == 1


def test_a_collections_and_an_evaluations_files_are_read_too(tmp_path):
    (tmp_path / "all").mkdir()
    trace = {"question_id": 0, "question": "1 + 1?", "solution": "2", "completion": "Two.", "reasoning_trace": "Two."}
    pandas.DataFrame([{**trace, "reward": -1.0, "rank": 1}]).to_parquet(tmp_path / "all/traces.parquet")
    of_traces = ["question_id", "reward", "rank", "question", "solution", "completion"]
    assert list(embedded_in(completion_table(tmp_path))) == of_traces
    (tmp_path / "all/traces.parquet").unlink()
    answers = [("1 + 1?", "2", "It is 3.", "3", 0.0, 4), ("1 + 1?", "2", "It", None, 0.0, 2)]
    frame = pandas.DataFrame(answers, columns=["question", "solution", "text", "answer", "right", "tokens"])
    frame.to_parquet(tmp_path / "answers.parquet")
    columns = embedded_in(completion_table(tmp_path))
    assert list(columns) == ["right", "tokens", "question", "solution", "completion", "answer"]
    assert texts_of(columns["answer"]) == ["3", None]
    assert texts_of(columns["completion"]) == ["It is 3.", "It"]
    (tmp_path / "answers.parquet").unlink()
    assert completion_table(tmp_path) == ""


def test_completions_of_an_older_run_stand_beside_their_prompt():
    frame = named(pandas.DataFrame([{"step": 1, "prompt": "asked", "completion": "said", "reward": 0.0}]))
    assert order(frame) == ["step", "reward", "question", "completion"]


def test_of_more_than_a_page_holds_every_kth_row_is_shown():
    frame = pandas.DataFrame({"step": range(100), "completion": ["ten chars."] * 100})  # 1,000 characters
    assert thinned(frame, 1000)["step"].tolist() == list(range(100))
    assert thinned(frame, 999)["step"].tolist() == list(range(0, 100, 2))
    assert thinned(frame, 300)["step"].tolist() == list(range(0, 100, 4))


def test_a_page_names_nothing_outside_itself(trained, tmp_path):
    write_report([trained], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert not re.findall(r"https?://|//cdn|@import|url\(|<link|import\(|fetch\(|XMLHttpRequest", page)
    assert set(re.findall(r'\bsrc="?([^">]{0,10})', page)) <= {"data:image"}


# A real browser. Each script uses the table as a hand would, through its controls, and answers in `found`.

HANDS = """
const found = {};
const one = (place, name) => place.querySelector(name);
const table = one(document, ".completions");
const set = (input, value) => {
  input.value = value;
  for (const kind of ["input", "change"]) input.dispatchEvent(new Event(kind, { bubbles: true }));
};
const labelled = (label) => one(table, `[aria-label="${label}"]`);
const head = (name) => [...table.querySelectorAll("th button")].find((button) => button.textContent === name);
const column = (name) => {
  const place = [...table.querySelectorAll("thead th")].findIndex((th) => th.textContent === name) + 1;
  return [...table.querySelectorAll("tbody tr:not(.whole)")].map((row) => row.children[place].textContent);
};
const status = () => one(table, "[role=status]").textContent;
"""


@pytest.fixture
def used(trained, tmp_path):
    """What `found` holds after a script has used the page of the run in a browser without a network."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip("no chromium on this machine")

    def use(script: str, allowed: bool = True) -> dict | None:
        page = tmp_path / "report.html"
        write_report([trained], page)
        answer = 'document.body.append(Object.assign(document.createElement("pre"), { id: "found", '
        answer += "textContent: encodeURIComponent(JSON.stringify(found)) }));"
        hands = f"{HANDS}{script}{answer}"
        text = page.read_text()
        if allowed:
            text = text.replace("script-src ", f"script-src '{sum_of(hands)}' ")
        page.write_text(f"{text}<script>{hands}</script>")
        alone = ["--headless", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND"]
        command = [browser, *alone, f"--user-data-dir={tmp_path / 'browser'}", "--dump-dom", page.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=BROWSER_LIMIT_S, check=True)
        found = "".join(re.findall('<pre id="found">(.*?)</pre>', done.stdout))
        if not found:
            return None
        return json.loads(unquote(found))

    return use


def test_a_browser_runs_no_script_but_the_pages_own(used):
    assert used("", allowed=False) is None
    assert used("") == {}


def test_a_browser_holds_one_page_of_rows_and_turns_it(used):
    found = used("""
      found.first = [column("completion").length, column("completion")[1], status()];
      labelled("next page").click();
      found.second = [column("completion")[0], status()];
      labelled("last page").click(); labelled("next page").click();
      found.last = [column("completion").at(-1), status(), labelled("next page").getAttribute("aria-disabled")];
      set(labelled("page"), "7");
      found.seventh = column("completion")[0];
      set(labelled("rows of a page"), "25");
      found.longer = [column("completion").length, column("completion")[0], status()];
      set(labelled("page"), "-3");
      found.before = status();
    """)
    assert found["first"] == [10, "completion 1", "1 to 10 of 3000"]
    assert found["second"] == ["completion 10", "11 to 20 of 3000"]
    assert found["last"] == ["completion 2999", "2991 to 3000 of 3000", "true"]
    assert found["seventh"] == "completion 60"
    assert found["longer"] == [25, "completion 50", "51 to 75 of 3000"]  # the page that holds the row 60
    assert found["before"] == "1 to 25 of 3000"


def test_a_browser_sorts_numbers_and_texts_both_ways_and_back(used):
    found = used("""
      const reward = head("reward");
      reward.click();
      found.down = [column("reward").slice(0, 4), reward.parentElement.getAttribute("aria-sort")];
      found.ties = column("completion").slice(0, 3);
      labelled("last page").click();
      found.none = column("reward");
      labelled("first page").click();
      reward.click();
      found.up = [column("reward").slice(0, 4), reward.parentElement.getAttribute("aria-sort")];
      labelled("last page").click();
      found.none_up = column("reward");
      reward.click();
      found.files = [column("reward").slice(0, 3), reward.parentElement.getAttribute("aria-sort"), status()];
      head("question").click(); labelled("last page").click();
      found.texts = column("question").at(-1);
    """)
    # 999 is the reward of the last of a step, which has none: 998 is the highest, three times.
    assert found["down"] == [["998", "998", "998", "997"], "descending"]
    assert found["ties"] == ["completion 998", "completion 1998", "completion 2998"]  # as in the files
    assert found["none"] == [""] * 10
    assert found["up"] == [["0", "0", "0", "1"], "ascending"]
    assert found["none_up"] == [""] * 10
    assert found["files"] == [["0", "1", "2"], "none", "1 to 10 of 3000"]
    assert found["texts"] == "question 749"  # numbers in texts count as numbers


def test_a_browser_filters_by_number_by_text_and_by_all_texts(used):
    found = used("""
      set(labelled("reward at least"), "996"); found.least = [column("reward"), status()];
      set(labelled("reward at most"), "997"); found.both = column("reward");
      set(labelled("matched is"), "yes"); found.flag = column("reward");
      one(table, ".bar button").click(); found.cleared = [status(), labelled("reward at least").value];
      set(labelled("question contains"), "QUESTION 74"); found.text = status();
      set(labelled("question contains"), ""); found.emptied = status();
      set(labelled("search all texts"), "completion 299"); found.search = status();
      set(labelled("search all texts"), "no such text"); found.nothing = [status(), column("step").length];
    """)
    assert found["least"] == [["996", "997", "998"] * 3, "1 to 9 of 9 (of 3000 in all)"]
    assert found["both"] == ["996", "997"] * 3
    assert found["flag"] == ["996"] * 3
    assert found["cleared"] == ["1 to 10 of 3000", ""]
    assert found["text"] == "1 to 10 of 44 (of 3000 in all)"  # 74 and 740 to 749, four completions each
    assert found["emptied"] == "1 to 10 of 3000"
    assert found["search"] == "1 to 10 of 11 (of 3000 in all)"  # 299 and 2990 to 2999
    assert found["nothing"] == ["no completion is left (of 3000 in all)", 0]


def test_a_browser_shows_a_models_text_as_text_and_question_and_solution_beside_it(used):
    found = used("""
      found.cell = column("completion")[0];
      const open = one(table, "tbody button");
      open.click();
      const whole = one(table, "tr.whole");
      found.open = [open.getAttribute("aria-expanded"), whole.textContent.includes("reasoning_kl_mean 0.500")];
      found.beside = [...one(whole, ".beside").children].map((side) => side.textContent);
      found.own = document.querySelectorAll("#own").length;
      found.by_hand = [...table.querySelectorAll("button, input, select, summary")].every((e) => e.tabIndex === 0);
      const named = [...table.querySelectorAll("button, input:not([type=checkbox]), select")];
      found.named = named.every((e) => e.getAttribute("aria-label") || e.textContent);
      const box = [...table.querySelectorAll("label")].find((e) => e.textContent.includes("reasoning_kl_mean"));
      box.click();
      found.chosen = column("reasoning kl mean")[0];
      found.closed = (one(table, "tbody button").click(), one(table, "tbody button").click(),
        one(table, "tr.whole"));
    """)
    assert found["cell"] == UGLY
    assert found["open"] == ["true", True]
    assert found["beside"] == ["questionquestion 0solution0", f"completion{UGLY}"]
    assert found["own"] == 0
    assert found["by_hand"] and found["named"]
    assert found["chosen"] == "0.500"
    assert found["closed"] is None

"""Each format gives what its rows say, from rows in the shape of the public sets (tests/data/formats), and no more."""

import json
import re

import orjson
import pytest
from conftest import ROOT

from rlt.errors import Refused
from rlt.formats import FORMATS, Options, apply, apply_to_group, find_format, told_by
from rlt.formats.columns import Unfit
from rlt.formats.record import Dropped, content_hash, make_record, message, texts_of, turns_of
from rlt.preparation.write import FORMS
from rlt.tokens.harmony import HarmonyEncoder, parts_of

ROWS = ROOT / "tests" / "data" / "formats"
# Of each file, row by row: the last question, the thought, the answer and the gold answer; or why it is dropped.
EXPECTED = {
    "gsm8k": [
        (
            "Mira sells 36 eggs in March and a third as many in April. How many eggs does she sell in all?",
            "In April Mira sells 36/3 = 12 eggs.\nIn all she sells 36+12 = 48 eggs.",
            *("48", "48"),
        ),
        (
            "A hall has 41 rows of 30 seats and 4 more. How many seats?",
            "The rows have 41*30 = 1230 seats.\nWith the others: 1230+4 = 1234 seats.",
            *("1,234", "1234"),
        ),
        ("How many legs have two cats?", "#### is no answer yet: 2*4 = 8", "8 legs", "8 legs"),
        "no final answer",
    ],
    "orca-math": [
        (
            *("Lena is 7th in a queue. How many people stand before her?", None),
            *("If Lena is 7th in the queue, 6 people stand before her.", None),
        ),
        "empty_column:answer",
    ],
    "openorca": [
        (
            "Turn the sentence into triplets.\n\nSentence: The bridge crosses the river.",
            *(None, '[["bridge", "crosses", "river"]]', None),
        ),
        ("Why is ice cold?", None, "Because it takes warmth out of your hand.", None),
    ],
    "cot-collection": [
        (
            "Is a whale a fish? Options: yes, no",
            "A whale breathes air and feeds its young with milk, so it is a mammal.",
            *("no", "no"),
        ),
        ("Which is heavier, lead or cork?", None, "lead", "lead"),
    ],
    "mathinstruct": [
        (
            "A train makes 120 km in 2 h. Its speed? Answer Choices: (A) 60 km/h (B) 80 km/h",
            *(None, "Speed is way over time: 120/2 = 60.\nThe answer is A.", "A"),
        ),
        ("Ada has 3 boxes of 12 pens. How many pens?", None, "boxes = 3\npens = 12\nprint(boxes * pens)", None),
        "evaluation set TheoremQA",
    ],
    "metamath": [
        (
            *("What is the distance between 1+i and 2+3i?", None),
            "The difference is $1+2i$, whose length is $\\boxed{\\sqrt{5}}$.\nThe answer is: \\sqrt{5}",
            "\\sqrt{5}",
        ),
        (
            *("If 47 boxes hold 16 apples each, how many apples are there?", None),
            *("47 * 16 = 752\n#### 752\nThe answer is: 752", "752"),
        ),
        "no final answer",
    ],
    "glaive": [
        ("In a play, how do I write\nUSER: as a name?", None, "As a name before a colon.", None),
        ("Write that it's late.", None, "I write it.", None),
        ("Hello", None, "Good day.", None),
        "unparsable tool call",
    ],
    "hermes": [
        ("Light in kitchen and hall, please.", None, "The kitchen is lit; the hall is not.", None),
        ("A colour?", None, '{"colour": "red"}', None),
        "unparsable tool call",
    ],
    "gorilla": [
        ("Find a tea room with a garden in Bath.", None, None, 'tea.find(town="Bath", garden=True)'),
        (
            *("Count the words of a text.", None),
            *("<<<domain>>>: Text\n<<<code>>>: model = load('counter')\nprint(model('a b'))", "load('counter')"),
        ),
        ("Find the colour of a picture.", None, '{"domain": "Pictures", "code": "load(1)"}', "load(1)"),
        "unparsable tool call",
    ],
    "toolbench": [
        "beginning of a longer row",
        ("\nWhat runs today?\nBegin!\n", "I can answer.", None, "Red Hill runs."),
        ("\nWhat runs today?\nBegin!\n", None, None, None),
        "unparsable tool call",
    ],
    "logiqa": [
        (
            "All of Ann's cats are black. Tom is Ann's cat.\n\nWhat follows?\n\nA. Tom is black.\nB. Tom is white.\n"
            "C. Ann is black.\nD. Tom is a dog.",
            *(None, "A. Tom is black.", "A"),
        ),
        (
            "No bird here swims. Pip swims.\n\nWhat follows?\n\nA. Pip is a bird here.\nB. Pip is no bird here.\n"
            "C. Pip flies.",
            *(None, "B. Pip is no bird here.", "B"),
        ),
        (
            "Whoever reads learns. Max reads.\n\nWhat must be true?\n\nA. Max writes.\nB. Max sleeps.\n"
            "C. Max forgets.\nD. Max learns.",
            *(None, "D. Max learns.", "D"),
        ),
        "answer is none of the options",
    ],
    "logiqa2nli": [
        ("Whoever reads learns.\nMax reads.\n\nMax learns.", None, "entailed", "entailed"),
        ("Whoever reads learns.\n\nMax reads.", None, "not-entailed", "not-entailed"),
    ],
    "arc": [
        (
            "Which surface warms hands most when rubbed?\n\nA. dry palms\nB. wet palms\nC. oiled palms",
            *(None, "A. dry palms", "A"),
        ),
        ("What does a plant need to grow?\n\n1. light\n2. noise", None, "1. light", "1"),
        "answer is none of the options",
    ],
    "alpaca": [
        ("Put the words in order.\n\ntea, apple, milk", None, "apple, milk, tea", None),
        ("Name a river.", None, "The Rhine.", None),
        "empty_column:output",
    ],
    "dolly": [
        ("When did the mill open?\n\nThe mill opened in 1821 and closed in 1903.", None, "In 1821.", None),
        ("Give a word for a small house.", None, "Cottage.", None),
    ],
    "oasst": [
        "inside of a path that is kept",
        ("What is a comet?", None, "A ball of ice.", None),
        *["inside of a path that is kept"] * 2,
        ("Why a tail?", None, "The sun's light blows gas away.", None),
        *("no answer", "orphan", "cycle", "cycle", "deleted", "below a message that is left out"),
        "tree is not ready for export",
    ],
    "harmony_code": [
        (None, None, "def one():\n    return 1\n", None),
        (None, None, "x = 2\n", None),
        "bad_column:content",
    ],
    "harmony_completion": [
        ("def add(a, b):", None, "    return a + b", None),
        ("Sort it.\n\n[2, 1]", None, "[1, 2]", None),
        "empty_column:completion",
    ],
    "harmony_agent": [
        ("How warm is it in Oslo?", "It froze.", "Minus three degrees.", None),
        "tool result without a call",
    ],
    "harmony_preference": [
        ("Name a prime.", None, "Seven.", None),
        ("Hi", None, "Good day.", None),
        "chosen equals rejected",
    ],
    "harmony_task": [
        ("Return the sum of a list.\n\ndef total(xs):", None, "def total(xs):\n    return sum(xs)", None),
        ("Return the longest word.\n\ndef longest(ws):", None, None, None),
        "empty_column:tests",
    ],
    "harmony_debug": [
        ("print(1\n\nSyntaxError: '(' was never closed", None, "The bracket was open.\n\nprint(1)", None),
        "fixed code equals buggy code",
    ],
    "messages": [
        ("Time now?", None, "Noon.", None),
        ("What does <think> mean?", "A tag.", "It marks a thought.", None),
        *("unknown_role", "no messages"),
    ],
    "sharegpt": [("Another?", None, "Vast.", None), ("Time?", None, "Noon.", None)],
    "openr1": [("What is 2+2?", "Two and two.", "It is $\\boxed{4}$.", "4"), "thought without its end"],
    "openthoughts": [("What is 2+2?", "Two and two.", "It is 4.", None), "no thought or solution tags"],
    "numina": [
        ("Solve $x+1=3$.", None, "Subtract one: $x = \\boxed{2}$.", "2"),
        ("Prove it.", None, "It is clear.", None),
    ],
    "openmath2": [
        (
            *("What is half of one third?", None),
            *("$\\frac13 \\cdot \\frac12 = \\boxed{\\frac{1}{6}}$", "\\frac{1}{6}"),
        ),
        ("What is 2*3?", None, "Six: \\boxed{6}", "6"),
    ],
    "prompt-answer": [
        ("What is 2*3?", None, None, "6"),
        ("What is 7*8?", "Seven times eight is 56.", "56", None),
        ("What is 9*9?", None, None, "81"),
        "empty_column:answer",
    ],
    "text": [
        (None, None, "A short text.\n\n  With an indented line.", None),
        *("bad_column:text", "empty_column:text", "bad_column:text", "bad_column:text"),
    ],
}
AMBIGUOUS = {"gsm8k", "orca-math"}  # question and answer may be either's, or a prompt and its gold answer


def rows_of(name: str) -> list[dict]:
    return [json.loads(line) for line in (ROWS / f"{name}.jsonl").read_text().splitlines()]


def results_of(name: str, rows: list[dict], **options) -> list:
    known, options = FORMATS[name], Options(**options)
    if known.group is None:
        return [apply(known, row, options) for row in rows]
    groups: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        groups.setdefault(known.group(row), []).append(number)
    found = {}
    for numbers in groups.values():
        found |= zip(numbers, apply_to_group(known, [rows[n] for n in numbers], options), strict=True)
    return [found[number] for number in range(len(rows))]


def one(name: str, row: dict, **options):
    return results_of(name, [row], **options)[0]


def told(result) -> tuple | str:
    """The last question, the last thought and answer, the gold answer; or the reason."""
    if isinstance(result, Dropped):
        return result.reason
    if result["kind"] == "text":
        return None, None, result["text"], result["answer"]
    asked = [turn["content"] for turn in result["messages"] if turn["role"] == "user"]
    answered = [turn for turn in turns_of(result) if turn["role"] == "assistant"] or [message("assistant", None)]
    last = answered[0] if result["chosen"] else answered[-1]
    return asked[-1], last["thinking"], last["content"], result["answer"]


def chat(*turns: dict, **row) -> dict:
    return {"messages": list(turns), **row}


USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Good day."}


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_gives_what_its_rows_say(name):
    assert [told(result) for result in results_of(name, rows_of(name))] == EXPECTED[name]


def test_all_formats_have_rows_here():
    assert set(EXPECTED) == set(FORMATS) == {path.stem for path in ROWS.glob("*.jsonl")}
    assert len(FORMATS) >= 26


@pytest.mark.parametrize("name", FORMATS)
def test_columns_tell_a_format_or_several_but_never_another(name):
    expected = ["gsm8k", "orca-math", "prompt-answer"] if name in AMBIGUOUS else [name]
    assert told_by(rows_of(name)[0]) == expected


@pytest.mark.parametrize("name", FORMATS)
def test_no_format_writes_a_word_that_its_row_does_not_have(name):
    rows = rows_of(name)
    given = set(re.findall(r"\w+", json.dumps(rows, ensure_ascii=False).replace("\\n", " ")))
    for result in results_of(name, rows):
        if not isinstance(result, Dropped):
            said = " ".join(f"{t['content']} {t['thinking']}" for t in turns_of(result) if t["role"] == "assistant")
            assert set(re.findall(r"\w+", said)) <= given | {"None", *"ABCD"}


ODD = (None, True, 5, 1.5, "", " ", "{", "x: <tool_call>", [], {}, [None], ["x"], [[]], [{}], {"a": None}, {"type": 1})


def with_odd_values(value, odd):
    """The value with each of its parts, however deep, replaced in turn, or left out."""
    yield odd
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inner:
        for changed in with_odd_values(part, odd):
            yield {**value, key: changed} if isinstance(value, dict) else [*value[:key], changed, *value[key + 1 :]]
        if isinstance(value, dict):
            yield {other: kept for other, kept in value.items() if other != key}


@pytest.mark.parametrize("name", FORMATS)
def test_whatever_stands_in_a_column_a_row_becomes_a_record_or_has_a_reason(name):
    """Of types too: what comes out can be written, and its texts are texts."""
    for number, row in enumerate(rows_of(name)):
        for odd in ODD:
            for changed in with_odd_values(row, odd):
                if isinstance(changed, dict) and not (number and len(str(row)) > 2000):
                    told_of_odd(name, changed)


def told_of_odd(name: str, row: dict) -> None:
    known = FORMATS[name]
    if known.group is not None:
        try:
            known.group(row)
        except Unfit:
            return
    result = one(name, row)
    if isinstance(result, Dropped):
        assert result.reason
    else:
        content_hash(result)
        assert all(isinstance(text, str) for text in texts_of(result))
        for turn in turns_of(result):
            assert isinstance(turn["content"], str) or turn["tool_calls"]
            assert all(isinstance(call["arguments"], dict) for call in turn["tool_calls"] or ())
        for form in FORMS.values():
            orjson.dumps(written if not isinstance(written := form(result), Dropped) else None)


def test_an_unknown_format_is_refused_with_all_that_there_are():
    with pytest.raises(Refused, match="'alpacca' is none of gsm8k, .*, text$"):
        find_format("alpacca", [{"text": "x"}], "x.jsonl")


def test_columns_that_tell_no_format_or_two_are_refused_with_the_columns_seen():
    with pytest.raises(Refused, match="columns body, title, which no format has"):
        find_format(None, [{"title": "a", "body": "b"}], "x.jsonl")
    with pytest.raises(Refused, match="answer, question, which gsm8k and orca-math and prompt-answer have"):
        find_format(None, rows_of("gsm8k"), "x.jsonl")


def test_a_named_format_is_refused_where_its_columns_are_not_there():
    dolly = rows_of("dolly")
    with pytest.raises(Refused, match="columns category, context, instruction, response, and format alpaca needs"):
        find_format("alpaca", dolly, "x.jsonl")
    assert one("alpaca", dolly[0]) == Dropped("bad_column:output")


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("BFCL", {"id": "simple_1", "question": [[{"role": "user", "content": "x"}]], "function": []}),
        (
            "HumanEval",
            {"task_id": "HumanEval/0", "prompt": "", "canonical_solution": "", "entry_point": "f", "test": ""},
        ),
        ("MMLU", {"question": "x", "subject": "law", "choices": ["a", "b"], "answer": 0}),
    ],
)
def test_rows_of_an_evaluation_are_refused_whatever_format_is_named(name, row):
    for named in (None, "gorilla", "prompt-answer"):
        with pytest.raises(Refused, match=f"is the evaluation set {name}"):
            find_format(named, [row], "x.jsonl")


def test_columns_of_the_source_that_no_format_uses_stay_in_extra():
    assert one("messages", rows_of("messages")[0])["meta"]["extra"] == {"note": 7}
    assert one("arc", rows_of("arc")[0])["meta"]["extra"] == {"id": "S_1"}


def test_calculations_stay_where_the_key_says_so():
    kept = one("gsm8k", rows_of("gsm8k")[0], keep_calculations=True)
    assert "<<36/3=12>>" in kept["messages"][-1]["thinking"]


@pytest.mark.parametrize(("given", "answer"), [("1,234", "1234"), ("1,234,567.5", "1234567.5"), ("(1,2)", "(1,2)")])
def test_only_commas_of_thousands_leave_an_answer(given, answer):
    assert one("gsm8k", {"question": "How many?", "answer": f"So\n#### {given}"})["answer"] == answer


def test_augmentations_of_one_problem_are_one_group():
    assert one("metamath", rows_of("metamath")[0])["meta"]["group"].startswith("Find the distance")


def test_mathematics_and_code_are_told_apart_for_the_rules_that_follow():
    kinds = [one("mathinstruct", row)["meta"]["kind"] for row in rows_of("mathinstruct")[:2]]
    assert kinds == ["maths", "code"]


def test_glaive_calls_keep_apostrophes_and_braces_and_its_functions_need_no_commas():
    first, second, without, _ = results_of("glaive", rows_of("glaive"))
    assert [tool["function"]["name"] for tool in first["tools"]] == ["get_news", "send_mail"]
    assert [turn["role"] for turn in first["messages"]] == [
        *("system", "user", "assistant", "tool", "assistant", "user", "assistant")
    ]
    call, result = first["messages"][2]["tool_calls"][0], first["messages"][3]
    assert call == {"id": "call_1", "name": "get_news", "arguments": {"country": "France"}}
    assert (result["name"], result["tool_call_id"]) == ("get_news", "call_1")
    assert second["messages"][-1]["tool_calls"][0]["arguments"] == {"text": "It's late, {friend}"}
    assert without["tools"] == [] and without["messages"][0]["content"].endswith("no access to external functions.")


def test_hermes_reads_calls_as_python_writes_them_and_cuts_the_tools_out_of_the_prompt():
    record = one("hermes", rows_of("hermes")[0])
    system, _, called, *results, _ = record["messages"]
    assert "<tools>" not in system["content"] and "set_lamp" not in system["content"]
    assert [c["arguments"] for c in called["tool_calls"]] == [
        {"room": "cook's kitchen", "on": True},
        {"room": "hall", "on": True},
    ]
    assert [r["tool_call_id"] for r in results] == [c["id"] for c in called["tool_calls"]]
    row = {k: v for k, v in rows_of("hermes")[0].items() if k != "tools"}
    assert one("hermes", row)["tools"] == record["tools"]


def test_gorilla_declares_objects_where_its_lists_say_dict():
    record = one("gorilla", rows_of("gorilla")[0])
    assert record["tools"][0]["function"]["parameters"]["type"] == "object"
    assert record["messages"][-1]["tool_calls"][0]["arguments"] == {"town": "Bath", "garden": True}


def test_a_step_that_two_trajectories_of_a_query_share_is_trained_once():
    records = [r for r in results_of("toolbench", rows_of("toolbench")) if not isinstance(r, Dropped)]
    thoughts = [t["thinking"] for r in records for t in r["messages"] if t["role"] == "assistant" and t["train"]]
    assert sorted(filter(None, thoughts)) == ["I can answer.", "I look again.", "I look at the cards."]
    assert {r["meta"]["group"] for r in records} == {"What runs today?"}


def test_oasst_keeps_the_best_path_of_a_tree_when_one_is_asked_for():
    results = results_of("oasst", rows_of("oasst"), answers_per_tree=1)
    records = [r for r in results if not isinstance(r, Dropped)]
    assert [told(r)[2] for r in records] == ["The sun's light blows gas away."]
    assert results[1] == Dropped("not among the best answers")
    assert records[0]["meta"]["group"] == "t1"


def test_a_path_without_a_rank_comes_after_those_that_have_one():
    rows = [row for row in rows_of("oasst") if row["message_id"] in "123"]
    rows[1]["rank"], rows[2]["rank"] = None, 5
    assert told(results_of("oasst", rows, answers_per_tree=1)[2])[2].startswith("A body of ice")


def test_harmony_tests_are_no_part_of_the_prompt():
    record = one("harmony_task", rows_of("harmony_task")[0])
    assert record["kind"] == "rl" and "assert" not in json.dumps(record["messages"])
    assert record["tests"] == "assert total([1, 2]) == 3"


LOGIC = {"context": "A.", "query": "B?", "options": ["c", "d", "e"]}


@pytest.mark.parametrize(("given", "gold"), [(0, "A"), ("c", "C"), ("B", "B"), (True, None), ("1", None), (3, None)])
def test_the_right_option_is_a_letter_or_a_number_from_zero(given, gold):
    found = told(one("logiqa", {**LOGIC, "correct_option": given}))
    assert found == "answer is none of the options" if gold is None else found[3] == gold


THOUGHTS = {
    "<think>a</think>b": ("a", "b"),
    "\n<think>\na\n</think>\n\nb": ("a", "b"),
    "The tag <think> opens": (None, "The tag <think> opens"),
    "<think>a<think>b</think>c</think>d": "thought inside of a thought",
    "<think>a": "thought without its end",
    "a</think>b": "thought without its beginning",
    "<think>a</think>": "empty_assistant",
}


@pytest.mark.parametrize(("content", "expected"), THOUGHTS.items())
def test_a_thought_is_split_off_where_it_begins_an_answer_and_is_whole(content, expected):
    found = told(one("messages", chat(USER, {"role": "assistant", "content": content})))
    assert (found if isinstance(found, str) else found[1:3]) == expected


def test_a_thought_in_a_key_of_its_own_is_read_under_each_of_its_names():
    for key in ("thinking", "reasoning_content", "reasoning"):
        assert told(one("messages", chat(USER, {**ANSWER, key: "Hm."})))[1] == "Hm."


def called(arguments, name="clock") -> dict:
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "c", "function": {"name": name, "arguments": arguments}}],
    }


RESULT = {"role": "tool", "content": "12:00", "tool_call_id": "c"}
BAD_CHATS = {
    "no messages": [],
    "unknown_role": [{"role": None, "content": "x"}],
    "content part that is no text": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
    "content is no text": [{"role": "user", "content": 5}],
    "empty_user": [{"role": "user", "content": "  "}],
    "empty_assistant": [USER, {"role": "assistant", "content": None}],
    "unparsable tool call": [USER, called('{"zone": ')],
    "tool result without a call": [USER, RESULT, ANSWER],
    "tool call without a result": [USER, called({}), ANSWER],
}


@pytest.mark.parametrize(("reason", "turns"), BAD_CHATS.items())
def test_a_conversation_that_cannot_be_read_has_its_reason(reason, turns):
    assert one("messages", chat(*turns)) == Dropped(reason)


@pytest.mark.parametrize("turns", [[ANSWER], [USER, USER, ANSWER], [USER, ANSWER, USER], [called({})]])
def test_the_order_of_turns_is_left_to_the_rules_of_quality(turns):
    assert len(one("messages", chat(*turns))["messages"]) == len(turns)


@pytest.mark.parametrize("arguments", ['{"zone": "it\'s"}', "{'zone': \"it's\"}", {"zone": "it's"}])
def test_arguments_are_read_as_an_object_as_json_and_as_python_writes_them(arguments):
    record = one("messages", chat(USER, called(arguments), RESULT, ANSWER))
    assert record["messages"][1]["tool_calls"][0]["arguments"] == {"zone": "it's"}


def test_two_calls_with_one_result_are_dropped_and_with_two_in_another_order_are_matched():
    both = called({})
    both["tool_calls"] = [{"id": key, "function": {"name": key, "arguments": "{}"}} for key in ("a", "b")]
    results = [{"role": "tool", "content": key, "tool_call_id": key} for key in ("b", "a")]
    assert one("messages", chat(USER, both, results[0], ANSWER)) == Dropped("tool call without a result")
    matched = one("messages", chat(USER, both, *results, ANSWER))["messages"][2:4]
    assert [(turn["name"], turn["tool_call_id"]) for turn in matched] == [("b", "b"), ("a", "a")]


def test_special_tokens_of_a_template_stay_text():
    record = one("messages", chat({"role": "user", "content": "<|im_end|> <|end|>"}, ANSWER))
    assert record["messages"][0]["content"] == "<|im_end|> <|end|>"


@pytest.fixture(scope="module")
def encoder() -> HarmonyEncoder:
    return HarmonyEncoder()


HARMONY = """\
<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.
Knowledge cutoff: 2024-06

Reasoning: high

# Valid channels: analysis, commentary, final. Channel must be included for every message.
Calls to these tools must go to the commentary channel: 'functions'.<|end|><|start|>developer<|message|># Instructions

Use metric units.

# Tools

## functions

namespace functions {

// How warm it is.
type weather = (_: {
town: string,
}) => any;

} // namespace functions<|end|><|start|>user<|message|>How warm is it in Oslo?<|end|><|start|>assistant\
<|channel|>analysis<|message|>I ask.<|end|><|start|>assistant\
<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{"town":"Oslo"}<|call|>\
<|start|>functions.weather<|channel|>commentary to=assistant<|message|>-3 C<|end|>\
<|start|>assistant<|channel|>analysis<|message|>It froze.<|end|><|start|>assistant\
<|channel|>final<|message|>Minus three.<|return|>"""
TRAINED = (
    "<|channel|>analysis<|message|>I ask.<|end|><|start|>assistant<|channel|>commentary to=functions.weather "
    '<|constrain|>json<|message|>{"town":"Oslo"}<|call|>',
    "<|channel|>analysis<|message|>It froze.<|end|><|start|>assistant<|channel|>final<|message|>Minus three.<|return|>",
)


def weather_record() -> dict:
    parameters = {"type": "object", "properties": {"town": {"type": "string"}}, "required": ["town"]}
    function = {"name": "weather", "description": "How warm it is.", "parameters": parameters}
    call = {"id": "c1", "name": "weather", "arguments": {"town": "Oslo"}}
    turns = [
        message("developer", "Use metric units."),
        message("user", "How warm is it in Oslo?"),
        message("assistant", None, thinking="I ask.", tool_calls=[call]),
        message("tool", "-3 C", name="weather", tool_call_id="c1"),
        message("assistant", "Minus three.", thinking="It froze."),
    ]
    return make_record("chat", messages=turns, tools=[{"type": "function", "function": function}])


def trained(encoder: HarmonyEncoder, encoded) -> list[str]:
    """Runs of tokens that are trained, as text."""
    runs, before = [], 0
    for token, counts in zip(*encoded, strict=True):
        if counts:
            runs = [*runs, []] if not before else runs
            runs[-1].append(token)
        before = counts
    return [encoder.encoding.decode(run) for run in runs]


def test_harmony_is_written_as_its_documentation_says_and_trained_from_the_role_to_the_end(encoder):
    encoded = encoder.one(weather_record())
    assert encoder.encoding.decode(encoded.ids) == HARMONY
    assert trained(encoder, encoded) == list(TRAINED)


def test_harmony_has_the_tokens_of_the_official_renderer_for_training(encoder):
    from openai_harmony import Conversation, RenderConversationConfig

    record = weather_record()
    conversation = Conversation.from_messages([part.message for part in parts_of(record)])
    config = RenderConversationConfig(auto_drop_analysis=False)
    assert encoder.encoding.render_conversation_for_training(conversation, config=config) == encoder.one(record).ids


def test_harmony_keeps_the_thought_of_a_single_turn_and_of_every_turn_before(encoder):
    turns = [message("user", "q1"), message("assistant", "f1", thinking="a1")]
    assert "analysis<|message|>a1" in encoder.encoding.decode(encoder.one(make_record("chat", messages=turns)).ids)
    turns += [message("user", "q2"), message("assistant", "f2", thinking="a2")]
    encoded = encoder.one(make_record("chat", messages=turns))
    assert trained(encoder, encoded) == [
        "<|channel|>analysis<|message|>a1<|end|><|start|>assistant<|channel|>final<|message|>f1",
        "<|channel|>analysis<|message|>a2<|end|><|start|>assistant<|channel|>final<|message|>f2<|return|>",
    ]


def test_harmony_reads_its_special_tokens_inside_of_a_text_as_text(encoder):
    turns = [message("user", "<|end|><|return|>"), message("assistant", "f")]
    ids = encoder.one(make_record("chat", messages=turns)).ids
    assert ids.count(encoder.special("<|end|>")) == 2 and ids.count(encoder.special("<|return|>")) == 1


def test_harmony_leaves_untrained_turns_out_of_the_loss_and_drops_what_has_none(encoder):
    turns = [message("user", "q1"), message("assistant", "f1", train=False), message("user", "q2")]
    assert encoder.one(make_record("chat", messages=turns)) == Dropped("no token that is trained")
    assert encoder.one(make_record("text", text="x")) == Dropped("of kind text, not a conversation")

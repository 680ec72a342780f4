"""What a teacher and a student read, and which tokens count."""

import re

import pytest

from rlt.models.loading import load_tokenizer
from rlt.prompts.rendering import (
    Rendered,
    render_conversation,
    render_question,
    render_student_reading,
    render_teacher_prompt,
    render_teacher_reading,
    student_answer,
)
from rlt.prompts.spans import align_spans, common_ends, tokenize_with_spans, tokens_inside
from rlt.prompts.styles import FORMATS, check_tags, load_format
from rlt.prompts.tokenizers import check_tokenizer

STYLE = load_format("stratos")


def test_the_teachers_prompt_begins_its_own_turn(tokenizer):
    prompt = render_teacher_prompt(tokenizer, STYLE, "What is 1+1?", "2", "Teach.")
    assert prompt == (
        "<|im_start|>system\nTeach.<|im_end|>\n<|im_start|>user\nWhat is 1+1?<|im_end|>\n<|im_start|>assistant\n"
        "<|begin_of_solution|>2<|end_of_solution|>\n\n<|begin_of_explanation|>\n\n"
    )


@pytest.mark.parametrize("style", FORMATS.values(), ids=FORMATS)
def test_spans_hold_exactly_what_stands_between_the_tags(tokenizer, style):
    reading = render_student_reading(tokenizer, style, "Q?", "42", "\n\nbecause", "System.")
    (a, b), (c, d) = reading.spans["thought"], reading.spans["solution"]
    assert reading.text[a:b] == "\n\nbecause"
    assert reading.text[c:d] == "42"
    assert reading.text[:a].endswith(style.thought_tags[0])
    assert reading.text[b:c] == style.thought_tags[1] + "\n\n" + style.solution_tags[0]
    assert reading.text[d:].startswith(style.solution_tags[1])


def test_the_first_end_tag_ends_the_explanation_and_a_missing_one_is_put_in():
    end = STYLE.explanation_tags[1]
    two = render_teacher_reading(STYLE, "P\n\n", f"one{end}two{end}")
    assert two.text[slice(*two.spans["explanation"])] == "\n\none"
    none = render_teacher_reading(STYLE, "P\n\n", "cut off")
    assert none.text == f"P\n\ncut off{end}"
    assert none.text[slice(*none.spans["explanation"])] == "\n\ncut off"


def test_a_template_without_a_system_role_gets_that_text_before_the_question(tokenizer):
    strict = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "[{{ m['role'] }}]{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    silent = strict.replace("{{ raise_exception('no system role') }}", "{% continue %}")
    kept = tokenizer.chat_template
    try:
        for template in (strict, silent):
            tokenizer.chat_template = template
            prompt = render_teacher_prompt(tokenizer, STYLE, "Q?", "42", "Teach.")
            assert prompt.startswith("[user]Teach.\n\nQ?[assistant]<|begin_of_solution|>42")
    finally:
        tokenizer.chat_template = kept


def test_a_reading_begins_with_what_a_student_is_asked_and_answers(tokenizer, monkeypatch):
    """Qwen3's template puts an empty thought into the last answer, and none into the prompt for one."""
    thinks = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
        "{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    for template in (tokenizer.chat_template, thinks):
        monkeypatch.setattr(tokenizer, "chat_template", template)
        for style in FORMATS.values():
            asked = render_question(tokenizer, style, "Q?", "System.")
            reading = render_student_reading(tokenizer, style, "Q?", "42", "\n\nbecause\n\n", "System.")
            assert reading.text == asked + student_answer(style, "because", "42") + "<|im_end|>\n"


def test_a_system_text_of_a_row_goes_before_the_question_where_a_template_has_no_role_for_it(tokenizer, monkeypatch):
    strict = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('none') }}{% endif %}"
        "[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    )
    monkeypatch.setattr(tokenizer, "chat_template", strict)
    assert render_conversation(tokenizer, "Q?", "Be terse.") == "[user]Be terse.\n\nQ?"
    assert render_conversation(tokenizer, "Q?", None) == "[user]Q?"


def test_a_tag_that_is_a_special_token_is_refused(tiny_teacher):
    own = load_tokenizer(tiny_teacher)
    check_tags(STYLE, own)
    own.add_tokens([STYLE.explanation_tags[1]])
    check_tags(STYLE, own)  # a plain token of its own is read
    own = load_tokenizer(tiny_teacher)
    own.add_special_tokens({"additional_special_tokens": [STYLE.explanation_tags[1]]})
    with pytest.raises(ValueError, match=r"the tag <\|end_of_explanation\|> is a special token of this tokenizer"):
        check_tags(STYLE, own)
    with pytest.raises(ValueError, match="is a special token of this tokenizer"):
        check_tokenizer(STYLE, own)  # which every run asks


def test_a_system_prompt_that_a_template_trims_stays_where_it_is(tokenizer, monkeypatch):
    trims = tokenizer.chat_template.replace("message['content']", "(message['content'] | trim)")
    assert trims != tokenizer.chat_template
    plain = render_teacher_prompt(tokenizer, STYLE, "Q?", "2", "Teach.")
    monkeypatch.setattr(tokenizer, "chat_template", trims)
    assert render_teacher_prompt(tokenizer, STYLE, "Q?", "2", "Teach.\n") == plain


def test_a_token_counts_only_when_it_lies_wholly_inside():
    offsets = [(0, 2), (2, 5), (5, 5), (5, 8), (8, 9)]
    assert tokens_inside(offsets, 2, 8) == [1, 3]
    assert tokens_inside(offsets, 3, 9) == [3, 4]


def test_common_ends_leave_out_the_middle_that_differs():
    assert common_ends([1, 2, 3], [1, 2, 3]) == [(0, 0), (1, 1), (2, 2)]
    assert common_ends([1, 2, 9, 5], [1, 2, 7, 8, 5]) == [(0, 0), (1, 1), (3, 4)]
    assert common_ends([], [1]) == []


def test_newlines_that_are_cut_by_what_follows_are_dropped(tokenizer):
    # Before a tag two newlines are two tokens; the piece alone ends in one token for both.
    text = "so 12\n\n<end>"
    (tokenized,) = tokenize_with_spans(tokenizer, [Rendered(text, {"x": (0, 7)})])
    kept = tokenizer.decode([tokenized.ids[i] for i in tokenized.spans["x"]])
    assert kept == "so 12"


def test_teacher_and_student_keep_the_same_tokens(tokenizer):
    completion = "Because 3 * 4 is 12.\n\n<|end_of_explanation|>"
    prompt = render_teacher_prompt(tokenizer, STYLE, "What is 3 * 4?", "12")
    teacher = render_teacher_reading(STYLE, prompt, completion)
    student = render_student_reading(tokenizer, STYLE, "What is 3 * 4?", "12", "\n\nBecause 3 * 4 is 12.\n\n")
    left, right = tokenize_with_spans(tokenizer, [teacher, student])
    pieces = align_spans(left, "explanation", right, "thought")
    assert [left.ids[i] for i in pieces.left] == [right.ids[j] for j in pieces.right]
    assert pieces.left_sizes == pieces.right_sizes == [1] * len(pieces.left)
    assert tokenizer.decode([left.ids[i] for i in pieces.left]) == "\n\nBecause 3 * 4 is 12."


def test_a_users_own_format_comes_from_yaml(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("thought_tags: ['<t>', '</t>']\nstudent_system_prompt: 'Think in {thought_start}.'\n")
    style = load_format(str(path))
    assert (style.name, style.thought_tags, style.student_system) == ("mine", ("<t>", "</t>"), "Think in <t>.")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"thought_tag: x", "'thought_tag'] not among the fields"),
        (b"5: x\nthought_tag: x", "'5', 'thought_tag'] not among the fields"),
        (b"- a list", "list not among the fields"),
        (b"thought_tags: ['a']", "thought_tags must be two non-empty strings, not ['a']"),
        (b"explanation_tags: 5", "explanation_tags must be two non-empty strings, not 5"),
        (b"explanation_tags: ab", "explanation_tags must be two non-empty strings, not 'ab'"),
        (b"teacher_system_prompt: [a, b]", "teacher_system_prompt must be text, not ['a', 'b']"),
        (b"student_system_prompt:", "student_system_prompt must be text, not None"),
        (b"teacher_system_prompt: Explain like this: step by step", "is not YAML (mapping values are not allowed"),
        (b"teacher_system_prompt: '\xff'", "is not YAML ("),
    ],
)
def test_a_wrong_format_file_is_refused_in_one_line(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_bytes(text)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        load_format(str(path))
    assert "\n" not in str(caught.value)


def test_a_format_file_that_the_system_does_not_read_is_named(tmp_path):
    (tmp_path / "mine.yaml").symlink_to("/proc/self/mem")  # a file whose first byte nobody may read
    with pytest.raises(ValueError, match="reasoning_format=.*mine.yaml cannot be read"):
        load_format(str(tmp_path / "mine.yaml"))

"""Chat templates that behave as those of known families do, and what is refused of others."""

import datetime as dates

import pytest
from conftest import config_of
from families import CHATML, FAMILIES, byte_level, family
from transformers.utils import chat_template_utils
from trl.data_utils import maybe_apply_chat_template

from rlt.planning.trl_fields import typed_settings
from rlt.prompts.examples import example
from rlt.prompts.rendering import (
    prompt_token_ids,
    render_question,
    render_student_reading,
    render_teacher_prompt,
    student_answer,
)
from rlt.prompts.rows import plain_prompt
from rlt.prompts.spans import tokenize_with_spans
from rlt.prompts.styles import FORMATS, load_format
from rlt.prompts.tokenizers import check_tokenizer, load_student_tokenizer
from trainers.examples import whole_pairs

STYLE = load_format("stratos")
PLAIN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module", params=FAMILIES)
def of_a_family(request):
    return family(request.param)


@pytest.fixture
def plain():
    """A tokenizer that is given a template by its test."""
    tokenizer = byte_level(CHATML)
    tokenizer.chat_template = PLAIN
    return tokenizer


@pytest.mark.parametrize("style", FORMATS.values(), ids=FORMATS)
def test_what_a_model_is_asked_begins_what_is_read_of_it_in_characters_and_tokens(of_a_family, style):
    check_tokenizer(style, of_a_family)
    asked = render_question(of_a_family, style, "Q?", "Be brief.")
    reading = render_student_reading(of_a_family, style, "Q?", "42", "\n\nbecause\n\n", "Be brief.")
    assert reading.text.startswith(asked + student_answer(style, "because", "42"))
    assert "Be brief." in asked and reading.text.count("<think>") == (style.name == "r1")
    (ids,), (read,) = prompt_token_ids(of_a_family, [asked]), tokenize_with_spans(of_a_family, [reading])
    assert read.ids[: len(ids)] == ids
    learned = example(of_a_family, asked, student_answer(style, "because", "42"))["input_ids"]
    assert learned == read.ids[: len(learned)]


def test_a_text_begins_with_the_bos_of_its_template_once(of_a_family):
    prompt = render_teacher_prompt(of_a_family, STYLE, "Q?", "42")
    settings = typed_settings(config_of("dpo_tiny", "max_length=2000", "dataset_id_or_path=traces"))
    (pair,) = whole_pairs(settings, [{"prompt": prompt, "chosen": "a", "rejected": "b"}], of_a_family)
    asked = maybe_apply_chat_template(pair, of_a_family)["prompt"]
    reading = render_student_reading(of_a_family, STYLE, "Q?", "42", "because")
    ways = {
        "sampled": prompt_token_ids(of_a_family, [prompt])[0],
        "read": tokenize_with_spans(of_a_family, [reading])[0].ids,
        "learned": example(of_a_family, prompt, "because")["input_ids"],
        "compared, by TRL": of_a_family(asked)["input_ids"],
    }
    bos = of_a_family.bos_token_id
    for way, ids in ways.items():
        assert ids.count(bos) == (bos is not None), way
        assert bos is None or ids[0] == bos, way


@pytest.mark.parametrize("name", ["gemma3", "gemma2"])
def test_a_gemma_gets_the_system_text_before_the_question(name):
    prompt = render_teacher_prompt(family(name), STYLE, "Q?", "42", "Teach.")
    assert prompt.startswith("<bos><start_of_turn>user\nTeach.\n\nQ?<end_of_turn>\n<start_of_turn>model\n<|begin_of_so")


@pytest.mark.parametrize(("name", "begun"), [("qwen3.5", "<think>\n"), ("qwen3.5, small", "<think>\n\n</think>\n\n")])
def test_a_thought_that_a_prompt_begins_stays_where_a_model_answers_in_its_own_way(name, begun):
    tokenizer = family(name)
    settings = typed_settings(config_of("grpo_exact"))
    native = plain_prompt(tokenizer, {"question": "Q?"}, settings)
    assert native.endswith(f"<|im_start|>assistant\n{begun}")
    assert render_question(tokenizer, STYLE, "Q?", answer_line=True).endswith(f"assistant\n{begun}")
    for style in FORMATS.values():
        assert render_question(tokenizer, style, "Q?").endswith("<|im_start|>assistant\n")


def test_words_that_switch_a_mode_are_kept_before_the_question():
    """SmolLM3's template takes `/think` out of the system text, and with it half of the tag `</think>`."""
    style = FORMATS["r1"]
    asked = render_question(family("smollm3"), style, "Q?")
    assert f"<|im_start|>user\n{style.student_system}\n\nQ?<|im_end|>" in asked
    assert "You are a helpful assistant." in asked


@pytest.mark.parametrize(("name", "day"), [("llama3.2", "26 Jul 2024"), ("smollm3", "26 July 2024")])
def test_a_prompt_has_the_same_date_on_any_day(name, day, monkeypatch):
    tokenizer, texts = family(name), []
    for today in (dates.datetime(2026, 1, 1), dates.datetime(2026, 1, 2)):
        stopped = type("Stopped", (dates.datetime,), {"now": classmethod(lambda cls, today=today: today)})
        monkeypatch.setattr(chat_template_utils, "datetime", stopped)
        stock = tokenizer.apply_chat_template([{"role": "user", "content": "Q?"}], tokenize=False)
        assert today.strftime("%d %b") in stock
        reading = render_student_reading(tokenizer, STYLE, "Q?", "42", "because").text
        texts.append((render_teacher_prompt(tokenizer, STYLE, "Q?", "42"), reading))
    assert texts[0] == texts[1]
    assert all(f"Today Date: {day}\n" in text for text in texts[0])


def test_a_time_of_day_in_a_template_stands_still(plain):
    plain.chat_template = "{{ strftime_now('%H:%M:%S.%f') }}" + PLAIN
    check_tokenizer(STYLE, plain)
    assert render_question(plain, STYLE, "Q?").startswith("00:00:00.000000<|im_start|>")


REFUSED = {
    "no template": ("", "its tokenizer has no chat template: name an instruct model"),
    "another each time": ("{{ range(10**5) | random }}" + PLAIN, "writes another prompt each time"),
    "no question": (PLAIN.replace("{{ m.content }}", "{{ m.content if m.role != 'user' }}"), "leaves the question out"),
    "no answer": (PLAIN.replace("{{ m.content }}", "{{ m.content if m.role != 'assistant' }}"), "an answer 0 times"),
    "answer twice": (PLAIN.replace("{{ m.content }}", "{{ m.content }}{{ m.content }}"), "an answer 2 times"),
    "question marked once answered": (
        PLAIN.replace("{{ m.content }}", "{{ m.content }}{{ '' if loop.last or m.role != 'user' else ' (done)' }}"),
        "writes a question otherwise once it is answered: '<|im_end|>",
    ),
    "no conversation at all": ("{{ raise_exception('tools only') }}", "take a question with its answer (tools only)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_template_by_which_a_prompt_does_not_begin_its_reading_is_one_line(case, plain):
    plain.chat_template, says = REFUSED[case]
    with pytest.raises(ValueError) as caught:
        check_tokenizer(STYLE, plain)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_a_prompt_whose_last_token_takes_in_what_follows_is_refused():
    tokenizer = byte_level(CHATML, text=[" <|begin_of_thought|>"] * 9)
    tokenizer.chat_template = PLAIN.replace("\n{{ m", " {{ m").replace("assistant\n", "assistant ")
    with pytest.raises(ValueError, match="its tokenizer cuts ' ' at the end of a prompt otherwise when an answer"):
        check_tokenizer(STYLE, tokenizer)


def test_a_template_that_writes_its_bos_twice_is_refused():
    tokenizer = family("gemma3")
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    with pytest.raises(ValueError, match="begins a text with <bos> twice"):
        check_tokenizer(STYLE, tokenizer)


def test_a_student_that_cannot_write_the_text_is_refused(plain, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "[PAD]": 1, "[EOS]": 2, "What": 3}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    own = type(plain)(tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]", eos_token="[EOS]")
    own.chat_template = PLAIN
    own.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no tokens for some of"):
        load_student_tokenizer(str(tmp_path), plain, STYLE)


def test_only_another_template_or_other_tokens_give_a_student_a_tokenizer_of_its_own(plain, tmp_path, caplog):
    caplog.set_level("INFO", "rlt")
    plain.save_pretrained(tmp_path)
    assert load_student_tokenizer(str(tmp_path), plain, STYLE) is plain
    other = family("qwen3")
    other.save_pretrained(tmp_path)
    own = load_student_tokenizer(str(tmp_path), plain, STYLE)
    assert own.chat_template == other.chat_template and not caplog.text
    family("gemma3").save_pretrained(tmp_path)
    assert load_student_tokenizer(str(tmp_path), plain, STYLE).bos_token == "<bos>"
    assert caplog.text.count("has another tokenizer than the teacher") == 1

"""Token ids and loss masks: by hand-written templates, by transformers' own mask, by what each text must give back."""

import json
from functools import cache
from pathlib import Path

import pytest
from conftest import EMBEDDED

from rlt.errors import Refused
from rlt.formats.record import Dropped, make_record, message
from rlt.models.embedded import embedded_model_path
from rlt.models.loading import load_tokenizer
from rlt.preparation.quality import Quality
from rlt.preparation.run import key_of, prepare
from rlt.preparation.tokenizers import CHAT_TEMPLATE, fingerprint_of
from rlt.preparation.tokens import NO_TOKEN, Encoder, Tokens
from rlt.runs.folder import TOKENS, mark_complete
from rlt.schema import settings_of
from rlt.tokens.files import array_file, read_arrays, writing_arrays
from rlt.tokens.rendering import NOT_ASKED, REFUSED, SPECIAL, THOUGHTLESS, TWO_ANSWERS, ChatRenderer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ '<|begin_of_text|>' }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}<bos>"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (
    "<s>{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)
# As Qwen3's: a thought is shown in the last answer only, and an empty one where there is none.
QWEN3 = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.index0 > ns.last %}<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n"
    "{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As DeepSeek-R1's: the prompt begins the thought, and a whole answer is shown without it.
DEEPSEEK = (
    "{% for m in messages %}{% if m.role == 'user' %}<User>{{ m.content }}{% else %}<Assistant>"
    "{{ m.content.split('</think>')[-1] }}<end>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<Assistant><think>\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIALS = {
    LLAMA3: ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    GEMMA: ["<bos>", "<start_of_turn>", "<end_of_turn>"],
    MISTRAL: ["<s>", "</s>", "[INST]", "[/INST]"],
    DEEPSEEK: ["<User>", "<Assistant>", "<end>"],
}


def tokenizer_with(template: str, special: tuple[str, ...] = ()):
    tokenizer = load_tokenizer(str(embedded_model_path(EMBEDDED)))
    tokenizer.add_special_tokens({"additional_special_tokens": [*SPECIALS.get(template, ()), *special]})
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """From a chat template to what makes tokens of records."""

    @cache
    def made(template: str) -> Encoder:
        folder = tmp_path_factory.mktemp("tokenizer")
        tokenizer_with(template).save_pretrained(folder)
        return Encoder(str(folder))

    def make(template: str) -> Encoder:
        made(template).counted.clear()
        return made(template)

    return make


def chat(*turns, **fields):
    """A record of (role, content) and (role, content, {other fields of a turn})."""
    return make_record("chat", messages=[message(t[0], t[1], **(t[2] if len(t) > 2 else {})) for t in turns], **fields)


def trained_text(encoder: Encoder, record) -> list[str]:
    """The texts of the runs of trained tokens."""
    (found,) = encoder([record])
    assert not isinstance(found, Dropped), found
    runs: list[list[int]] = [[]]
    for token, trained in zip(found.ids, found.mask, strict=True):
        if trained:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [encoder.tokenizer.decode(run, skip_special_tokens=False) for run in runs if run]


TWO_TURNS = (("user", "1 + 1?"), ("assistant", "2!"), ("user", "And 2 + 2?\n"), ("assistant", "It is 4!"))
EXPECTED = [
    (CHATML, ["2!<|im_end|>", "It is 4!<|im_end|>"]),
    (LLAMA3, ["2!<|eot_id|>", "It is 4!<|eot_id|>"]),
    (GEMMA, ["2!<end_of_turn>", "It is 4!<end_of_turn>"]),
    (MISTRAL, [" 2!</s>", " It is 4!</s>"]),
    (MARKED, ["2!<|im_end|>", "It is 4!<|im_end|>"]),
    # In the first turn of a conversation that goes on, the model would have been shown another text.
    (QWEN3, ["<think>\n\n</think>\n\nIt is 4!<|im_end|>"]),
]


@pytest.mark.parametrize(
    ("template", "expected"), EXPECTED, ids=["chatml", "llama3", "gemma", "mistral", "marked", "qwen3"]
)
def test_exactly_what_the_model_is_asked_to_write_is_trained(template, expected, encoder):
    assert trained_text(encoder(template), chat(*TWO_TURNS)) == expected


def test_the_mask_is_the_one_that_transformers_has_for_a_template_with_marks(encoder):
    ours = encoder(MARKED)
    record = chat(("system", "Be brief!"), *TWO_TURNS)
    (found,) = ours([record])
    turns = [{"role": turn["role"], "content": turn["content"]} for turn in record["messages"]]
    theirs = ours.tokenizer.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
    assert (found.ids, found.mask) == (theirs["input_ids"], theirs["assistant_masks"])


def test_templates_with_and_without_marks_agree(encoder):
    record = chat(("system", "S"), *TWO_TURNS)
    assert trained_text(encoder(MARKED), record) == trained_text(encoder(CHATML), record)


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_a_turn_that_is_not_to_be_trained_is_masked(template, encoder):
    record = chat(TWO_TURNS[0], ("assistant", "2!", {"train": False}), *TWO_TURNS[2:])
    assert trained_text(encoder(template), record) == ["It is 4!<|im_end|>"]


def test_every_exclamation_mark_is_trained_though_its_id_is_the_lowest_of_some_vocabularies(encoder):
    ours = encoder(CHATML)
    (text,) = ours([make_record("text", text="!!! ! a! !")])
    assert text.mask == [1] * len(text.ids)
    assert trained_text(ours, chat(("user", "!"), ("assistant", "!!!! !"))) == ["!!!! !<|im_end|>"]


def test_a_thought_is_trained_where_the_template_has_a_place_for_it_or_as_text(encoder):
    record = chat(("user", "1 + 1?"), ("assistant", "2", {"thinking": "one and one"}))
    expected = ["<think>\none and one\n</think>\n\n2<|im_end|>"]
    assert trained_text(encoder(QWEN3), record) == expected
    assert trained_text(encoder(CHATML), record) == expected


def test_a_template_that_leaves_thoughts_out_drops_rows_with_one(encoder):
    record = chat(("user", "1 + 1?"), ("assistant", "2", {"thinking": "one and one"}))
    assert encoder(DEEPSEEK)([record]) == [Dropped(THOUGHTLESS)]


def test_a_template_that_asks_otherwise_than_it_shows_answers_drops_the_row(encoder):
    assert encoder(DEEPSEEK)([chat(("user", "1 + 1?"), ("assistant", "2"))]) == [Dropped(NOT_ASKED)]


def test_an_earlier_thought_that_the_template_forgets_is_counted_and_not_trained(encoder):
    ours = encoder(QWEN3)
    thinks = [(t[0], t[1], {"thinking": f"so {t[1]}"}) if t[0] == "assistant" else t for t in TWO_TURNS]
    assert trained_text(ours, chat(*thinks)) == ["<think>\nso It is 4!\n</think>\n\nIt is 4!<|im_end|>"]
    assert ours.counted["turns_not_trained"] == 1


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (chat(("system", "S"), *TWO_TURNS[:2]), REFUSED),
        (chat(("user", "a <end_of_turn> b"), ("assistant", "c")), SPECIAL),
        (chat(("user", "a"), ("assistant", "c", {"thinking": "<bos>"})), SPECIAL),
        (chat(("user", "a")), NO_TOKEN),
        (chat(("assistant", "a")), NOT_ASKED),
        (make_record("preference", messages=[message("user", "a")], chosen=[message("assistant", "b")]), TWO_ANSWERS),
    ],
)
def test_a_row_that_cannot_be_trained_on_is_dropped_with_a_reason(record, reason, encoder):
    assert encoder(GEMMA)([record]) == [Dropped(reason)]


def test_special_tokens_in_a_plain_text_are_text(encoder):
    ours = encoder(CHATML)
    text = "a <|im_end|> b <|endoftext|>"
    (found,) = ours([make_record("text", text=text)])
    assert found.ids[-1] == ours.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert set(found.ids[:-1]).isdisjoint(ours.tokenizer.all_special_ids)
    assert ours.tokenizer.decode(found.ids[:-1]) == text


def test_tools_and_calls_reach_the_template(encoder):
    template = (
        "{% if tools %}{{ tools | tojson }}\n{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% for c in m.tool_calls or [] %}[{{ c.function.name }} {{ c.function.arguments | tojson }}]{% endfor %}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    call = {"name": "add", "arguments": {"a": 1}}
    tools = [{"type": "function", "function": {"name": "add", "description": "adds", "parameters": {}}}]
    turns = (("user", "1?"), ("assistant", None, {"tool_calls": [call]}), ("tool", "1", {"name": "add"}))
    ours = encoder(template)
    record = chat(*turns, ("assistant", "One"), tools=tools)
    assert trained_text(ours, record) == ['[add {"a": 1}]<|im_end|>', "One<|im_end|>"]
    (found,) = ours([record])
    assert '"description": "adds"' in ours.tokenizer.decode(found.ids)


def test_a_developers_turn_is_a_system_prompt_where_the_template_does_not_know_developers():
    render = ChatRenderer(tokenizer_with(CHATML))
    assert render(chat(("developer", "D"), *TWO_TURNS[:2])).text.startswith("<|im_start|>system\nD<|im_end|>")


def test_a_tokenizer_that_changes_texts_is_refused(encoder):
    from tokenizers import pre_tokenizers

    ours = encoder(CHATML + "{# of its own #}")
    bytes_of_words = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ours.plain.pre_tokenizer = pre_tokenizers.Sequence(bytes_of_words)
    with pytest.raises(Refused, match="does not give a text back"):
        ours([make_record("text", text="two words")])


def settings(tmp_path: Path, **keys):
    from rlt.planning.configuration import compose_config

    given = [f"output_dir={tmp_path / 'out'}", "report_to=null", "engine_workers=1", "run_cfg=prepare_tiny"]
    (tmp_path / keys.get("output_dir", "out")).mkdir(exist_ok=True)
    config, _ = compose_config([*given, f"sources=[{tmp_path / 'rows.jsonl'}]"])
    return settings_of({**config, **keys})


def prepare_whole(given) -> list:
    """All stages, and the mark without which no other run reads the rows."""
    results = prepare(given, lambda: False)
    mark_complete(Path(given.output_dir), {"rows": results[-1].counts.kept})
    return results


def write_texts(tmp_path: Path, count: int = 300) -> None:
    rows = [{"text": f"Row {n} has a text of its own! It says {n * n} and é.", "id": n} for n in range(count)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def outputs(folder: Path) -> dict[str, bytes]:
    """What other runs read, by name."""
    wanted = [*folder.glob("tokens/*"), *folder.glob("packed/*"), *folder.glob("tokenizer/tokenizer.json")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in wanted}


TRAINED = {"stages": ["read", "split", "tokens", "pack"], "train_tokenizer": 400, "tokenizer": None, "pack_length": 64}


def test_a_tokenizer_is_trained_once_and_the_same_each_time(tmp_path):
    write_texts(tmp_path)
    results = prepare(settings(tmp_path, validation_share=0.1, **TRAINED), lambda: False)
    first = outputs(tmp_path / "out")
    assert len(json.loads(first["tokenizer/tokenizer.json"])["model"]["vocab"]) == 400
    assert results[-1].counts.notes["tokens_in"] == results[-2].counts.notes["tokens"]
    again = prepare(settings(tmp_path, validation_share=0.1, engine_workers=2, **TRAINED), lambda: False)
    assert [one.seconds for one in again] == pytest.approx(
        [one.seconds for one in results], abs=1e-3
    )  # nothing was done
    other = settings(tmp_path, validation_share=0.1, output_dir=str(tmp_path / "other"), **TRAINED)
    prepare(other, lambda: False)
    assert outputs(tmp_path / "other") == first


def test_the_arrays_hold_what_the_records_say_and_validation_has_a_file_of_its_own(tmp_path):
    write_texts(tmp_path)
    prepare(settings(tmp_path, validation_share=0.2, **TRAINED), lambda: False)
    tokenizer = load_tokenizer(str(tmp_path / "out" / "tokenizer"))
    counts = {}
    for split in ("train", "validation"):
        rows = [row for n in range(4) for row in read_arrays(array_file(tmp_path / "out" / TOKENS, split, n))]
        counts[split] = len(rows)
        for row in rows:
            number = int(row["id"].split(":")[1])
            expected = f"Row {number} has a text of its own! It says {number * number} and é.<|endoftext|>"
            assert tokenizer.decode(row["input_ids"]) == expected
            assert row["length"] == len(row["input_ids"]) == row["loss_mask"].sum()
    assert sum(counts.values()) == 300 and 30 < counts["validation"] < 90


def test_arrays_of_a_stage_that_a_run_no_longer_has_are_removed(tmp_path):
    write_texts(tmp_path, 20)
    prepare(settings(tmp_path, **TRAINED), lambda: False)
    assert (tmp_path / "out" / "packed").is_dir()
    prepare(settings(tmp_path, **{**TRAINED, "stages": ["read", "split", "tokens"]}), lambda: False)
    assert not (tmp_path / "out" / "packed").exists()


def test_arrays_that_were_deleted_are_made_again(tmp_path):
    import shutil

    write_texts(tmp_path, 20)
    prepare(settings(tmp_path, **TRAINED), lambda: False)
    first = outputs(tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "tokens")
    prepare(settings(tmp_path, **TRAINED), lambda: False)
    assert outputs(tmp_path / "out") == first


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"tokenizer": None, "train_tokenizer": None}, "needs one of them"),
        ({"tokenizer": "./gone", "train_tokenizer": None}, "there is no tokenizer.json"),
        ({"train_tokenizer": 100}, "train_tokenizer=100 must be at least 260"),
        ({"pack_buckets": [64]}, "must be a number of tokens below pack_length=64"),
        ({"pack_overflow": "cut"}, "use null or one of drop, split, error"),
    ],
)
def test_what_cannot_be_tokenised_or_packed_is_refused_before_hours_are_spent(keys, message, tmp_path):
    from rlt.preparation.stages import stages_of

    with pytest.raises(Refused, match=message):
        for stage in stages_of(settings(tmp_path, **{**TRAINED, **keys})):
            if stage.name in ("tokens", "pack"):
                stage.check()


def test_a_file_of_arrays_gives_back_what_was_written(tmp_path):
    columns = ("input_ids", "loss_mask", "length", "id", "source", "kind")
    rows = [
        {"input_ids": list(range(n)), "loss_mask": [1] * n, "length": n, "id": f"x{n}", "source": "é", "kind": "text"}
        for n in (3, 0, 5)
    ]
    with writing_arrays(tmp_path / "a.parquet", columns, {"tokenizer": "t"}) as write:
        for row in rows:
            write(row)
    found = list(read_arrays(tmp_path / "a.parquet"))
    assert [
        {**row, "input_ids": row["input_ids"].tolist(), "loss_mask": row["loss_mask"].tolist()} for row in found
    ] == rows


CALL = {"name": "add", "arguments": {"a": 1}}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "adds", "parameters": {}}}]
CALLING = (("user", "1 and 1?"), ("assistant", None, {"tool_calls": [CALL]}))


def test_the_embedded_models_template_has_no_place_for_calls_or_tools_and_their_rows_are_dropped():
    ours = Encoder(EMBEDDED)
    assert ours([chat(*CALLING)]) == [Dropped("tool call that the chat template leaves out")]
    assert ours([chat(*TWO_TURNS, tools=TOOLS)]) == [Dropped("tools that the chat template leaves out")]
    assert not isinstance(ours([chat(*TWO_TURNS)])[0], Dropped)


def test_the_template_of_a_trained_tokenizer_shows_tools_and_trains_calls(encoder):
    ours = encoder(CHAT_TEMPLATE)
    record = chat(*CALLING, ("tool", "2", {"name": "add"}), ("assistant", "Two"), tools=TOOLS)
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>'
    assert trained_text(ours, record) == [call, "Two<|im_end|>"]
    (found,) = ours([record])
    assert '"description": "adds"' in ours.tokenizer.decode(found.ids)


def test_a_turn_that_the_template_leaves_out_drops_the_row(encoder):
    without_system = "{% for m in messages if m.role != 'system' %}" + CHATML.removeprefix("{% for m in messages %}")
    left_out = [Dropped("turn that the chat template leaves out")]
    assert encoder(without_system)([chat(("system", "Be brief!"), *TWO_TURNS)]) == left_out
    escaped = CHATML.replace("{{ m.content }}", "{{ m.content | tojson if m.role == 'tool' else m.content }}")
    record = chat(("user", "1?"), ("assistant", "2"), ("tool", 'a "b"\n', {"name": "x"}), ("assistant", "c"))
    assert trained_text(encoder(escaped), record) == ["2<|im_end|>", "c<|im_end|>"]


@pytest.mark.parametrize("name", ["chat_template.json", "added_tokens.json", "additional_chat_templates/tool.jinja"])
def test_a_file_of_the_tokenizer_that_changes_makes_tokens_again(name, tmp_path):
    tokenizer_with(CHATML).save_pretrained(tmp_path / "model")
    named = settings(tmp_path, tokenizer=str(tmp_path / "model"), train_tokenizer=None)
    before = key_of(Tokens(named), "")
    (tmp_path / "model" / name).parent.mkdir(exist_ok=True)
    (tmp_path / "model" / name).write_text("{}")
    assert key_of(Tokens(named), "") != before
    counted = [settings(tmp_path, tokenizer=named.tokenizer, max_answer_tokens=longest) for longest in (None, 5)]
    assert [tmp_path / "model" / name in Quality(one).files() for one in counted] == [False, True]


def test_quality_depends_on_the_tokenizer_where_it_counts_tokens_alone(tmp_path):
    for longest, same in ((None, True), (5, False)):
        keys = [
            key_of(Quality(settings(tmp_path, tokenizer=name, max_answer_tokens=longest)), "")
            for name in (EMBEDDED, str(embedded_model_path(EMBEDDED)))
        ]
        assert (keys[0] == keys[1]) is same


def test_the_fingerprint_is_of_the_vocabulary_of_its_cuts_and_of_the_chat_template():
    from tokenizers import normalizers, pre_tokenizers

    prints = {fingerprint_of(tokenizer_with(CHATML)), fingerprint_of(tokenizer_with(MARKED))}
    for part, other in (("normalizer", normalizers.NFKC()), ("pre_tokenizer", pre_tokenizers.WhitespaceSplit())):
        changed = tokenizer_with(CHATML)
        setattr(changed.backend_tokenizer, part, other)
        prints.add(fingerprint_of(changed))
    assert len(prints) == 4 and fingerprint_of(tokenizer_with(CHATML)) in prints


def test_a_tokenizer_that_was_deleted_is_trained_again_and_one_that_is_left_out_is_removed(tmp_path):
    import shutil

    write_texts(tmp_path, 20)
    prepare(settings(tmp_path, **TRAINED), lambda: False)
    first = outputs(tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "tokenizer")
    prepare(settings(tmp_path, **TRAINED), lambda: False)
    assert outputs(tmp_path / "out") == first
    prepare(settings(tmp_path, **{**TRAINED, "stages": ["read", "split"]}), lambda: False)
    assert not (tmp_path / "out" / "tokenizer").exists()

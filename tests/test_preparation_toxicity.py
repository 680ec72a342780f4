"""Toxicity: what the worst passage says, whatever stands around it."""

import json
import sys

import pytest
import torch
from preparation_rows import chat, outcome, text
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

from rlt.errors import Refused
from rlt.preparation.classifier import Classifier
from rlt.preparation.toxicity import Toxicity, passages_of, svm, worst

INSULTS = ("a fucking idiot", "a piece of shit", "a stupid bitch", "a worthless asshole", "a dumb motherfucker")
ABUSIVE = [
    *(f"You are {insult}." for insult in INSULTS),
    *(f"Shut up, you are {insult} and everybody knows it." for insult in INSULTS),
    *(f"My neighbour is {insult}, I hope he dies." for insult in INSULTS),
    "I will kill you and your whole family.",
    "Go fuck yourself.",
    "What the fuck is wrong with you, you sick bastard?",
    "Women are too stupid to vote.",
    "Go back to your country, you animals.",
    "People like you should be gassed.",
    "Nobody would miss you if you jumped off a bridge.",
    "You disgust me, you filthy pig.",
    "They breed like rats and should be treated like rats.",
    "I know where you live, and I am coming tonight with a knife.",
    "Kill yourself.",
    "You people are vermin.",
    "This dickhead sucks cock for money.",
    "Die, you ugly whore.",
    "All of them are thieves and rapists.",
]
HARMLESS = [
    "Kill all the background processes before the update.",
    "How do I kill a child process in Python?",
    "The patient was treated for breast cancer in an early stage.",
    "Scunthorpe town hall lies in Lincolnshire.",
    "The execution of the program was aborted.",
    "Master and slave drives are set by a jumper.",
    "She shot the film in black and white.",
    "The bomb calorimeter measures the heat of a reaction.",
    "He was attacked by a virus, and his cells died.",
    "A dead lock occurs when two threads wait for each other.",
    "Essex and Sussex lie in the south of England.",
    "The assassin in the play speaks the last words.",
    "Hitting the ball hard needs strong arms.",
    "The penal code of the country was changed.",
    "Homo sapiens came out of Africa.",
    "The gene is expressed in the testis and the ovary.",
    "Sexual reproduction mixes the genes of two parents.",
    "What is the area of a circle with radius 3?",
    "The war killed many thousands of people.",
    "I hate it when my code does not compile.",
    "The stupid error was a missing comma.",
    "Damn, that proof is beautiful.",
    "The cock crowed thrice.",
    "Screw the lid on tightly.",
    "The bastard sword is longer than the arming sword.",
    "He rode to town on an ass.",
    "The tit is a small bird of the woods.",
    "Balls are drawn from an urn without replacement.",
    "The dyke kept the sea from the fields.",
    "Let the queen take the bishop, and the pawn dies.",
]
WEATHER = "The weather in the town was fine, and the harvest was good. " * 20


@pytest.fixture(scope="module")
def scores():
    scored = svm()
    return lambda contents: scored([[content] for content in contents])


def test_precision_and_recall_are_what_the_docstring_says(scores):
    swearing, without, harmless = (
        [score > 0.9 for score in scores(some)] for some in (ABUSIVE[:15], ABUSIVE[15:], HARMLESS)
    )
    assert (sum(swearing), sum(without), sum(harmless)) == (15, 7, 2)
    toxic = sum(swearing) + sum(without)
    assert round(toxic / (toxic + sum(harmless)), 2) == 0.92
    assert round(toxic / len(ABUSIVE), 2) == 0.73


def test_an_insult_is_as_bad_among_other_sentences(scores):
    alone, among = scores([ABUSIVE[0], f"{WEATHER}{ABUSIVE[0]} {WEATHER}"])
    assert alone == pytest.approx(among, abs=0.02)
    assert alone > 0.99
    assert scores([WEATHER])[0] < 0.2


def test_an_insult_at_the_very_end_is_read(tmp_path):
    found = outcome(Toxicity, tmp_path, [text(WEATHER * 2 + ABUSIVE[0]), text(WEATHER * 2)])
    assert (len(found.kept), found.reasons) == (1, ["toxic"])
    assert found.dropped[0]["score"] > 0.99


def test_one_passage_in_fifty_may_be_bad(tmp_path):
    """Long documents, of which the model would else drop most for a word."""
    assert worst([0.1] * 48 + [0.9]) == 0.9
    assert worst([0.1] * 49 + [0.9]) == 0.1
    assert worst([0.1] * 98 + [0.9, 0.95]) == 0.1
    once, often = text(WEATHER * 10 + ABUSIVE[0]), text(f"{WEATHER}{ABUSIVE[0]} " * 10)
    found = outcome(Toxicity, tmp_path, [once, often])
    assert ([record["id"] for record in found.kept], found.reasons) == ([once["id"]], ["toxic"])


def test_the_worst_of_all_texts_of_a_record_counts(tmp_path):
    found = outcome(Toxicity, tmp_path, [chat("Hello there.", ABUSIVE[0]), chat("Hello there.", "Good day.")])
    assert found.reasons == ["toxic"]
    assert 0 <= found.kept[0]["meta"]["toxicity"] < 0.9


def test_a_score_can_only_be_noted(tmp_path):
    found = outcome(Toxicity, tmp_path, [text(ABUSIVE[0]), text(HARMLESS[0])], toxicity_action="tag")
    assert found.reasons == []
    assert [record["meta"]["toxicity"] > 0.9 for record in found.kept] == [True, False]
    assert found.counts.notes == {"over_threshold": 1}


def test_a_record_without_words_is_harmless(tmp_path):
    found = outcome(Toxicity, tmp_path, [text(""), text("42 " * 100), text("😀" * 1000), text("a" * 1_000_000)])
    assert len(found.kept) == 4


def test_passages_hold_every_word_once_and_are_short():
    content = f"One. Two! {'x' * 950}\n\n\nThree three three? {'word ' * 100}"
    passages = passages_of(content)
    assert "".join("".join(passages).split()) == "".join(content.split())
    assert max(map(len, passages)) <= 200


LABELS = {0: "neutral", 1: "toxic", 2: "threat"}


def saved(folder, labels, problem):
    """A random classifier with real files; its vocabulary has the words of a few sentences."""
    torch.manual_seed(0)
    words = sorted({word for line in (*ABUSIVE, *HARMLESS, WEATHER) for word in line.lower().replace(".", "").split()})
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", ",", *words]))
    BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=64).save_pretrained(folder)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = BertConfig(vocab_size=len(words) + 7, id2label=labels, label2id={b: a for a, b in labels.items()},
                        problem_type=problem, initializer_range=0.5, **sizes)  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("problem", ["single_label_classification", "multi_label_classification"])
def test_a_classifier_scores_its_worst_window_as_one_by_one(tmp_path, problem):
    folder = saved(tmp_path / "model", LABELS, problem)
    records = [[ABUSIVE[0], HARMLESS[0]], [WEATHER], [], [""], ["Homo sapiens"], *([line] for line in ABUSIVE)]
    model = Classifier(folder)
    together = model(records)
    assert together == pytest.approx([score for record in records for score in model([record])], abs=1e-5)
    assert together[2:4] == [0.0, 0.0]
    assert together[0] == pytest.approx(max(model([[ABUSIVE[0]], [HARMLESS[0]]])), abs=1e-5)
    logits_L = model.model(**model.tokenizer("Homo sapiens", return_tensors="pt")).logits[0]
    by_hand = logits_L.sigmoid().max() if problem[0] == "m" else 1 - logits_L.softmax(0)[0]
    assert together[4] == pytest.approx(by_hand.item(), abs=1e-5)


def test_a_classifier_from_a_folder_drops_and_notes(tmp_path):
    folder = saved(tmp_path / "model", LABELS, "single_label_classification")
    records = [text(line) for line in (*ABUSIVE, *HARMLESS)]
    noted = outcome(Toxicity, tmp_path, records, toxicity_model=str(folder), toxicity_action="tag").kept
    given = [record["meta"]["toxicity"] for record in noted]
    middle = sorted(given)[len(given) // 2]
    found = outcome(Toxicity, tmp_path, records, toxicity_model=str(folder), max_toxicity=middle)
    assert len(found.dropped) == sum(score > middle for score in given) > 10


@pytest.mark.parametrize(
    ("labels", "said"),
    [({0: "LABEL_0", 1: "LABEL_1"}, "do not say which is harmless"), ({0: "safe", 1: "neutral"}, "do not say which")],
)
def test_labels_that_do_not_say_what_is_harmless_are_refused(tmp_path, labels, said):
    folder = saved(tmp_path / "model", labels, "single_label_classification")
    with pytest.raises(Refused, match=said):
        outcome(Toxicity, tmp_path, [], toxicity_model=str(folder))


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "profanity_check", None)
    with pytest.raises(Refused, match="toxicity_model=svm needs the package alt-profanity-check: ./setup.sh data"):
        outcome(Toxicity, tmp_path, [])


def test_what_is_no_classifier_is_refused(tmp_path):
    with pytest.raises(Refused, match="use svm, or the folder of a sequence classifier"):
        outcome(Toxicity, tmp_path, [], toxicity_model="detoxify")
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(Refused, match="holds LlamaForCausalLM, which is no sequence classifier"):
        outcome(Toxicity, tmp_path, [], toxicity_model=str(tmp_path))
    with pytest.raises(Refused, match="toxicity_action=mask: use one of drop, tag"):
        outcome(Toxicity, tmp_path, [], toxicity_action="mask")

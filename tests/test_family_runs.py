"""A policy with sliding windows and a student with windows, sinks and experts in the runs of this project: each path
that reads log-probs against transformers' own code."""

import pytest
import torch
from conftest import TINY_RUN, build
from test_against_trl import assert_is_stock_trls
from test_reductions import PAPER
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma3TextConfig, GptOssConfig

from rlt.commands.score import log_prob_function
from rlt.errors import Refused
from rlt.models.loading import load_frozen, load_policy, load_student
from rlt.prompts.styles import load_format
from rlt.rewards import TeacherReward

WINDOW = 24  # of prompts of a hundred tokens and more
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "initializer_range": 0.2,
    "max_position_embeddings": 2048,
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}


def save(config, tokenizer, folder) -> str:
    torch.manual_seed(0)
    config.vocab_size = len(tokenizer)
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def policy(tokenizer, tmp_path_factory) -> str:
    config = Gemma3TextConfig(**SHAPE, query_pre_attn_scalar=32)
    return save(config, tokenizer, tmp_path_factory.mktemp("models") / "gemma")


@pytest.fixture(scope="module")
def student(tokenizer, tmp_path_factory) -> str:
    config = GptOssConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2)
    return save(config, tokenizer, tmp_path_factory.mktemp("models") / "gpt-oss")


@pytest.fixture
def run(policy, student):
    return [*TINY_RUN, f"model_name_or_path={policy}", f"student_model={student}", "use_vllm=false"]


def test_models_are_loaded_so_that_their_layers_share_prompts(policy, student, tokenizer):
    for model in (load_policy(policy), load_student(student, tokenizer, dtype=torch.float32)):
        assert model.config._attn_implementation == "shared_prefix"


def test_an_attention_that_a_model_has_not_is_refused_in_one_line(student):
    with pytest.raises(Refused, match="has no attn_implementation=sdpa: shared_prefix or eager would do"):
        load_policy(student, attn_implementation="sdpa")


def test_a_soft_cap_is_never_left_out(tokenizer, tmp_path):
    config = Gemma2Config(**SHAPE, query_pre_attn_scalar=32, attn_logit_softcapping=0.5, attention_dropout=0.1)
    path = save(config, tokenizer, tmp_path)
    assert load_policy(path).config._attn_implementation == "eager"  # a dropout keeps it from sharing prompts
    with pytest.raises(Refused, match="attn_implementation=sdpa leaves that out: shared_prefix or eager would do"):
        load_policy(path, attn_implementation="sdpa")


def test_rewards_of_a_teacher_are_those_of_stock_models(policy, student, tokenizer):
    rows = [{"question": "What is 3 * 4?", "solution": "12"}, {"question": "What is 5 * 5?", "solution": "25"}]
    completions = ["3 * 4 = 12<|end_of_explanation|>", "five times five is twenty-five<|end_of_explanation|>"]
    style = load_format("stratos")
    found = []
    for attention in ("shared_prefix", "eager"):
        models = [load_frozen(path, torch.float32, attn_implementation=attention) for path in (policy, student)]
        asked = [log_prob_function(model, 4096) for model in models]
        reward = TeacherReward(tokenizer, style, PAPER, 0.7, *asked)
        scored = reward.score([row for row in rows for _ in completions], completions * 2)
        found.append(torch.tensor([[one.solution_log_prob_reward, one.kl_reward] for one in scored]))
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)


def test_a_policys_loss_and_gradients_and_its_references_log_probs_are_stock_trls(run, tmp_path, in_root):
    trainer, _ = build(run, tmp_path, "eval_size=0", "per_device_train_batch_size=8", "beta=0.1")
    inputs = assert_is_stock_trls(trainer)
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    with torch.no_grad():
        reference, _, _ = trainer._get_per_token_logps_and_entropies(
            trainer.ref_model, ids, mask, inputs["completion_ids"].shape[1]
        )
    counts = inputs["completion_mask"].bool()
    gaps = (inputs["ref_per_token_logps"] - reference)[counts].abs()
    assert gaps.max() < 1e-4 and gaps.mean() < 1e-5


@pytest.mark.parametrize("which", ["policy", "student"])
def test_an_sft_loss_is_that_of_a_stock_model(which, request, tmp_path, in_root):
    path = request.getfixturevalue(which)
    sft = ["run_cfg=teacher_sft_tiny", "report_to=null", "bf16=false", "dataset_size=4", "train_batch_size=4"]
    small = ["per_device_train_batch_size=4", f"model_name_or_path={path}"]
    trainer, _ = build([*sft, *small], tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    stock = load_frozen(path, torch.float32, attn_implementation="eager")
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, dict(batch))
        logits = stock(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)

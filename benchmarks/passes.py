"""Log-prob passes that are compared: ours, one sample at a time, and rows padded to the longest as in stock TRL."""

import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from statistics import median

import torch
from harness import MODEL, Setting, forward_flops, matrix_rate, now, peak_memory_gib, rows_of
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config
from trl.trainer.utils import add_fused_lm_head

from rlt.logprobs import token_log_probs
from rlt.models.devices import supports_bfloat16
from rlt.models.embedded import embedded_model_path
from rlt.models.loading import load_frozen, load_policy, load_tokenizer
from rlt.prompts.rendering import prompt_token_ids

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = torch.bfloat16 if supports_bfloat16(DEVICE) else torch.float32
REPEATS = 3
TEMPERATURE = 0.7
VOCABULARY = 49152  # of the embedded model's tokenizer, which random models take as well
SHAPES = {
    "360m": LlamaConfig(
        hidden_size=960,
        intermediate_size=2560,
        num_hidden_layers=32,
        num_attention_heads=15,
        num_key_value_heads=5,
        vocab_size=VOCABULARY,
        tie_word_embeddings=True,
    ),
    "1.5b": Qwen2Config(
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        vocab_size=151_936,
        tie_word_embeddings=True,
    ),
    "7b": Qwen2Config(
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        vocab_size=152_064,
    ),
}


@dataclass(frozen=True)
class Batch:
    """Token ids of each completion with its prompt, the indices that count, and the rows of each prompt."""

    sequences: list[list[int]]
    counted: list[list[int]]
    groups: list[range]


def random_batch(setting: Setting) -> Batch:
    """Real prompts, random completions of exactly the setting's length."""
    tokenizer = load_tokenizer(str(embedded_model_path(MODEL)))
    rows = rows_of(setting, tokenizer)
    prompts = prompt_token_ids(tokenizer, [row["prompt"] for row in rows])
    generator = torch.Generator().manual_seed(0)
    size, length = setting.generations, setting.completion_tokens
    sequences = [
        ids + torch.randint(100, 40_000, (length,), generator=generator).tolist()
        for ids in prompts
        for _ in range(size)
    ]
    counted = [list(range(len(ids) - length, len(ids))) for ids in sequences]
    return Batch(sequences, counted, [range(start, start + size) for start in range(0, len(sequences), size)])


def autocast() -> AbstractContextManager:
    return torch.autocast(DEVICE, HALF, enabled=torch.float32 != HALF)


def ours(model, batch: Batch) -> torch.Tensor:
    log_probs, _ = token_log_probs(
        model,
        batch.sequences,
        batch.counted,
        token_budget=8192,
        autocast=autocast(),
        temperature=TEMPERATURE,
        entropy="value" if torch.is_grad_enabled() else "none",
    )
    return torch.cat(log_probs)


def one_at_a_time(model, sequences, counted, temperature: float, context=autocast) -> list[torch.Tensor]:
    """As a plain script has it: a whole forward pass for each, logits at every position."""
    found = []
    for ids, where in zip(sequences, counted, strict=True):
        with context():
            logits_TV = model(torch.tensor([ids], device=model.device)).logits[0]
        index = torch.tensor(where, device=model.device, dtype=torch.long)
        log_probs_NV = torch.log_softmax(logits_TV[index - 1].float() / temperature, dim=-1)
        targets_N = torch.tensor(ids, device=model.device)[index]
        found.append(log_probs_NV.gather(1, targets_N[:, None]).squeeze(1))
    return found


def per_sample(model, batch: Batch) -> torch.Tensor:
    return torch.cat(one_at_a_time(model, batch.sequences, batch.counted, TEMPERATURE))


def padded(model, batch: Batch) -> torch.Tensor:
    """As stock TRL 1.16: rows padded on the left, TRL's fused output head."""
    width = max(map(len, batch.sequences))
    ids = torch.zeros(len(batch.sequences), width, dtype=torch.long, device=DEVICE)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, (tokens, where) in enumerate(zip(batch.sequences, batch.counted, strict=True)):
        ids[row, width - len(tokens) :] = torch.tensor(tokens)
        mask[row, width - len(tokens) :] = 1
        labels[row, -len(where) :] = torch.tensor(tokens[-len(where) :])
    with autocast():
        outputs = model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True)
    return outputs.log_probs[labels[:, 1:] != -100]


PASSES: dict[str, Callable[[torch.nn.Module, Batch], torch.Tensor]] = {
    "ours": ours,
    "per_sample": per_sample,
    "padded": padded,
}


def load(variant: str, shape: str | None, trained: bool):
    attention = {} if variant == "ours" else {"attn_implementation": "sdpa"}
    path = str(embedded_model_path(MODEL))
    with tempfile.TemporaryDirectory() as folder:
        if shape is not None:
            with torch.device(DEVICE):
                AutoModelForCausalLM.from_config(SHAPES[shape], dtype=HALF).save_pretrained(folder)
            path = folder
        model = load_policy(path, **attention).train() if trained else load_frozen(path, HALF, **attention)
    if variant == "padded":
        # As in stock: entropies of the policy are logged, those of frozen models are not computed.
        outputs = ("log_probs", "entropy") if trained else ("log_probs",)
        add_fused_lm_head(model, temperature=TEMPERATURE, outputs=outputs)
    return model.to(DEVICE)


def measure_pass(variant: str, setting: Setting, trained: bool) -> dict:
    """Median seconds of a pass (with backward when `trained`), its share of the matrix rate, and peak memory."""
    rate = matrix_rate()
    model, batch = load(variant, setting.shape, trained), random_batch(setting)
    seconds = []
    for _ in range(REPEATS + 1):
        start = now()
        with torch.set_grad_enabled(trained):
            total = PASSES[variant](model, batch).mean()
        if trained:
            total.backward()
            model.zero_grad()
        seconds.append(now() - start)
    prompt = sum(len(batch.sequences[group[0]]) - setting.completion_tokens for group in batch.groups)
    floor = forward_flops(setting, prompt / len(batch.groups), model) * (3 if trained else 1)
    return {
        "seconds": median(seconds[1:]),
        "share_of_matrix_rate": floor / median(seconds[1:]) / rate,
        "memory": peak_memory_gib(),
        "mean_log_prob": total.item(),
    }

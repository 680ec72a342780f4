"""Divergences between two heads, against hand-worked numbers, plain operations in float64, and TRL's own."""

from math import log
from types import SimpleNamespace

import pytest
import torch
from trl.experimental.sdft.loss_utils import compute_topk_self_distillation_loss

from rlt.logprobs.divergence import Divergence, TeacherHead, divergence_of, head_divergences, likeliest_and_rest

N, STUDENT_H, TEACHER_H = 8, 5, 4


class Headed:
    """As much of a causal model as its head and what transforms its logits."""

    def __init__(self, vocabulary: int, hidden: int, cap: float | None = None, scale: float | None = None):
        self.head = torch.nn.Linear(hidden, vocabulary).double()
        text = SimpleNamespace(final_logit_softcapping=cap, logit_scale=scale, vocab_size=vocabulary, model_type="")
        self.config = SimpleNamespace(get_text_config=lambda: text)

    def get_output_embeddings(self) -> torch.nn.Linear:
        return self.head

    def log_probs(self, hidden: torch.Tensor, asked: Divergence, size: int) -> torch.Tensor:
        text = self.config.get_text_config()
        logits = self.head(hidden)[:, :size] * (text.logit_scale or 1.0)
        cap = text.final_logit_softcapping
        logits = logits if cap is None else cap * torch.tanh(logits / cap)
        return (logits / asked.temperature).log_softmax(-1)


def naive(student: torch.Tensor, teacher: torch.Tensor, beta: float) -> torch.Tensor:
    s, t = student.exp(), teacher.exp()
    if beta in (0.0, 1.0):
        return (t * (teacher - student)).sum(-1) if beta == 0.0 else (s * (student - teacher)).sum(-1)
    m = ((1 - beta) * s + beta * t).log()
    return beta * (t * (teacher - m)).sum(-1) + (1 - beta) * (s * (student - m)).sum(-1)


@pytest.mark.parametrize(
    ("beta", "expected"),
    [
        (0.0, 0.9 * log(0.9 / 0.5) + 0.1 * log(0.1 / 0.5)),  # 0.3681
        (1.0, 0.5 * log(0.5 / 0.9) + 0.5 * log(0.5 / 0.1)),  # 0.5108
        # Against the mixture 1/4 student + 3/4 teacher, which is (0.8, 0.2).
        (
            0.75,
            0.75 * (0.9 * log(0.9 / 0.8) + 0.1 * log(0.1 / 0.2)) + 0.25 * (0.5 * log(0.5 / 0.8) + 0.5 * log(0.5 / 0.2)),
        ),
    ],
)
def test_two_tokens_by_hand(beta, expected):
    student, teacher = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log()
    assert divergence_of(student, teacher, beta).item() == pytest.approx(expected, abs=1e-6)


def test_the_students_likeliest_token_and_a_bucket_for_the_rest_by_hand():
    student, teacher = torch.tensor([[0.2, 0.5, 0.3]]).log(), torch.tensor([[0.6, 0.2, 0.2]]).log()
    coarse = likeliest_and_rest(student, teacher, 1)
    assert coarse[0].exp()[0].tolist() == pytest.approx([0.5, 0.5])
    assert coarse[1].exp()[0].tolist() == pytest.approx([0.2, 0.8])
    expected = 0.5 * log(0.5 / 0.2) + 0.5 * log(0.5 / 0.8)  # 0.2231
    assert divergence_of(*coarse, 1.0).item() == pytest.approx(expected, abs=1e-6)
    assert expected < divergence_of(student, teacher, 1.0).item()


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_the_likeliest_tokens_are_those_of_trl(beta):
    torch.manual_seed(0)
    logits = torch.randn(6, 20), torch.randn(6, 20)
    ours = divergence_of(*likeliest_and_rest(*(values.log_softmax(-1) for values in logits), 5), beta)
    how = {"distillation_topk": 5, "distillation_alpha": beta, "distillation_add_tail": True}
    torch.testing.assert_close(ours, compute_topk_self_distillation_loss(*logits, **how), atol=1e-6, rtol=0)


@pytest.mark.parametrize("top_k", [None, 3])
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("cap", "scale"), [(None, None), (3.0, 0.5)])
def test_values_and_gradients_in_chunks_are_those_of_plain_operations(beta, top_k, cap, scale, monkeypatch):
    monkeypatch.setattr("rlt.logprobs.divergence.HEAD_CHUNK_ELEMENTS", 3 * 9)  # three positions at a time,
    monkeypatch.setattr("rlt.logprobs.head.CPU_BLOCK_ELEMENTS", 2 * 7)  # two of them worked on at once
    torch.manual_seed(1)
    # The teacher has two rows more, of tokens that are none.
    student, teacher = Headed(7, STUDENT_H, cap, scale), Headed(9, TEACHER_H, cap, scale)
    hidden, others = torch.randn(N, STUDENT_H).double().requires_grad_(), torch.randn(N, TEACHER_H).double()
    asked, weights = Divergence(beta, 0.7, top_k), torch.rand(N).double()

    def gradients(values: torch.Tensor) -> list[torch.Tensor]:
        inputs = [hidden, student.head.weight, student.head.bias]
        return list(torch.autograd.grad((values * weights).sum(), inputs))

    ours, entropies = head_divergences(student, hidden, TeacherHead.of(teacher), others, asked)
    log_s, log_t = student.log_probs(hidden, asked, 7), teacher.log_probs(others, asked, 7).detach()
    torch.testing.assert_close(entropies, -(log_s.exp() * log_s).sum(-1))
    if top_k:
        log_s, log_t = likeliest_and_rest(log_s, log_t, top_k)
    plain = naive(log_s, log_t, beta)
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(gradients(ours), gradients(plain))
    assert teacher.head.weight.grad is None


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_gradients_are_those_of_small_differences(beta):
    torch.manual_seed(2)
    student, teacher = Headed(7, STUDENT_H), Headed(7, TEACHER_H)
    hidden, others = torch.randn(3, STUDENT_H).double().requires_grad_(), torch.randn(3, TEACHER_H).double()

    asked, head = Divergence(beta, 0.7), TeacherHead.of(teacher)
    assert torch.autograd.gradcheck(lambda h: head_divergences(student, h, head, others, asked)[0], (hidden,))


def test_a_model_against_itself_has_no_divergence_and_no_gradient():
    torch.manual_seed(3)
    student, hidden = Headed(7, STUDENT_H), torch.randn(N, STUDENT_H).double().requires_grad_()
    for beta in (0.0, 0.5, 1.0):
        ours, _ = head_divergences(student, hidden, None, hidden.detach(), Divergence(beta))
        assert ours.abs().max() < 1e-12
        assert torch.autograd.grad(ours.sum(), hidden)[0].abs().max() < 1e-12


def test_under_autocast_products_are_in_bfloat16_and_sums_in_float32():
    torch.manual_seed(4)
    student, teacher = Headed(7, STUDENT_H), Headed(7, TEACHER_H)
    student.head, teacher.head = student.head.float(), teacher.head.float()
    hidden, others = torch.randn(N, STUDENT_H, requires_grad=True), torch.randn(N, TEACHER_H)
    exact, _ = head_divergences(student, hidden, TeacherHead.of(teacher), others, Divergence(1.0))
    with torch.autocast("cpu", torch.bfloat16):
        low, _ = head_divergences(student, hidden, TeacherHead.of(teacher), others, Divergence(1.0))
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, exact, atol=0.05, rtol=0.1)
    low.sum().backward()
    assert hidden.grad is not None and hidden.grad.dtype == torch.float32

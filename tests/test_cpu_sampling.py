"""Inverse transform sampling by hand, and against the softmax."""

import torch
from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler
from vllm.v1.sample.sampler import Sampler

from rlt.generation.cpu import sampling as cpu_sampling
from rlt.generation.cpu.sampling import BLOCK, inverse_transform


def test_a_number_falls_into_its_tokens_share():
    probs = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]] * 6)
    numbers = torch.tensor([0.0, 0.2499, 0.25, 0.7499, 0.75, 1 - 2**-53], dtype=torch.float64)
    assert inverse_transform(probs, numbers).tolist() == [1, 1, 3, 3, 4, 4]


def test_blocks_and_a_vocabulary_that_they_do_not_divide():
    probs = torch.zeros(3, 2 * BLOCK + 5)
    probs[:, BLOCK - 1] = probs[:, BLOCK] = probs[:, -1] = 2.0  # sums need not be 1
    numbers = torch.tensor([0.3, 0.5, 0.999], dtype=torch.float64)
    assert inverse_transform(probs, numbers).tolist() == [BLOCK - 1, BLOCK, 2 * BLOCK + 4]


def test_samples_are_distributed_as_the_softmax_and_repeat():
    sampler = TopKTopPSampler(logprobs_mode="processed_logprobs")
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0]).repeat(20_000, 1)

    def sample() -> torch.Tensor:
        generators = {row: torch.Generator().manual_seed(row) for row in range(len(logits))}
        tokens, log_probs = cpu_sampling.forward_cpu(sampler, logits.clone(), generators, None, None)
        torch.testing.assert_close(log_probs, logits.log_softmax(-1))
        return tokens

    tokens = sample()
    assert torch.equal(tokens, sample())
    shares = torch.bincount(tokens, minlength=4) / len(tokens)
    # Four standard errors of a share of 20,000 draws are 0.014 at most.
    torch.testing.assert_close(shares, logits[0].softmax(-1), atol=0.014, rtol=0)


def test_top_p_and_top_k_leave_the_rest_out():
    sampler = TopKTopPSampler(logprobs_mode="processed_logprobs")
    logits = torch.tensor([0.0, 1.0, 2.0, 3.0]).repeat(200, 1)
    generators = {row: torch.Generator().manual_seed(row) for row in range(200)}
    tokens, _ = cpu_sampling.forward_cpu(sampler, logits.clone(), generators, torch.full((200,), 2), None)
    assert set(tokens.tolist()) == {2, 3}


def test_log_probs_are_gathered_without_ranks():
    cpu_sampling.install()
    log_probs = torch.tensor([[0.1, 0.2, 0.7], [0.5, 0.25, 0.25]]).log()
    gathered = Sampler.gather_logprobs(log_probs, 0, torch.tensor([1, 0]))
    torch.testing.assert_close(gathered.logprobs.exp(), torch.tensor([[0.2], [0.5]]))
    assert gathered.selected_token_ranks.tolist() == [0, 0]

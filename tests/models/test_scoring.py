"""Passes over finished responses, against a loop over single sequences."""

import pytest
import torch
import torch.nn.functional as F

from fastrl.models import (
    PackedAttention,
    decoder_config,
    new_decoder,
    response_logprobs,
    response_scores,
    response_values,
    scalar_from_causal,
    sequence_scores,
)
from fastrl.packing import pack_sequences
from fastrl.types import Rollout

PROMPTS = ([5, 7, 9], [4], [11, 12, 13, 14])
RESPONSES = ([8, 3], [6, 1, 22, 2], [9])


@pytest.fixture
def model():
    config = decoder_config("llama", vocab_size=23, hidden_size=24, num_layers=2, num_heads=3,
                            max_positions=32)
    made = new_decoder(config, seed=1)
    with torch.no_grad():  # away from a flat distribution
        for parameter in made.parameters():
            parameter.mul_(1 if parameter.dim() == 1 else 10)
    return made.eval()


@pytest.fixture
def rollout() -> Rollout:
    batch = pack_sequences([p + r for p, r in zip(PROMPTS, RESPONSES, strict=True)])
    mask = torch.tensor([[i < len(r) for i in range(4)] for r in RESPONSES])
    return Rollout(
        token_ids=batch.token_ids, cu_seqlens=batch.cu_seqlens,
        prompt_lens=torch.tensor([len(p) for p in PROMPTS]),
        response_ids=torch.tensor([r + [0] * (4 - len(r)) for r in RESPONSES]),
        response_mask=mask, rollout_logprobs=torch.zeros(3, 4), entropy=torch.zeros(3, 4),
        finish_reasons=("stop",) * 3)


def per_token(model, index: int) -> torch.Tensor:
    """The model's output at every token of one sequence, alone."""
    batch = pack_sequences([PROMPTS[index] + RESPONSES[index]])
    return model(batch.token_ids, batch.positions, PackedAttention(batch.cu_seqlens,
                                                                   batch.max_seqlen))


@pytest.mark.parametrize("max_tokens", [1, 6, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@torch.no_grad()
def test_logprobs_and_entropy(model, rollout, max_tokens, temperature):
    logprobs, entropy = response_logprobs(model, rollout, temperature, max_tokens)
    assert logprobs.shape == entropy.shape == (3, 4)
    for i, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        logits = model.lm_head(per_token(model, i), F.linear) / temperature
        expected = logits.log_softmax(-1)
        for t in range(4):
            if t < len(response):
                row = expected[len(prompt) + t - 1]
                assert float(logprobs[i, t]) == pytest.approx(float(row[response[t]]), abs=2e-6)
                assert float(entropy[i, t]) == pytest.approx(float(-(row.exp() * row).sum()),
                                                             abs=2e-6)
            else:
                assert logprobs[i, t] == entropy[i, t] == 0


@pytest.mark.parametrize("max_tokens", [1, 6, 1000])
@torch.no_grad()
def test_values_and_scores(model, rollout, max_tokens):
    critic = scalar_from_causal(model, seed=0)
    critic.head.bias.fill_(0.5)
    values = response_values(critic, rollout, max_tokens)
    scores = response_scores(critic, rollout, max_tokens)
    assert values.shape == (3, 4)
    for i, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        alone = per_token(critic, i)
        expected = torch.zeros(4)
        # the value of the state before response token t is read at the token before it
        expected[: len(response)] = alone[len(prompt) - 1 : -1]
        torch.testing.assert_close(values[i], expected, rtol=0, atol=2e-6)
        assert float(scores[i]) == pytest.approx(float(alone[-1]), abs=2e-6)
    sequences = [p + r for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    assert torch.equal(sequence_scores(critic, sequences, max_tokens), scores)


def test_no_sequences(model):
    assert sequence_scores(scalar_from_causal(model, 0), [], 10).shape == (0,)


@pytest.mark.parametrize("training", [True, False])
def test_eval_mode_inside_and_the_old_mode_after(model, rollout, training):
    expected, _ = response_logprobs(model, rollout, 1.0, 100)
    model.backbone.residual_dropout = 0.5
    model.train(training)
    logprobs, entropy = response_logprobs(model, rollout, 1.0, 100)
    assert torch.equal(logprobs, expected)
    assert not logprobs.requires_grad and not entropy.requires_grad
    assert model.training == model.backbone.training == training

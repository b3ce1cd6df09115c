"""A prompt encoded once for all of its responses: states, gradients, scores, tokens read."""

import pytest
import torch
from torch import Tensor

from fastrl.models import (
    PackedAttention,
    decoder_config,
    load_causal_lm,
    new_decoder,
    response_logprobs,
    response_scores,
    response_values,
    scalar_from_causal,
)
from fastrl.models.config import DecoderConfig
from fastrl.packing import pack_sequences
from fastrl.types import Rollout

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gpt2", "gpt_neox", "windows")
# Ragged, alone, a prompt and responses of one token, nothing but equal lengths.
GROUPS = [
    ((5, 7, 46, 9, 33, 3, 8), ((1, 2, 3, 4, 5, 6), (7,), (8, 9, 10))),
    ((4, 45, 3), ((11, 12),)),
    ((11,), ((13,), (14,), (15,))),
    ((17, 18, 19, 20), ((1, 2, 3), (4, 5, 6))),
]
SEQUENCES = [prompt + response for prompt, responses in GROUPS for response in responses]
PROMPT_LENS = [len(prompt) for prompt, responses in GROUPS for _ in responses]
NUM_SHARED = sum(len(p) + sum(map(len, responses)) for p, responses in GROUPS)


def make(family: str, dtype: torch.dtype = torch.float32):
    """A small decoder; "windows": two layers that see 3 and 5 tokens."""
    if family != "windows":
        return new_decoder(decoder_config(family, vocab_size=47, hidden_size=24, num_layers=2,
                                          num_heads=3, max_positions=32), seed=1, dtype=dtype)
    return new_decoder(DecoderConfig(
        family="mistral", vocab_size=47, hidden_size=24, intermediate_size=30, num_layers=2,
        num_heads=3, num_kv_heads=1, head_dim=8, max_positions=32, rotary_dim=8,
        initializer_range=0.3, windows=(3, 5)), seed=1, dtype=dtype)


def states(model, share_prefix: bool) -> tuple[Tensor, int]:
    """Hidden states that predict response tokens and those at the ends, and tokens read."""
    batch = pack_sequences(SEQUENCES, prompt_lens=PROMPT_LENS, share_prefix=share_prefix)
    hidden = model(batch.token_ids, batch.positions, PackedAttention.of(batch))
    rows = batch.previous[batch.is_response]
    return torch.cat([hidden[rows], hidden[batch.ends]]), len(batch.token_ids)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_states_and_gradients_equal_those_of_whole_sequences(
    family: str, dtype: torch.dtype, tolerance: float
) -> None:
    model = make(family, dtype)
    results = []
    for share_prefix in (True, False):
        model.zero_grad()
        out, num_tokens = states(model, share_prefix)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=dtype)
        (out * weight).sum().backward()
        results.append((out.detach(), [p.grad.clone() for p in model.parameters()
                                       if p.grad is not None]))
        assert num_tokens == (NUM_SHARED if share_prefix else sum(map(len, SEQUENCES)))
    (out, gradients), (expected, truth) = results
    assert (out - expected).norm() <= tolerance * expected.norm()
    assert len(gradients) == len(truth) > 5
    for a, b in zip(gradients, truth, strict=True):
        assert (a - b).norm() <= tolerance * b.norm()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_states_have_the_bits_of_whole_sequences(family: str) -> None:
    model = make(family)
    assert torch.equal(states(model, True)[0], states(model, False)[0])


def test_checkpointed_layers_share_too() -> None:
    model = make("llama", torch.float64).train()
    gradients = []
    for is_on in (False, True):
        model.zero_grad()
        model.backbone.activation_checkpointing = is_on
        states(model, True)[0].square().sum().backward()
        gradients.append([p.grad for p in model.backbone.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["phi3", "opt"])
@torch.no_grad()
def test_transformers_models_share_too(name: str, checkpoint) -> None:
    model = load_causal_lm(checkpoint(name).folder)
    shared, num_tokens = states(model, True)
    expected, _ = states(model, False)
    assert num_tokens == NUM_SHARED
    assert (shared - expected).norm() <= 1e-5 * expected.norm()


@pytest.fixture
def rollout() -> Rollout:
    """The responses of all groups, in an order that tears the groups apart."""
    order = [0, 4, 3, 1, 7, 5, 2, 8, 6]
    sequences, prompt_lens = [SEQUENCES[i] for i in order], [PROMPT_LENS[i] for i in order]
    responses = [list(s[n:]) for s, n in zip(sequences, prompt_lens, strict=True)]
    batch, width = pack_sequences(sequences), max(map(len, responses))
    return Rollout(
        token_ids=batch.token_ids, cu_seqlens=batch.cu_seqlens,
        prompt_lens=torch.tensor(prompt_lens),
        response_ids=torch.tensor([r + [0] * (width - len(r)) for r in responses]),
        response_mask=torch.tensor([[t < len(r) for t in range(width)] for r in responses]),
        rollout_logprobs=torch.zeros(len(order), width), entropy=torch.zeros(len(order), width),
        finish_reasons=("stop",) * len(order))


@pytest.mark.parametrize("max_tokens", [1, 12, 1000])
def test_scoring_shares_without_changing_what_comes_out(rollout: Rollout, max_tokens: int) -> None:
    policy = make("llama")
    critic = scalar_from_causal(policy, seed=0)
    seen: dict[bool, int] = {}
    results = {}
    for share_prefix in (True, False):
        seen[share_prefix] = 0

        def count(module, arguments, share_prefix: bool = share_prefix) -> None:
            seen[share_prefix] += len(arguments[0])

        hooks = [m.register_forward_pre_hook(count) for m in (policy.backbone, critic.backbone)]
        results[share_prefix] = [
            *response_logprobs(policy, rollout, 0.7, max_tokens, share_prefix=share_prefix),
            response_values(critic, rollout, max_tokens, share_prefix=share_prefix),
            response_scores(critic, rollout, max_tokens, share_prefix=share_prefix)]
        for hook in hooks:
            hook.remove()
    for a, b in zip(results[True], results[False], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-6)
    assert seen[False] == 3 * sum(map(len, SEQUENCES))
    expected = {1: seen[False], 12: seen[True], 1000: 3 * NUM_SHARED}[max_tokens]
    assert seen[True] == expected <= seen[False]
    assert max_tokens == 1 or seen[True] < seen[False]

"""gather_logprobs: values, entropy, extremes and gradients."""

import math
from types import SimpleNamespace

import pytest
import torch

from fastrl.errors import ConfigError, ShapeError
from fastrl.ops import gather_logprobs


def test_golden_entropy_in_bits(golden: SimpleNamespace) -> None:
    for p, bits in golden.ENTROPY_BITS.items():
        logits = torch.tensor([[p, 1 - p]], dtype=torch.float64).log()
        logprobs, entropy = gather_logprobs(logits, torch.tensor([0]))
        assert entropy.item() / math.log(2) == pytest.approx(bits, abs=1e-6)
        assert logprobs.item() == pytest.approx(math.log(p))


# M = 1; V = 1 has nothing to choose; 50257 is GPT-2's, divisible by no power of two.
@pytest.mark.parametrize("M, V", [(1, 1), (1, 7), (5, 3), (3, 50257)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_equals_torch(M: int, V: int, temperature: float) -> None:
    logits, token_ids = 3 * torch.randn(M, V), torch.randint(V, (M,))
    logprobs, entropy = gather_logprobs(logits, token_ids, temperature=temperature)
    categorical = torch.distributions.Categorical(logits=logits.double() / temperature)
    torch.testing.assert_close(logprobs.double(), categorical.log_prob(token_ids),
                               rtol=1e-6, atol=2e-6)
    # A sum of 50257 float32 terms.
    torch.testing.assert_close(entropy.double(), categorical.entropy(), rtol=1e-5, atol=2e-6)


def test_half_precision_is_widened_before_the_softmax() -> None:
    logits, token_ids = torch.randn(4, 1000).bfloat16(), torch.randint(1000, (4,))
    expected = gather_logprobs(logits.double(), token_ids)
    for got, wide in zip(gather_logprobs(logits, token_ids), expected, strict=True):
        torch.testing.assert_close(got.double(), wide, rtol=1e-6, atol=1e-6)


def test_extreme_logits() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4]], requires_grad=True)
    logprobs, entropy = gather_logprobs(logits, torch.tensor([1, 0]))
    torch.testing.assert_close(logprobs, torch.tensor([-2e4, -math.log(3)]))
    torch.testing.assert_close(entropy, torch.tensor([0.0, math.log(3)]))
    (gradient,) = torch.autograd.grad(logprobs.sum() + entropy.sum(), logits)
    assert gradient.isfinite().all()


def test_forbidden_tokens() -> None:
    """Columns of -inf leave the others as if they were alone, in values and gradients."""
    logits = torch.tensor([[0.3, -math.inf, 1.0], [-math.inf, -math.inf, 2.0]], requires_grad=True)
    logprobs, entropy = gather_logprobs(logits, torch.tensor([0, 2]))
    alone, alone_entropy = gather_logprobs(torch.tensor([[0.3, 1.0]]), torch.tensor([0]))
    torch.testing.assert_close(logprobs, torch.tensor([alone.item(), 0.0]))
    torch.testing.assert_close(entropy, torch.tensor([alone_entropy.item(), 0.0]))
    (gradient,) = torch.autograd.grad(logprobs.sum() + entropy.sum(), logits)
    assert gradient.isfinite().all() and gradient[0, 1] == 0
    assert gather_logprobs(logits, torch.tensor([1, 2]))[0][0] == -math.inf


def test_rows_are_independent() -> None:
    logits, token_ids = torch.randn(6, 33), torch.randint(33, (6,))
    together = torch.stack(gather_logprobs(logits, token_ids))
    for m in range(6):
        alone = torch.stack(gather_logprobs(logits[m:m + 1], token_ids[m:m + 1]))
        assert torch.equal(alone[:, 0], together[:, m])


def test_gradients() -> None:
    logits = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    token_ids = torch.tensor([0, 4, 2, 2])
    assert torch.autograd.gradcheck(
        lambda x: gather_logprobs(x, token_ids, temperature=0.7), logits)


def test_bad_input() -> None:
    logits, token_ids = torch.ones(2, 3), torch.tensor([0, 1])
    with pytest.raises(ShapeError, match=r"logits \[M, V\] and token_ids \[M\], got \[2, 3\] and"):
        gather_logprobs(logits, torch.tensor([0]))
    with pytest.raises(ShapeError, match="V at least 1, got"):
        gather_logprobs(logits[:, :0], token_ids)
    with pytest.raises(ShapeError, match="token_ids to be int64"):
        gather_logprobs(logits, token_ids.int())
    with pytest.raises(ConfigError, match="expected temperature above 0, got 0"):
        gather_logprobs(logits, token_ids, temperature=0)

"""policy_loss: golden numbers, statistics, masks, extremes, and any split into microbatches."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from fastrl.errors import ConfigError, ShapeError
from fastrl.ops import policy_loss


def inputs(M: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logprobs, old_logprobs, advantages = torch.randn(3, M, dtype=dtype)
    return (logprobs - 2).requires_grad_(), old_logprobs - 2, advantages, torch.rand(M) > 0.3


def test_golden(golden: SimpleNamespace) -> None:
    one = torch.tensor([True])
    for ratio, advantage, expected in golden.POLICY_LOSSES:
        logprobs = torch.tensor([ratio], dtype=torch.float64).log()
        loss, stats = policy_loss(logprobs, torch.zeros(1), torch.tensor([advantage]), one,
                                  clip_range=0.2)
        assert loss.item() == pytest.approx(expected, abs=1e-12)
        # The clip binds only where it makes the loss larger than it would be.
        is_bound = (ratio, advantage) in ((1.5, 1.0), (0.5, -1.0))
        assert stats.clip_fraction.item() == is_bound
        assert stats.policy_loss.item() == pytest.approx(expected, abs=1e-12)


def test_statistics_are_sums_over_the_mask() -> None:
    logprobs, old_logprobs = torch.tensor([-1.0, -2.0, -5.0]), torch.tensor([-1.5, -2.1, 3.0])
    mask = torch.tensor([True, True, False])
    _, stats = policy_loss(logprobs, old_logprobs, torch.ones(3), mask)
    assert stats.count.item() == 2 and stats.clip_fraction.item() == 1
    assert stats.approx_kl.item() == pytest.approx(0.5 * (0.5 ** 2 + 0.1 ** 2), abs=1e-6)
    assert stats.approx_kl_k3.item() == pytest.approx(0.1487213 + 0.0051709, abs=1e-6)
    assert stats.ratio.item() == pytest.approx(1.6487213 + 1.1051709, abs=1e-6)
    assert stats.squared_ratio.item() == pytest.approx(2.7182818 + 1.2214028, abs=1e-6)
    assert stats.policy_loss.item() == pytest.approx(-1.2 - 1.1051709, abs=1e-6)
    assert stats.max_abs_log_ratio.item() == 0.5
    assert stats.entropy.item() == 0.0


def test_effective_sample_size() -> None:
    """Equal ratios count in full; of 1 and 3 the sum is 4, squared 16, over 1 + 9."""
    ratios, mask = torch.tensor([1.0, 3.0, 1.0, 1e9]), torch.tensor([True, True, True, False])
    for kept, expected in ((slice(0, 3, 2), 2.0), (slice(0, 2), 1.6), (slice(0, 4), 25 / 11)):
        _, stats = policy_loss(ratios[kept].log(), torch.zeros(4)[kept], torch.ones(4)[kept],
                               mask[kept])
        assert stats.effective_sample_size.item() == pytest.approx(expected)


def test_statistics_add_up() -> None:
    logprobs, old_logprobs, advantages, mask = inputs(9)
    _, whole = policy_loss(logprobs, old_logprobs, advantages, mask)
    parts = [policy_loss(logprobs[s], old_logprobs[s], advantages[s], mask[s])[1]
             for s in (slice(0, 4), slice(4, 5), slice(5, 9))]
    total = parts[0] + parts[1] + parts[2]
    for name in whole.__dataclass_fields__:
        assert getattr(total, name).item() == pytest.approx(getattr(whole, name).item())
        assert not getattr(whole, name).requires_grad


def test_ratio_one_is_the_policy_gradient() -> None:
    """At the first minibatch: loss = -mean advantage, gradient = -advantage / count."""
    logprobs, _, advantages, mask = inputs(6)
    loss, stats = policy_loss(logprobs, logprobs.detach(), advantages, mask)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    torch.testing.assert_close(loss, -advantages[mask].mean())
    torch.testing.assert_close(gradient, -advantages * mask / mask.sum())
    assert stats.ratio == stats.count and stats.approx_kl == 0 and stats.clip_fraction == 0


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_any_split_gives_the_same_loss_and_gradient(dtype: torch.dtype, tolerance: float) -> None:
    logprobs, old_logprobs, advantages, mask = inputs(40, dtype)
    count = int(mask.sum())
    whole, _ = policy_loss(logprobs, old_logprobs, advantages, mask)
    (expected,) = torch.autograd.grad(whole, logprobs)
    parts = [policy_loss(logprobs[s], old_logprobs[s], advantages[s], mask[s],
                         denominator=count)[0] for s in (slice(0, 1), slice(1, 27), slice(27, 40))]
    (gradient,) = torch.autograd.grad(sum(parts), logprobs)
    assert (sum(parts) - whole).abs() <= tolerance * whole.abs()
    assert (gradient - expected).norm() <= tolerance * expected.norm()


def test_shape_does_not_matter() -> None:
    logprobs, old_logprobs, advantages, mask = inputs(12)
    flat, _ = policy_loss(logprobs, old_logprobs, advantages, mask)
    square, _ = policy_loss(*(x.reshape(3, 4) for x in (logprobs, old_logprobs, advantages, mask)))
    assert torch.equal(flat, square)


def test_masked_tokens_may_hold_anything() -> None:
    logprobs = torch.tensor([-1.0, float("nan"), -float("inf")], requires_grad=True)
    old_logprobs = torch.tensor([-1.0, 0.0, -float("inf")])
    advantages = torch.tensor([2.0, float("nan"), float("inf")])
    mask = torch.tensor([True, False, False])
    loss, stats = policy_loss(logprobs, old_logprobs, advantages, mask)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    assert loss.item() == -2.0 and gradient.tolist() == [-2.0, 0.0, 0.0]
    assert all(getattr(stats, name).isfinite() for name in stats.__dataclass_fields__)


def test_nothing_counts() -> None:
    logprobs, old_logprobs, advantages, mask = inputs(5)
    loss, stats = policy_loss(logprobs, old_logprobs, advantages, torch.zeros_like(mask))
    (gradient,) = torch.autograd.grad(loss, logprobs)
    assert loss.item() == 0 and torch.equal(gradient, torch.zeros(5, dtype=torch.float64))
    assert stats.count.item() == stats.ratio.item() == stats.max_abs_log_ratio.item() == 0


def test_far_ratios_stay_finite() -> None:
    logprobs = torch.tensor([0.0, -500.0, 0.0], requires_grad=True)
    old_logprobs = torch.tensor([-500.0, 0.0, -torch.inf])
    loss, stats = policy_loss(logprobs, old_logprobs, -torch.ones(3), torch.ones(3).bool())
    (gradient,) = torch.autograd.grad(loss, logprobs)
    assert loss.isfinite() and gradient.isfinite().all()
    assert stats.ratio.isfinite() and stats.approx_kl_k3.isfinite()
    assert stats.max_abs_log_ratio.item() == float("inf")  # the truth, for the log


def test_gradcheck() -> None:
    logprobs, old_logprobs, advantages, mask = inputs(20)
    assert torch.autograd.gradcheck(
        lambda x: policy_loss(x, old_logprobs, advantages, mask)[0], logprobs)


def test_bad_input() -> None:
    one, mask = torch.ones(3), torch.ones(3, dtype=torch.bool)
    with pytest.raises(ShapeError, match=r"policy_loss: expected one shape .* advantages \[2\]"):
        policy_loss(one, one, one[:2], mask)
    with pytest.raises(ShapeError, match="loss_mask to be bool"):
        policy_loss(one, one, one, one)
    with pytest.raises(ConfigError, match="denominator above 0, got 0"):
        policy_loss(one, one, one, mask, denominator=0)
    with pytest.raises(ConfigError, match="clip_range above 0, got -0.2"):
        policy_loss(one, one, one, mask, clip_range=-0.2)

"""ppo_loss: golden numbers, the sum of its two halves, whitening on the way, masks, any split."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from fastrl.errors import ConfigError, ShapeError
from fastrl.ops import compute_gae, policy_loss, ppo_loss, value_loss, whiten
from fastrl.ops.whiten import row_moments

NAMES = ("logprobs", "old_logprobs", "advantages", "values", "old_values", "returns")


def inputs(*shape: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    tensors = {name: torch.randn(*shape, dtype=dtype) for name in NAMES}
    tensors["logprobs"].requires_grad_()
    tensors["values"].requires_grad_()
    return {**tensors, "loss_mask": torch.rand(*shape) > 0.3}


def test_golden(golden: SimpleNamespace) -> None:
    one = torch.tensor([True])
    for ratio, advantage, policy in golden.POLICY_LOSSES:
        for value, old_value, target, critic in golden.VALUE_LOSSES:
            numbers = (math.log(ratio), 0.0, advantage, value, old_value, target)
            loss, policy_stats, value_stats = ppo_loss(
                *(torch.tensor([x], dtype=torch.float64) for x in numbers), one, value_coef=0.1)
            assert loss.item() == pytest.approx(policy + 0.1 * critic, abs=1e-12)
            assert policy_stats.policy_loss.item() == pytest.approx(policy, abs=1e-12)
            assert value_stats.value_loss.item() == pytest.approx(critic, abs=1e-12)


@pytest.mark.parametrize("denominator", [None, 7.0])
def test_is_the_sum_of_its_halves(denominator: float | None) -> None:
    x = inputs(3, 8)
    loss, policy_stats, value_stats = ppo_loss(**x, denominator=denominator, clip_range=0.1,
                                               value_clip_range=0.3, value_coef=0.5)
    policy, one = policy_loss(x["logprobs"], x["old_logprobs"], x["advantages"], x["loss_mask"],
                              denominator=denominator, clip_range=0.1)
    value, other = value_loss(x["values"], x["old_values"], x["returns"], x["loss_mask"],
                              denominator=denominator, value_clip_range=0.3)
    assert torch.equal(loss, policy + 0.5 * value)
    assert policy_stats == one and value_stats == other
    leaves = (x["logprobs"], x["values"])
    for got, expected in zip(torch.autograd.grad(loss, leaves),
                             torch.autograd.grad(policy + 0.5 * value, leaves), strict=True):
        assert torch.equal(got, expected)


def test_whitens_the_advantages_by_the_moments_of_the_batch() -> None:
    """A piece of the batch gets what it would get had all advantages been whitened first."""
    x = inputs(4, 6)
    mask = x["loss_mask"]
    x["advantages"], x["returns"], moments = compute_gae(
        torch.randn(4, 6).double(), x["old_values"], mask, return_moments=True)
    whitened = {**x, "advantages": whiten(x["advantages"], mask)}
    for rows in (slice(0, 4), slice(1, 3)):
        got, *_ = ppo_loss(**{k: v[rows] for k, v in x.items()}, moments=moments)
        expected, *_ = ppo_loss(**{k: v[rows] for k, v in whitened.items()})
        torch.testing.assert_close(got, expected)


def test_any_split_gives_the_same_loss_gradient_and_statistics() -> None:
    x = inputs(5, 8)
    count = int(x["loss_mask"].sum())
    moments = row_moments(x["advantages"], x["loss_mask"])
    whole, *stats = ppo_loss(**x, moments=moments)
    leaves = (x["logprobs"], x["values"])
    expected = torch.autograd.grad(whole, leaves)
    parts = [ppo_loss(**{k: v[s] for k, v in x.items()}, denominator=count, moments=moments)
             for s in (slice(0, 1), slice(1, 5))]
    gradients = torch.autograd.grad(parts[0][0] + parts[1][0], leaves)
    torch.testing.assert_close(gradients, expected)
    for i, whole_stats in enumerate(stats):
        total = parts[0][i + 1] + parts[1][i + 1]
        for name in total.__dataclass_fields__:
            torch.testing.assert_close(getattr(total, name), getattr(whole_stats, name))


def test_gradients_reach_log_probs_and_values_only() -> None:
    x = inputs(6)
    for name in ("old_logprobs", "advantages", "old_values", "returns"):
        assert not x[name].requires_grad
    x["advantages"].requires_grad_()
    loss, *_ = ppo_loss(**x)
    gradients = torch.autograd.grad(loss, (x["logprobs"], x["values"], x["advantages"]),
                                    allow_unused=True)
    assert gradients[2] is None and all((g != 0).any() for g in gradients[:2])
    assert torch.autograd.gradcheck(
        lambda a, b: ppo_loss(**{**x, "logprobs": a, "values": b})[0], (x["logprobs"], x["values"]))


def test_masked_tokens_may_hold_anything_and_nothing_may_count() -> None:
    x = inputs(3, 4)
    expected, *_ = ppo_loss(**x)
    dirty = {name: value.detach().masked_fill(~x["loss_mask"], torch.nan)
             if name in NAMES else value for name, value in x.items()}
    assert torch.equal(ppo_loss(**dirty)[0], expected)
    loss, policy_stats, value_stats = ppo_loss(**{**dirty, "loss_mask": x["loss_mask"] & False})
    assert loss == policy_stats.count == value_stats.count == 0


def test_bad_input() -> None:
    x = inputs(3)
    with pytest.raises(ShapeError, match=r"ppo_loss: expected one shape .* returns \[2\]"):
        ppo_loss(**{**x, "returns": x["returns"][:2]})
    with pytest.raises(ShapeError, match="loss_mask to be bool"):
        ppo_loss(**{**x, "loss_mask": x["returns"]})
    with pytest.raises(ShapeError, match=r"moments \[P, 3\]"):
        ppo_loss(**x, moments=torch.ones(2, 2))
    with pytest.raises(ConfigError, match="value_coef of at least 0, got -1"):
        ppo_loss(**x, value_coef=-1)
    for name in ("denominator", "clip_range", "value_clip_range"):
        with pytest.raises(ConfigError, match=f"{name} above 0, got 0"):
            ppo_loss(**x, **{name: 0})

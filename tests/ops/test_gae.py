"""compute_gae: golden numbers, packed equals padded, masks with holes, the textbook sum."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from fastrl.errors import ConfigError, ShapeError
from fastrl.ops import compute_gae


def textbook(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """A_t = sum_l (gamma lam)^l delta_{t+l}, by definition."""
    following = [*values[1:], 0.0]
    deltas = [r + gamma * n - v for r, v, n in zip(rewards, values, following, strict=True)]
    return [sum((gamma * lam) ** k * d for k, d in enumerate(deltas[t:]))
            for t in range(len(deltas))]


def batch(B: int, T: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards, values and a right-padded mask with lengths T, T-1, ..., float64."""
    lengths = torch.tensor([max(1, T - b) for b in range(B)])
    mask = torch.arange(T) < lengths[:, None]
    rewards, values = torch.randn(2, B, T, dtype=torch.float64)
    return rewards, values, mask


@pytest.mark.parametrize("lam", [0.95, 1.0, 0.0])
def test_golden(golden: SimpleNamespace, lam: float) -> None:
    rewards, values = torch.tensor([golden.GAE_REWARDS]), torch.tensor([golden.GAE_VALUES])
    everything = torch.ones(1, 4, dtype=torch.bool)
    advantages, returns = compute_gae(rewards, values, everything, gamma=1.0, lam=lam)
    # The specification rounds lambda 0.95 to four digits.
    torch.testing.assert_close(advantages, torch.tensor([golden.GAE_ADVANTAGES[lam]]),
                               rtol=0, atol=6e-5)
    if lam == 0.95:
        torch.testing.assert_close(returns, torch.tensor([golden.GAE_RETURNS_095]),
                                   rtol=0, atol=6e-5)


@pytest.mark.parametrize("B, T", [(1, 1), (1, 9), (5, 1), (4, 7), (3, 130)])
def test_equals_the_textbook_sum(B: int, T: int) -> None:
    rewards, values, mask = batch(B, T)
    advantages, returns = compute_gae(rewards, values, mask, gamma=0.9, lam=0.8)
    for b in range(B):
        length = int(mask[b].sum())
        expected = textbook(rewards[b, :length].tolist(), values[b, :length].tolist(), 0.9, 0.8)
        torch.testing.assert_close(advantages[b, :length],
                                   torch.tensor(expected, dtype=torch.float64))
        torch.testing.assert_close(returns[b, :length],
                                   advantages[b, :length] + values[b, :length])
    assert (advantages[~mask] == 0).all() and (returns[~mask] == 0).all()


def test_packed_equals_padded_bit_for_bit() -> None:
    rewards, values, mask = batch(4, 7)
    padded = compute_gae(rewards, values, mask, gamma=0.9, lam=0.8)
    cu_seqlens = torch.tensor([0, *mask.sum(dim=1).cumsum(0).tolist()])
    packed = compute_gae(rewards[mask], values[mask], gamma=0.9, lam=0.8, cu_seqlens=cu_seqlens)
    for one, other in zip(padded, packed, strict=True):
        assert torch.equal(one[mask], other)


def test_packed_takes_a_mask_too() -> None:
    rewards, values = torch.randn(2, 5, dtype=torch.float64)
    mask = torch.tensor([True, False, True, True, False])
    cu_seqlens = torch.tensor([0, 3, 5])
    advantages, _ = compute_gae(rewards, values, mask, cu_seqlens=cu_seqlens)
    alone, _ = compute_gae(rewards[mask], values[mask], cu_seqlens=torch.tensor([0, 2, 3]))
    torch.testing.assert_close(advantages[mask], alone)
    assert (advantages[~mask] == 0).all()


def test_holes_are_skipped() -> None:
    """Tokens that the policy did not write, in the middle of a response: as if they were not."""
    rewards, values = torch.randn(2, 1, 6, dtype=torch.float64)
    mask = torch.tensor([[True, False, False, True, True, False]])
    rewards[~mask] = values[~mask] = float("nan")
    advantages, returns = compute_gae(rewards, values, mask, gamma=0.9, lam=0.8)
    alone = compute_gae(rewards[mask][None], values[mask][None], gamma=0.9, lam=0.8)
    torch.testing.assert_close(advantages[mask], alone[0][0])
    torch.testing.assert_close(returns[mask], alone[1][0])
    assert (advantages[~mask] == 0).all() and (returns[~mask] == 0).all()


def test_rows_are_independent_and_a_masked_row_is_zero() -> None:
    rewards, values, mask = batch(4, 7)
    together, _ = compute_gae(rewards, values, mask)
    for b in range(4):
        alone, _ = compute_gae(rewards[b:b + 1], values[b:b + 1], mask[b:b + 1])
        assert torch.equal(alone[0], together[b])
    mask[1] = False
    advantages, returns = compute_gae(rewards, values, mask)
    assert torch.equal(advantages[1], torch.zeros(7, dtype=torch.float64))
    assert torch.equal(advantages[2], together[2]) and (returns[1] == 0).all()


def test_lambda_one_is_monte_carlo() -> None:
    rewards, values, mask = batch(3, 6)
    _, returns = compute_gae(rewards, values, mask, gamma=1.0, lam=1.0)
    kept = rewards.masked_fill(~mask, 0.0)
    expected = kept.flip(1).cumsum(1).flip(1).masked_fill(~mask, 0.0)
    torch.testing.assert_close(returns, expected)


def test_no_gradient_and_inputs_untouched() -> None:
    rewards, values, mask = batch(2, 3)
    values.requires_grad_()
    before = rewards.clone()
    advantages, returns = compute_gae(rewards, values, mask)
    assert not advantages.requires_grad and not returns.requires_grad
    assert torch.equal(rewards, before)


def test_moments_are_those_of_each_response() -> None:
    rewards, values, mask = batch(4, 7)
    mask[1] = False
    advantages, returns, moments = compute_gae(rewards, values, mask, return_moments=True)
    assert moments.shape == (4, 3) and moments.dtype == torch.float64
    assert all(torch.equal(a, b) for a, b in
               zip((advantages, returns), compute_gae(rewards, values, mask), strict=True))
    for b in range(4):
        kept = advantages[b][mask[b]]
        squares = kept.var(correction=0) * len(kept) if b != 1 else torch.zeros(()).double()
        torch.testing.assert_close(moments[b], torch.stack(
            [torch.tensor(len(kept)).double(), kept.sum(), squares]))
    cu_seqlens = torch.tensor([0, *mask.sum(dim=1).cumsum(0).tolist()])
    packed = compute_gae(rewards[mask], values[mask], cu_seqlens=cu_seqlens, return_moments=True)
    torch.testing.assert_close(packed[2], moments)


def test_moments_golden(golden: SimpleNamespace) -> None:
    """Advantages .88, .79, .67, .6 with mean .735."""
    _, _, moments = compute_gae(torch.tensor([golden.GAE_REWARDS]),
                                torch.tensor([golden.GAE_VALUES]), lam=1.0, return_moments=True)
    torch.testing.assert_close(moments, torch.tensor([[4.0, 2.94, 0.0465]]), rtol=0, atol=1e-6)


def test_bad_input() -> None:
    one, packed = torch.ones(2, 3), torch.ones(4)
    with pytest.raises(ShapeError, match=r"rewards \[2, 3\], values \[2, 2\]"):
        compute_gae(one, one[:, :2])
    with pytest.raises(ShapeError, match=r"with cu_seqlens"):
        compute_gae(packed, packed)
    with pytest.raises(ShapeError, match=r"without cu_seqlens"):
        compute_gae(one, one, cu_seqlens=torch.tensor([0, 3]))
    with pytest.raises(ShapeError, match="cu_seqlens to be int64"):
        compute_gae(packed, packed, cu_seqlens=torch.tensor([0, 4], dtype=torch.int32))
    with pytest.raises(ShapeError, match=r"cu_seqlens \[B\+1\] with B at least 1, got \[1\]"):
        compute_gae(packed, packed, cu_seqlens=torch.tensor([0]))
    with pytest.raises(ShapeError, match="response_mask to be bool"):
        compute_gae(one, one, one)
    with pytest.raises(ConfigError, match="expected lam from 0 to 1, got 1.5"):
        compute_gae(one, one, lam=1.5)
    with pytest.raises(ConfigError, match="expected gamma from 0 to 1"):
        compute_gae(one, one, gamma=-0.1)

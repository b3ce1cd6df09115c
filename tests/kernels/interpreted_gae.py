"""compute_gae's Triton kernel against the float64 reference; run by test_triton.py."""

import pytest
import torch
from fastrl_kernels.triton.gae import MAX_BLOCK
from torch import Tensor

from fastrl.errors import BackendUnavailableError
from fastrl.ops import compute_gae
from fastrl.ops.gae import compute_gae_reference, moments_reference

FLOOR = 1e-5  # the scan adds in another order than the loop over time


def batch(B: int, T: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards, values and a mask with holes and a row that is all masked; NaN where masked."""
    rewards, values = torch.randn(2, B, T)
    mask = torch.rand(B, T) > 0.3
    mask[B // 2] = B == 1
    return rewards.masked_fill(~mask, torch.nan), values.masked_fill(~mask, torch.nan), mask


def assert_as_good_as_torch(rewards: Tensor, values: Tensor, *mask: Tensor, **settings) -> None:
    wide = compute_gae_reference(rewards.double(), values.double(), *mask, **settings)
    plain = compute_gae_reference(rewards, values, *mask, **settings)
    ours = compute_gae(rewards, values, *mask, backend="triton", **settings)
    for truth, torch_result, result in zip(wide, plain, ours, strict=True):
        assert result.dtype == torch_result.dtype and result.shape == truth.shape
        error = (result - truth).abs().max()
        assert error <= 2 * (torch_result - truth).abs().max() + FLOOR * truth.abs().max()


# One token, one below, at and above a block, and two blocks that do not fill.
@pytest.mark.parametrize("B, T", [(1, 1), (3, 5), (3, 31), (2, MAX_BLOCK), (2, MAX_BLOCK + 1),
                                  (3, 2 * MAX_BLOCK + 77)])
def test_padded_with_holes(B: int, T: int) -> None:
    assert_as_good_as_torch(*batch(B, T), gamma=0.9, lam=0.8)


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (1.0, 0.0), (1.0, 1.0), (0.0, 1.0)])
def test_coefficients(gamma: float, lam: float) -> None:
    assert_as_good_as_torch(*batch(2, 70), gamma=gamma, lam=lam)


def test_no_mask() -> None:
    assert_as_good_as_torch(*torch.randn(2, 3, 17), gamma=0.99, lam=0.9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_inputs(dtype: torch.dtype) -> None:
    rewards, values, mask = batch(3, 50)
    assert_as_good_as_torch(rewards.to(dtype), values.to(dtype), mask)


def test_packed_lengths_zero_and_beyond_a_block() -> None:
    lengths = torch.tensor([3, 0, MAX_BLOCK + 5, 1])
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    N = int(lengths.sum())
    rewards, values = torch.randn(2, N)
    mask = torch.rand(N) > 0.3
    assert_as_good_as_torch(rewards, values, cu_seqlens=cu_seqlens)
    assert_as_good_as_torch(rewards, values, mask, cu_seqlens=cu_seqlens, lam=0.9)


def test_not_contiguous() -> None:
    rewards, values, mask = (x.t() for x in batch(40, 6))
    assert_as_good_as_torch(rewards, values, mask)
    assert_as_good_as_torch(torch.randn(20)[::2], torch.randn(30)[::3],
                            cu_seqlens=torch.tensor([0, 4, 10]))


def test_a_row_does_not_depend_on_the_others() -> None:
    rewards, values, mask = batch(4, 90)
    together = compute_gae(rewards, values, mask, backend="triton")[0]
    for b in range(4):
        row = slice(b, b + 1)
        alone = compute_gae(rewards[row], values[row], mask[row], backend="triton")[0]
        assert torch.equal(alone[0], together[b])


def test_moments_for_whitening_do_not_cancel() -> None:
    T = 2 * MAX_BLOCK + 77
    rewards, values, mask = batch(3, T)
    rewards = rewards + 1e4 * (torch.arange(T) == T - 1)
    mask[:, -1] = mask[2, -1] = True
    mask[1] = False
    rewards, values = rewards.nan_to_num(), values.nan_to_num()
    advantages, _, moments = compute_gae(rewards, values, mask, lam=1.0, return_moments=True,
                                         backend="triton")
    for b in range(3):
        kept = advantages[b][mask[b]].double()
        expected = [len(kept), kept.sum(), (kept - kept.mean()).square().sum() if b != 1 else 0.0]
        # A mean 1000 times the deviation: a sum of plain squares would be wrong by some percent.
        torch.testing.assert_close(moments[b].double(),
                                   torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=0)


def test_moments_of_packed_responses() -> None:
    cu_seqlens = torch.tensor([0, 3, 3, 20])
    rewards, values, mask = torch.randn(20), torch.randn(20), torch.rand(20) > 0.3
    for keep in (None, mask):
        advantages, _, moments = compute_gae(rewards, values, keep, cu_seqlens=cu_seqlens,
                                             return_moments=True, backend="triton")
        torch.testing.assert_close(moments, moments_reference(advantages, keep, cu_seqlens))


@pytest.mark.parametrize("is_packed", [False, True])
def test_moments_are_made_in_the_same_launch(launches: list[str], is_packed: bool) -> None:
    rewards, values = torch.randn(2, 3, 40)
    options = {"return_moments": True, "backend": "triton"}
    if is_packed:
        cu_seqlens = torch.tensor([0, 40, 80, 120])
        compute_gae(rewards.flatten(), values.flatten(), cu_seqlens=cu_seqlens, **options)
    else:
        compute_gae(rewards, values, rewards > 0, **options)
    assert launches == ["_gae_fwd_kernel"]


@pytest.mark.parametrize("is_packed", [False, True])
def test_registered_op_and_one_graph(is_packed: bool) -> None:
    rewards, values = torch.randn(2, 4, 10).flatten(1) if is_packed else torch.randn(2, 4, 10)
    mask, cu_seqlens = rewards < 1, torch.tensor([0, 7, 40]) if is_packed else None
    torch.library.opcheck(torch.ops.fastrl_kernels.compute_gae,
                          (rewards.half(), values, mask, 0.9, 0.8, cu_seqlens))
    options = {"cu_seqlens": cu_seqlens, "return_moments": True, "backend": "triton"}
    compiled = torch.compile(compute_gae, fullgraph=True, backend="aot_eager")
    for traced, eager in zip(compiled(rewards, values, mask, **options),
                             compute_gae(rewards, values, mask, **options), strict=True):
        assert torch.equal(traced, eager)


def test_float64_is_refused() -> None:
    with pytest.raises(BackendUnavailableError, match="it computes in float32"):
        compute_gae(*torch.randn(2, 2, 3, dtype=torch.float64), backend="triton")

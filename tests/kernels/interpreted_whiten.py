"""whiten's Triton kernels against the float64 reference; run by test_triton.py."""

from types import SimpleNamespace

import pytest
import torch
from fastrl_kernels.triton import whiten as kernels
from torch import Tensor

from fastrl.errors import BackendUnavailableError
from fastrl.ops import compute_gae, whiten
from fastrl.ops.whiten import row_moments, whiten_reference

FLOOR = 1e-6  # float32 sums in another order
BLOCK = kernels.BLOCK_N


def batch(*shape: int) -> tuple[Tensor, Tensor]:
    """Values about 3, NaN where masked, and the mask."""
    mask = torch.rand(*shape) > 0.3
    return (3 + 2 * torch.randn(*shape)).masked_fill(~mask, torch.nan), mask


def forward_and_backward(
    function, values: Tensor, mask: Tensor, **options
) -> tuple[Tensor, Tensor]:
    leaf = values.detach().requires_grad_()
    whitened = function(leaf, mask, **options)
    weights = torch.linspace(-1, 2, values.numel(), dtype=whitened.dtype).reshape(values.shape)
    (whitened * weights + whitened ** 3 / 7).sum().backward()
    return whitened, leaf.grad


def assert_as_good_as_torch(
    values: Tensor, mask: Tensor, floor: float = FLOOR, moments: Tensor | None = None, **options
) -> None:
    wide_moments = None if moments is None else moments.double()
    truth = forward_and_backward(whiten_reference, values.double(), mask, moments=wide_moments,
                                 **options)
    plain = forward_and_backward(whiten_reference, values, mask, moments=moments, **options)
    ours = forward_and_backward(whiten, values, mask, moments=moments, backend="triton", **options)
    for wide, torch_result, result in zip(truth, plain, ours, strict=True):
        assert result.dtype == torch_result.dtype and result.shape == wide.shape
        error, torch_error = ((x - wide).abs().max() for x in (result, torch_result))
        assert error <= 2 * torch_error + floor * (1 + wide.abs().max())


# One value, below, at and above a block, several blocks; one to three dimensions.
@pytest.mark.parametrize("shape", [(1,), (3, 5), (BLOCK,), (2, BLOCK // 2 + 1), (3, 3, 1000)])
@pytest.mark.parametrize("keep_mean", [False, True])
def test_sizes(shape: tuple[int, ...], keep_mean: bool) -> None:
    assert_as_good_as_torch(*batch(*shape), keep_mean=keep_mean)


# The interpreter cuts a float32 to bfloat16 where a GPU rounds: twice the error, 2^-8.
@pytest.mark.parametrize("dtype, floor", [(torch.float16, 2**-11), (torch.bfloat16, 2**-8)])
def test_narrow_values(dtype: torch.dtype, floor: float) -> None:
    values, mask = batch(3, 50)
    assert_as_good_as_torch(values.to(dtype), mask, floor)


def test_not_contiguous() -> None:
    values, mask = batch(40, 6)
    assert_as_good_as_torch(values.t(), mask.t())
    assert_as_good_as_torch(values[:, ::2], mask[:, ::2])


@pytest.mark.parametrize("keep_mean", [False, True])
@pytest.mark.parametrize("num_parts", [1, 7, kernels.BLOCK_P + 5])
def test_given_moments(keep_mean: bool, num_parts: int) -> None:
    """Those of a whole of which the values are a piece; parts of any size, some empty."""
    whole, mask = batch(num_parts, 9)
    if num_parts > 1:
        mask[num_parts // 2] = False
    moments = row_moments(whole, mask)
    assert_as_good_as_torch(whole[:3], mask[:3], moments=moments, keep_mean=keep_mean)
    if keep_mean:
        return
    everything = whiten(whole, mask, moments=moments, backend="triton")
    torch.testing.assert_close(everything, whiten_reference(whole.double(), mask).float(),
                               rtol=1e-4, atol=1e-5)


def test_moments_of_gae() -> None:
    rewards, values = torch.randn(2, 5, 30)
    mask = torch.rand(5, 30) > 0.3
    advantages, _, moments = compute_gae(rewards, values, mask, return_moments=True,
                                         backend="triton")
    whitened = whiten(advantages, mask, moments=moments, backend="triton")
    torch.testing.assert_close(whitened, whiten_reference(advantages, mask), rtol=1e-5, atol=1e-5)


def test_two_launches_and_one_where_moments_are_given(launches: list[str]) -> None:
    values, mask = batch(3, 3, 1000)
    whiten(values, mask, backend="triton")
    assert launches == ["_moments_fwd_kernel", "_whiten_fwd_kernel"]
    launches.clear()
    moments = row_moments(torch.randn(2, 5), torch.ones(2, 5, dtype=torch.bool))
    whiten(values, mask, moments=moments, backend="triton")
    assert launches == ["_whiten_fwd_kernel"]


def test_golden(golden: SimpleNamespace) -> None:
    advantages = torch.tensor([golden.GAE_ADVANTAGES[0.95]])
    everything = torch.ones(1, 4, dtype=torch.bool)
    torch.testing.assert_close(whiten(advantages, everything, backend="triton"),
                               torch.tensor([golden.GAE_WHITENED_095]), rtol=0, atol=2e-6)
    values = torch.tensor(golden.WHITEN_VALUES)
    kept = whiten(values, torch.ones(3, 3, dtype=torch.bool), keep_mean=True, backend="triton")
    torch.testing.assert_close(kept[0], torch.tensor(golden.WHITEN_KEEP_MEAN_FIRST_ROW),
                               rtol=0, atol=6e-5)


def test_a_mean_beyond_the_spread_does_not_cancel() -> None:
    """Blocks whose means differ, all of them 10^4 deviations from 0; sums of plain squares would
    be wrong by more than the variance. A mean in float32 is known to half of its last digit."""
    values = 1e4 + torch.randn(2 * BLOCK + 9) + torch.arange(2 * BLOCK + 9) / BLOCK
    assert_as_good_as_torch(values, torch.rand(2 * BLOCK + 9) > 0.3, floor=1e4 * 2**-24)


def test_nothing_is_kept_and_no_values() -> None:
    nothing = torch.zeros(3, 4, dtype=torch.bool)
    for values, mask in ((torch.full((3, 4), torch.nan), nothing), (torch.ones(0), nothing[0, :0])):
        for moments in (None, torch.zeros(2, 3), torch.zeros(0, 3)):
            leaf = values.clone().requires_grad_()
            whitened = whiten(leaf, mask, keep_mean=True, moments=moments, backend="triton")
            whitened.sum().backward()
            assert torch.equal(whitened, torch.zeros(values.shape))
            assert torch.equal(leaf.grad, torch.zeros(values.shape))


def test_equal_values() -> None:
    whitened = whiten(torch.full((9,), 3.0), torch.ones(9, dtype=torch.bool), backend="triton")
    assert torch.equal(whitened, torch.zeros(9))


def test_nan_that_counts_is_not_hidden() -> None:
    values, mask = torch.randn(2 * BLOCK), torch.ones(2 * BLOCK, dtype=torch.bool)
    values[BLOCK + 1], mask[5] = torch.nan, False
    whitened = whiten(values, mask, backend="triton")
    assert whitened[mask].isnan().all() and whitened[5] == 0


def test_the_same_bits_every_time() -> None:
    values, mask = batch(3, BLOCK)
    assert torch.equal(*(whiten(values, mask, backend="triton") for _ in range(2)))


def test_registered_ops() -> None:
    values, mask = batch(3, 40)
    scale, g = torch.tensor([3.0, 0.5]), torch.randn(3, 40)
    for moments in (None, row_moments(values, mask)):
        torch.library.opcheck(torch.ops.fastrl_kernels.whiten, (values, mask, moments, True, 1e-8))
        torch.library.opcheck(torch.ops.fastrl_kernels.whiten_bwd,
                              (values.half(), mask, g, scale, True, moments is not None))


@pytest.mark.parametrize("has_moments", [False, True])
def test_compiles_to_one_graph(has_moments: bool) -> None:
    values, mask = batch(3, 40)
    options = {"moments": row_moments(values, mask) if has_moments else None, "backend": "triton"}
    compiled = torch.compile(whiten, fullgraph=True, backend="aot_eager")
    eager = forward_and_backward(whiten, values, mask, **options)
    traced = forward_and_backward(compiled, values, mask, **options)
    assert all(torch.equal(a, b) for a, b in zip(eager, traced, strict=True))


def test_float64_is_refused() -> None:
    with pytest.raises(BackendUnavailableError, match="it computes in float32"):
        whiten(torch.randn(3).double(), torch.ones(3, dtype=torch.bool), backend="triton")

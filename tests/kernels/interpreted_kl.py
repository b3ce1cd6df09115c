"""kl_estimate's Triton kernels against the float64 reference; run by test_triton.py."""

import pytest
import torch
from fastrl_kernels.triton import kl
from fastrl_kernels.triton.kl import BLOCK
from torch import Tensor

from fastrl.errors import BackendUnavailableError
from fastrl.ops import kl_estimate
from fastrl.ops.kl import kl_estimate_reference

FLOOR = 1e-6  # of each estimate itself: float32's exp, against expm1 in the reference


def pair(*shape: int) -> tuple[Tensor, Tensor]:
    """Log-probs of a policy and a reference from equal to far apart."""
    logprobs = -3 * torch.rand(shape)
    return logprobs, logprobs + torch.randn(shape) * 10 ** (4 * torch.rand(shape) - 3)


def run(function, logprobs: Tensor, ref: Tensor, *mask: Tensor, which: str = "k1 k2 k3",
        **options) -> list[Tensor]:
    """The three estimates, and the gradients of a sum of some of them with mixed weights."""
    leaves = [x.detach().requires_grad_() for x in (logprobs, ref)]
    estimates = function(*leaves, *mask, **options)
    weights = torch.linspace(-1, 2, estimates[0].numel(), dtype=estimates[0].dtype)
    total = sum((1 + k) * (weights.view(x.shape) * x).sum() for k, x in enumerate(estimates)
                if f"k{k + 1}" in which)
    total.backward()
    return [*estimates, *(leaf.grad for leaf in leaves)]


def assert_as_good_as_torch(logprobs: Tensor, ref: Tensor, *mask: Tensor, floor: float = FLOOR,
                            **options) -> None:
    wide = [x.double() if x.is_floating_point() else x for x in (logprobs, ref, *mask)]
    truths = run(kl_estimate_reference, *wide, **options)
    plain = run(kl_estimate_reference, logprobs, ref, *mask, **options)
    ours = run(kl_estimate, logprobs, ref, *mask, backend="triton", **options)
    for k, (truth, torch_result, result) in enumerate(zip(truths, plain, ours, strict=True)):
        assert result.dtype == torch_result.dtype and result.shape == truth.shape
        error, torch_error = ((x - truth).abs() for x in (result, torch_result))
        size = truth.abs() if k < 3 else truth.abs().max()  # the terms of a gradient may cancel
        assert (error <= 2 * torch_error + floor * size).all()


# One token, one below, at and above a block, and three blocks of two dimensions that do not fill.
@pytest.mark.parametrize("shape", [(1,), (BLOCK - 1,), (BLOCK,), (BLOCK + 1,), (7, 400)])
def test_sizes(shape: tuple[int, ...]) -> None:
    assert_as_good_as_torch(*pair(*shape))


@pytest.mark.parametrize("which", ["k1", "k2", "k3", "k1 k3"])
def test_gradients_of_some_of_them(which: str) -> None:
    assert_as_good_as_torch(*pair(3, 17), which=which)


def test_one_launch_forward_and_one_backward(launches: list[str]) -> None:
    run(kl_estimate, *pair(3, BLOCK), backend="triton")
    assert launches == ["_kl_estimate_fwd_kernel", "_kl_estimate_bwd_kernel"]


def test_k3_keeps_its_digits_near_zero_and_where_the_series_ends() -> None:
    """Equal bits of log-prob and u: nothing is lost before k3; relative errors, not absolute."""
    u = torch.cat([10 ** torch.linspace(-6, 1.2, 600), torch.tensor([0.49999997, 0.5, 0.50000006])])
    u = torch.cat([u, -u])
    zeros = torch.zeros_like(u)
    truth = torch.special.expm1(u.double()) - u.double()
    k3 = kl_estimate(zeros, u, backend="triton")[2]
    assert ((k3 - truth).abs() <= 1.5e-6 * truth).all()


def test_masks_over_nan() -> None:
    logprobs, ref = pair(3, 40)
    mask = torch.rand(3, 40) > 0.4
    mask[1] = False
    logprobs, ref = (x.masked_fill(~mask, torch.nan) for x in (logprobs, ref))
    assert_as_good_as_torch(logprobs, ref, mask)


def test_a_ratio_beyond_the_bound_has_no_gradient() -> None:
    logprobs = torch.tensor([-100.0, -1.0, -21.0, -20.5])
    ref = torch.tensor([-1.0, -100.0, -1.0, -1.0])
    assert_as_good_as_torch(logprobs, ref)
    assert run(kl_estimate, logprobs, ref, which="k3", backend="triton")[3][0] == 0


def test_nan_is_not_hidden() -> None:
    ours = run(kl_estimate, torch.tensor([torch.nan, -1.0]), torch.tensor([-1.0, -2.0]),
               backend="triton")
    assert all(x.isnan().tolist() == [True, False] for x in ours)


def test_not_contiguous() -> None:
    logprobs, ref = pair(6, 40)
    mask = torch.rand(6, 40) > 0.4
    assert_as_good_as_torch(logprobs.t(), ref.t(), mask.t())
    assert_as_good_as_torch(logprobs[:, ::2], ref[0, ::2].expand(6, 20))


# float16 and bfloat16 gradients are rounded once.
@pytest.mark.parametrize("dtype, floor", [(torch.float16, 2**-10), (torch.bfloat16, 2**-7)])
def test_narrow_inputs(dtype: torch.dtype, floor: float) -> None:
    logprobs, ref = torch.rand(2, 3, 20) + 0.1
    assert_as_good_as_torch(-logprobs.to(dtype), -ref.to(dtype), floor=floor)


def test_a_gradient_of_one_number_is_read_in_place() -> None:
    """The gradient of a plain sum is one number for all tokens."""
    logprobs, ref = pair(50)
    leaf = logprobs.clone().requires_grad_()
    kl_estimate(leaf, ref, backend="triton")[1].sum().backward()
    torch.testing.assert_close(leaf.grad, logprobs - ref)


def test_no_tokens_and_only_the_gradients_asked_for() -> None:
    empty = torch.zeros(0, 4, requires_grad=True)
    sum(x.sum() for x in kl_estimate(empty, empty.detach(), backend="triton")).backward()
    assert empty.grad.shape == (0, 4)
    logprobs, ref = pair(5)
    assert not kl_estimate(logprobs, ref, backend="triton")[0].requires_grad
    kl_estimate(logprobs, ref.requires_grad_(), backend="triton")[0].sum().backward()
    assert ref.grad.tolist() == [-1.0] * 5 and logprobs.grad is None


def test_registered_ops() -> None:
    logprobs, ref = pair(3, 5)
    mask, given = torch.rand(3, 5) > 0.3, torch.randn(3, 5)
    for keep in (mask, None):
        torch.library.opcheck(torch.ops.fastrl_kernels.kl_estimate, (logprobs, ref, keep))
    for needs in ([True, True], [True, False], [False, True]):
        torch.library.opcheck(torch.ops.fastrl_kernels.kl_estimate_bwd,
                              (logprobs, ref, mask, given, None, given, needs))


def test_compiles_to_one_graph() -> None:
    logprobs, ref = pair(3, 5)
    mask = torch.rand(3, 5) > 0.3
    compiled = torch.compile(kl_estimate, fullgraph=True, backend="aot_eager")
    eager = run(kl_estimate, logprobs, ref, mask, backend="triton")
    traced = run(compiled, logprobs, ref, mask, backend="triton")
    assert all(torch.equal(a, b) for a, b in zip(eager, traced, strict=True))


def test_float64_is_refused() -> None:
    assert kl.supports("cuda", torch.float64) is not None
    with pytest.raises(BackendUnavailableError, match="it computes in float32"):
        kl_estimate(*torch.randn(2, 3).double(), backend="triton")

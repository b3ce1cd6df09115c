"""linear's Triton kernel against the float64 reference, and row by row; run by test_triton.py."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from fastrl.errors import BackendUnavailableError
from fastrl.ops import linear
from fastrl.ops.linear import linear_reference

FLOORS = {torch.float32: 1e-6,
          torch.float16: 2**-11,
          # The interpreter cuts a float32 to bfloat16 where a GPU rounds: twice the error, twice.
          torch.bfloat16: 2**-7}
triton_linear = partial(linear, backend="triton")


def tensors(*leading: int, D: int, O: int, dtype: torch.dtype = torch.float32  # noqa: E741
            ) -> tuple[Tensor, Tensor, Tensor]:
    return (torch.randn(*leading, D).to(dtype), (torch.randn(O, D) * D**-0.5).to(dtype),
            torch.randn(O).to(dtype))


def forward_and_backward(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    y = function(*leaves)
    dy = ((torch.arange(y.numel()) * 7 % 9 - 3) / 4).view(y.shape).to(y.dtype)
    return y, *torch.autograd.grad(y, leaves, dy)


def assert_as_good_as_torch(*inputs: Tensor) -> None:
    ours = forward_and_backward(triton_linear, *inputs)
    plain = forward_and_backward(linear_reference, *inputs)
    truth = forward_and_backward(linear_reference, *(x.double() for x in inputs))
    for wide, torch_result, result in zip(truth, plain, ours, strict=True):
        assert result.dtype == torch_result.dtype and result.shape == wide.shape
        error = (result - wide).abs().max()
        floor = FLOORS[inputs[0].dtype] * wide.abs().max()
        assert error <= 2 * (torch_result - wide).abs().max() + floor


# One of each; odd; below, at and above a tile of 64 x 64 and a step of 32; nine tiles of rows: the
# second group has one.
@pytest.mark.parametrize("N, D, O", [(1, 1, 1), (3, 7, 5), (63, 31, 63), (64, 32, 64),
                                     (65, 33, 65), (129, 70, 130), (8 * 64 + 1, 5, 70)])
def test_sizes(N: int, D: int, O: int) -> None:  # noqa: E741
    x, weight, bias = tensors(N, D=D, O=O)
    assert_as_good_as_torch(x, weight, bias)
    assert_as_good_as_torch(x, weight)


@pytest.mark.parametrize("D", [48, 33])  # whole and odd rows take steps of 64 and 32
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_types(dtype: torch.dtype, D: int) -> None:
    assert_as_good_as_torch(*tensors(65, D=D, O=130, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_float32_results_of_narrow_types_are_not_rounded(dtype: torch.dtype) -> None:
    x, weight, bias = tensors(65, D=48, O=70, dtype=dtype)
    y, *gradients = forward_and_backward(partial(triton_linear, out_dtype=torch.float32),
                                         x, weight, bias)
    truth = linear_reference(x.double(), weight.double(), bias.double())
    assert y.dtype == torch.float32 and (y - truth).abs().max() <= 1e-6 * truth.abs().max()
    assert [gradient.dtype for gradient in gradients] == [dtype] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_row_has_the_same_bits_in_any_number(dtype: torch.dtype) -> None:
    x, weight, bias = tensors(600, D=80, O=140, dtype=dtype)
    many = triton_linear(x, weight, bias)
    for count in (1, 2, 3, 16, 63, 64, 65, 128, 513):
        assert torch.equal(triton_linear(x[:count], weight, bias), many[:count]), count
        # In another place among others.
        assert torch.equal(triton_linear(x[-count:], weight, bias), many[-count:]), count


def test_nan_stays_in_its_row() -> None:
    x, weight, bias = tensors(70, D=20, O=9)
    expected = triton_linear(x, weight, bias)
    x[3, 4] = torch.nan
    y = triton_linear(x, weight, bias)
    assert y[3].isnan().all()
    assert torch.equal(y[:3], expected[:3]) and torch.equal(y[4:], expected[4:])


def test_any_leading_shape_and_strides() -> None:
    for leading in ((), (2, 3), (2, 2, 3)):
        assert_as_good_as_torch(*tensors(*leading, D=10, O=6))
    x, weight, bias = tensors(6, D=40, O=7)
    assert_as_good_as_torch(x[:, 3:23], weight[:, 5:25], bias)
    assert_as_good_as_torch(x[:, ::2], weight[:, ::2], bias)
    assert_as_good_as_torch(torch.randn(10, 4).t(), torch.randn(10, 3).t())
    assert_as_good_as_torch(torch.randn(1, 10).expand(6, 10), torch.randn(1, 10).expand(3, 10),
                            torch.randn(1).expand(3))
    y = triton_linear(x, weight.t().contiguous().t(), bias)  # stored by input
    assert torch.equal(y, triton_linear(x, weight, bias))


def test_only_the_gradients_that_are_needed() -> None:
    x, weight, bias = tensors(3, D=4, O=5)
    for number in range(3):
        inputs = [t.detach().requires_grad_(i == number) for i, t in enumerate((x, weight, bias))]
        triton_linear(*inputs).sum().backward()
        assert [t.grad is not None for t in inputs] == [i == number for i in range(3)]


def test_no_rows() -> None:
    x, weight, bias = tensors(0, D=4, O=5)
    y, dx, dweight, dbias = forward_and_backward(triton_linear, x, weight, bias)
    assert y.shape == (0, 5) and dx.shape == (0, 4)
    assert not dweight.any() and not dbias.any()


def test_registered_ops() -> None:
    x, weight, bias = tensors(3, D=4, O=5)
    torch.library.opcheck(torch.ops.fastrl_kernels.linear, (x, weight, bias, torch.float32))
    torch.library.opcheck(torch.ops.fastrl_kernels.linear,
                          (x.half(), weight.half(), None, torch.float32))


def test_compiles_to_one_graph() -> None:
    torch.compiler.reset()
    inputs = tensors(2, 3, D=4, O=5)
    compiled = torch.compile(triton_linear, fullgraph=True, backend="aot_eager")
    for a, b in zip(forward_and_backward(triton_linear, *inputs),
                    forward_and_backward(compiled, *inputs), strict=True):
        assert torch.equal(a, b)


def test_float64_is_refused() -> None:
    with pytest.raises(BackendUnavailableError, match="it computes in float32"):
        triton_linear(*(t.double() for t in tensors(3, D=4, O=5)))

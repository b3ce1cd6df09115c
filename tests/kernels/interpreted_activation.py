"""swiglu's and gelu's Triton kernels against the float64 references; run by test_triton.py."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from fastrl_kernels.triton.activation import MAX_BLOCK
from fastrl_kernels.triton.support import as_rows
from torch import Tensor

from fastrl.errors import BackendUnavailableError
from fastrl.ops import gelu, swiglu
from fastrl.ops.activation import gelu_reference, swiglu_reference

OPS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "swiglu": (swiglu, swiglu_reference),
    "gelu": (gelu, gelu_reference),
    "gelu_tanh": (partial(gelu, approximate="tanh"), partial(gelu_reference, approximate="tanh")),
}
FLOORS = {torch.float32: 1e-6,
          torch.float16: 2**-11,
          # The interpreter cuts a float32 to bfloat16 where a GPU rounds: twice the error, twice.
          torch.bfloat16: 2**-7}


def forward_and_backward(function: Callable[..., Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """y, and the gradient of x for a gradient of y that every type holds."""
    leaf = x.detach().requires_grad_()
    y = function(leaf)
    dy = ((torch.arange(y.numel()) * 7 % 9 - 3) / 4).view(y.shape).to(y.dtype)
    return y, *torch.autograd.grad(y, leaf, dy)


def assert_as_good_as_torch(name: str, x: Tensor) -> None:
    function, reference = OPS[name]
    ours = forward_and_backward(partial(function, backend="triton"), x)
    plain = forward_and_backward(reference, x)
    truth = forward_and_backward(reference, x.double())
    for wide, torch_result, result in zip(truth, plain, ours, strict=True):
        assert result.dtype == torch_result.dtype and result.shape == wide.shape
        error = (result - wide).abs().max()
        floor = FLOORS[x.dtype] * wide.abs().max()
        assert error <= 2 * (torch_result - wide).abs().max() + floor


# One output element, an odd width, a width below, at and above a block, two blocks.
@pytest.mark.parametrize("N, I", [(1, 1), (5, 7), (3, 300), (2, MAX_BLOCK), (2, MAX_BLOCK + 1),
                                  (3, 2 * MAX_BLOCK - 9)])
@pytest.mark.parametrize("name", OPS)
def test_sizes(name: str, N: int, I: int) -> None:  # noqa: E741
    assert_as_good_as_torch(name, 2 * torch.randn(N, 2 * I if name == "swiglu" else I))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", OPS)
def test_narrow_types(name: str, dtype: torch.dtype) -> None:
    assert_as_good_as_torch(name, (2 * torch.randn(5, 600)).to(dtype))


@pytest.mark.parametrize("name", OPS)
def test_any_leading_shape(name: str) -> None:
    for shape in ((20,), (2, 3, 20), (2, 2, 3, 20)):
        assert_as_good_as_torch(name, torch.randn(shape))


@pytest.mark.parametrize("name", OPS)
def test_not_contiguous(name: str) -> None:
    rows = torch.randn(6, 30)[:, 4:24]
    assert as_rows(rows).data_ptr() == rows.data_ptr()
    assert_as_good_as_torch(name, rows)
    assert_as_good_as_torch(name, torch.randn(6, 7, 10)[:, 2:6])
    assert_as_good_as_torch(name, torch.randn(10, 4, 6).permute(2, 1, 0))
    assert_as_good_as_torch(name, torch.randn(1, 10).expand(6, 10))


@pytest.mark.parametrize("name", OPS)
def test_gradients_that_are_not_contiguous(name: str) -> None:
    x, gradients = torch.randn(6, 40), []
    columns = slice(9, 29 if name == "swiglu" else 49)
    apart, transposed = torch.randn(6, 60)[:, columns], torch.randn(60, 6).t()[:, columns]
    for backend in ("triton", "torch"):
        leaf = x.clone().requires_grad_()
        y = OPS[name][0](leaf, backend=backend)
        gradients.append(torch.autograd.grad(y, leaf, apart, retain_graph=True)
                         + torch.autograd.grad(y, leaf, transposed, retain_graph=True)
                         + torch.autograd.grad(y.sum(), leaf))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("name", OPS)
def test_large_inputs_do_not_overflow(name: str) -> None:
    numbers = torch.tensor([-1e4, -200.0, -90.0, -30.0, -9.0, 0.0, 9.0, 30.0, 90.0, 200.0, 1e4])
    x = torch.cat([numbers, numbers.flip(0)]) if name == "swiglu" else numbers
    assert_as_good_as_torch(name, x[None])


def test_small_probabilities_keep_their_digits() -> None:
    """Where 1 + tanh(u) or 1 - sigmoid(x) would cancel."""
    x = torch.linspace(-8, -3, 50)
    wide = x.double()
    wide = wide * (2 * math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)).sigmoid()
    torch.testing.assert_close(gelu(x, approximate="tanh", backend="triton").double(), wide,
                               rtol=2e-5, atol=0)
    gate = torch.linspace(10, 20, 50, requires_grad=True)
    y = swiglu(torch.cat([gate, torch.ones(50)]), backend="triton")
    (dgate,) = torch.autograd.grad(y.sum(), gate)
    sigmoid = gate.detach().double().sigmoid()
    expected = sigmoid * (1 + gate.detach().double() * (1 - sigmoid))
    assert (dgate - expected).abs().max() <= 2**-23


def test_silu_is_rounded_before_the_product() -> None:
    gate, up = torch.randn(2, 4, 64).half()
    ones = swiglu(torch.cat([gate, torch.ones_like(up)], dim=-1), backend="triton")
    assert torch.equal(swiglu(torch.cat([gate, up], dim=-1), backend="triton"), ones * up)


@pytest.mark.parametrize("name", OPS)
def test_a_row_does_not_depend_on_the_others(name: str) -> None:
    function, x = partial(OPS[name][0], backend="triton"), torch.randn(5, 70)
    together = function(x)
    for n in range(5):
        assert torch.equal(function(x[n:n + 1])[0], together[n])


@pytest.mark.parametrize("name", OPS)
def test_nan_is_not_hidden(name: str) -> None:
    x = torch.randn(3, 20)
    x[1, 4] = torch.nan
    y = OPS[name][0](x, backend="triton")
    assert y.isnan().nonzero().tolist() == [[1, 4]]


@pytest.mark.parametrize("name", OPS)
def test_no_rows(name: str) -> None:
    y, dx = forward_and_backward(partial(OPS[name][0], backend="triton"), torch.randn(0, 4, 10))
    assert y.shape == (0, 4, 5 if name == "swiglu" else 10) and dx.shape == (0, 4, 10)


def test_registered_ops() -> None:
    registered, x, dy = torch.ops.fastrl_kernels, torch.randn(3, 2, 20), torch.randn(3, 2, 20)
    torch.library.opcheck(registered.swiglu, (x,))
    torch.library.opcheck(registered.swiglu_bwd, (dy[..., :10], x))
    for is_tanh in (False, True):
        torch.library.opcheck(registered.gelu, (x, is_tanh))
        torch.library.opcheck(registered.gelu_bwd, (dy, x, is_tanh))


@pytest.mark.parametrize("name", OPS)
def test_compiles_to_one_graph(name: str) -> None:
    torch.compiler.reset()
    function, x = partial(OPS[name][0], backend="triton"), torch.randn(3, 2, 20)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for a, b in zip(forward_and_backward(function, x), forward_and_backward(compiled, x),
                    strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", OPS)
def test_float64_is_refused(name: str) -> None:
    with pytest.raises(BackendUnavailableError, match="it computes in float32"):
        OPS[name][0](torch.randn(2, 4).double(), backend="triton")

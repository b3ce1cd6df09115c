"""The norms' Triton kernels against the float64 references; run by test_triton.py."""

from functools import partial

import pytest
import torch
from fastrl_kernels.triton import norm
from fastrl_kernels.triton.norm import FOLD, MAX_BLOCK, NUM_TILES
from fastrl_kernels.triton.support import as_rows
from torch import Tensor

from fastrl import ops
from fastrl.errors import BackendUnavailableError
from fastrl.ops import add_rms_norm, rms_norm
from fastrl.ops import norm as references

NAMES = ("rms_norm", "add_rms_norm", "layer_norm", "add_layer_norm")
FLOORS = {torch.float32: 1e-6,  # sums in another order
          torch.float16: 2**-11,
          # The interpreter cuts a float32 to bfloat16 where a GPU rounds: twice the error, thrice.
          torch.bfloat16: 3 * 2**-8}


def inputs(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Arguments of an op: x, the residual where it takes one, weight, and the bias."""
    D = shape[-1]
    shapes = [shape] * (2 if name.startswith("add_") else 1) + [(D,)] * (1 + ("layer" in name))
    return [torch.randn(s).to(dtype) for s in shapes]


def forward_and_backward(function, tensors: list[Tensor]) -> list[Tensor]:
    """Outputs, and gradients of all inputs, for gradients of the outputs that every type holds."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    outputs = function(*leaves, epsilon=1e-3)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    gradients = [((torch.arange(y.numel()) * (7 + i) % 9 - 3) / 4).view(y.shape).to(y.dtype)
                 for i, y in enumerate(outputs)]
    return [*outputs, *torch.autograd.grad(outputs, leaves, gradients)]


def assert_as_good_as_torch(
    name: str, tensors: list[Tensor], floor: float | None = None
) -> None:
    reference = getattr(references, f"{name}_reference")
    ours = forward_and_backward(partial(getattr(ops, name), backend="triton"), tensors)
    plain = forward_and_backward(reference, tensors)
    truth = forward_and_backward(reference, [t.double() for t in tensors])
    for wide, torch_result, result in zip(truth, plain, ours, strict=True):
        assert result.dtype == torch_result.dtype and result.shape == wide.shape
        error = (result - wide).abs().max()
        share = FLOORS[tensors[0].dtype] if floor is None else floor
        assert error <= 2 * (torch_result - wide).abs().max() + share * wide.abs().max()


# One element; odd; tiles of 64, 8 and 2 rows that do not fill, the first in two programs; two
# programs of one row per tile.
@pytest.mark.parametrize("N, D", [(1, 1), (5, 7), (64 * NUM_TILES + 3, 16), (11, 128), (9, 288),
                                  (NUM_TILES + 2, 513)])
@pytest.mark.parametrize("name", NAMES)
def test_sizes(name: str, N: int, D: int) -> None:
    assert_as_good_as_torch(name, inputs(name, N, D))


# Together they take every branch for rows that are cut: in two forward, in three backward.
@pytest.mark.parametrize("name", ["add_rms_norm", "layer_norm"])
def test_long_rows(name: str) -> None:
    assert_as_good_as_torch(name, inputs(name, 2, MAX_BLOCK + 5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_narrow_types(name: str, dtype: torch.dtype) -> None:
    assert_as_good_as_torch(name, inputs(name, 5, 300, dtype=dtype))


@pytest.mark.parametrize("name", NAMES)
def test_any_leading_shape(name: str) -> None:
    for shape in ((20,), (2, 3, 20), (2, 2, 3, 20)):
        assert_as_good_as_torch(name, inputs(name, *shape))


@pytest.mark.parametrize("name", NAMES)
def test_not_contiguous(name: str) -> None:
    _, *others = inputs(name, 6, 4, 10)
    heads = torch.randn(6, 7, 10)[:, 2:6]  # a slice of Q, K and V: rows 10 apart, tokens 70
    assert as_rows(heads).data_ptr() == heads.data_ptr()
    assert_as_good_as_torch(name, [heads, *others])
    assert_as_good_as_torch(name, [torch.randn(10, 4, 6).permute(2, 1, 0), *others])
    assert_as_good_as_torch(name, [torch.randn(1, 1, 10).expand(6, 4, 10), *others])
    if name.startswith("add_"):
        assert_as_good_as_torch(name, [others[0], heads, *others[1:]])
    assert_as_good_as_torch(name, [heads, *others[:-1], torch.randn(20)[::2]])  # parameters


@pytest.mark.parametrize("name", NAMES)
def test_gradients_that_are_not_contiguous(name: str) -> None:
    tensors, results = inputs(name, 6, 40), []
    for backend in ("triton", "torch"):
        leaves = [t.clone().requires_grad_() for t in tensors]
        outputs = getattr(ops, name)(*leaves, epsilon=1e-3, backend=backend)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        numbers = torch.arange(360.0) / 100  # rows 60 apart, and columns that are no neighbours
        gradients = [numbers.view(6, 60)[:, 9:49], numbers[:240].view(40, 6).t()]
        results.append(torch.autograd.grad(outputs, leaves, gradients[:len(outputs)],
                                           retain_graph=True))
        results[-1] += torch.autograd.grad(sum(y.sum() for y in outputs), leaves)
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("name", ["add_rms_norm", "add_layer_norm"])
def test_one_output_without_a_gradient(name: str, which: int) -> None:
    tensors, results = inputs(name, 5, 40), []
    for backend in ("triton", "torch"):
        leaves = [t.clone().requires_grad_() for t in tensors]
        output = getattr(ops, name)(*leaves, epsilon=1e-3, backend=backend)[which]
        results.append(torch.autograd.grad(output.square().sum(), leaves, allow_unused=True))
    for ours, expected in zip(*results, strict=True):
        if expected is None:
            assert ours is None
        else:
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_the_sum_is_rounded_before_it_is_normalised() -> None:
    x, residual, weight = inputs("add_rms_norm", 5, 70, dtype=torch.float16)
    y, new_residual = add_rms_norm(x, residual, weight, epsilon=1e-6, backend="triton")
    assert torch.equal(new_residual, x + residual)
    assert torch.equal(y, rms_norm(new_residual, weight, epsilon=1e-6, backend="triton"))


def test_rounds_before_the_weight_as_llama_does() -> None:
    x, _ = inputs("rms_norm", 4, 64, dtype=torch.float16)
    ones, weight = torch.ones(64).half(), torch.randn(64).half()
    normed = rms_norm(x, ones, epsilon=1e-6, backend="triton")
    assert torch.equal(rms_norm(x, weight, epsilon=1e-6, backend="triton"), normed * weight)


@pytest.mark.parametrize("D", [40, MAX_BLOCK + 5])
def test_a_large_mean_does_not_cancel(D: int) -> None:
    x, weight, bias = inputs("layer_norm", 2, D)
    # A float32 mean of 1000 is known to 3e-5; a difference of mean squares would be 5% wrong.
    assert_as_good_as_torch("layer_norm", [1000 + x, weight, bias], floor=3e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("D", [16, 200, 600])  # 64 rows in a tile, 4, 1
def test_a_row_does_not_depend_on_the_others(name: str, D: int) -> None:
    function = partial(getattr(ops, name), backend="triton")
    x, *others = inputs(name, 7, D)
    is_added = name.startswith("add_")
    rows, shared = [x, *others[:is_added]], others[is_added:]

    def run(tensors: list[Tensor]) -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_() for t in tensors]
        outputs = function(*leaves, *shared, epsilon=1e-3)
        outputs = outputs if is_added else (outputs,)
        return *outputs, *torch.autograd.grad(sum(y.square().sum() for y in outputs), leaves)

    together = run(rows)
    for n in (0, 3, 6):
        for alone, expected in zip(run([t[n:n + 1] for t in rows]), together, strict=True):
            assert torch.equal(alone[0], expected[n])


@pytest.mark.parametrize("P", [1, 33, FOLD, 2 * FOLD + 3])
def test_partial_sums_are_folded(P: int) -> None:
    partials = torch.randn(P, 37)
    torch.testing.assert_close(norm.fold(partials, torch.float32).double(),
                               partials.double().sum(0), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_nan_is_not_hidden_and_stays_in_its_row(name: str) -> None:
    x, *others = inputs(name, 3, 20)
    x[1, 4] = torch.nan
    y = getattr(ops, name)(x, *others, epsilon=1e-3, backend="triton")
    y = y[0] if isinstance(y, tuple) else y
    assert y.isnan().all(dim=1).tolist() == y.isnan().any(dim=1).tolist() == [False, True, False]


@pytest.mark.parametrize("name", NAMES)
def test_no_rows(name: str) -> None:
    results = forward_and_backward(partial(getattr(ops, name), backend="triton"),
                                   inputs(name, 0, 4, 9))
    for result in results:
        assert result.shape in ((0, 4, 9), (9,)) and (result == 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_registered_ops(name: str) -> None:
    tensors = inputs(name, 3, 2, 20)
    x, residual = tensors[0], tensors[1] if name.startswith("add_") else None
    weight, bias = (tensors[-2:] if "layer" in name else (tensors[-1], None))
    arguments = (x, residual, weight, bias, 1e-3)
    torch.library.opcheck(torch.ops.fastrl_kernels.norm, arguments)
    _, total, stats = norm.norm_fwd(*arguments)
    dtotal = None if residual is None else torch.randn(3, 2, 20)
    torch.library.opcheck(
        torch.ops.fastrl_kernels.norm_bwd,
        (torch.randn(3, 2, 20), dtotal, x if residual is None else total, weight, stats))


@pytest.mark.parametrize("name", ["rms_norm", "add_layer_norm"])
def test_compiles_to_one_graph(name: str) -> None:
    torch.compiler.reset()
    function = partial(getattr(ops, name), backend="triton")
    tensors = inputs(name, 3, 2, 20)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    eager = forward_and_backward(function, tensors)
    for a, b in zip(eager, forward_and_backward(compiled, tensors), strict=True):
        assert torch.equal(a, b)


def test_float64_is_refused() -> None:
    with pytest.raises(BackendUnavailableError, match="it computes in float32"):
        rms_norm(torch.randn(2, 3).double(), torch.ones(3).double(), epsilon=0.0, backend="triton")

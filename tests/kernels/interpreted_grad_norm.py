"""grad_norm's Triton kernel against float64; run by test_triton.py."""

import math

import pytest
import torch
from fastrl_kernels.multi_tensor import CHUNK
from fastrl_kernels.triton import grad_norm as kernel
from torch import Tensor

from fastrl.errors import BackendUnavailableError
from fastrl.ops import grad_norm
from fastrl.ops.grad_norm import grad_norm_reference

FLOOR = 1e-7  # float32 sums of eight squares in another order
# A scalar, nothing, below, at and above a block, one program, two that do not fill.
SHAPES = [(), (0,), (7, 5), (kernel.BLOCK,), (kernel.BLOCK + 1,), (CHUNK,), (3, 8192)]


def assert_as_good_as_torch(gradients: list[Tensor]) -> None:
    truth = float(grad_norm_reference([g.double() for g in gradients]))
    plain = float(grad_norm_reference(gradients))
    norm = grad_norm(gradients, backend="triton")
    assert norm.dtype == torch.float64 and norm.shape == ()
    assert abs(float(norm) - truth) <= 2 * abs(plain - truth) + FLOOR * truth


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_sizes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert_as_good_as_torch([torch.randn(shape).to(dtype)])


def test_many_tensors_of_several_dtypes() -> None:
    gradients = [torch.randn(s) for s in SHAPES]
    assert_as_good_as_torch(gradients)
    gradients[3], gradients[5] = gradients[3].bfloat16(), gradients[5].half()
    assert_as_good_as_torch(gradients)


def test_not_contiguous_and_misaligned() -> None:
    assert_as_good_as_torch([torch.randn(30, 40).t(), torch.randn(100)[::3], torch.randn(65)[1:]])


def test_nothing_beyond_a_tensor_is_read() -> None:
    whole = torch.full((100,), torch.nan)
    whole[16:37] = 2.0
    assert float(grad_norm([whole[16:37]], backend="triton")) == math.sqrt(84)


def test_equal_gradients_give_equal_bits() -> None:
    gradients = [torch.randn(s) for s in SHAPES]
    one, other = (grad_norm([g.clone() for g in gradients], backend="triton") for _ in range(2))
    assert torch.equal(one, other)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_is_not_hidden(bad: float) -> None:
    gradient = torch.ones(CHUNK + 9)
    gradient[CHUNK + 3] = bad
    norm = float(grad_norm([torch.ones(5), gradient], backend="triton"))
    assert math.isnan(norm) if math.isnan(bad) else norm == math.inf


def test_compiles_to_one_graph_and_passes_opcheck() -> None:
    gradients = [torch.randn(300), torch.randn(4, 5).bfloat16()]

    def call(*tensors: Tensor) -> Tensor:
        return grad_norm(tensors, backend="triton")

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*gradients), call(*gradients))
    torch.library.opcheck(torch.ops.fastrl_kernels.grad_norm, (gradients,))


def test_float64_is_refused() -> None:
    with pytest.raises(BackendUnavailableError, match="it computes in float32"):
        grad_norm([torch.ones(2, dtype=torch.float64)], backend="triton")

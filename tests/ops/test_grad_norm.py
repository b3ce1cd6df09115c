"""grad_norm and clip_coefficient: literal numbers, wide sums, NaN and infinity stay visible."""

import pytest
import torch

from fastrl.errors import BackendUnavailableError, ShapeError
from fastrl.ops import grad_norm
from fastrl.ops.grad_norm import clip_coefficient


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_golden(dtype: torch.dtype) -> None:
    gradients = [torch.tensor([2.0, 0.0]), torch.tensor(-3.0), torch.tensor([[6.0]]),
                 torch.empty(0)]
    norm = grad_norm([g.to(dtype) for g in gradients])
    assert norm.dtype == torch.float64 and norm.shape == () and norm.item() == 7.0


def test_dtypes_may_differ() -> None:
    norm = grad_norm([torch.tensor([3.0], dtype=torch.bfloat16), torch.tensor([4.0])])
    assert norm.item() == 5.0


def test_sums_are_wide_and_strides_do_not_matter() -> None:
    assert grad_norm([torch.ones(100_000, dtype=torch.bfloat16)]).item() == pytest.approx(
        316.227766, rel=1e-6)
    gradient = torch.randn(50, 30)
    assert grad_norm([gradient.t()[::2]]).item() == pytest.approx(
        gradient.t()[::2].double().square().sum().sqrt().item(), rel=1e-6)


@pytest.mark.parametrize("bad, is_nan", [(float("nan"), True), (float("-inf"), False)])
def test_what_is_not_finite_is_not_hidden(bad: float, is_nan: bool) -> None:
    norm = grad_norm([torch.ones(3), torch.tensor([1.0, bad])])
    assert norm.isnan().item() is is_nan and not norm.isfinite()
    assert clip_coefficient(norm, 1.0).item() == 1.0  # 0 would hide the infinity in the others


def test_clip_coefficient() -> None:
    norms = [0.0, 0.5, 1.0, 2.0, 1e300]
    got = [clip_coefficient(torch.tensor(n, dtype=torch.float64), 1.0).item() for n in norms]
    assert got == [1.0, 1.0, 1.0, 0.5, 1e-300]


def test_compiles_to_one_graph() -> None:
    gradients = [torch.randn(3, 4), torch.randn(5)]

    def call(*tensors: torch.Tensor) -> torch.Tensor:
        return clip_coefficient(grad_norm(tensors), 1.0)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*gradients), call(*gradients))


def test_refusals() -> None:
    with pytest.raises(ShapeError, match="at least one gradient"):
        grad_norm([])
    with pytest.raises(ShapeError, match=r"gradients\[1\] to be floating point, got torch.int64"):
        grad_norm([torch.ones(1), torch.ones(1, dtype=torch.int64)])
    with pytest.raises(ShapeError, match=r"one device; got gradients\[0\] on cpu, gradients\[1\]"):
        grad_norm([torch.ones(1), torch.ones(1, device="meta")])
    for backend in ("triton", "cuda"):
        with pytest.raises(BackendUnavailableError, match=f"^grad_norm: backend '{backend}'"):
            grad_norm([torch.ones(1)], backend=backend)

"""grad_norm: the global L2 norm of gradients, and what to multiply them by to bound it.

    norm = sqrt(sum over tensors and elements of g^2)        coefficient = min(1, max_norm / norm)
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastrl.backends import choose
from fastrl.checks import check_device, check_float, wide_dtype
from fastrl.errors import ShapeError

# Order by measurement; no GPU result yet, so "auto" keeps the proven path.
PREFERENCE = ("torch", "triton", "cuda")


@torch.no_grad()
def grad_norm_reference(gradients: Sequence[Tensor]) -> Tensor:
    """grad_norm in plain torch: a norm per tensor, merged in float64."""
    norms = [torch.linalg.vector_norm(g, dtype=wide_dtype(g.dtype)) for g in gradients]
    total: Tensor = torch.linalg.vector_norm(torch.stack([norm.double() for norm in norms]))
    return total


def _check(gradients: Sequence[Tensor]) -> None:
    op = "grad_norm"
    if not gradients:
        raise ShapeError(f"{op}: expected at least one gradient, got none")
    named = {f"gradients[{i}]": g for i, g in enumerate(gradients)}
    check_float(op, **named)
    check_device(op, named)


def grad_norm(gradients: Sequence[Tensor], *, backend: str | None = None) -> Tensor:
    """The L2 norm of all gradients together, on their device.

        norm = sqrt(sum over tensors and elements of g^2)

    NaN or infinity when a gradient has one, or when a square leaves float32.

    Args:
        gradients: Floating point, any shapes and dtypes, one device.
        backend: See fastrl.backends.
    Returns:
        Scalar, float64. Squares are added up in float32 or wider within a part of a tensor and in
        float64 across parts, in an order that depends on the shapes alone.
    Raises:
        ShapeError: when there is no gradient, or one is not floating point or elsewhere.
        BackendUnavailableError: when a backend is named that cannot run.
    Cost: reads every gradient once.
    Example:
        >>> float(grad_norm([torch.tensor([3.0, 0.0]), torch.tensor(4.0)]))
        5.0
    """
    _check(gradients)
    dtype = gradients[0].dtype
    for gradient in gradients[1:]:
        dtype = torch.promote_types(dtype, gradient.dtype)
    name = choose("grad_norm", "grad_norm", PREFERENCE, gradients[0].device.type, dtype, backend)
    if name == "triton":
        from fastrl_kernels.triton import grad_norm as kernel

        return kernel.grad_norm(gradients)
    if name == "cuda":
        from fastrl_kernels.cuda import grad_norm as cuda_kernel

        return cuda_kernel.grad_norm(gradients)
    return grad_norm_reference(gradients)


def clip_coefficient(norm: Tensor, max_norm: float) -> Tensor:
    """What gradients of this norm are multiplied by, so that their norm is at most `max_norm`.

        coefficient = min(1, max_norm / norm)        1 for a norm that is NaN or infinite

    With such a norm nothing is scaled: the value that is not finite stays visible, and finite
    gradients beside it do not become 0.

    Args:
        norm: Scalar, see `grad_norm`.
        max_norm: Above 0.
    Returns:
        Scalar of norm's dtype on its device; nothing waits for it.
    Example:
        >>> float(clip_coefficient(torch.tensor(4.0), 1.0))
        0.25
    """
    is_above = (norm > max_norm) & norm.isfinite()
    return torch.where(is_above, max_norm / norm, 1.0)

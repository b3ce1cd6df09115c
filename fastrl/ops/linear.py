"""linear: a product with a weight, of which one path gives a row the same bits in any company.

    y = x @ weight.T + bias

D inputs, O outputs; any leading shape stands for rows.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrl.backends import choose
from fastrl.checks import check_device, check_float, check_values, wide_dtype
from fastrl.errors import ShapeError

# Libraries multiply faster; exact mode asks for triton where their rows depend on each other.
PREFERENCE = ("torch", "triton")


def linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> Tensor:
    """linear by torch."""
    dtype = out_dtype or x.dtype
    return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def takes_kernel(keeps_rows: bool, x: Tensor) -> bool:
    """Whether a product whose rows are to keep their bits is made by this op's kernel now.

    Args:
        keeps_rows: The library's rows are known to depend on how many there are.
        x: The rows.
    """
    return keeps_rows and choose(
        "linear", "linear", PREFERENCE, x.device.type, x.dtype) == "triton"


def _check(
    x: Tensor, weight: Tensor, bias: Tensor | None, out_dtype: torch.dtype | None
) -> None:
    if weight.dim() != 2 or x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ShapeError(f"linear: expected x [..., D] and weight [O, D], got {list(x.shape)} and "
                         f"{list(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ShapeError(f"linear: expected bias [O] with O = {len(weight)}, got "
                         f"{list(bias.shape)}")
    tensors = {"x": x, "weight": weight} | ({} if bias is None else {"bias": bias})
    check_float("linear", **tensors)
    check_device("linear", tensors)
    if any(tensor.dtype != x.dtype for tensor in tensors.values()):
        came = ", ".join(f"{name} {tensor.dtype}" for name, tensor in tensors.items())
        raise ShapeError(f"linear: expected one dtype, got {came}; convert them with .to(dtype)")
    if out_dtype not in (None, x.dtype, wide_dtype(x.dtype)):
        raise ShapeError(f"linear: expected out_dtype {x.dtype} or {wide_dtype(x.dtype)}, got "
                         f"{out_dtype}")
    check_values("linear", **tensors)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *,
    out_dtype: torch.dtype | None = None, backend: str | None = None,
) -> Tensor:
    """The product of rows with a weight.

        y = x @ weight.T + bias

    With triton a row of y has the same bits however many other rows there are, which a library
    does not promise: it picks another kernel for another number of rows. Gradients are products by
    torch on every backend.

    Args:
        x: [..., D] float. Differentiable.
        weight: [O, D], dtype of x. Differentiable.
        bias: [O], dtype of x, or None. Differentiable.
        out_dtype: Of y: that of x, or float32, in which the sums are.
        backend: See fastrl.backends.
    Returns:
        y: [..., O], dtype of x or `out_dtype`; sums in float32, or float64 for float64.
            Differentiable, with triton once.
    Raises:
        ShapeError: when shapes, dtypes or devices do not fit together.
        BackendUnavailableError: when a backend is named that cannot run.
    Cost: 2DO operations per row forward, 4DO backward; with triton a pass costs at least that of 64
        rows.
    Example:
        >>> import torch
        >>> linear(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
        tensor([[11.,  2.]])
    """
    _check(x, weight, bias, out_dtype)
    name = choose("linear", "linear", PREFERENCE, x.device.type, x.dtype, backend)
    if name == "triton":
        from fastrl_kernels.triton import linear as triton_kernels

        return triton_kernels.linear(x, weight, bias, out_dtype)
    return linear_reference(x, weight, bias, out_dtype)

"""masked_sum, masked_mean: reductions over the True positions of a mask.

    mean = sum_i m_i v_i / sum_i m_i
"""

from torch import Tensor

from fastrl.backends import choose
from fastrl.checks import check_float, check_mask, check_shape, check_values, wide_dtype

PREFERENCE = ("torch",)


def masked_sum_reference(values: Tensor, mask: Tensor) -> Tensor:
    """masked_sum in plain torch."""
    return kept(values, mask).sum()


def masked_mean_reference(values: Tensor, mask: Tensor) -> Tensor:
    """masked_mean in plain torch."""
    return kept(values, mask).sum() / mask.sum().clamp(min=1)


def kept(values: Tensor, mask: Tensor) -> Tensor:
    """The values, 0 where masked; a NaN under the mask is dropped, not multiplied by 0."""
    return values.to(wide_dtype(values.dtype)).masked_fill(~mask, 0.0)


def _check(op: str, values: Tensor, mask: Tensor) -> None:
    check_shape(op, {"values": values, "mask": mask}, ndim=values.dim(), layout="[...]")
    check_float(op, values=values)
    check_mask(op, mask=mask)
    check_values(op, mask, values=values)


def masked_sum(values: Tensor, mask: Tensor, *, backend: str | None = None) -> Tensor:
    """Sum of the values where the mask is True.

    Args:
        values: [...] float. Any shape; masked positions may hold anything, NaN too.
        mask: [...] bool. True means keep.
        backend: See fastrl.backends.
    Returns:
        Scalar float32 (float64 for float64). Differentiable.
    Raises:
        ShapeError: when shapes differ or dtypes do not fit.
        BackendUnavailableError: when a backend is named that cannot run.
    Cost: reads values and mask once.
    Example:
        >>> import torch
        >>> float(masked_sum(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([True, False, True])))
        5.0
    """
    _check("masked_sum", values, mask)
    choose("masked_sum", "masked", PREFERENCE, values.device.type, values.dtype, backend)
    return masked_sum_reference(values, mask)


def masked_mean(values: Tensor, mask: Tensor, *, backend: str | None = None) -> Tensor:
    """Mean of the values where the mask is True; 0 where nothing is.

    Args:
        values: [...] float. Any shape; masked positions may hold anything, NaN too.
        mask: [...] bool. True means keep.
        backend: See fastrl.backends.
    Returns:
        Scalar float32 (float64 for float64). Differentiable.
    Raises:
        ShapeError: when shapes differ or dtypes do not fit.
        BackendUnavailableError: when a backend is named that cannot run.
    Cost: reads values and mask once.
    Example:
        >>> import torch
        >>> float(masked_mean(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([True, False, True])))
        2.5
    """
    _check("masked_mean", values, mask)
    choose("masked_mean", "masked", PREFERENCE, values.device.type, values.dtype, backend)
    return masked_mean_reference(values, mask)

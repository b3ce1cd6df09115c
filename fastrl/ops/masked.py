"""masked_sum, masked_mean, whiten: reductions over the True positions of a mask.

    mean = sum_i m_i v_i / sum_i m_i        w = (v - mean) / sqrt(var + 1e-8)
"""

from torch import Tensor

from fastrl.backends import choose
from fastrl.checks import check_float, check_mask, check_shape, check_values, wide_dtype

PREFERENCE = ("torch",)
VARIANCE_EPSILON = 1e-8


def masked_sum_reference(values: Tensor, mask: Tensor) -> Tensor:
    """masked_sum in plain torch."""
    return _kept(values, mask).sum()


def masked_mean_reference(values: Tensor, mask: Tensor) -> Tensor:
    """masked_mean in plain torch."""
    return _kept(values, mask).sum() / mask.sum().clamp(min=1)


def whiten_reference(values: Tensor, mask: Tensor, *, keep_mean: bool = False) -> Tensor:
    """whiten in plain torch, in two passes: a sum of squares would cancel."""
    mean = masked_mean_reference(values, mask)
    centred = _kept(values - mean, mask)
    variance = centred.square().sum() / mask.sum().clamp(min=1)
    whitened = centred * (variance + VARIANCE_EPSILON).rsqrt()
    return _kept(whitened + mean, mask) if keep_mean else whitened


def _kept(values: Tensor, mask: Tensor) -> Tensor:
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


def whiten(
    values: Tensor, mask: Tensor, *, keep_mean: bool = False, backend: str | None = None
) -> Tensor:
    """The values shifted and scaled to mean 0 and variance 1 over the True positions of the mask.

        w = (v - mean) / sqrt(var + 1e-8)        (+ mean with keep_mean)

    Differs from TRL: population variance, no Bessel correction.

    Args:
        values: [...] float. Any shape; masked positions may hold anything, NaN too.
        mask: [...] bool. True means keep.
        keep_mean: Scale only: the mean stays where it was.
        backend: See fastrl.backends.
    Returns:
        [...] float32 (float64 for float64), 0 where the mask is False. Differentiable.
    Raises:
        ShapeError: when shapes differ or dtypes do not fit.
        BackendUnavailableError: when a backend is named that cannot run.
    Cost: reads values three times, writes them once.
    Source: Ziegler et al. 2019 (arXiv 1909.08593), code.
    Example:
        >>> import torch
        >>> whiten(torch.tensor([1.0, 3.0, 9.0]), torch.tensor([True, True, False])).tolist()
        [-1.0, 1.0, 0.0]
    """
    _check("whiten", values, mask)
    choose("whiten", "masked", PREFERENCE, values.device.type, values.dtype, backend)
    return whiten_reference(values, mask, keep_mean=keep_mean)

"""whiten: mean 0 and variance 1 over the True positions of a mask.

    w = (v - mean) / sqrt(var + 1e-8)

What whitening needs of a tensor fits in three numbers per part: count, sum, and sum of squares
about the part's own mean. Such moments merge without the cancellation of plain sums of squares, so
a kernel that wrote the values (compute_gae) can spare the passes that look for mean and variance.
"""

import torch
from torch import Tensor

from fastrl.backends import choose
from fastrl.checks import (
    check_device,
    check_float,
    check_mask,
    check_shape,
    check_values,
    wide_dtype,
)
from fastrl.errors import ShapeError
from fastrl.ops.masked import kept, masked_mean_reference

# Order by measurement; no GPU result yet, so "auto" keeps the proven path.
PREFERENCE = ("torch", "triton")
VARIANCE_EPSILON = 1e-8


def whiten_reference(
    values: Tensor, mask: Tensor, *, keep_mean: bool = False, moments: Tensor | None = None
) -> Tensor:
    """whiten in plain torch, in two passes: a sum of squares would cancel."""
    values = values.to(wide_dtype(values.dtype))  # a scalar mean would leave half precision as is
    if moments is None:
        mean = masked_mean_reference(values, mask)
        centred = kept(values - mean, mask)
        variance = centred.square().sum() / mask.sum().clamp(min=1)
    else:
        mean, variance = merge_moments(moments.detach().to(values.dtype))
        centred = kept(values - mean, mask)
    whitened = centred * (variance + VARIANCE_EPSILON).rsqrt()
    return kept(whitened + mean if keep_mean else whitened, mask)


def row_moments(values: Tensor, mask: Tensor) -> Tensor:
    """[B, 3] of values [B, T]: count, sum, and sum of squares about the row's own mean."""
    values = kept(values, mask)
    count, total = mask.sum(dim=1).to(values.dtype), values.sum(dim=1)
    centred = kept(values - (total / count.clamp(min=1))[:, None], mask)
    return torch.stack([count, total, centred.square().sum(dim=1)], dim=1)


def merge_moments(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population variance of everything, from the moments [P, 3] of its parts.

    Source: Chan, Golub, LeVeque 1983, eq. 2.1, for any number of parts at once.
    """
    count, total, squares = moments.unbind(dim=1)
    size = count.sum().clamp(min=1)
    mean = total.sum() / size
    gap = total / count.clamp(min=1) - mean
    return mean, (squares + count * gap.square()).sum() / size


def check_moments(op: str, values: Tensor, moments: Tensor | None) -> None:
    """The moments are those of parts: [P, 3], floating point, where the values are."""
    if moments is None:
        return
    check_float(op, moments=moments)
    check_device(op, {"values": values, "moments": moments})
    if moments.dim() != 2 or moments.shape[1] != 3:
        raise ShapeError(f"{op}: expected moments [P, 3] as compute_gae returns them, got "
                         f"{list(moments.shape)}")


def _check(values: Tensor, mask: Tensor, moments: Tensor | None) -> None:
    op = "whiten"
    check_shape(op, {"values": values, "mask": mask}, ndim=values.dim(), layout="[...]")
    check_float(op, values=values)
    check_mask(op, mask=mask)
    check_moments(op, values, moments)
    check_values(op, mask, values=values)


def whiten(
    values: Tensor,
    mask: Tensor,
    *,
    keep_mean: bool = False,
    moments: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The values shifted and scaled to mean 0 and variance 1 over the True positions of the mask.

        w = (v - mean) / sqrt(var + 1e-8)        (+ mean with keep_mean)

    Differs from TRL: population variance, no Bessel correction.

    Args:
        values: [...] float. Any shape; masked positions may hold anything, NaN too.
        mask: [...] bool. True means keep.
        keep_mean: Scale only: the mean stays where it was.
        moments: [P, 3] float. Of the parts of the values, as compute_gae returns them: mean and
            variance come from these, which are constants to autograd. The values may be a piece
            of what they describe. None: from the values.
        backend: See fastrl.backends.
    Returns:
        [...] float32 (float64 for float64), 0 where the mask is False. Differentiable once (torch:
        any number of times).
    Raises:
        ShapeError: when shapes differ or dtypes do not fit.
        BackendUnavailableError: when a backend is named that cannot run.
    Cost: reads values three times, writes them once (triton: twice, with moments once).
    Source: Ziegler et al. 2019 (arXiv 1909.08593), code.
    Example:
        >>> whiten(torch.tensor([1.0, 3.0, 9.0]), torch.tensor([True, True, False])).tolist()
        [-1.0, 1.0, 0.0]
    """
    _check(values, mask, moments)
    name = choose("whiten", "whiten", PREFERENCE, values.device.type, values.dtype, backend)
    if name == "triton":
        from fastrl_kernels.triton import whiten as kernels

        return kernels.whiten(values, mask, keep_mean=keep_mean, moments=moments,
                              epsilon=VARIANCE_EPSILON)
    return whiten_reference(values, mask, keep_mean=keep_mean, moments=moments)

"""rms_norm and layer_norm of rows, alone or of the residual stream after an addition.

    rms_norm(x) = weight round(x / sqrt(mean(x^2) + epsilon))
    layer_norm(x) = weight (x - mean(x)) / sqrt(var(x) + epsilon) + bias

Means are float32 or wider. `round` is to the type of x: transformers' Llama rounds before it
multiplies by the weight. Shape letters: N rows, D width; any leading shape stands for N.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrl.backends import choose
from fastrl.checks import check_device, check_float, check_values, wide_dtype
from fastrl.errors import ShapeError

# Order by measurement; no GPU result yet, so "auto" keeps the proven path.
PREFERENCE = ("torch", "triton")


def rms_norm_reference(x: Tensor, weight: Tensor, *, epsilon: float) -> Tensor:
    """rms_norm in plain torch, with the casts of transformers' Llama."""
    wide = x.to(wide_dtype(x.dtype))
    normed = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)).to(x.dtype)
    return weight * normed if torch.is_grad_enabled() else normed.mul_(weight)


def add_rms_norm_reference(
    x: Tensor, residual: Tensor, weight: Tensor, *, epsilon: float
) -> tuple[Tensor, Tensor]:
    """add_rms_norm in plain torch."""
    total = x + residual
    return rms_norm_reference(total, weight, epsilon=epsilon), total


def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor, *, epsilon: float) -> Tensor:
    """layer_norm by torch."""
    return F.layer_norm(x, weight.shape, weight, bias, epsilon)


def add_layer_norm_reference(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, *, epsilon: float
) -> tuple[Tensor, Tensor]:
    """add_layer_norm by torch."""
    total = x + residual
    return layer_norm_reference(total, weight, bias, epsilon=epsilon), total


def _check(
    op: str, x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None
) -> None:
    if weight.dim() != 1 or x.shape[-1:] != weight.shape:
        raise ShapeError(f"{op}: expected x [..., D] and weight [D], got {list(x.shape)} and "
                         f"{list(weight.shape)}")
    if not x.is_floating_point():
        check_float(op, x=x)
    _check_like(op, x, "weight", weight, weight.shape)
    if bias is not None:
        _check_like(op, x, "bias", bias, weight.shape)
    if residual is not None:
        _check_like(op, x, "residual", residual, x.shape)
    check_values(op, x=x)


def _check_like(op: str, x: Tensor, name: str, tensor: Tensor, shape: torch.Size) -> None:
    if tensor.dtype != x.dtype or tensor.shape != shape:
        raise ShapeError(f"{op}: expected {name} {list(shape)} in {x.dtype}, the type of "
                         f"x, got {list(tensor.shape)} in {tensor.dtype}")
    if tensor.device != x.device:
        check_device(op, {"x": x, name: tensor})


def rms_norm(
    x: Tensor, weight: Tensor, *, epsilon: float, backend: str | None = None
) -> Tensor:
    """Each row divided by its root mean square, times the weight.

        y = weight round(x / sqrt(mean(x^2) + epsilon))

    Args:
        x: [..., D] float.
        weight: [D], type of x.
        epsilon: Added to the mean square.
        backend: See fastrl.backends.
    Returns:
        y: shape and type of x; the mean square is float32 or wider.
    Raises:
        ShapeError: when shapes, dtypes or devices do not fit together.
        BackendUnavailableError: when a backend is named that cannot run.
    Cost: in half precision 4 bytes per element forward, 6 backward; torch moves more, in float32.
    Source: Zhang & Sennrich 2019 (arXiv 1910.07467); casts as in transformers' LlamaRMSNorm.
    Example:
        >>> rms_norm(torch.tensor([[3.0, 4.0]]), torch.tensor([1.0, 10.0]), epsilon=0.0)
        tensor([[ 0.8485, 11.3137]])
    """
    _check("rms_norm", x, weight)
    name = choose("rms_norm", "norm", PREFERENCE, x.device.type, x.dtype, backend)
    if name == "triton":
        from fastrl_kernels.triton import norm

        return norm.rms_norm(x, weight, epsilon=epsilon)
    return rms_norm_reference(x, weight, epsilon=epsilon)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, *, epsilon: float, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """The next state of the residual stream and its rms_norm, in one pass.

        new_residual = round(x + residual)        y = rms_norm(new_residual)

    Args:
        x: [..., D] float. What a block adds to the stream.
        residual: [..., D], shape and type of x.
        weight: [D], type of x.
        epsilon: Added to the mean square.
        backend: See fastrl.backends.
    Returns:
        y, new_residual: shape and type of x each; gradients flow through both.
    Raises:
        ShapeError: when shapes, dtypes or devices do not fit together.
        BackendUnavailableError: when a backend is named that cannot run.
    Cost: in half precision 8 bytes per element forward and backward.
    Source: see rms_norm.
    Example:
        >>> one, weight = torch.tensor([[1.0, 2.0]]), torch.ones(2)
        >>> y, new_residual = add_rms_norm(one, torch.tensor([[2.0, 2.0]]), weight, epsilon=0.0)
        >>> y, new_residual
        (tensor([[0.8485, 1.1314]]), tensor([[3., 4.]]))
    """
    _check("add_rms_norm", x, weight, residual=residual)
    name = choose("add_rms_norm", "norm", PREFERENCE, x.device.type, x.dtype, backend)
    if name == "triton":
        from fastrl_kernels.triton import norm

        return norm.add_rms_norm(x, residual, weight, epsilon=epsilon)
    return add_rms_norm_reference(x, residual, weight, epsilon=epsilon)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, *, epsilon: float, backend: str | None = None
) -> Tensor:
    """Each row less its mean, divided by its standard deviation, times the weight plus the bias.

        y = weight (x - mean(x)) / sqrt(var(x) + epsilon) + bias        var divides by D

    Args:
        x: [..., D] float.
        weight, bias: [D] each, type of x.
        epsilon: Added to the variance.
        backend: See fastrl.backends.
    Returns:
        y: shape and type of x, rounded once.
    Raises:
        ShapeError: when shapes, dtypes or devices do not fit together.
        BackendUnavailableError: when a backend is named that cannot run.
    Cost: in half precision 4 bytes per element forward, 6 backward.
    Source: Ba et al. 2016 (arXiv 1607.06450).
    Example:
        >>> weight, bias = torch.tensor([1.0, 10.0]), torch.tensor([0.0, 0.5])
        >>> layer_norm(torch.tensor([[2.0, 4.0]]), weight, bias, epsilon=0.0)
        tensor([[-1.0000, 10.5000]])
    """
    _check("layer_norm", x, weight, bias)
    name = choose("layer_norm", "norm", PREFERENCE, x.device.type, x.dtype, backend)
    if name == "triton":
        from fastrl_kernels.triton import norm

        return norm.layer_norm(x, weight, bias, epsilon=epsilon)
    return layer_norm_reference(x, weight, bias, epsilon=epsilon)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, *, epsilon: float,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The next state of the residual stream and its layer_norm, in one pass.

        new_residual = round(x + residual)        y = layer_norm(new_residual)

    Args:
        x: [..., D] float. What a block adds to the stream.
        residual: [..., D], shape and type of x.
        weight, bias: [D] each, type of x.
        epsilon: Added to the variance.
        backend: See fastrl.backends.
    Returns:
        y, new_residual: shape and type of x each; gradients flow through both.
    Raises:
        ShapeError: when shapes, dtypes or devices do not fit together.
        BackendUnavailableError: when a backend is named that cannot run.
    Cost: in half precision 8 bytes per element forward and backward.
    Source: see layer_norm.
    Example:
        >>> one, weight, bias = torch.tensor([[1.0, 2.0]]), torch.ones(2), torch.zeros(2)
        >>> y, new_residual = add_layer_norm(one, one, weight, bias, epsilon=0.0)
        >>> y, new_residual
        (tensor([[-1.,  1.]]), tensor([[2., 4.]]))
    """
    _check("add_layer_norm", x, weight, bias, residual)
    name = choose("add_layer_norm", "norm", PREFERENCE, x.device.type, x.dtype, backend)
    if name == "triton":
        from fastrl_kernels.triton import norm

        return norm.add_layer_norm(x, residual, weight, bias, epsilon=epsilon)
    return add_layer_norm_reference(x, residual, weight, bias, epsilon=epsilon)

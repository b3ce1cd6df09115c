"""swiglu and gelu: what stands between the two projections of a feed-forward block.

    swiglu(gate, up) = round(silu(gate)) up        silu(x) = x / (1 + exp(-x))
    gelu(x) = x Phi(x), or with Phi(x) ~ (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) / 2

`round` is to the type of the tensor: torch rounds silu before the product. I: width inside the
block; any leading shape stands for rows.
"""

from typing import Literal

import torch
from torch import Tensor

from fastrl.backends import choose
from fastrl.checks import check_float, check_values
from fastrl.errors import ConfigError, ShapeError

# Order by measurement; no GPU result yet, so "auto" keeps the proven path.
PREFERENCE = ("torch", "triton")


def swiglu_reference(gate_up: Tensor) -> Tensor:
    """swiglu by torch."""
    gate, up = gate_up.chunk(2, dim=-1)
    gated = torch.nn.functional.silu(gate)
    needs_gated = gate_up.requires_grad and torch.is_grad_enabled()  # by the gradient of up
    return gated * up if needs_gated else gated.mul_(up)


def gelu_reference(x: Tensor, *, approximate: str = "none") -> Tensor:
    """gelu by torch."""
    return torch.nn.functional.gelu(x, approximate=approximate)


def _check(op: str, x: Tensor, approximate: str | None = None) -> None:
    """`approximate`: of gelu; None means swiglu, whose rows have two halves."""
    if x.dim() == 0 or (approximate is None and x.shape[-1] % 2):
        layout = "gate_up [..., 2I]" if approximate is None else "x [..., I]"
        raise ShapeError(f"{op}: expected {layout}, got {list(x.shape)}")
    if approximate not in (None, "none", "tanh"):
        raise ConfigError(f"{op}: expected approximate none or tanh, got {approximate!r}")
    if not x.is_floating_point():
        check_float(op, x=x)
    check_values(op, x=x)


def swiglu(gate_up: Tensor, *, backend: str | None = None) -> Tensor:
    """The gated unit of a feed-forward block, from one tensor that holds gate, then up.

        y = round(silu(gate)) up        silu(x) = x / (1 + exp(-x))

    Args:
        gate_up: [..., 2I] float. Gate in the first half of each row, up in the second.
        backend: See fastrl.backends.
    Returns:
        y: [..., I], type of gate_up.
    Raises:
        ShapeError: when rows have no two halves, or are not floating point.
        BackendUnavailableError: when a backend is named that cannot run.
    Cost: in half precision 6 bytes per output element forward, 10 backward; torch keeps and moves
        silu(gate) besides.
    Source: Shazeer 2020 (arXiv 2002.05202).
    Example:
        >>> swiglu(torch.tensor([[1.0, -1.0, 2.0, 10.0]]))
        tensor([[ 1.4621, -2.6894]])
    """
    _check("swiglu", gate_up)
    name = choose("swiglu", "activation", PREFERENCE, gate_up.device.type, gate_up.dtype, backend)
    if name == "triton":
        from fastrl_kernels.triton import activation

        return activation.swiglu(gate_up)
    return swiglu_reference(gate_up)


def gelu(
    x: Tensor, *, approximate: Literal["none", "tanh"] = "none", backend: str | None = None
) -> Tensor:
    """The Gaussian error linear unit.

        y = x Phi(x)        tanh: Phi(x) ~ (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) / 2

    Args:
        x: [..., I] float.
        approximate: "none" (GPT-NeoX) or "tanh" (GPT-2).
        backend: See fastrl.backends.
    Returns:
        y: shape and type of x.
    Raises:
        ShapeError: when x is not floating point.
        ConfigError: when there is no such form.
        BackendUnavailableError: when a backend is named that cannot run.
    Cost: in half precision 4 bytes per element forward, 6 backward.
    Source: Hendrycks & Gimpel 2016 (arXiv 1606.08415).
    Example:
        >>> gelu(torch.tensor([1.0, -1.0]))
        tensor([ 0.8413, -0.1587])
        >>> gelu(torch.tensor([1.0, -1.0]), approximate="tanh")
        tensor([ 0.8412, -0.1588])
    """
    _check("gelu", x, approximate)
    name = choose("gelu", "activation", PREFERENCE, x.device.type, x.dtype, backend)
    if name == "triton":
        from fastrl_kernels.triton import activation

        return activation.gelu(x, approximate=approximate)
    return gelu_reference(x, approximate=approximate)

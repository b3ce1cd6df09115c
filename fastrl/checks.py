"""Argument checks that several ops share.

None looks at a tensor's values, except `check_values`, `check_range` and `check_offsets` where
FASTRL_CHECK is 1.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fastrl.environment import checks_values
from fastrl.errors import ConfigError, NumericsError, ShapeError


def check_shape(op: str, tensors: Mapping[str, Tensor], *, ndim: int, layout: str) -> None:
    """All tensors have `ndim` dimensions, one shape and one device.

    Raises:
        ShapeError: names the op, the layout, and the shapes that came.
    """
    first = next(iter(tensors.values()))
    if first.dim() != ndim or any(t.shape != first.shape for t in tensors.values()):
        came = ", ".join(f"{name} {list(t.shape)}" for name, t in tensors.items())
        raise ShapeError(f"{op}: expected one shape {layout} for {', '.join(tensors)}; got {came}")
    check_device(op, tensors)


def check_like(
    op: str, name: str, tensors: Sequence[Tensor], shapes: Sequence[torch.Size],
    dtype: torch.dtype, *, contiguous: bool,
) -> None:
    """A list of tensors has these shapes and this dtype, and is contiguous where that is asked.

    Raises:
        ShapeError: names the op, the list, the place in it, and what came.
    """
    if len(tensors) != len(shapes):
        raise ShapeError(f"{op}: expected {len(shapes)} {name}, one for each parameter, got "
                         f"{len(tensors)}")
    for i, (tensor, shape) in enumerate(zip(tensors, shapes, strict=True)):
        if tensor.shape != shape or tensor.dtype != dtype:
            raise ShapeError(f"{op}: expected {name}[{i}] {list(shape)} {dtype}, got "
                             f"{list(tensor.shape)} {tensor.dtype}")
        if contiguous and not tensor.is_contiguous():
            raise ShapeError(f"{op}: expected {name}[{i}] to be contiguous, got strides "
                             f"{list(tensor.stride())}; make it with torch.zeros")


def check_device(op: str, tensors: Mapping[str, Tensor]) -> None:
    """All tensors live on one device."""
    first = next(iter(tensors.values()))
    if any(t.device != first.device for t in tensors.values()):
        came = ", ".join(f"{name} on {t.device}" for name, t in tensors.items())
        raise ShapeError(f"{op}: expected all tensors on one device; got {came}; move them with "
                         ".to(device)")


def check_float(op: str, **tensors: Tensor) -> None:
    """All tensors are floating point."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ShapeError(f"{op}: expected {name} to be floating point, got {tensor.dtype}; "
                             f"convert it with .float()")


def check_mask(op: str, **masks: Tensor) -> None:
    """All masks are bool."""
    for name, mask in masks.items():
        if mask.dtype != torch.bool:
            raise ShapeError(f"{op}: expected {name} to be bool, True means keep, got "
                             f"{mask.dtype}; convert it with .bool()")


def check_index(op: str, **tensors: Tensor) -> None:
    """All tensors are int64."""
    for name, tensor in tensors.items():
        if tensor.dtype != torch.int64:
            raise ShapeError(f"{op}: expected {name} to be int64, got {tensor.dtype}; convert it "
                             "with .long()")


def check_values(op: str, mask: Tensor | None = None, **tensors: Tensor) -> None:
    """Where FASTRL_CHECK is 1, no tensor holds NaN in a row that counts.

    Args:
        op: Name of the op, for the message.
        mask: [...] bool, True for what counts; its shape begins that of the tensors. None: all.
        tensors: Floating point.
    Raises:
        NumericsError: names the op, the argument, how many and where.
    """
    if torch.compiler.is_compiling() or not checks_values():
        return
    for name, tensor in tensors.items():
        bad = tensor.detach().isnan()
        if mask is not None:
            bad = bad & mask.reshape(mask.shape + (1,) * (bad.dim() - mask.dim()))
        if bad.any():
            raise NumericsError(
                f"{op}: expected {name} without NaN, got {int(bad.sum())} in "
                f"{list(tensor.shape)}, the first at {bad.nonzero()[0].tolist()}; look at what "
                "computed it (FASTRL_CHECK=1)")


def check_range(
    op: str, num_values: int, *, lowest: int = 0, mask: Tensor | None = None, **tensors: Tensor
) -> None:
    """Where FASTRL_CHECK is 1, all integers lie from `lowest` to `num_values` - 1.

    Args:
        mask: Shape of the tensors, bool; False: may hold anything. None: all count.

    Raises:
        ShapeError: names the op, the argument, the value and where it is.
    """
    if torch.compiler.is_compiling() or not checks_values():
        return
    for name, tensor in tensors.items():
        bad = (tensor < lowest) | (tensor >= num_values)
        if mask is not None:
            bad &= mask
        if bad.any():
            place = bad.nonzero()[0].tolist()
            raise ShapeError(
                f"{op}: expected {name} from {lowest} to {num_values - 1}, got "
                f"{int(tensor[tuple(place)])} at {place}; look at what computed it "
                "(FASTRL_CHECK=1)")


def check_offsets(op: str, num_rows: int, **offsets: Tensor) -> None:
    """Where FASTRL_CHECK is 1, all offsets [B+1] rise from 0 to `num_rows`.

    Raises:
        ShapeError: names the op, the argument and what came.
    """
    if torch.compiler.is_compiling() or not checks_values():
        return
    for name, tensor in offsets.items():
        given = tensor.tolist()
        if given[0] != 0 or given[-1] != num_rows or given != sorted(given):
            raise ShapeError(
                f"{op}: expected {name} to rise from 0 to {num_rows}, the number of rows, got "
                f"{given if len(given) < 10 else [*given[:4], '...', *given[-4:]]}; look at what "
                "computed it (FASTRL_CHECK=1)")


def check_positive(op: str, **numbers: float | None) -> None:
    """All numbers that are given are above 0.

    Raises:
        ConfigError: names the op and the argument.
    """
    for name, number in numbers.items():
        if number is not None and not number > 0:
            raise ConfigError(f"{op}: expected {name} above 0, got {number}; change {name}")


def check_not_negative(op: str, **numbers: float) -> None:
    """All numbers are at least 0.

    Raises:
        ConfigError: names the op and the argument.
    """
    for name, number in numbers.items():
        if not number >= 0:
            raise ConfigError(f"{op}: expected {name} of at least 0, got {number}; change {name}")


def check_share(op: str, **numbers: float) -> None:
    """All numbers lie in [0, 1].

    Raises:
        ConfigError: names the op and the argument.
    """
    for name, number in numbers.items():
        if not 0 <= number <= 1:
            raise ConfigError(f"{op}: expected {name} from 0 to 1, got {number}; change {name}")


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which an op computes: float32, or float64 for float64 inputs."""
    return torch.promote_types(dtype, torch.float32)


def check_resident(owner: str, tensor: Tensor) -> None:
    """Raise ConfigError for a tensor that is parked on the host (`fastrl.memory.parking`)."""
    if tensor.numel() and not tensor.untyped_storage().nbytes():
        which = getattr(type(tensor), "parked_from", "parked ones")  # see fastrl.memory.guard
        raise ConfigError(f"{owner}: expected weights in memory, got {which}; use it inside "
                          "`with trainer.residents.phase(...)`, or set parking to off")

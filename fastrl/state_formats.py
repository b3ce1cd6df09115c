"""Optimiser state in fewer bits: a bf16 weight with the bits it drops, and 8-bit moments.

The arithmetic is integers and single float32 operations that every machine rounds alike, so the
kernels of `fastrl_kernels` store the same bits.
"""

import numpy as np
import torch
from torch import Tensor

BLOCK_SIZE = 256
"""Neighbours in memory that share one scale of an 8-bit moment."""


def split_master(master: Tensor) -> tuple[Tensor, Tensor]:
    """Split float32 values into a bf16 weight and the 16 bits that it drops.

    The weight is the nearest bf16 (halves go away from zero), the remainder is the signed distance
    of the bit patterns: together they are the float32 value exactly, in 4 bytes. NaN stays NaN,
    without its payload.

    Args:
        master: any shape, float32.
    Returns:
        weight: bfloat16, remainder: int16, same shape.
    """
    bits = master.view(torch.int32)
    # A GPU's NaN is 0x7fffffff: rounded up it would become -0.
    high = torch.where(master.isnan(), (bits >> 16) | 0x40, (bits + 0x8000) >> 16)
    remainder = bits - (high << 16)
    return high.to(torch.int16).view(torch.bfloat16), remainder.to(torch.int16)


def join_master(weight: Tensor, remainder: Tensor) -> Tensor:
    """The float32 values that `split_master` split, bit for bit."""
    high = weight.view(torch.int16).to(torch.int32) << 16
    return (high + remainder.to(torch.int32)).view(torch.float32)


def exact_sqrt(values: Tensor, out: Tensor) -> Tensor:
    """Square roots, correctly rounded: on a CPU torch's are off by one bit in half a percent.

    Args:
        values, out: One shape and dtype, no gradient; `out` may be `values`. numpy gets hold of
            the memory of `out`, which can then not be parked any more: it has to be a temporary.
    """
    if values.device.type != "cpu":
        return torch.sqrt(values, out=out)
    if out is not values:
        out.copy_(values)
    np.sqrt(out.numpy(), out=out.numpy())
    return out


def code_dtype(signed: bool) -> torch.dtype:
    """int8 for a first moment, which has a sign; uint8 for the root of a second moment."""
    return torch.int8 if signed else torch.uint8


def num_blocks(numel: int) -> int:
    """Scales that `numel` values need."""
    return -(-numel // BLOCK_SIZE)


def encode_moment(values: Tensor, *, signed: bool) -> tuple[Tensor, Tensor]:
    """Store float32 values in 8 bits each, a square-law code relative to their block's largest.

        x = |value| / scale        code = sign(value) floor(levels sqrt(x) + 1/2)
        scale = max |value| over 256 neighbours        levels = 127 signed, 255 unsigned

    The error is at most scale (sqrt(x) / levels + 1 / levels^2). Relative to the value that is 0.8%
    at the block's largest, 2.5% at 1/10 of it and 8% at 1/100 for signed codes, half of that for
    unsigned ones. Below 1.6e-5 of the largest (unsigned: 3.9e-6) no digit is left: a signed value
    becomes 0; an unsigned one becomes code 1, so that no denominator vanishes.

    Args:
        values: [n] float32, not negative where `signed` is False.
        signed: int8 codes from -127 to 127; else uint8 codes from 0 to 255.
    Returns:
        codes: [n]; scales: [ceil(n / 256)] float32, NaN for a block that holds NaN or an infinity.
    """
    levels = 127 if signed else 255
    padded = values.new_zeros(num_blocks(len(values)) * BLOCK_SIZE)
    padded[:len(values)] = values
    blocks = padded.view(-1, BLOCK_SIZE)
    magnitudes = blocks.abs()
    largest = magnitudes.amax(dim=1, keepdim=True)
    scales = torch.where(largest.isfinite(), largest, torch.nan)
    shares = magnitudes.div_(scales)
    codes = exact_sqrt(shares, out=shares).mul_(levels).add_(0.5).floor_()
    if signed:
        codes = codes.copysign_(blocks)
    else:
        codes = codes.maximum((blocks > 0).to(codes.dtype))
    codes = torch.where(scales > 0, codes, 0.0)
    return codes.view(-1)[:len(values)].to(code_dtype(signed)), scales.view(-1)


def decode_moment(codes: Tensor, scales: Tensor) -> Tensor:
    """The float32 values [n] that `encode_moment` stored: sign(code) code^2 scale / levels^2."""
    levels = 127 if codes.dtype == torch.int8 else 255
    numbers = codes.float()
    squares = numbers * numbers.abs()
    units = (scales / (levels * levels)).repeat_interleave(BLOCK_SIZE)[:len(codes)]
    return squares.mul_(units)

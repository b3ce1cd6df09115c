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
    weight = torch.empty_like(master, dtype=torch.bfloat16)
    remainder = torch.empty_like(master, dtype=torch.int16)
    split_master_into(master, weight, remainder, torch.empty_like(master),
                      torch.empty_like(master), torch.empty_like(master, dtype=torch.bool))
    return weight, remainder


def split_master_into(
    master: Tensor, weight: Tensor, remainder: Tensor, one: Tensor, other: Tensor, mask: Tensor
) -> None:
    """`split_master` without new memory: `one`, `other` (float32) and `mask` (bool) are scratch."""
    bits, high, spare = (x.view(torch.int32) for x in (master, one, other))
    torch.bitwise_right_shift(torch.add(bits, 0x8000, out=high), 16, out=high)
    # A GPU's NaN is 0x7fffffff: rounded up it would become -0.
    torch.bitwise_right_shift(bits, 16, out=spare).bitwise_or_(0x40)
    torch.where(torch.ne(master, master, out=mask), spare, high, out=high)
    weight.view(torch.int16).copy_(high)
    remainder.copy_(torch.sub(bits, high.bitwise_left_shift_(16), out=spare))


def join_master(weight: Tensor, remainder: Tensor) -> Tensor:
    """The float32 values that `split_master` split, bit for bit."""
    master = torch.empty_like(weight, dtype=torch.float32)
    join_master_into(weight, remainder, master, torch.empty_like(master))
    return master


def join_master_into(weight: Tensor, remainder: Tensor, master: Tensor, one: Tensor) -> None:
    """`join_master` into `master` without new memory; `one` is scratch, float32."""
    low = one.view(torch.int32)
    low.copy_(remainder)
    master.view(torch.int32).copy_(weight.view(torch.int16)).bitwise_left_shift_(16).add_(low)


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
    padded = values.new_zeros(num_blocks(len(values)) * BLOCK_SIZE)
    padded[:len(values)] = values
    codes = torch.empty_like(values, dtype=code_dtype(signed))
    scales = values.new_empty(num_blocks(len(values)))
    encode_moment_into(padded, codes, scales, torch.empty_like(padded), torch.empty_like(padded),
                       torch.empty_like(scales, dtype=torch.bool))
    return codes, scales


def encode_moment_into(
    padded: Tensor, codes: Tensor, scales: Tensor, one: Tensor, other: Tensor, mask: Tensor
) -> None:
    """`encode_moment` into `codes` (int8: signed) and `scales` without new memory.

    Args:
        padded: The values, then zeros to the end of the last block; so long are `one` and `other`.
        one, other: Scratch, float32.
        mask: Scratch, bool, one for each block.
    """
    signed = codes.dtype == torch.int8
    blocks, shares = padded.view(-1, BLOCK_SIZE), one.view(-1, BLOCK_SIZE)
    column, is_off = scales[:, None], mask[:, None]
    torch.amax(torch.abs(blocks, out=shares), dim=1, keepdim=True, out=column)
    column.masked_fill_(torch.lt(column, torch.inf, out=is_off).logical_not_(), torch.nan)
    exact_sqrt(shares.div_(column), out=shares).mul_(127 if signed else 255).add_(0.5).floor_()
    if signed:
        shares.copysign_(blocks)
    else:  # at least 1 for what is above 0
        torch.maximum(shares, torch.sign(blocks, out=other.view(-1, BLOCK_SIZE)), out=shares)
    shares.masked_fill_(torch.gt(column, 0, out=is_off).logical_not_(), 0.0)
    codes.copy_(one[:len(codes)])


def decode_moment(codes: Tensor, scales: Tensor) -> Tensor:
    """The float32 values [n] that `encode_moment` stored: sign(code) code^2 scale / levels^2."""
    padded = scales.new_empty(len(scales) * BLOCK_SIZE)
    decode_moment_into(codes, scales, padded, torch.empty_like(padded), torch.empty_like(scales))
    return padded[:len(codes)]


def decode_moment_into(
    codes: Tensor, scales: Tensor, padded: Tensor, one: Tensor, units: Tensor
) -> None:
    """`decode_moment` into whole blocks, 0 behind the last value, without new memory.

    Args:
        padded: [256 len(scales)] float32.
        one, units: Scratch, float32, of the sizes of `padded` and `scales`.
    """
    levels = 127 if codes.dtype == torch.int8 else 255
    padded[len(codes):].zero_()
    padded[:len(codes)].copy_(codes)
    padded.mul_(torch.abs(padded, out=one))
    padded.view(-1, BLOCK_SIZE).mul_(torch.div(scales, levels * levels, out=units)[:, None])

"""bf16 weights with remainders, and 8-bit codes: exact bits, bounds of the error, NaN stays NaN."""

import numpy as np
import pytest
import torch

from fastrl.state_formats import (
    decode_moment,
    encode_moment,
    exact_sqrt,
    join_master,
    num_blocks,
    split_master,
)


def bits(values: torch.Tensor) -> torch.Tensor:
    return values.view(torch.int32)


def test_split_master_is_exact_and_rounds_to_nearest() -> None:
    master = torch.cat([
        torch.randn(10_000),
        torch.tensor([0.0, -0.0, 1e-40, -1e-40, 1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 3e38]),
    ])
    weight, remainder = split_master(master)
    assert weight.dtype == torch.bfloat16 and remainder.dtype == torch.int16
    assert torch.equal(bits(join_master(weight, remainder)), bits(master))
    nearest = (master - master.bfloat16().float()).abs()
    assert torch.equal((master - weight.float()).abs(), nearest)


def test_no_nan_becomes_a_number() -> None:
    # The NaN of a CPU, that of a GPU, its negative, the smallest, one halfway; the infinities.
    patterns = [-0x400000, 0x7FFFFFFF, -1, 0x7F800001, 0x7F808000, 0x7F800000, -0x800000]
    weight, remainder = split_master(torch.tensor(patterns, dtype=torch.int32).view(torch.float32))
    assert weight.isnan().tolist() == [True] * 5 + [False] * 2
    assert join_master(weight, remainder).isnan().tolist() == [True] * 5 + [False] * 2
    assert weight[5:].tolist() == [float("inf"), float("-inf")]


def test_codes_are_literal_numbers() -> None:
    values = torch.tensor([1.0, -1.0, 0.25, -0.01, 1e-5, 0.0])
    codes, scales = encode_moment(values, signed=True)
    assert codes.dtype == torch.int8 and codes.tolist() == [127, -127, 64, -13, 0, 0]
    assert scales.tolist() == [1.0]
    codes, scales = encode_moment(2 * values.abs(), signed=False)
    assert codes.dtype == torch.uint8 and codes.tolist() == [255, 255, 128, 26, 1, 0]
    assert scales.tolist() == [2.0]
    torch.testing.assert_close(decode_moment(codes, scales),
                               2 * torch.tensor([255, 255, 128, 26, 1, 0]) ** 2 / 65025)


@pytest.mark.parametrize("signed, levels", [(True, 127), (False, 255)])
@pytest.mark.parametrize("numel", [1, 255, 256, 257, 1000])
def test_error_is_within_the_bound(numel: int, signed: bool, levels: int) -> None:
    values = torch.randn(numel) * 10.0 ** torch.randint(-6, 7, (numel,))
    values = values if signed else values.abs()
    codes, scales = encode_moment(values, signed=signed)
    assert codes.shape == (numel,) and scales.shape == (num_blocks(numel),)
    each = scales.double().repeat_interleave(256)[:numel]
    error = (decode_moment(codes, scales).double() - values.double()).abs()
    share = values.double().abs() / each
    assert (error <= each * (share.sqrt() / levels + 1 / levels**2) * (1 + 1e-6)).all()
    # What the docstring says of 1, 1/10 and 1/100 of the largest.
    for least, relative in ((1.0, 1.0), (0.1, 2.6), (0.01, 8.3)):
        large = share >= least
        assert (error[large] <= values[large].abs() * relative / 100 * 127 / levels).all()
    assert (codes[values == 0] == 0).all()
    if not signed:
        assert (codes[values > 0] > 0).all()


def test_codes_are_stable() -> None:
    codes, scales = encode_moment(torch.randn(1000), signed=True)
    again, same = encode_moment(decode_moment(codes, scales), signed=True)
    assert torch.equal(again, codes)
    torch.testing.assert_close(same, scales, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_block_with_nan_or_infinity_is_nan(bad: float) -> None:
    values = torch.ones(600)
    values[300] = bad
    codes, scales = encode_moment(values, signed=False)
    assert scales.isnan().tolist() == [False, True, False]
    back = decode_moment(codes, scales)
    assert back[256:512].isnan().all() and (back[:256] == 1).all() and (back[512:] == 1).all()


def test_zeros() -> None:
    codes, scales = encode_moment(torch.zeros(300), signed=True)
    assert (codes == 0).all() and scales.tolist() == [0.0, 0.0]
    assert (decode_moment(codes, scales) == 0).all()


def test_exact_sqrt_is_correctly_rounded() -> None:
    values = torch.rand(100_000) * 10.0 ** torch.randint(-30, 30, (100_000,))
    exact = torch.from_numpy(np.sqrt(values.double().numpy())).float()
    assert torch.equal(exact_sqrt(values, out=torch.empty_like(values)), exact)

"""How many rows a forward pass needs so that each row's bits do not depend on the others.

A matrix library picks other code for a few rows than for many, and sums in another order. From
some row count on it no longer does. `smallest_invariant_rows` finds that count by trying, for the
shapes, dtype and threads at hand, and the engine never runs fewer rows than that. Where no count
helps, the decoder's matrices are multiplied by the kernel of `fastrl.ops.linear`, if that passes.
"""

import logging
from collections.abc import Callable, Iterable
from functools import cache, partial
from math import gcd

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrl.backends import choose
from fastrl.models import CausalLM
from fastrl.models.by_input import by_input as stored_by_input
from fastrl.models.by_input import is_small, matrices
from fastrl.models.linear import Linear
from fastrl.ops.linear import PREFERENCE, linear

logger = logging.getLogger("fastrl")

ROW_COUNTS = (48, 32, 24, *range(16, 0, -1))
"""Row counts that are tried, from many to few, against `MANY_ROWS`."""
MANY_ROWS = 64
"""What a CPU's counts are compared with, and the most that a pass is padded to."""
GPU_ROW_COUNTS = (*range(1, MANY_ROWS + 1), *(128 << i for i in range(7)))
"""Up to 8192; compared with the largest count whose results fit MAX_RESULT_BYTES."""
MAX_RESULT_BYTES = 256 * 2**20
VECTOR_BYTES = 128
"""What elementwise functions take at a time: two registers of 512 bits."""
MAX_OUTPUTS = 8192
"""Columns of a product that are tried: more change the blocking no further, and cost time."""


def weight_shapes(model: CausalLM) -> set[tuple[int, int]]:
    """(outputs, inputs) of every matrix that rows are multiplied with, the LM head included."""
    weights = [module.weight for module in matrices(model)]
    return {(int(weight.shape[0]), int(weight.shape[1])) for weight in weights}


def multiplies_by_input(model: CausalLM) -> bool:
    """True where the engine multiplies with copies stored by input: a small model on a CPU, where
    rows of every product get the bits that the weights themselves give them.
    """
    return is_small(model) and all(
        smallest_invariant_rows(shape, torch.float32, torch.get_num_threads(), True) is not None
        for shape in weight_shapes(model))


def invariant_rows(model: CausalLM, *, by_input: bool = False) -> int:
    """Rows that every forward pass of `model` should have, at least.

    Args:
        by_input: The pass multiplies with copies stored by input.
    Returns:
        The largest count that any shape needs, of those that the library multiplies.
    """
    weight = model.lm_head.weight
    shapes = weight_shapes(model) - shapes_of_kernel(model, by_input=by_input)
    return max(_checked(shape, weight.dtype, weight.device, by_input) for shape in sorted(shapes))


def shapes_of_kernel(model: CausalLM, *, by_input: bool = False) -> set[tuple[int, int]]:
    """Shapes that fail in the library for every number of rows and pass in the kernel of `linear`.

    Matrices of the native decoder only, and no shape that the LM head has too. To be called in
    exact mode, which prefers that kernel; without a GPU there is none.
    """
    weight, shapes, others = model.lm_head.weight, set[tuple[int, int]](), set[tuple[int, int]]()
    for module in matrices(model):
        of_module = (int(module.weight.shape[0]), int(module.weight.shape[1]))
        (shapes if isinstance(module, Linear) else others).add(of_module)
    return {shape for shape in shapes - others
            if least_rows(shape, weight.dtype, weight.device, by_input) is None
            and choose("linear", "linear", PREFERENCE, weight.device.type, weight.dtype) == "triton"
            and kernel_passes(shape, weight.dtype, weight.device)}


def choose_products(model: CausalLM, *, by_input: bool = False) -> None:
    """Decide for each matrix of the native decoder who multiplies with it, in exact mode."""
    shapes = shapes_of_kernel(model, by_input=by_input)
    for shape in sorted(shapes):
        _log_once(shape, model.lm_head.weight.dtype)
    for module in model.modules():
        if isinstance(module, Linear):
            module.keeps_rows = tuple(module.weight.shape) in shapes


def row_multiple(model: CausalLM) -> int:
    """Rows of a forward pass should be a multiple of this.

    An elementwise function is cut into one piece per thread, and the last elements of a piece,
    fewer than fill VECTOR_BYTES, take other code with other last bits. With a multiple of this
    many rows no piece has such elements.
    """
    weight = model.lm_head.weight
    if weight.device.type != "cpu":
        return 1
    vector = VECTOR_BYTES // weight.element_size()
    widths = {outputs for outputs, _ in weight_shapes(model)}
    return torch.get_num_threads() * max(vector // gcd(vector, width) for width in widths)


def _checked(
    shape: tuple[int, int], dtype: torch.dtype, device: torch.device, by_input: bool
) -> int:
    """Rows for one shape; 1 with a warning where no count helps."""
    rows = least_rows(shape, dtype, device, by_input)
    if rows is None:
        _warn_once(shape, dtype)
        return 1
    return rows


@cache
def _warn_once(shape: tuple[int, int], dtype: torch.dtype) -> None:
    logger.warning(
        "rows of a product with a %d x %d matrix in %s depend on the number of rows, up to %d: "
        "generated tokens may change with the batch where two are almost equally likely",
        *shape, str(dtype).removeprefix("torch."), MANY_ROWS)


@cache
def _log_once(shape: tuple[int, int], dtype: torch.dtype) -> None:
    logger.info(
        "exact mode: products with a %d x %d matrix in %s take the kernel of linear (triton): the "
        "library's rows depend on the number of rows, the kernel's do not",
        *shape, str(dtype).removeprefix("torch."))


def least_rows(
    shape: tuple[int, int], dtype: torch.dtype, device: torch.device, by_input: bool = False
) -> int | None:
    """Rows from which on those of `x @ weight.T` have the same bits; None: no count tried helps."""
    if device.type == "cpu":
        return smallest_invariant_rows(shape, dtype, torch.get_num_threads(), by_input)
    return smallest_invariant_rows_on_gpu(shape, dtype, device)


@cache
@torch.no_grad()
def smallest_invariant_rows_on_gpu(
    shape: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> int | None:
    """As `smallest_invariant_rows`, over GPU_ROW_COUNTS as far as the results fit.

    Returns:
        The count, at most MANY_ROWS, or None where more than that are needed.
    """
    count = _first_equal_count(F.linear, shape, dtype, device)
    return count if count is not None and count <= MANY_ROWS else None


@cache
@torch.no_grad()
def kernel_passes(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> bool:
    """Whether rows of `linear` in triton have the same bits from a single one on."""
    return _first_equal_count(partial(linear, backend="triton"), shape, dtype, device) == 1


def _first_equal_count(
    multiply: Callable[[Tensor, Tensor], Tensor], shape: tuple[int, int], dtype: torch.dtype,
    device: torch.device,
) -> int | None:
    """From how many rows on those of a product agree with those of the most that fit."""
    outputs, inputs = shape
    generator = torch.Generator(device).manual_seed(0)
    most = max(MANY_ROWS, min(max(GPU_ROW_COUNTS), MAX_RESULT_BYTES // (4 * outputs)))
    weight, rows = ((torch.rand(size, inputs, generator=generator, device=device) - 0.5).to(dtype)
                    for size in (outputs, most))
    many = multiply(rows, weight)
    return _first_of_equal_run(
        (count, torch.equal(multiply(rows[:count], weight), many[:count]))
        for count in sorted(GPU_ROW_COUNTS, reverse=True) if count <= most)


@cache
def smallest_invariant_rows(
    shape: tuple[int, int], dtype: torch.dtype, num_threads: int, by_input: bool = False
) -> int | None:
    """The smallest row count from which rows of `x @ weight.T` are bit-equal to those of many.

    Args:
        shape: (outputs, inputs) of the weight.
        dtype: Of weight and rows.
        num_threads: Threads of the matrix library; part of the key of the cached answer.
        by_input: The rows are multiplied with a copy stored by input, the many with the weight.
    Returns:
        The count, or None where the largest one tried is not enough.
    Cost: about 300 rows times the weight, once per process.
    """
    outputs, inputs = shape
    generator = torch.Generator().manual_seed(0)
    weight = torch.rand(min(outputs, MAX_OUTPUTS), inputs, generator=generator) - 0.5
    rows = torch.rand(MANY_ROWS, inputs, generator=generator) - 0.5
    weight, rows = weight.to(dtype), rows.to(dtype)
    with torch.no_grad():
        many = F.linear(rows, weight)
        weight = stored_by_input(weight) if by_input else weight
        return _first_of_equal_run(
            (count, torch.equal(F.linear(rows[:count], weight), many[:count]))
            for count in (MANY_ROWS, *ROW_COUNTS))


def _first_of_equal_run(results: Iterable[tuple[int, bool]]) -> int | None:
    """The last count, going down, before the first that is not equal."""
    smallest = None
    for count, is_equal in results:
        if not is_equal:
            break
        smallest = count
    return smallest

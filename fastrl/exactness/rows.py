"""How many rows a forward pass needs so that each row's bits do not depend on the others.

A matrix library picks other code for a few rows than for many, and sums in another order. From
some row count on it no longer does. `smallest_invariant_rows` finds that count by trying, for the
shapes, dtype and threads at hand, and the engine never runs fewer rows than that. Where no count
helps, the decoder's matrices and the LM head are multiplied by the kernel of `fastrl.ops.linear`,
if that passes.
"""

import logging
from collections.abc import Callable, Iterable
from functools import cache, partial
from math import gcd
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastrl.backends import choose
from fastrl.checks import wide_dtype
from fastrl.models import CausalLM
from fastrl.models.by_input import by_input as stored_by_input
from fastrl.models.by_input import by_tile, is_small, matrices, tile_columns
from fastrl.models.heads import LMHead, project_logits
from fastrl.models.linear import Linear
from fastrl.ops.linear import PREFERENCE, linear

logger = logging.getLogger("fastrl")

ROW_COUNTS = (48, 32, 24, *range(16, 0, -1))
"""Row counts that are tried, from many to few, against `MANY_ROWS`."""
MANY_ROWS = 64
"""What a CPU's counts are compared with, and the most that a pass is padded to."""
GPU_ROW_COUNTS = (*range(1, MANY_ROWS + 1), *(128 << i for i in range(7)))
"""Up to 8192; see `gpu_row_counts`."""
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


class Product(NamedTuple):
    """`rows @ weight.T` for the weights of one shape."""

    outputs: int
    inputs: int
    is_head: bool = False
    """Logits: float32 results, of as many rows at a time as fastrl_kernels.head_chunks says."""

    @property
    def shape(self) -> str:
        """In words."""
        return f"{self.outputs} x {self.inputs}"


def products(model: CausalLM) -> list[Product]:
    """Every product of a pass, the LM head's last."""
    *others, head = matrices(model)
    return [*sorted({_product(module) for module in others}), _product(head)]


def _product(module: nn.Linear | LMHead) -> Product:
    return Product(len(module.weight), module.weight.shape[1], isinstance(module, LMHead))


def invariant_rows(model: CausalLM, *, by_input: bool = False) -> int:
    """Rows that every forward pass of `model` should have, at least.

    Args:
        by_input: The pass multiplies with copies stored by input.
    Returns:
        The largest count that any product needs, of those that the library makes.
    """
    weight, by_kernel = model.lm_head.weight, products_of_kernel(model, by_input=by_input)
    return max((_checked(product, weight.dtype, weight.device, by_input)
                for product in products(model) if product not in by_kernel), default=1)


def products_of_kernel(model: CausalLM, *, by_input: bool = False) -> set[Product]:
    """Those that fail in the library for every number of rows and pass in the kernel of `linear`.

    Matrices of the native decoder and any LM head. To be called in exact mode, which prefers that
    kernel; without a GPU there is none.
    """
    weight = model.lm_head.weight
    fixed = {_product(module) for module in matrices(model)
             if not isinstance(module, Linear | LMHead)}
    return {product for product in products(model) if product not in fixed
            and least_rows(product, weight.dtype, weight.device, by_input) is None
            and choose("linear", "linear", PREFERENCE, weight.device.type, weight.dtype) == "triton"
            and kernel_passes(product, weight.dtype, weight.device)}


def choose_products(model: CausalLM, *, by_input: bool = False) -> None:
    """Decide for each matrix who multiplies with it in exact mode."""
    by_kernel = products_of_kernel(model, by_input=by_input)
    for product in sorted(by_kernel):
        _log_once(product, model.lm_head.weight.dtype)
    for module in matrices(model):
        if isinstance(module, Linear | LMHead):
            module.keeps_rows = _product(module) in by_kernel


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
    product: Product, dtype: torch.dtype, device: torch.device, by_input: bool
) -> int:
    """Rows for one product; 1 with a warning where no count helps."""
    rows = least_rows(product, dtype, device, by_input)
    if rows is None:
        _warn_once(product, dtype)
        return 1
    return rows


@cache
def _warn_once(product: Product, dtype: torch.dtype) -> None:
    logger.warning(
        "rows of a product with a %s matrix in %s depend on the number of rows, up to %d: "
        "generated tokens may change with the batch where two are almost equally likely",
        product.shape, str(dtype).removeprefix("torch."), MANY_ROWS)


@cache
def _log_once(product: Product, dtype: torch.dtype) -> None:
    logger.info(
        "exact mode: products with %s %s matrix in %s take the kernel of linear (triton): the "
        "library's rows depend on the number of rows, the kernel's do not",
        "the LM head, a" if product.is_head else "a", product.shape,
        str(dtype).removeprefix("torch."))


def least_rows(
    product: Product, dtype: torch.dtype, device: torch.device, by_input: bool = False
) -> int | None:
    """Rows from which on those of `x @ weight.T` have the same bits; None: no count tried helps."""
    if device.type == "cpu":
        dtype = wide_dtype(dtype) if product.is_head else dtype
        return smallest_invariant_rows(product[:2], dtype, torch.get_num_threads(), by_input)
    return smallest_invariant_rows_on_gpu(product, dtype, device)


@cache
@torch.no_grad()
def smallest_invariant_rows_on_gpu(
    product: Product, dtype: torch.dtype, device: torch.device
) -> int | None:
    """As `smallest_invariant_rows`, over `gpu_row_counts`.

    Returns:
        The count, at most MANY_ROWS, or None where more than that are needed.
    """
    count = _first_equal_count(project_logits if product.is_head else F.linear, product, dtype,
                               device)
    return count if count is not None and count <= MANY_ROWS else None


@cache
@torch.no_grad()
def kernel_passes(product: Product, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether rows of `linear` in triton have the same bits from a single one on."""
    by_kernel = partial(linear, out_dtype=wide_dtype(dtype) if product.is_head else dtype,
                        backend="triton")
    return _first_equal_count(by_kernel, product, dtype, device) == 1


def gpu_row_counts(product: Product) -> list[int]:
    """Row counts that a GPU tries, from many to few; all are compared with the first.

    The LM head's go up to the largest chunk, in the steps that chunks have.
    """
    from fastrl_kernels.head_chunks import TILE, largest_chunk

    largest = max(GPU_ROW_COUNTS)
    if product.is_head:
        most = min(largest, largest_chunk(4 * product.outputs))
        counts = {most, *GPU_ROW_COUNTS, *range(TILE, most, TILE)}
    else:
        most = max(MANY_ROWS, min(largest, MAX_RESULT_BYTES // (4 * product.outputs)))
        counts = {most, *GPU_ROW_COUNTS}
    return sorted((count for count in counts if count <= most), reverse=True)


def _first_equal_count(
    multiply: Callable[[Tensor, Tensor], Tensor], product: Product, dtype: torch.dtype,
    device: torch.device,
) -> int | None:
    """From how many rows on those of a product agree with those of the most that are tried."""
    counts, generator = gpu_row_counts(product), torch.Generator(device).manual_seed(0)
    weight, rows = (
        (torch.rand(size, product.inputs, generator=generator, device=device) - 0.5).to(dtype)
        for size in (product.outputs, counts[0]))
    many = multiply(rows, weight)
    return _first_of_equal_run(
        (count, torch.equal(multiply(rows[:count], weight), many[:count])) for count in counts[1:])


@cache
def smallest_invariant_rows(
    shape: tuple[int, int], dtype: torch.dtype, num_threads: int, by_input: bool = False
) -> int | None:
    """The smallest row count from which rows of `x @ weight.T` are bit-equal to those of many.

    Args:
        shape: (outputs, inputs) of the weight.
        dtype: Of weight and rows.
        num_threads: Threads of the matrix library; part of the key of the cached answer.
        by_input: The rows are multiplied with a copy stored by input, and with one in tiles where
            the LM head has such, the many with the weight.
    Returns:
        The count, or None where the largest one tried is not enough.
    Cost: about 300 rows times the weight, once per process.
    """
    outputs, inputs = shape
    generator = torch.Generator().manual_seed(0)
    columns = tile_columns(outputs) if by_input else 0
    outputs = min(outputs, MAX_OUTPUTS // max(1, columns) * max(1, columns))
    weight = torch.rand(outputs, inputs, generator=generator) - 0.5
    rows = torch.rand(MANY_ROWS, inputs, generator=generator) - 0.5
    weight, rows = weight.to(dtype), rows.to(dtype)
    with torch.no_grad():
        many = F.linear(rows, weight)
        multiply = [partial(F.linear, weight=stored_by_input(weight) if by_input else weight)]
        if columns:
            multiply.append(partial(project_logits, weight=by_tile(weight, columns)))
        return _first_of_equal_run(
            (count, all(torch.equal(by(rows[:count]), many[:count]) for by in multiply))
            for count in (MANY_ROWS, *ROW_COUNTS))


def _first_of_equal_run(results: Iterable[tuple[int, bool]]) -> int | None:
    """The last count, going down, before the first that is not equal."""
    smallest = None
    for count, is_equal in results:
        if not is_equal:
            break
        smallest = count
    return smallest

"""linear_cross_entropy on a GPU: each chunk of logits becomes its own gradient in one launch.

    z = (hidden @ weight.T + bias) / temperature        loss = -sum_mask w logprob(z) / denominator

Per chunk: logits by cuBLAS, one program per row that reduces the row and walks it again to
overwrite it with w (p - onehot), and the two products with hidden and weight, summed in float32. A
masked row is not read, only zeroed. The gradient is written without 1 / (denominator temperature),
which the backward pass applies: it stays near 1, where float16 has digits. Operations 6MDV; per
logit 4 bytes written, 8 read, 2 written over them and 4 read by the products (half-precision
operands). In memory: one chunk. Limits: float32, float16, bfloat16; differentiable once. Source:
gradient in the forward after linkedin/Liger-Kernel (arXiv 2410.10989).
"""

import itertools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrl_kernels.head_chunks import chunk_slices
from fastrl_kernels.triton.linear_logprob import (
    Gradients,
    add_head_gradients,
    as_tensors,
    gradient_view,
    multiply,
    new_chunk,
    new_gradients,
    same_dtype,
)
from fastrl_kernels.triton.linear_policy_loss import KnownGradients
from fastrl_kernels.triton.logprob import (
    MAX_BLOCK,
    block_settings,
    reduce_row,
    token_score,
    write_gradient,
)
from fastrl_kernels.triton.support import DTYPES, AotCase, supports

__all__ = ["aot_cases", "linear_cross_entropy", "supports"]


@triton.jit  # type: ignore[untyped-decorator]
def _cross_entropy_kernel(  # type: ignore[no-untyped-def]
    logits_ptr, bias_ptr, token_ids_ptr, mask_ptr, weights_ptr, dlogits_ptr, losses_ptr,
    num_columns, stride_logits_m, stride_dlogits_m, inverse_temperature,
    HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
    WRITES_GRADIENT: tl.constexpr, BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride_logits_m
    drow_ptr = dlogits_ptr + row * stride_dlogits_m
    keep = row >= 0
    if HAS_MASK:
        keep = tl.load(mask_ptr + row) != 0
    if keep:
        weight = 1.0
        if HAS_WEIGHTS:
            weight = tl.load(weights_ptr + row).to(tl.float32)
        maximum, log_sum, entropy = reduce_row(row_ptr, bias_ptr, num_columns, 1,
                                               inverse_temperature, HAS_BIAS, BLOCK_V)
        token = tl.load(token_ids_ptr + row)
        z = token_score(row_ptr, bias_ptr, token, num_columns, 1, inverse_temperature, HAS_BIAS)
        loss = -weight * (z - maximum - log_sum)
        # A token of weight 0 adds nothing, even where it is forbidden.
        tl.store(losses_ptr + row, tl.where(weight == 0, 0.0, loss))
        if WRITES_GRADIENT:
            write_gradient(row_ptr, bias_ptr, drow_ptr, token, maximum, log_sum, entropy, -weight,
                           0.0, 1.0, num_columns, 1, 1, inverse_temperature, HAS_BIAS, False, True,
                           BLOCK_V)
    else:
        tl.store(losses_ptr + row, 0.0)
        if WRITES_GRADIENT:
            zeros = tl.zeros([BLOCK_V], tl.float32)
            for start in range(0, num_columns, BLOCK_V):
                columns = start + tl.arange(0, BLOCK_V)
                tl.store(drow_ptr + columns, zeros, mask=columns < num_columns)


def cross_entropy_of_logits(
    logits: Tensor, token_ids: Tensor, loss_mask: Tensor | None, token_weights: Tensor | None,
    losses: Tensor, bias: Tensor | None, gradient_dtype: torch.dtype | None, temperature: float,
) -> Tensor:
    """Write the tokens' losses to `losses` [m]; returns the gradient that overwrote `logits`.

    The gradient is that of the sum of the losses by z. `logits` is contiguous; where
    `gradient_dtype` is None they stay as they are and are returned.
    """
    dlogits = logits if gradient_dtype is None else gradient_view(logits, gradient_dtype)
    _cross_entropy_kernel[(len(logits),)](
        logits, logits if bias is None else bias.contiguous(), token_ids.contiguous(),
        logits if loss_mask is None else loss_mask.contiguous(),
        logits if token_weights is None else token_weights.contiguous(), dlogits, losses,
        logits.shape[1], logits.stride(0), dlogits.stride(0), 1 / temperature,
        HAS_BIAS=bias is not None, HAS_MASK=loss_mask is not None,
        HAS_WEIGHTS=token_weights is not None, WRITES_GRADIENT=gradient_dtype is not None,
        **block_settings(logits.shape[1]),
    )
    return dlogits


def linear_cross_entropy_fwd(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, token_ids: Tensor,
    loss_mask: Tensor | None, token_weights: Tensor | None, temperature: float,
    chunk_tokens: int | None, needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Gradients]:
    """The sum of the losses, scalar float64, and the gradients that are needed, of it by z."""
    gradients = new_gradients(hidden, weight, bias, needs)
    hidden, weight = same_dtype(hidden, weight)
    chunks = chunk_slices(len(hidden), 4 * len(weight), chunk_tokens)
    buffer = new_chunk(hidden, weight, chunks, torch.float32)
    losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
    for rows in chunks:
        kept, mask = hidden[rows], None
        if loss_mask is not None:
            # NaN in a masked hidden state would pass through a product with a gradient of 0.
            mask = loss_mask[rows]
            kept = kept.masked_fill(~mask[:, None], 0.0)
        logits = buffer[: rows.stop - rows.start]
        multiply(kept, weight.T, logits)
        dlogits = cross_entropy_of_logits(
            logits, token_ids[rows], mask, None if token_weights is None else token_weights[rows],
            losses[rows], bias, hidden.dtype if any(needs) else None, temperature)
        add_head_gradients(dlogits, kept, weight, rows, gradients)
    return losses.sum(dtype=torch.float64), gradients


@torch.library.custom_op("fastrl_kernels::linear_cross_entropy", mutates_args=())
def _fwd_op(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, token_ids: Tensor,
    loss_mask: Tensor | None, token_weights: Tensor | None, temperature: float,
    chunk_tokens: int | None, needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total, gradients = linear_cross_entropy_fwd(
        hidden, weight, bias, token_ids, loss_mask, token_weights, temperature, chunk_tokens,
        (needs[0], needs[1], needs[2]))
    return total, *as_tensors(gradients, hidden)


@_fwd_op.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, *others: Any) -> tuple[Tensor, ...]:
    needs = others[-1]
    gradients = new_gradients(hidden, weight, bias, (needs[0], needs[1], needs[2]))
    return hidden.new_empty((), dtype=torch.float64), *as_tensors(gradients, hidden)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, token_ids: Tensor, loss_mask: Tensor | None = None, *,
    bias: Tensor | None = None, denominator: float, temperature: float = 1.0,
    token_weights: Tensor | None = None, chunk_tokens: int | None = None,
) -> Tensor:
    """fastrl.ops.linear_cross_entropy on this backend."""
    inputs = (hidden, weight, bias)
    is_recording = torch.is_grad_enabled()
    needs: Any = tuple(is_recording and x is not None and x.requires_grad for x in inputs)
    arguments: Any = (*(None if x is None else x.detach() for x in inputs), token_ids, loss_mask,
                      None if token_weights is None else token_weights.detach(), temperature,
                      chunk_tokens)
    if torch.compiler.is_compiling():
        total, *made = _fwd_op(*arguments, list(needs))
        dhidden, dweight, dbias = (gradient if is_needed else None
                                   for gradient, is_needed in zip(made, needs, strict=True))
        gradients: Gradients = dhidden, dweight, dbias
    else:
        arguments = (*arguments, needs)
        total, gradients = linear_cross_entropy_fwd(*arguments)
    loss: Tensor = (total / denominator).float()
    if any(needs):
        loss = KnownGradients.apply(  # type: ignore[no-untyped-call]
            loss, 1 / (denominator * temperature), *gradients, *inputs
        )
    return loss


def aot_cases(every: bool = False) -> list[AotCase]:
    """See fastrl_kernels.triton.support."""
    types = {
        "bias_ptr": "*fp32", "token_ids_ptr": "*i64", "mask_ptr": "*i1", "weights_ptr": "*fp32",
        "logits_ptr": "*fp32", "losses_ptr": "*fp32", "num_columns": "i32",
        "stride_logits_m": "i32", "stride_dlogits_m": "i32", "inverse_temperature": "fp32",
    }
    flags = (True, False) if every else (True,)
    names = ("HAS_BIAS", "HAS_MASK", "HAS_WEIGHTS", "WRITES_GRADIENT")
    return [
        (_cross_entropy_kernel, {**types, "dlogits_ptr": f"*{dtype}"},
         {**dict(zip(names, values, strict=True)), "BLOCK_V": MAX_BLOCK, "num_warps": 8})
        for dtype in DTYPES for values in itertools.product(flags, repeat=len(names))
    ]

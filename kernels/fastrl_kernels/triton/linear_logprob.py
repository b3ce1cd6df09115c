"""linear_logprobs on a GPU: chunks of logits by cuBLAS, one pass over each.

    z = (hidden @ weight.T + bias) / temperature
    logprob = z_token - logsumexp(z)        H = -sum_v p_v log p_v

Forward: a chunk of logits in float32, from half-precision operands where those are (by the kernel
of linear, where rows are to have the same bits in any number), then the kernel of gather_logprobs,
which adds the bias and reads the chunk once; or, on request, no logits at all
(linear_logprob_tiles.py). Backward: the same logits again,
overwritten by their gradient in the operands' type (in the first half of each row, where that is
narrower), then the two products, summed in float32. Operations 2MDV and 6MDV; per logit 4 bytes
written and read forward, and 8 more and three readings of the gradient backward. In memory at a
time: one chunk. Limits: float32, float16 (its gradients need a scaled loss), bfloat16. Source:
Wijmans et al. 2024 (arXiv 2411.09009), without its filter.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastrl_kernels.head_chunks import chunk_slices
from fastrl_kernels.triton.linear import linear_fwd
from fastrl_kernels.triton.linear_logprob_tiles import tiled_logprobs
from fastrl_kernels.triton.logprob import logprobs_bwd, logprobs_fwd, new_rows
from fastrl_kernels.triton.support import supports

__all__ = ["linear_logprobs", "supports"]
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def new_chunk(hidden: Tensor, weight: Tensor, chunks: list[slice], dtype: torch.dtype) -> Tensor:
    """Memory for the logits of the largest chunk."""
    rows = max((chunk.stop - chunk.start for chunk in chunks), default=0)
    return torch.empty(rows, len(weight), dtype=dtype, device=hidden.device)


def multiply(a: Tensor, b: Tensor, out: Tensor, *, accumulate: bool = False) -> None:
    """out = a @ b, or out += a @ b. Half-precision operands give float32 without a copy of them."""
    if a.dtype != out.dtype and not a.is_cuda:
        a, b = a.to(out.dtype), b.to(out.dtype)  # the CPU has no product with a wider result
    is_same = a.dtype == out.dtype
    if accumulate and is_same:
        torch.addmm(out, a, b, out=out)
    elif accumulate:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    elif is_same:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def project(hidden: Tensor, weight: Tensor, logits: Tensor, keeps_rows: bool) -> None:
    """logits = hidden @ weight.T, by the library or, where its rows depend on how many there are,
    by the kernel of linear.
    """
    if keeps_rows:
        linear_fwd(hidden, weight, None, logits)
    else:
        multiply(hidden, weight.T, logits)


def same_dtype(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the wider of their types."""
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    return hidden.to(dtype), weight.to(dtype)


def gradient_view(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """[m, V] of a type at most as wide, in the memory of contiguous logits, row over row."""
    return logits.view(dtype)[:, : logits.shape[1]]


def new_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: tuple[bool, bool, bool]
) -> Gradients:
    """float32 memory for the gradients that are needed; what is added to begins at 0."""
    return (torch.empty_like(hidden, dtype=torch.float32) if needs[0] else None,
            torch.zeros_like(weight, dtype=torch.float32) if needs[1] else None,
            torch.zeros_like(bias, dtype=torch.float32)
            if bias is not None and needs[2] else None)


def add_head_gradients(
    dlogits: Tensor, hidden: Tensor, weight: Tensor, rows: slice, gradients: Gradients
) -> None:
    """From a chunk's gradient [m, V]: write the rows of dhidden, add to dweight and dbias."""
    dhidden, dweight, dbias = gradients
    if dhidden is not None:
        multiply(dlogits, weight, dhidden[rows])
    if dweight is not None:
        multiply(dlogits.T, hidden, dweight, accumulate=True)
    if dbias is not None:
        dbias.add_(dlogits.sum(dim=0, dtype=torch.float32))


def linear_logprobs_fwd(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, token_ids: Tensor, temperature: float,
    chunk_tokens: int | None, logits: str, keeps_rows: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probs, entropy, m and log s, [M] float32 each."""
    hidden, weight = same_dtype(hidden, weight)
    if logits == "none":
        return tiled_logprobs(hidden, weight, bias, token_ids, temperature)
    chunks = chunk_slices(len(hidden), 4 * len(weight), chunk_tokens)
    buffer = new_chunk(hidden, weight, chunks, torch.float32)
    result = new_rows(hidden)
    for rows in chunks:
        chunk = buffer[: rows.stop - rows.start]
        project(hidden[rows], weight, chunk, keeps_rows)
        logprobs, entropy, maximum, log_sum = (values[rows] for values in result)
        logprobs_fwd(chunk, token_ids[rows], temperature, bias,
                     out=(logprobs, entropy, maximum, log_sum))
    return result


def linear_logprobs_bwd(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, token_ids: Tensor, entropy: Tensor,
    maximum: Tensor, log_sum: Tensor, dlogprobs: Tensor, dentropy: Tensor | None,
    temperature: float, chunk_tokens: int | None, keeps_rows: bool,
    needs: tuple[bool, bool, bool],
) -> Gradients:
    """Gradients of hidden, weight and bias in float32, where needed."""
    gradients = new_gradients(hidden, weight, bias, needs)
    hidden, weight = same_dtype(hidden, weight)
    chunks = chunk_slices(len(hidden), 4 * len(weight), chunk_tokens)
    buffer = new_chunk(hidden, weight, chunks, torch.float32)
    for rows in chunks:
        logits = buffer[: rows.stop - rows.start]
        project(hidden[rows], weight, logits, keeps_rows)
        dlogits = gradient_view(logits, hidden.dtype)
        logprobs_bwd(dlogits, logits, token_ids[rows], entropy[rows], maximum[rows], log_sum[rows],
                     dlogprobs[rows], None if dentropy is None else dentropy[rows], temperature,
                     bias)
        add_head_gradients(dlogits, hidden[rows], weight, rows, gradients)
    return gradients


@torch.library.custom_op("fastrl_kernels::linear_logprobs", mutates_args=())
def _fwd_op(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, token_ids: Tensor, temperature: float,
    chunk_tokens: int | None, logits: str, keeps_rows: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return linear_logprobs_fwd(hidden, weight, bias, token_ids, temperature, chunk_tokens, logits,
                               keeps_rows)


@_fwd_op.register_fake
def _(hidden: Tensor, *others: Any) -> tuple[Tensor, ...]:
    return tuple(hidden.new_empty(hidden.shape[0], dtype=torch.float32) for _ in range(4))


@torch.library.custom_op("fastrl_kernels::linear_logprobs_bwd", mutates_args=())
def _bwd_op(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, token_ids: Tensor, entropy: Tensor,
    maximum: Tensor, log_sum: Tensor, dlogprobs: Tensor, dentropy: Tensor | None,
    temperature: float, chunk_tokens: int | None, keeps_rows: bool, needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = linear_logprobs_bwd(
        hidden, weight, bias, token_ids, entropy, maximum, log_sum, dlogprobs, dentropy,
        temperature, chunk_tokens, keeps_rows, (needs[0], needs[1], needs[2]))
    return as_tensors(gradients, hidden)


@_bwd_op.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, *others: Any) -> tuple[Tensor, ...]:
    needs = others[-1]
    gradients = new_gradients(hidden, weight, bias, (needs[0], needs[1], needs[2]))
    return as_tensors(gradients, hidden)


def as_tensors(gradients: Gradients, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients as a registered op returns them, which knows no None: empty instead."""
    dhidden, dweight, dbias = (like.new_empty(0) if g is None else g for g in gradients)
    return dhidden, dweight, dbias


class _LinearLogprobs(torch.autograd.Function):
    """Keeps its inputs and three numbers per row; backward makes the logits again."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, token_ids: Tensor,
        temperature: float, chunk_tokens: int | None, logits: str, keeps_rows: bool,
    ) -> tuple[Tensor, Tensor]:
        run = _fwd_op if torch.compiler.is_compiling() else linear_logprobs_fwd
        logprobs, *rows = run(hidden, weight, bias, token_ids, temperature, chunk_tokens, logits,
                              keeps_rows)
        ctx.save_for_backward(hidden, weight, bias, token_ids, *rows)
        ctx.temperature, ctx.chunk_tokens, ctx.keeps_rows = temperature, chunk_tokens, keeps_rows
        ctx.set_materialize_grads(False)
        return logprobs, rows[0]

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dlogprobs: Tensor | None, dentropy: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, token_ids, *rows = ctx.saved_tensors
        if dlogprobs is None:
            dlogprobs = torch.zeros_like(rows[0])
        run: Any = _bwd_op if torch.compiler.is_compiling() else linear_logprobs_bwd
        needs = ctx.needs_input_grad[:3]
        gradients = run(hidden, weight, bias, token_ids, *rows, dlogprobs, dentropy,
                        ctx.temperature, ctx.chunk_tokens, ctx.keeps_rows, needs)
        return (
            *(gradient.to(x.dtype) if is_needed else None for gradient, is_needed, x in
              zip(gradients, needs, (hidden, weight, bias), strict=True)),
            None, None, None, None, None,
        )


def linear_logprobs(
    hidden: Tensor, weight: Tensor, token_ids: Tensor, *, bias: Tensor | None = None,
    temperature: float = 1.0, chunk_tokens: int | None = None, logits: str = "chunked",
    keeps_rows: bool = False,
) -> tuple[Tensor, Tensor]:
    """fastrl.ops.linear_logprobs on this backend."""
    result: tuple[Tensor, Tensor] = _LinearLogprobs.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, token_ids, temperature, chunk_tokens, logits, keeps_rows
    )
    return result

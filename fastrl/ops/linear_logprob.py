"""linear_logprobs: log-probs and entropy from hidden states and a head; no [M, V] is kept.

    z = (hidden @ weight.T + bias) / temperature
    logprob = z_token - logsumexp(z)        H = logsumexp(z) - sum_v p_v z_v
"""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastrl.backends import choose
from fastrl.checks import (
    check_device,
    check_float,
    check_index,
    check_positive,
    check_range,
    check_values,
    wide_dtype,
)
from fastrl.errors import ConfigError, ShapeError
from fastrl.ops.linear import takes_kernel
from fastrl.ops.logprob import gather_logprobs_reference

# Order by measurement; no GPU result yet, so "auto" keeps the proven path.
PREFERENCE = ("torch", "triton")
CHUNK_BYTES = 24 * 2**20
"""Logits in memory at a time: enough rows for a full-speed product, and below the 32 MiB from which
the C library hands a buffer back to the system after each use."""
LOWEST_LOGPROB = -1e30
"""Takes the place of -inf where a log-prob is multiplied: exp(-1e30) * -1e30 is 0, not NaN."""


def linear_logprobs_reference(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """linear_logprobs in plain torch, with all logits in memory."""
    dtype = wide_dtype(hidden.dtype)
    logits = hidden.to(dtype) @ weight.to(dtype).T
    if bias is not None:
        logits = logits + bias.to(dtype)
    return gather_logprobs_reference(logits, token_ids, temperature=temperature)


def masked_to_zero(token_ids: Tensor, mask: Tensor | None) -> Tensor:
    """Token ids with 0 in masked rows, which may hold anything: -100 is a habit."""
    return token_ids if mask is None else token_ids.masked_fill(~mask, 0)


def check_linear(
    op: str, hidden: Tensor, weight: Tensor, token_ids: Tensor, bias: Tensor | None,
    temperature: float, chunk_tokens: int | None, mask: Tensor | None = None,
) -> None:
    """The checks of every op on hidden states, a head and tokens; `mask` [M]: rows that count."""
    check_head(op, hidden, weight, bias, mask)
    if token_ids.shape != hidden.shape[:1]:
        raise ShapeError(f"{op}: expected token_ids [M] with M = {hidden.shape[0]}, got "
                         f"{list(token_ids.shape)}; one target per hidden state")
    check_index(op, token_ids=token_ids)
    check_device(op, {"hidden": hidden, "token_ids": token_ids})
    check_positive(op, temperature=temperature, chunk_tokens=chunk_tokens)
    check_range(op, weight.shape[0], mask=mask, token_ids=token_ids)


def check_head(
    op: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None = None,
    prefix: str = "",
) -> None:
    """The checks of hidden states and a head, whose names begin with `prefix`."""
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ShapeError(f"{op}: expected {prefix}hidden [M, D] and {prefix}weight [V, D], got "
                         f"{list(hidden.shape)} and {list(weight.shape)}")
    if weight.shape[0] == 0:
        raise ShapeError(f"{op}: expected {prefix}weight [V, D] with V at least 1, got "
                         f"{list(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ShapeError(f"{op}: expected {prefix}bias [V] with V = {weight.shape[0]}, got "
                         f"{list(bias.shape)}")
    head = {f"{prefix}weight": weight} | ({} if bias is None else {f"{prefix}bias": bias})
    tensors = {f"{prefix}hidden": hidden} | head
    check_float(op, **tensors)
    check_device(op, tensors)
    check_values(op, mask, **{f"{prefix}hidden": hidden})
    check_values(op, **head)


def chunk_slices(num_tokens: int, vocab_size: int, itemsize: int,
                 chunk_tokens: int | None) -> list[slice]:
    """Token ranges whose logits fit in CHUNK_BYTES, of nearly equal size.

    Equal sizes leave no last chunk of a few rows, which would be a slower product and, on a CPU,
    other bits.
    """
    largest = chunk_tokens or max(1, CHUNK_BYTES // (vocab_size * itemsize))
    num_chunks = max(1, -(-num_tokens // largest))
    bounds = [num_tokens * i // num_chunks for i in range(num_chunks + 1)]
    return [slice(a, b) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]


class ChunkDistribution(NamedTuple):
    """What a chunk of m hidden states says about the next tokens."""

    logprobs: Tensor
    """[m], of the given tokens."""
    entropy: Tensor
    """[m]."""
    probs: Tensor
    """[m, V], p."""
    weighted: Tensor
    """[m, V], p log p."""


def chunk_buffers(chunks: list[slice], weight: Tensor) -> tuple[Tensor, Tensor]:
    """Memory for the largest chunk, two [m, V], taken once for all of them.

    Taken anew for each chunk it goes back to the system now and then, by the C library's history,
    and finding it again costs up to a fifth of the time.
    """
    shape = (max(rows.stop - rows.start for rows in chunks), len(weight))
    return weight.new_empty(shape), weight.new_empty(shape)


def chunk_distribution(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, token_ids: Tensor, temperature: float,
    buffers: tuple[Tensor, Tensor],
) -> ChunkDistribution:
    """The distributions of a chunk of hidden states [m, D], in the memory of `buffers`."""
    logits, weighted = (buffer[: len(hidden)] for buffer in buffers)
    if bias is None:
        torch.mm(hidden, weight.T, out=logits)
    else:
        torch.addmm(bias, hidden, weight.T, out=logits)
    if temperature != 1.0:
        logits.div_(temperature)
    all_logprobs = torch.log_softmax(logits, dim=-1, out=weighted)
    logprobs = all_logprobs.gather(1, token_ids[:, None]).squeeze(1)
    probs = torch.exp(all_logprobs, out=logits)
    if bias is not None:  # the only way to a log-prob of -inf
        all_logprobs.clamp_(min=LOWEST_LOGPROB)
    all_logprobs.mul_(probs)
    return ChunkDistribution(logprobs, -weighted.sum(dim=1), probs, weighted)


def logits_gradient(
    chunk: ChunkDistribution, token_ids: Tensor, dlogprobs: Tensor, dentropy: Tensor | None
) -> Tensor:
    """[m, V]: dlogprobs (onehot - p) - dentropy p (log p + H), in the memory of `chunk.probs`."""
    factor = dlogprobs if dentropy is None else dlogprobs + dentropy * chunk.entropy
    dlogits = chunk.probs.mul_(-factor[:, None])
    if dentropy is not None:
        dlogits.addcmul_(chunk.weighted, dentropy[:, None], value=-1)
    return dlogits.scatter_add_(1, token_ids[:, None], dlogprobs[:, None])


def add_head_gradients(
    dlogits: Tensor, hidden: Tensor, weight: Tensor,
    dhidden: Tensor | None, dweight: Tensor | None, dbias: Tensor | None,
) -> None:
    """From the gradient of a chunk's logits [m, V]: write `dhidden` [m, D], add to the others."""
    if dhidden is not None:
        torch.mm(dlogits, weight, out=dhidden)
    if dweight is not None:
        dweight.addmm_(dlogits.T, hidden)
    if dbias is not None:
        dbias.add_(dlogits.sum(dim=0))


class _LinearLogprobs(torch.autograd.Function):
    """Keeps its inputs between forward and backward; backward makes the logits again."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, token_ids: Tensor,
        temperature: float, chunk_tokens: int | None,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(hidden, weight, bias, token_ids)
        ctx.temperature, ctx.chunk_tokens = temperature, chunk_tokens
        ctx.set_materialize_grads(False)
        dtype = wide_dtype(hidden.dtype)
        wide_weight, wide_bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        logprobs = torch.empty(len(hidden), dtype=dtype, device=hidden.device)
        entropy = torch.empty_like(logprobs)
        chunks = chunk_slices(len(hidden), len(weight), dtype.itemsize, chunk_tokens)
        buffers = chunk_buffers(chunks, wide_weight)
        for rows in chunks:
            logprobs[rows], entropy[rows] = chunk_distribution(
                hidden[rows].to(dtype), wide_weight, wide_bias, token_ids[rows], temperature,
                buffers)[:2]
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dlogprobs: Tensor | None, dentropy: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, token_ids = ctx.saved_tensors
        dtype = wide_dtype(hidden.dtype)
        wide_weight, wide_bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        dhidden = torch.empty_like(hidden, dtype=dtype) if needs_hidden else None
        dweight = torch.zeros_like(weight, dtype=dtype) if needs_weight else None
        dbias = torch.zeros_like(bias, dtype=dtype) if needs_bias else None
        if dlogprobs is None:
            dlogprobs = torch.zeros(len(hidden), dtype=dtype, device=hidden.device)
        chunks = chunk_slices(len(hidden), len(weight), dtype.itemsize, ctx.chunk_tokens)
        buffers = chunk_buffers(chunks, wide_weight)
        for rows in chunks:
            wide_hidden = hidden[rows].to(dtype)
            chunk = chunk_distribution(wide_hidden, wide_weight, wide_bias, token_ids[rows],
                                       ctx.temperature, buffers)
            dlogits = logits_gradient(
                chunk, token_ids[rows], dlogprobs[rows] / ctx.temperature,
                None if dentropy is None else dentropy[rows] / ctx.temperature)
            add_head_gradients(dlogits, wide_hidden, wide_weight,
                               None if dhidden is None else dhidden[rows], dweight, dbias)
        return (
            None if dhidden is None else dhidden.to(hidden.dtype),
            None if dweight is None else dweight.to(weight.dtype),
            None if dbias is None else dbias.to(bias.dtype),
            None, None, None,
        )


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
    logits: Literal["chunked", "none"] = "chunked",
    keeps_rows: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of one token per hidden state, and the entropy of its distribution.

        z = (hidden @ weight.T + bias) / temperature
        logprob = z_token - logsumexp(z)        H = -sum_v p_v log p_v

    Args:
        hidden: [M, D] float. hidden[m] predicts token_ids[m]; differentiable.
        weight: [V, D] float. The head; differentiable.
        token_ids: [M] int64.
        bias: [V] float or None; -inf forbids a token. Differentiable.
        temperature: Divides the logits.
        chunk_tokens: Rows of logits in memory at a time; None: as many as fit in a fixed budget.
        logits: "none" lets the forward pass keep them out of memory, for passes that score: triton
            then reduces each tile of the product where it is made. torch has chunks either way,
            and so has every backward pass.
        keeps_rows: Where exact mode prefers triton, logits by the kernel of `linear`, whose rows
            do not depend on how many there are.
        backend: See fastrl.backends.
    Returns:
        logprobs, entropy: [M] float32 (float64 for float64) each, nats. Both differentiable, once.
    Raises:
        ShapeError: when shapes, dtypes or devices do not fit together.
        ConfigError: when temperature or chunk_tokens is not above 0, or logits is another word.
        BackendUnavailableError: when a backend is named that cannot run.
    Cost: forward 2MDV operations, backward 6MDV; two chunks of logits and a float32 copy of a
        half-precision weight, or with triton one chunk and no copy; forward with logits="none" 16
        bytes per row and 2048 columns.
    Source: the chunked loss of Wijmans et al. 2024 (arXiv 2411.09009) without its filter.
    Example:
        >>> hidden, weight = torch.ones(1, 2), torch.zeros(4, 2)
        >>> logprobs, entropy = linear_logprobs(hidden, weight, torch.tensor([3]))
        >>> round(float(logprobs), 4), round(float(entropy), 4)
        (-1.3863, 1.3863)
    """
    check_linear("linear_logprobs", hidden, weight, token_ids, bias, temperature, chunk_tokens)
    if logits not in ("chunked", "none"):
        raise ConfigError(f"linear_logprobs: expected logits chunked or none, got {logits!r}")
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    name = choose("linear_logprobs", "linear_logprob", PREFERENCE, hidden.device.type, dtype,
                  backend)
    if name == "triton":
        from fastrl_kernels.triton import linear_logprob

        return linear_logprob.linear_logprobs(hidden, weight, token_ids, bias=bias,
                                              temperature=temperature, chunk_tokens=chunk_tokens,
                                              logits=logits,
                                              keeps_rows=takes_kernel(keeps_rows, hidden))
    result: tuple[Tensor, Tensor] = _LinearLogprobs.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, token_ids, temperature, chunk_tokens
    )
    return result

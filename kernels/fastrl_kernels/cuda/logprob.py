"""gather_logprobs on a GPU: one block per row, one read; see csrc/logprob.cu.

    z = logits / temperature    logprob = z_token - logsumexp(z)    H = -sum_v p_v log p_v

Limits: float32, float16, bfloat16 logits, float32 arithmetic; logits whose neighbours in a row are
not neighbours in memory are copied first.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastrl_kernels.cuda import compiled_ops, stream_of
from fastrl_kernels.cuda.gae import supports

__all__ = ["gather_logprobs", "logprobs_bwd", "logprobs_fwd", "supports"]


def logprobs_fwd(
    logits: Tensor, token_ids: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probs, entropy, and the maximum and log-sum of logits / temperature, [M] float32 each."""
    logprobs, entropy, maximum, log_sum = (
        logits.new_empty(len(logits), dtype=torch.float32) for _ in range(4))
    compiled_ops().gather_logprobs(logits, token_ids.contiguous(), temperature, logprobs, entropy,
                                   maximum, log_sum, stream_of(logits))
    return logprobs, entropy, maximum, log_sum


def logprobs_bwd(
    dlogits: Tensor, logits: Tensor, token_ids: Tensor, entropy: Tensor, maximum: Tensor,
    log_sum: Tensor, dlogprobs: Tensor, dentropy: Tensor | None, temperature: float,
) -> None:
    """Write the gradient of the logits to `dlogits` [M, V], which may be the logits."""
    compiled_ops().gather_logprobs_gradient(
        logits, token_ids.contiguous(), entropy, maximum, log_sum, dlogprobs.contiguous(),
        None if dentropy is None else dentropy.contiguous(), temperature, dlogits,
        stream_of(logits))


# What a compiled graph holds; eager code calls the functions above, which cost the host less.
@torch.library.custom_op("fastrl_cuda::token_logprobs", mutates_args=())
def _fwd_op(
    logits: Tensor, token_ids: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return logprobs_fwd(logits, token_ids, temperature)


@_fwd_op.register_fake
def _(logits: Tensor, token_ids: Tensor, temperature: float) -> tuple[Tensor, ...]:
    return tuple(logits.new_empty(logits.shape[0], dtype=torch.float32) for _ in range(4))


@torch.library.custom_op("fastrl_cuda::token_logprobs_backward", mutates_args=())
def _bwd_op(
    logits: Tensor, token_ids: Tensor, entropy: Tensor, maximum: Tensor, log_sum: Tensor,
    dlogprobs: Tensor, dentropy: Tensor | None, temperature: float,
) -> Tensor:
    dlogits = logits.new_empty(logits.shape)
    logprobs_bwd(dlogits, logits, token_ids, entropy, maximum, log_sum, dlogprobs, dentropy,
                 temperature)
    return dlogits


@_bwd_op.register_fake
def _(logits: Tensor, *others: Any) -> Tensor:
    return logits.new_empty(logits.shape)


class _GatherLogprobs(torch.autograd.Function):
    """Keeps the logits and three numbers per row."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, token_ids: Tensor, temperature: float, overwrite_logits: bool
    ) -> tuple[Tensor, Tensor]:
        run = _fwd_op if torch.compiler.is_compiling() else logprobs_fwd
        logprobs, *stats = run(logits, token_ids, temperature)
        ctx.save_for_backward(logits, token_ids, *stats)
        ctx.temperature, ctx.overwrite_logits = temperature, overwrite_logits
        ctx.set_materialize_grads(False)
        return logprobs, stats[0]

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dlogprobs: Tensor | None, dentropy: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        logits, token_ids, *stats = ctx.saved_tensors
        if dlogprobs is None:
            dlogprobs = torch.zeros_like(stats[0])
        arguments = (logits, token_ids, *stats, dlogprobs, dentropy, ctx.temperature)
        if torch.compiler.is_compiling():
            return _bwd_op(*arguments), None, None, None
        # A view with rows that overlap cannot hold its own gradient.
        is_overwritten = ctx.overwrite_logits and logits.is_contiguous()
        dlogits = logits.detach() if is_overwritten else logits.new_empty(logits.shape)
        logprobs_bwd(dlogits, *arguments)
        if is_overwritten:  # autograd refuses whoever else needs the values that are gone
            torch.autograd.graph.increment_version(logits)
        return dlogits, None, None, None


def gather_logprobs(
    logits: Tensor, token_ids: Tensor, *, temperature: float = 1.0, overwrite_logits: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropy; arguments as in fastrl.ops.gather_logprobs."""
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    result: tuple[Tensor, Tensor] = _GatherLogprobs.apply(  # type: ignore[no-untyped-call]
        logits, token_ids, temperature, overwrite_logits
    )
    return result

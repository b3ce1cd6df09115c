"""linear_policy_loss: PPO's clipped loss from hidden states and a head, gradient in the forward.

    z = (hidden @ weight.T + bias) / temperature        rho = exp(logprob(z) - old_logprob)
    L = max(-A rho, -A clip(rho, 1 - clip_range, 1 + clip_range_high))
        where A < 0 and dual_clip is given: min(L, -A dual_clip)
    loss = sum_mask w (L + kl_coef kl - entropy_coef H) / denominator

The gradient of a token's loss depends on nothing but that token's logits, so each chunk of logits
becomes its own gradient in place and is multiplied into those of hidden and weight at once: three
products instead of the four of recomputation, and no [M, V].
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastrl.backends import choose
from fastrl.checks import (
    check_float,
    check_mask,
    check_not_negative,
    check_positive,
    check_shape,
    check_values,
    wide_dtype,
)
from fastrl.errors import ConfigError
from fastrl.ops.kl import MAX_EXPONENT, kl_estimate_reference
from fastrl.ops.linear import takes_kernel
from fastrl.ops.linear_logprob import (
    add_head_gradients,
    check_linear,
    chunk_buffers,
    chunk_distribution,
    chunk_slices,
    linear_logprobs_reference,
    logits_gradient,
    masked_to_zero,
)
from fastrl.ops.policy_loss import MAX_LOG_RATIO, PolicyStats, token_losses
from fastrl.ops.rewards import ESTIMATORS, Estimator

# Order by measurement; no GPU result yet, so "auto" keeps the proven path.
PREFERENCE = ("torch", "triton")


def linear_policy_loss_reference(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    *,
    bias: Tensor | None = None,
    denominator: float,
    clip_range: float = 0.2,
    clip_range_high: float | None = None,
    dual_clip: float | None = None,
    temperature: float = 1.0,
    entropy_coef: float = 0.0,
    token_weights: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: Estimator = "k3",
) -> tuple[Tensor, PolicyStats]:
    """linear_policy_loss in plain torch, with all logits in memory and autograd behind them."""
    hidden = hidden.masked_fill(~loss_mask[:, None], 0.0)
    logprobs, entropy = linear_logprobs_reference(
        hidden, weight, masked_to_zero(token_ids, loss_mask), bias=bias, temperature=temperature)
    tokens = _Rows(hidden, token_ids, old_logprobs, advantages, loss_mask, token_weights,
                   ref_logprobs)
    coefficients = _Coefficients(denominator, clip_range, clip_range_high, dual_clip, temperature,
                                 entropy_coef, kl_coef, kl_estimator)
    return _total(logprobs, entropy, tokens, coefficients)


class _Rows(NamedTuple):
    """What is known of each of the M (or of a chunk's m) tokens."""

    hidden: Tensor
    token_ids: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    loss_mask: Tensor
    token_weights: Tensor | None
    ref_logprobs: Tensor | None


class _Coefficients(NamedTuple):
    denominator: float
    clip_range: float
    clip_range_high: float | None
    dual_clip: float | None
    temperature: float
    entropy_coef: float
    kl_coef: float
    kl_estimator: Estimator


def _total(
    logprobs: Tensor, entropy: Tensor, tokens: _Rows, coefficients: _Coefficients
) -> tuple[Tensor, PolicyStats]:
    """The loss from log-probs and entropy [M], and its statistics; differentiable."""
    c = coefficients
    losses, stats = token_losses(
        logprobs, tokens.old_logprobs, tokens.advantages, tokens.loss_mask, c.clip_range, entropy,
        clip_range_high=c.clip_range_high, dual_clip=c.dual_clip,
        token_weights=tokens.token_weights)
    weights = _wide_weights(tokens, logprobs.dtype)
    bonus = (weights * entropy).masked_fill(~tokens.loss_mask, 0.0).sum()
    total = losses.sum() - c.entropy_coef * bonus
    if tokens.ref_logprobs is not None:
        total = total + c.kl_coef * (weights * _kl_terms(
            logprobs, tokens.ref_logprobs, tokens.loss_mask, c.kl_estimator)).sum()
    return total / c.denominator, stats


def _wide_weights(tokens: _Rows, dtype: torch.dtype) -> Tensor:
    """Weights [M], 0 where masked."""
    if tokens.token_weights is None:
        return tokens.loss_mask.to(dtype)
    return tokens.token_weights.to(dtype).masked_fill(~tokens.loss_mask, 0.0)


def _kl_terms(
    logprobs: Tensor, ref_logprobs: Tensor, loss_mask: Tensor, estimator: Estimator
) -> Tensor:
    """[M]: the estimate of KL to the reference; k1 with the gradient of k2, its own means 0."""
    k1, k2, k3 = kl_estimate_reference(logprobs, ref_logprobs, loss_mask)
    return {"k1": k2 + (k1 - k2).detach(), "k2": k2, "k3": k3}[estimator]


class Gradients(NamedTuple):
    """Gradients of a loss, in the wide dtype; None where nobody asks."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def new_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype,
    needs: tuple[bool, bool, bool],
) -> Gradients:
    """Memory for the gradients that are needed; what is added to begins at 0."""
    return Gradients(
        torch.empty_like(hidden, dtype=dtype) if needs[0] else None,
        torch.zeros_like(weight, dtype=dtype) if needs[1] else None,
        torch.zeros_like(bias, dtype=dtype) if bias is not None and needs[2] else None,
    )


@torch.no_grad()
def _loss_and_gradients(
    tokens: _Rows, weight: Tensor, bias: Tensor | None, coefficients: _Coefficients,
    needs: tuple[bool, bool, bool], chunk_tokens: int | None,
) -> tuple[Tensor, PolicyStats, Gradients]:
    """The loss, its statistics and the gradients that are needed, chunk by chunk."""
    dtype, num_tokens = wide_dtype(tokens.hidden.dtype), len(tokens.hidden)
    wide_weight = weight.to(dtype)
    wide_bias = None if bias is None else bias.to(dtype)
    logprobs = torch.empty(num_tokens, dtype=dtype, device=weight.device)
    entropy = torch.empty_like(logprobs)
    gradients = new_gradients(tokens.hidden, weight, bias, dtype, needs)
    chunks = chunk_slices(num_tokens, len(weight), dtype.itemsize, chunk_tokens)
    buffers = chunk_buffers(chunks, wide_weight)
    for rows in chunks:
        chunk = tokens._replace(**{name: values[rows] for name, values in tokens._asdict().items()
                                   if values is not None})
        logprobs[rows], entropy[rows] = _process_chunk(
            chunk, wide_weight, wide_bias, coefficients,
            Gradients(None if gradients.hidden is None else gradients.hidden[rows],
                      gradients.weight, gradients.bias), buffers)
    loss, stats = _total(logprobs, entropy, tokens, coefficients)
    return loss, stats, gradients


def _process_chunk(
    chunk: _Rows, weight: Tensor, bias: Tensor | None, coefficients: _Coefficients,
    gradients: Gradients, buffers: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropy [m] of a chunk; its gradients are added to `gradients`."""
    # A masked row is computed as if its hidden state were 0: what it holds, NaN too, is no matter.
    hidden = chunk.hidden.to(weight.dtype).masked_fill(~chunk.loss_mask[:, None], 0.0)
    distribution = chunk_distribution(hidden, weight, bias, chunk.token_ids,
                                      coefficients.temperature, buffers)
    if any(gradient is not None for gradient in gradients):
        scale = 1 / (coefficients.denominator * coefficients.temperature)
        weights = scale * _wide_weights(chunk, weight.dtype)
        dlogprobs = weights * _logprobs_gradient(distribution.logprobs, chunk, coefficients)
        dentropy = None
        if coefficients.entropy_coef > 0:
            dentropy = -coefficients.entropy_coef * weights
        dlogits = logits_gradient(distribution, chunk.token_ids, dlogprobs, dentropy)
        add_head_gradients(dlogits, hidden, weight, *gradients)
    return distribution.logprobs, distribution.entropy


def _logprobs_gradient(logprobs: Tensor, chunk: _Rows, coefficients: _Coefficients) -> Tensor:
    """[m]: derivative of a token's loss by hand: -A rho, or 0 where clip or mask cut it off, + KL.
    """
    c, dtype = coefficients, logprobs.dtype
    log_ratio = logprobs - chunk.old_logprobs.to(dtype)
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    advantages = chunk.advantages.to(dtype)
    high = c.clip_range if c.clip_range_high is None else c.clip_range_high
    unclipped, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - c.clip_range, 1 + high)
    is_active = chunk.loss_mask & (unclipped >= clipped) & (log_ratio.abs() <= MAX_LOG_RATIO)
    if c.dual_clip is not None:
        is_active &= (advantages >= 0) | (unclipped <= -c.dual_clip * advantages)
    gradient = torch.where(is_active, unclipped, torch.zeros_like(unclipped))
    if chunk.ref_logprobs is None:
        return gradient
    k1 = logprobs - chunk.ref_logprobs.to(dtype)
    dkl = k1 if c.kl_estimator != "k3" else -torch.expm1(-k1).where(-k1 <= MAX_EXPONENT, 0.0)
    return gradient + c.kl_coef * dkl.masked_fill(~chunk.loss_mask, 0.0)


class KnownGradients(torch.autograd.Function):
    """The loss as a function of hidden, weight and bias whose gradients are there but for a factor.

    The factor meets them in the pass that rounds them to the inputs' type.
    """

    @staticmethod
    def forward(
        ctx: Any, loss: Tensor, factor: float, dhidden: Tensor | None, dweight: Tensor | None,
        dbias: Tensor | None, *inputs: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(dhidden, dweight, dbias)
        ctx.factor, ctx.dtypes = factor, [None if x is None else x.dtype for x in inputs]
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        factor = dloss * ctx.factor
        gradients = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return (None,) * 5 + tuple(
            None if gradient is None else (factor * gradient).to(dtype)
            for gradient, dtype in gradients
        )


def _check(
    hidden: Tensor, weight: Tensor, tokens: dict[str, Tensor], loss_mask: Tensor,
    bias: Tensor | None, coefficients: _Coefficients, chunk_tokens: int | None,
) -> None:
    op, c = "linear_policy_loss", coefficients
    floats = {name: values for name, values in tokens.items() if name != "token_ids"}
    check_shape(op, {**tokens, "loss_mask": loss_mask}, ndim=1, layout="[M]")
    check_float(op, **floats)
    check_mask(op, loss_mask=loss_mask)
    check_linear(op, hidden, weight, tokens["token_ids"], bias, c.temperature, chunk_tokens,
                 loss_mask)
    check_values(op, loss_mask, **floats)
    check_positive(op, denominator=c.denominator, clip_range=c.clip_range,
                   clip_range_high=c.clip_range_high)
    check_not_negative(op, entropy_coef=c.entropy_coef, kl_coef=c.kl_coef)
    if c.dual_clip is not None and not c.dual_clip > 1:
        raise ConfigError(f"{op}: expected dual_clip above 1, got {c.dual_clip}; 3 is usual")
    if c.kl_estimator not in ESTIMATORS:
        raise ConfigError(f"{op}: expected kl_estimator k1, k2 or k3, got {c.kl_estimator!r}")
    if (c.kl_coef > 0) != ("ref_logprobs" in tokens):
        raise ConfigError(f"{op}: expected ref_logprobs where kl_coef is above 0 and only there, "
                          f"got kl_coef {c.kl_coef} and "
                          f"{'some' if 'ref_logprobs' in tokens else 'none'}; pass both or neither")


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    *,
    bias: Tensor | None = None,
    denominator: float,
    clip_range: float = 0.2,
    clip_range_high: float | None = None,
    dual_clip: float | None = None,
    temperature: float = 1.0,
    entropy_coef: float = 0.0,
    token_weights: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: Estimator = "k3",
    chunk_tokens: int | None = None,
    keeps_rows: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, PolicyStats]:
    """The clipped policy loss of PPO straight from hidden states and the head.

        z = (hidden @ weight.T + bias) / temperature        rho = exp(logprob(z) - old_logprob)
        L = max(-A rho, -A clip(rho, 1 - clip_range, 1 + clip_range_high))
            where A < 0 and dual_clip is given: min(L, -A dual_clip)
        loss = sum_mask w (L + kl_coef kl - entropy_coef H) / denominator

    Args:
        hidden: [M, D] float. hidden[m] predicts token_ids[m]; differentiable.
        weight: [V, D] float. The head; differentiable.
        token_ids: [M] int64.
        old_logprobs: [M] float. Policy when the batch was made, at the same temperature.
        advantages: [M] float.
        loss_mask: [M] bool. True for tokens that count; elsewhere anything, NaN too.
        bias: [V] float or None; -inf forbids a token. Differentiable.
        denominator: Tokens of the whole minibatch, so that microbatches add up.
        clip_range: How far below 1 the ratio counts.
        clip_range_high: How far above 1 it counts; None: as far as below.
        dual_clip: Bound of the loss of a bad token, in units of -A; None: none.
        temperature: Divides the logits.
        entropy_coef: Weight of the entropy bonus.
        token_weights: [M] float. w of each token; None: 1.
        ref_logprobs: [M] float. Of the reference; given exactly where kl_coef is above 0.
        kl_coef: Weight of the KL to the reference.
        kl_estimator: See `kl_estimate`. k2 and k3 are differentiated as they stand; k1 has the
            gradient of k2, because its own is 0 in the mean over samples of the policy. k2's is
            that of KL(policy || reference), k3's that of KL(reference || policy), for such samples.
        chunk_tokens: Rows of logits in memory at a time; None: as many as fit in a fixed budget.
        keeps_rows: Where exact mode prefers triton, logits by the kernel of `linear`, whose rows
            do not depend on how many there are.
        backend: See fastrl.backends.
    Returns:
        loss: Scalar float32 (float64 for float64). Differentiable once.
        stats: PolicyStats.
    Raises:
        ShapeError: when shapes, dtypes or devices do not fit together.
        ConfigError: when a coefficient is out of bounds.
        BackendUnavailableError: when a backend is named that cannot run.
    Cost: 6MDV operations with gradient, 2MDV without; two chunks of logits (triton: one); the
        gradients of hidden and weight in float32, from the forward on.
    Source: Schulman et al. 2017 (arXiv 1707.06347), eq. 7; two clip ranges: Yu et al. 2025
        (arXiv 2503.14476); dual clip: Ye et al. 2020 (arXiv 1912.09729); KL in the loss: Shao et
        al. 2024 (arXiv 2402.03300); gradient in the forward after linkedin/Liger-Kernel
        (arXiv 2410.10989).
    Example:
        >>> hidden, weight = torch.ones(1, 2), torch.zeros(4, 2)
        >>> token_ids, mask = torch.tensor([3]), torch.tensor([True])
        >>> old = torch.tensor([0.125]).log()
        >>> loss, stats = linear_policy_loss(hidden, weight, token_ids, old, torch.ones(1), mask,
        ...                                  denominator=1)
        >>> round(float(loss), 4), round(float(stats.ratio), 4)
        (-1.2, 2.0)
    """
    coefficients = _Coefficients(denominator, clip_range, clip_range_high, dual_clip, temperature,
                                 entropy_coef, kl_coef, kl_estimator)
    optional = {"token_weights": token_weights, "ref_logprobs": ref_logprobs}
    given = {name: values for name, values in optional.items() if values is not None}
    _check(hidden, weight, {"token_ids": token_ids, "old_logprobs": old_logprobs,
                            "advantages": advantages, **given}, loss_mask, bias, coefficients,
           chunk_tokens)
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    name = choose("linear_policy_loss", "linear_policy_loss", PREFERENCE, hidden.device.type,
                  dtype, backend)
    if name == "triton":
        from fastrl_kernels.triton import linear_policy_loss as kernels

        loss, sums = kernels.linear_policy_loss(
            hidden, weight, token_ids, old_logprobs, advantages, loss_mask, bias=bias,
            token_weights=token_weights, ref_logprobs=ref_logprobs, **coefficients._asdict(),
            max_log_ratio=MAX_LOG_RATIO, max_exponent=MAX_EXPONENT, chunk_tokens=chunk_tokens,
            keeps_rows=takes_kernel(keeps_rows, hidden))
        return loss, PolicyStats(*sums.unbind())
    tokens = _Rows(hidden, masked_to_zero(token_ids, loss_mask), old_logprobs, advantages,
                   loss_mask, token_weights, ref_logprobs)
    is_recording = torch.is_grad_enabled()
    needs = (is_recording and hidden.requires_grad, is_recording and weight.requires_grad,
             is_recording and bias is not None and bias.requires_grad)
    loss, stats, gradients = _loss_and_gradients(tokens, weight, bias, coefficients, needs,
                                                 chunk_tokens)
    if any(needs):
        loss = KnownGradients.apply(  # type: ignore[no-untyped-call]
            loss, 1.0, *gradients, hidden, weight, bias
        )
    return loss, stats

"""linear_cross_entropy: negative log-likelihood from hidden states and a head.

    z = (hidden @ weight.T + bias) / temperature
    loss = -sum_mask w logprob(z) / denominator

What a token's log-prob weighs in the loss is known beforehand, so, as in linear_policy_loss, each
chunk of logits becomes its own gradient in place: three products instead of the four of
recomputation, and no [M, V].
"""

import torch
from torch import Tensor

from fastrl.backends import choose
from fastrl.checks import (
    check_float,
    check_mask,
    check_positive,
    check_shape,
    check_values,
    wide_dtype,
)
from fastrl.ops.linear_logprob import (
    add_head_gradients,
    check_linear,
    chunk_slices,
    linear_logprobs_reference,
    masked_to_zero,
)
from fastrl.ops.linear_policy_loss import Gradients, KnownGradients, new_gradients

# Order by measurement; no GPU result yet, so "auto" keeps the proven path.
PREFERENCE = ("torch", "triton")


def linear_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    loss_mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    denominator: float,
    temperature: float = 1.0,
    token_weights: Tensor | None = None,
) -> Tensor:
    """linear_cross_entropy in plain torch, with all logits in memory and autograd behind them."""
    if loss_mask is not None:
        hidden = hidden.masked_fill(~loss_mask[:, None], 0.0)
    token_ids = masked_to_zero(token_ids, loss_mask)
    logprobs, _ = linear_logprobs_reference(hidden, weight, token_ids, bias=bias,
                                            temperature=temperature)
    return _token_losses(logprobs, _weights(loss_mask, token_weights, logprobs)).sum() / denominator


def _weights(loss_mask: Tensor | None, token_weights: Tensor | None, like: Tensor) -> Tensor | None:
    """[M] in the type of `like`: the weight of each token, 0 where masked; None: 1 everywhere."""
    if token_weights is None:
        return None if loss_mask is None else loss_mask.to(like.dtype)
    weights = token_weights.detach().to(like.dtype)
    return weights if loss_mask is None else weights.masked_fill(~loss_mask, 0.0)


def _token_losses(logprobs: Tensor, weights: Tensor | None) -> Tensor:
    """[M]: -w logprob; a token of weight 0 adds nothing, whatever its log-prob."""
    if weights is None:
        return -logprobs
    return -weights * logprobs.masked_fill(weights == 0, 0.0)


@torch.no_grad()
def _losses_and_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, token_ids: Tensor,
    loss_mask: Tensor | None, token_weights: Tensor | None, temperature: float,
    needs: tuple[bool, bool, bool], chunk_tokens: int | None,
) -> tuple[Tensor, Gradients]:
    """The tokens' losses [M], and the gradients of their sum by z, through to the inputs."""
    dtype = wide_dtype(hidden.dtype)
    wide_weight, wide_bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    token_ids = masked_to_zero(token_ids, loss_mask)
    logprobs = torch.empty(len(hidden), dtype=dtype, device=hidden.device)
    weights = _weights(loss_mask, token_weights, logprobs)
    gradients = new_gradients(hidden, weight, bias, dtype, needs)
    for rows in chunk_slices(len(hidden), len(weight), dtype.itemsize, chunk_tokens):
        kept = hidden[rows].to(dtype)
        if loss_mask is not None:  # what a masked row holds, NaN too, is no matter
            kept = kept.masked_fill(~loss_mask[rows, None], 0.0)
        logprobs[rows] = _process_chunk(
            kept, wide_weight, wide_bias, token_ids[rows],
            None if weights is None else weights[rows], temperature,
            Gradients(None if gradients.hidden is None else gradients.hidden[rows],
                      gradients.weight, gradients.bias))
    return _token_losses(logprobs, weights), gradients


def _process_chunk(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, token_ids: Tensor,
    weights: Tensor | None, temperature: float, gradients: Gradients,
) -> Tensor:
    """Log-probs [m] of a chunk; its gradients are added to `gradients`.

    A function of its own, so that the chunk's logits are freed before the next ones are made.
    """
    logits = hidden @ weight.T if bias is None else torch.addmm(bias, hidden, weight.T)
    if temperature != 1.0:
        logits.div_(temperature)
    all_logprobs = torch.log_softmax(logits, dim=1)
    del logits
    logprobs = all_logprobs.gather(1, token_ids[:, None]).squeeze(1)
    if any(gradient is not None for gradient in gradients):
        dlogits = all_logprobs.exp_()  # of the sum of the losses: w (p - onehot)
        if weights is None:
            weights = torch.ones_like(logprobs)
        else:
            dlogits.mul_(weights[:, None])
        dlogits.scatter_add_(1, token_ids[:, None], -weights[:, None])
        add_head_gradients(dlogits, hidden, weight, *gradients)
    return logprobs


def _check(
    hidden: Tensor, weight: Tensor, token_ids: Tensor, loss_mask: Tensor | None,
    bias: Tensor | None, denominator: float, temperature: float, token_weights: Tensor | None,
    chunk_tokens: int | None,
) -> None:
    op = "linear_cross_entropy"
    tensors = {"token_ids": token_ids}
    if loss_mask is not None:
        check_mask(op, loss_mask=loss_mask)
        tensors["loss_mask"] = loss_mask
    if token_weights is not None:
        check_float(op, token_weights=token_weights)
        tensors["token_weights"] = token_weights
    check_shape(op, tensors, ndim=1, layout="[M]")
    check_linear(op, hidden, weight, token_ids, bias, temperature, chunk_tokens, loss_mask)
    check_positive(op, denominator=denominator)
    if token_weights is not None:
        check_values(op, loss_mask, token_weights=token_weights)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    loss_mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    denominator: float,
    temperature: float = 1.0,
    token_weights: Tensor | None = None,
    chunk_tokens: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Negative log-likelihood of given tokens straight from hidden states and the head.

        z = (hidden @ weight.T + bias) / temperature
        loss = -sum_mask w logprob(z) / denominator

    Args:
        hidden: [M, D] float. hidden[m] predicts token_ids[m]; differentiable.
        weight: [V, D] float. The head; differentiable.
        token_ids: [M] int64.
        loss_mask: [M] bool. True for tokens that count; elsewhere anything, NaN too. None: all.
        bias: [V] float or None; -inf forbids a token. Differentiable.
        denominator: Tokens of the whole minibatch, so that microbatches add up.
        temperature: Divides the logits.
        token_weights: [M] float, w, or None for 1. No gradient; a token of weight 0 adds nothing.
        chunk_tokens: Rows of logits in memory at a time; None: as many as fit in a fixed budget.
        backend: See fastrl.backends.
    Returns:
        Scalar float32 (float64 for float64). Differentiable once.
    Raises:
        ShapeError: when shapes, dtypes or devices do not fit together.
        ConfigError: when denominator, temperature or chunk_tokens is not above 0.
        BackendUnavailableError: when a backend is named that cannot run.
    Cost: 6MDV operations with gradient, 2MDV without; two chunks of logits (triton: one); the
        gradients of hidden and weight in float32, from the forward on.
    Source: gradient in the forward after linkedin/Liger-Kernel (arXiv 2410.10989).
    Example:
        >>> hidden, weight = torch.ones(1, 2), torch.zeros(4, 2)
        >>> loss = linear_cross_entropy(hidden, weight, torch.tensor([3]), denominator=1)
        >>> round(float(loss), 4)
        1.3863
    """
    _check(hidden, weight, token_ids, loss_mask, bias, denominator, temperature, token_weights,
           chunk_tokens)
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    name = choose("linear_cross_entropy", "linear_cross_entropy", PREFERENCE, hidden.device.type,
                  dtype, backend)
    if name == "triton":
        from fastrl_kernels.triton import linear_cross_entropy as kernels

        return kernels.linear_cross_entropy(
            hidden, weight, token_ids, loss_mask, bias=bias, denominator=denominator,
            temperature=temperature, token_weights=token_weights, chunk_tokens=chunk_tokens)
    is_recording = torch.is_grad_enabled()
    needs = (is_recording and hidden.requires_grad, is_recording and weight.requires_grad,
             is_recording and bias is not None and bias.requires_grad)
    losses, gradients = _losses_and_gradients(hidden, weight, bias, token_ids, loss_mask,
                                              token_weights, temperature, needs, chunk_tokens)
    loss = losses.sum() / denominator
    if any(needs):
        loss = KnownGradients.apply(  # type: ignore[no-untyped-call]
            loss, 1 / (denominator * temperature), *gradients, hidden, weight, bias
        )
    return loss

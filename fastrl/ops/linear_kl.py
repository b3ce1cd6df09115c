"""linear_kl: KL over the whole vocabulary between a policy and a reference, from hidden states.

    q = softmax((hidden @ weight.T + bias) / temperature)
    p = softmax((ref_hidden @ ref_weight.T + ref_bias) / temperature)
    reverse: KL(q || p) = sum_v q_v (log q_v - log p_v)        forward: KL(p || q)
"""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastrl.backends import choose
from fastrl.checks import check_device, check_positive, wide_dtype
from fastrl.errors import ConfigError, ShapeError
from fastrl.ops.linear_logprob import add_head_gradients, check_head, chunk_slices
from fastrl.ops.linear_policy_loss import new_gradients

# Order by measurement; no GPU result yet, so "auto" keeps the proven path.
PREFERENCE = ("torch", "triton")
DIRECTIONS = ("reverse", "forward")
Direction = Literal["reverse", "forward"]


def linear_kl_reference(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    *,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    temperature: float = 1.0,
    direction: Direction = "reverse",
) -> Tensor:
    """linear_kl in plain torch, with all logits in memory and autograd behind them."""
    dtype = _dtype(hidden, ref_hidden)
    policy = _all_logprobs(hidden, weight, bias, temperature, dtype)
    reference = _all_logprobs(ref_hidden, ref_weight, ref_bias, temperature, dtype).detach()
    first, second = (policy, reference) if direction == "reverse" else (reference, policy)
    probs = first.exp()
    # A token of probability 0 adds nothing; 0 * inf would be NaN.
    return (probs * (first - second).masked_fill(probs == 0, 0.0)).sum(dim=1)


def _dtype(hidden: Tensor, ref_hidden: Tensor) -> torch.dtype:
    return wide_dtype(torch.promote_types(hidden.dtype, ref_hidden.dtype))


def _heads(dtype: torch.dtype, *heads: Tensor | None) -> list[Any]:
    """weight, bias, ref_weight, ref_bias in the type of the computation; None stays None."""
    return [None if x is None else x.to(dtype) for x in heads]


def _all_logprobs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, dtype: torch.dtype
) -> Tensor:
    """[m, V]."""
    logits = hidden.to(dtype) @ weight.to(dtype).T
    if bias is not None:
        logits = logits + bias.to(dtype)
    return torch.log_softmax(logits / temperature if temperature != 1.0 else logits, dim=1)


def _weighted_gap(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """The first's probabilities, and what each token adds to KL, in the memory of `second`."""
    probs = first.exp()
    gap = second.neg_().add_(first).masked_fill_(probs == 0, 0.0)
    return probs, gap.mul_(probs)


def _logits_gradient(policy: Tensor, reference: Tensor, direction: str) -> Tensor:
    """[m, V], derivative of KL by the policy's z: q (log q - log p - KL), or q - p."""
    if direction == "forward":
        return policy.exp_().sub_(reference.exp_())
    probs, weighted = _weighted_gap(policy, reference)
    return weighted.addcmul_(probs, weighted.sum(dim=1, keepdim=True), value=-1)


class _LinearKL(torch.autograd.Function):
    """Keeps its inputs between forward and backward; backward makes the logits again."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, ref_hidden: Tensor,
        ref_weight: Tensor, ref_bias: Tensor | None, temperature: float, direction: str,
        chunk_tokens: int | None,
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias, ref_hidden, ref_weight, ref_bias)
        ctx.settings = temperature, direction, chunk_tokens
        dtype = _dtype(hidden, ref_hidden)
        heads = _heads(dtype, weight, bias, ref_weight, ref_bias)
        kl = torch.empty(len(hidden), dtype=dtype, device=hidden.device)
        for rows in chunk_slices(len(hidden), 2 * len(weight), dtype.itemsize, chunk_tokens):
            kl[rows] = _chunk_kl(hidden[rows], ref_hidden[rows], heads, temperature, direction)
        return kl

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dkl: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, ref_hidden, ref_weight, ref_bias = ctx.saved_tensors
        temperature, direction, chunk_tokens = ctx.settings
        dtype = _dtype(hidden, ref_hidden)
        heads = _heads(dtype, weight, bias, ref_weight, ref_bias)
        gradients = new_gradients(hidden, weight, bias, dtype, ctx.needs_input_grad[:3])
        for rows in chunk_slices(len(hidden), 2 * len(weight), dtype.itemsize, chunk_tokens):
            dlogits = _logits_gradient(
                *_chunk_logprobs(hidden[rows], ref_hidden[rows], heads, temperature), direction)
            dlogits.mul_((dkl[rows] / temperature)[:, None])
            add_head_gradients(
                dlogits, hidden[rows].to(dtype), heads[0], None if gradients.hidden is None
                else gradients.hidden[rows], *gradients[1:])
            del dlogits  # before the next ones are made
        return (*(None if gradient is None else gradient.to(x.dtype)
                  for gradient, x in zip(gradients, (hidden, weight, bias), strict=True)),
                *(None,) * 6)


def _chunk_logprobs(
    hidden: Tensor, ref_hidden: Tensor, heads: list[Any], temperature: float
) -> tuple[Tensor, Tensor]:
    """[m, V] of the policy and of the reference."""
    weight, bias, ref_weight, ref_bias = heads
    return (_all_logprobs(hidden, weight, bias, temperature, weight.dtype),
            _all_logprobs(ref_hidden, ref_weight, ref_bias, temperature, weight.dtype))


def _chunk_kl(
    hidden: Tensor, ref_hidden: Tensor, heads: list[Any], temperature: float, direction: str
) -> Tensor:
    """[m]."""
    policy, reference = _chunk_logprobs(hidden, ref_hidden, heads, temperature)
    pair = (policy, reference) if direction == "reverse" else (reference, policy)
    return _weighted_gap(*pair)[1].sum(dim=1)


def _check(
    hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor, bias: Tensor | None,
    ref_bias: Tensor | None, temperature: float, direction: str, chunk_tokens: int | None,
) -> None:
    op = "linear_kl"
    check_head(op, hidden, weight, bias)
    check_head(op, ref_hidden, ref_weight, ref_bias, prefix="ref_")
    check_device(op, {"hidden": hidden, "ref_hidden": ref_hidden})
    sizes, ref_sizes = (len(hidden), len(weight)), (len(ref_hidden), len(ref_weight))
    if sizes != ref_sizes:
        raise ShapeError(f"{op}: expected one M and one V for policy and reference, got "
                         f"{list(sizes)} and {list(ref_sizes)}")
    check_positive(op, temperature=temperature, chunk_tokens=chunk_tokens)
    if direction not in DIRECTIONS:
        raise ConfigError(f"{op}: expected direction reverse or forward, got {direction!r}")


def linear_kl(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    *,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    temperature: float = 1.0,
    direction: Direction = "reverse",
    chunk_tokens: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """KL over the whole vocabulary between the policy q and the reference p, per token.

        q = softmax((hidden @ weight.T + bias) / temperature)
        p = softmax((ref_hidden @ ref_weight.T + ref_bias) / temperature)
        reverse: KL(q || p) = sum_v q_v (log q_v - log p_v)        forward: KL(p || q)

    Args:
        hidden: [M, D] float. Policy; differentiable.
        weight: [V, D] float. Its head; differentiable.
        ref_hidden: [M, D2] float. Reference, at the same tokens. No gradient.
        ref_weight: [V, D2] float. No gradient.
        bias: [V] float or None; -inf forbids a token. Differentiable.
        ref_bias: [V] float or None. No gradient.
        temperature: Divides both logits.
        direction: "reverse" is KL(policy || reference), the penalty of RLHF; "forward" is
            KL(reference || policy), the loss of plain distillation.
        chunk_tokens: Rows of logits in memory at a time; None: as many as fit in a fixed budget.
        backend: See fastrl.backends.
    Returns:
        [M] float32 (float64 for float64), nats; inf where the first of the two allows a token that
        the second forbids. Rounding may leave equal distributions a little below 0. Differentiable
        once; there is no number for the gradient of inf.
    Raises:
        ShapeError: when shapes, dtypes or devices do not fit together.
        ConfigError: when temperature or chunk_tokens is not above 0, or there is no such direction.
        BackendUnavailableError: when a backend is named that cannot run.
    Cost: 2M(D + D2)V operations forward, that and 4MDV backward; two chunks of logits for each of
        the two models (triton: one).
    Source: Agarwal et al. 2024 (arXiv 2306.13649) for both directions in distillation.
    Example:
        >>> hidden, weight = torch.ones(1, 1), torch.tensor([[3.0], [1.0]]).log()
        >>> round(float(linear_kl(hidden, weight, hidden, torch.zeros(2, 1))), 4)
        0.1308
    """
    _check(hidden, weight, ref_hidden, ref_weight, bias, ref_bias, temperature, direction,
           chunk_tokens)
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    dtype = torch.promote_types(dtype, torch.promote_types(ref_hidden.dtype, ref_weight.dtype))
    name = choose("linear_kl", "linear_kl", PREFERENCE, hidden.device.type, dtype, backend)
    if name == "triton":
        from fastrl_kernels.triton import linear_kl as kernels

        return kernels.linear_kl(
            hidden, weight, ref_hidden, ref_weight, bias=bias, ref_bias=ref_bias,
            temperature=temperature, direction=direction, chunk_tokens=chunk_tokens)
    references = (x if x is None else x.detach() for x in (ref_hidden, ref_weight, ref_bias))
    kl: Tensor = _LinearKL.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, *references, temperature, direction, chunk_tokens
    )
    return kl

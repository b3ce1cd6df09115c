"""kl_estimate: three estimators of KL(policy || reference) from tokens the policy drew.

    u = ref_logprobs - logprobs        k1 = -u        k2 = u^2 / 2        k3 = exp(u) - 1 - u
"""

import torch
from torch import Tensor

from fastrl.backends import choose
from fastrl.checks import check_float, check_mask, check_shape, check_values, wide_dtype

# Order by measurement; no GPU result yet, so "auto" keeps the proven path.
PREFERENCE = ("torch", "triton", "cuda")
MAX_EXPONENT = 20.0
"""exp is applied to at most this; beyond it the estimate is meaningless but must stay finite."""


def kl_estimate_reference(
    logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """kl_estimate in plain torch."""
    dtype = wide_dtype(torch.promote_types(logprobs.dtype, ref_logprobs.dtype))
    k1 = logprobs.to(dtype) - ref_logprobs.to(dtype)
    if mask is not None:
        k1 = k1.masked_fill(~mask, 0.0)
    u = (-k1).clamp(max=MAX_EXPONENT)
    return k1, k1.square() / 2, torch.expm1(u) - u


def _check(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor | None) -> None:
    tensors = {"logprobs": logprobs, "ref_logprobs": ref_logprobs}
    check_float("kl_estimate", **tensors)
    if mask is not None:
        check_mask("kl_estimate", mask=mask)
        tensors["mask"] = mask
    check_shape("kl_estimate", tensors, ndim=logprobs.dim(), layout="[...]")
    check_values("kl_estimate", mask, logprobs=logprobs, ref_logprobs=ref_logprobs)


def kl_estimate(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Per-token estimates k1, k2, k3 of KL(policy || reference), tokens drawn from the policy.

        u = ref_logprobs - logprobs
        k1 = -u              unbiased, high variance
        k2 = u^2 / 2         biased, low variance; the one to use as a loss
        k3 = exp(u) - 1 - u  unbiased, low variance, never negative

    Args:
        logprobs: [...] float. Policy, of the tokens drawn from it.
        ref_logprobs: [...] float. Reference, of the same tokens.
        mask: [...] bool. True means keep; None keeps all.
        backend: See fastrl.backends.
    Returns:
        k1, k2, k3: [...] float32 (float64 for float64) each, 0 where the mask is False.
        Differentiable (triton: once). In k3, u is held at 20 so that the exponential stays finite.
    Raises:
        ShapeError: when shapes differ or dtypes do not fit.
        BackendUnavailableError: when a backend is named that cannot run.
    Cost: reads 8 bytes, writes 12 bytes per token.
    Source: Schulman, "Approximating KL divergence", joschu.net/blog/kl-approx.html, 2020.
    Example:
        >>> k1, k2, k3 = kl_estimate(torch.tensor([-1.0]), torch.tensor([-1.5]))
        >>> round(float(k1), 4), round(float(k2), 4), round(float(k3), 4)
        (0.5, 0.125, 0.1065)
    """
    _check(logprobs, ref_logprobs, mask)
    dtype = torch.promote_types(logprobs.dtype, ref_logprobs.dtype)
    name = choose("kl_estimate", "kl", PREFERENCE, logprobs.device.type, dtype, backend)
    if name == "triton":
        from fastrl_kernels.triton import kl

        return kl.kl_estimate(logprobs, ref_logprobs, mask)
    if name == "cuda":
        from fastrl_kernels.cuda import kl as cuda_kl

        return cuda_kl.kl_estimate(logprobs, ref_logprobs, mask)
    return kl_estimate_reference(logprobs, ref_logprobs, mask)

"""gather_logprobs: log-probs of given tokens, and the entropy of each row, from logits.

    z = logits / temperature        logprob = z_token - logsumexp(z)        H = -sum_v p_v log p_v
"""

import torch
from torch import Tensor

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
from fastrl.errors import ShapeError

# Order by measurement; no GPU result yet, so "auto" keeps the proven path.
PREFERENCE = ("torch", "triton", "cuda")


def gather_logprobs_reference(
    logits: Tensor, token_ids: Tensor, *, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """gather_logprobs in plain torch."""
    all_logprobs = torch.log_softmax(logits.to(wide_dtype(logits.dtype)) / temperature, dim=-1)
    logprobs = all_logprobs.gather(-1, token_ids[:, None]).squeeze(-1)
    # A token of probability 0 adds nothing to the entropy; 0 * -inf would be NaN.
    finite = all_logprobs.masked_fill(all_logprobs == -torch.inf, 0.0)
    return logprobs, -(all_logprobs.exp() * finite).sum(dim=-1)


def _check(logits: Tensor, token_ids: Tensor, temperature: float) -> None:
    op = "gather_logprobs"
    if logits.dim() != 2 or token_ids.shape != logits.shape[:1]:
        raise ShapeError(f"{op}: expected logits [M, V] and token_ids [M], got "
                         f"{list(logits.shape)} and {list(token_ids.shape)}; flatten leading "
                         "dimensions first")
    if logits.shape[1] == 0:
        raise ShapeError(f"{op}: expected logits [M, V] with V at least 1, got "
                         f"{list(logits.shape)}")
    check_float(op, logits=logits)
    check_index(op, token_ids=token_ids)
    check_device(op, {"logits": logits, "token_ids": token_ids})
    check_positive(op, temperature=temperature)
    check_values(op, logits=logits)
    check_range(op, logits.shape[1], token_ids=token_ids)


def gather_logprobs(
    logits: Tensor,
    token_ids: Tensor,
    *,
    temperature: float = 1.0,
    overwrite_logits: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of one token per row, and the entropy of the row.

        z = logits / temperature    logprob = z_token - logsumexp(z)    H = -sum_v p_v log p_v

    Args:
        logits: [M, V] float. Row m predicts token_ids[m]; columns may be -inf.
        token_ids: [M] int64.
        temperature: Divides the logits.
        overwrite_logits: Nobody needs the logits any more: the backward pass may put their gradient
            in their memory (triton and cuda do, where they are contiguous).
        backend: See fastrl.backends.
    Returns:
        logprobs, entropy: [M] float32 (float64 for float64) each, nats. Differentiable.
    Raises:
        ShapeError: when shapes, dtypes or devices do not fit together.
        ConfigError: when the temperature is not above 0.
        BackendUnavailableError: when a backend is named that cannot run.
    Cost: torch keeps a float32 copy of the logits for the backward pass; triton and cuda read them
        once and keep three numbers per row.
    Source: Ouyang et al. 2022 (arXiv 2203.02155), as the log-probs of its eq. 2.
    Example:
        >>> logprobs, entropy = gather_logprobs(torch.zeros(1, 4), torch.tensor([2]))
        >>> round(float(logprobs), 4), round(float(entropy), 4)
        (-1.3863, 1.3863)
    """
    _check(logits, token_ids, temperature)
    name = choose("gather_logprobs", "logprob", PREFERENCE, logits.device.type, logits.dtype,
                  backend)
    if name == "triton":
        from fastrl_kernels.triton import logprob

        return logprob.gather_logprobs(logits, token_ids, temperature=temperature,
                                       overwrite_logits=overwrite_logits)
    if name == "cuda":
        from fastrl_kernels.cuda import logprob as cuda_logprob

        return cuda_logprob.gather_logprobs(logits, token_ids, temperature=temperature,
                                            overwrite_logits=overwrite_logits)
    return gather_logprobs_reference(logits, token_ids, temperature=temperature)

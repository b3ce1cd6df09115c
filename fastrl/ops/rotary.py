"""rotary, qk_norm_rotary: what queries and keys go through between their projection and attention.

    (x_i, x_{i + R/2}) <- (x_i cos - x_{i + R/2} sin, x_{i + R/2} cos + x_i sin)      i < R/2

The first R channels of every head turn by the angle of their token's position; the rest stay. With
weights every head is normalised first, over its C channels (`rms_norm`).
Shape letters: N packed tokens, Hq and Hk query and KV heads, C channels per head, R rotary ones.
"""

import torch
from torch import Tensor

from fastrl.backends import choose
from fastrl.checks import check_device, check_values
from fastrl.errors import ShapeError
from fastrl.ops.norm import rms_norm_reference

# Order by measurement; no GPU result yet, so "auto" keeps the proven path.
PREFERENCE = ("torch", "triton")


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the first R channels of x [N, H, C], pairing channel i with channel i + R/2."""
    half = cos.shape[-1]
    rest = x[..., 2 * half:]
    needs_gradient = x.requires_grad and torch.is_grad_enabled()
    if needs_gradient or torch.compiler.is_compiling():
        first, second = x[..., :half], x[..., half:2 * half]
        return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)
    # The same sums, both halves in one call.
    pairs = x[..., :2 * half].view(*x.shape[:-1], 2, half)
    turned, crossed = pairs * cos[:, :, None], pairs * sin[:, :, None]
    turned[..., 0, :].sub_(crossed[..., 1, :])
    turned[..., 1, :].add_(crossed[..., 0, :])
    turned = turned.flatten(-2)
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned


def rotary_reference(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """rotary in plain torch."""
    return rotate(query, cos, sin), rotate(key, cos, sin)


def qk_norm_rotary_reference(
    query: Tensor, key: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, *,
    epsilon: float,
) -> tuple[Tensor, Tensor]:
    """qk_norm_rotary in plain torch."""
    return rotary_reference(rms_norm_reference(query, q_weight, epsilon=epsilon),
                            rms_norm_reference(key, k_weight, epsilon=epsilon), cos, sin)


def check_angles(op: str, x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """cos and sin are [N, 1, R/2] for heads x [N, H, C], R at most C."""
    if x.dim() != 3 or cos.shape != sin.shape or cos.dim() != 3 \
            or cos.shape[:2] != (x.shape[0], 1) or 2 * cos.shape[2] > x.shape[2]:
        raise ShapeError(f"{op}: expected heads [N, H, C] and cos, sin [N, 1, R/2] with R at most "
                         f"C, got {list(x.shape)}, {list(cos.shape)} and {list(sin.shape)}")
    if not x.dtype == cos.dtype == sin.dtype or not x.is_floating_point():
        raise ShapeError(f"{op}: expected heads, cos and sin of one floating type, got {x.dtype}, "
                         f"{cos.dtype} and {sin.dtype}")
    check_device(op, {"heads": x, "cos": cos, "sin": sin})


def check_head_weights(op: str, x: Tensor, weights: tuple[Tensor, Tensor]) -> None:
    """The weights of the norms of queries and keys are [C] each, in the type of the heads."""
    for name, weight in zip(("q_weight", "k_weight"), weights, strict=True):
        if weight.shape != x.shape[-1:] or weight.dtype != x.dtype:
            raise ShapeError(f"{op}: expected {name} [{x.shape[-1]}] in {x.dtype}, as the heads, "
                             f"got {list(weight.shape)} in {weight.dtype}")
        check_device(op, {"heads": x, name: weight})


def _check(op: str, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> None:
    check_angles(op, query, cos, sin)
    if key.dim() != 3 or key.shape[::2] != query.shape[::2] or key.dtype != query.dtype:
        raise ShapeError(f"{op}: expected query [N, Hq, C] and key [N, Hk, C] of one type, got "
                         f"{list(query.shape)} {query.dtype} and {list(key.shape)} {key.dtype}")
    check_device(op, {"query": query, "key": key})
    check_values(op, query=query, key=key)


def rotary(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Queries and keys turned by the angles of their positions.

        (x_i, x_{i + R/2}) <- (x_i cos - x_{i + R/2} sin, x_{i + R/2} cos + x_i sin)

    Differs from the paper: channel i is paired with i + R/2, not with its neighbour, as in GPT-NeoX
    and Llama checkpoints.

    Args:
        query: [N, Hq, C] float; differentiable.
        key: [N, Hk, C], type of query; differentiable.
        cos, sin: [N, 1, R/2], type of query, R at most C: of each token's angles. No gradient.
        backend: See fastrl.backends.
    Returns:
        query, key: shapes and types as they came.
    Raises:
        ShapeError: when shapes, dtypes or devices do not fit together.
        BackendUnavailableError: when a backend is named that cannot run.
    Cost: reads and writes queries and keys once in one launch; torch makes several passes.
    Source: Su et al. 2021 (arXiv 2104.09864).
    Example:
        >>> x, one = torch.tensor([[[1.0, 0.0, 5.0]]]), torch.ones(1, 1, 1)
        >>> rotary(x, x, 0 * one, one)[0]  # a quarter turn
        tensor([[[0., 1., 5.]]])
    """
    _check("rotary", query, key, cos, sin)
    name = choose("rotary", "rotary", PREFERENCE, query.device.type, query.dtype, backend)
    if name == "triton":
        from fastrl_kernels.triton import rotary as triton_rotary

        return triton_rotary.rotary(query, key, cos, sin)
    return rotary_reference(query, key, cos, sin)


def qk_norm_rotary(
    query: Tensor, key: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, *,
    epsilon: float, backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`rms_norm` of every query and key head over its channels, then `rotary`.

        x <- rotary(weight round(x / sqrt(mean(x^2) + epsilon)))

    Args:
        query: [N, Hq, C] float; differentiable.
        key: [N, Hk, C], type of query; differentiable.
        q_weight, k_weight: [C] each, type of query; differentiable.
        cos, sin: [N, 1, R/2], type of query, R at most C. No gradient.
        epsilon: Added to the mean square.
        backend: See fastrl.backends.
    Returns:
        query, key: shapes and types as they came.
    Raises:
        ShapeError: when shapes, dtypes or devices do not fit together.
        BackendUnavailableError: when a backend is named that cannot run.
    Cost: reads and writes queries and keys once in one launch; torch makes a dozen passes.
    Source: Su et al. 2021 (arXiv 2104.09864); norms of queries and keys: Henry et al. 2020
        (arXiv 2010.04245), in the form of Qwen3.
    Example:
        >>> x, one = torch.tensor([[[3.0, 4.0]]]), torch.ones(1, 1, 1)
        >>> qk_norm_rotary(x, x, *2 * [torch.ones(2)], 0 * one, one, epsilon=0.0)[0]
        tensor([[[-1.1314,  0.8485]]])
    """
    _check("qk_norm_rotary", query, key, cos, sin)
    check_head_weights("qk_norm_rotary", query, (q_weight, k_weight))
    name = choose("qk_norm_rotary", "rotary", PREFERENCE, query.device.type, query.dtype, backend)
    if name == "triton":
        from fastrl_kernels.triton import rotary as triton_rotary

        return triton_rotary.qk_norm_rotary(query, key, q_weight, k_weight, cos, sin,
                                            epsilon=epsilon)
    return qk_norm_rotary_reference(query, key, q_weight, k_weight, cos, sin, epsilon=epsilon)

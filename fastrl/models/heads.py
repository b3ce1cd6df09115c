"""Heads: modules whose forward is the only place that reads their weights.

A sharded parameter is whole only while its module runs, so an op that needs the weight of a head
is handed to the head, never the other way round.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastrl.ops import linear, linear_logprobs, linear_policy_loss
from fastrl.ops.linear import takes_kernel

Result = TypeVar("Result")


def project_logits(
    hidden: Tensor, weight: Tensor, *, bias: Tensor | None = None, out: Tensor | None = None,
    keeps_rows: bool = False,
) -> Tensor:
    """[R, V] logits, computed in float32 at least, of hidden [R, D] under weight [V, D].

    Args:
        weight: On a CPU also [tiles, D, W], V / W tiles of W columns each.
        out: [at least R, V], memory for the result. A CPU that takes fresh memory for so large a
            tensor in every step spends as long on that as on the product.
        keeps_rows: As in `fastrl.ops.linear_logprobs`.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    if takes_kernel(keeps_rows, hidden):
        logits = linear(hidden, weight, out_dtype=wide, backend="triton")
    elif hidden.is_cuda:  # products of 16 bits, sums of 32, no wide copy
        from fastrl_kernels.head_chunks import chunk_slices

        logits = hidden.new_empty(len(hidden), len(weight), dtype=wide)
        for rows in chunk_slices(len(hidden), wide.itemsize * len(weight)):
            if hidden.dtype == wide:
                torch.mm(hidden[rows], weight.t(), out=logits[rows])
            else:
                torch.mm(hidden[rows], weight.t(), out_dtype=wide, out=logits[rows])
    else:
        out = None if out is None else out[: len(hidden)]
        if weight.dim() == 3:
            logits = _project_by_tile(hidden, weight, out)
        else:
            logits = torch.mm(hidden.to(wide), weight.to(wide).t(), out=out)
    return logits if bias is None else logits.add_(bias)


def _project_by_tile(hidden: Tensor, tiles: Tensor, out: Tensor | None) -> Tensor:
    """[R, V] from hidden [R, D] and tiles [V / W, D, W] of its type."""
    num_tiles, _, columns = tiles.shape
    logits = hidden.new_empty(len(hidden), num_tiles * columns) if out is None else out
    for part, tile in zip(torch.split(logits, columns, dim=1), tiles.unbind(), strict=True):
        torch.mm(hidden, tile, out=part)
    return logits


KEEPS_ROWS = (project_logits, linear_logprobs, linear_policy_loss)
"""Ops whose rows rollout and update have in common."""


class LMHead(nn.Module):
    """Turns hidden states into whatever an op makes of them and the unembedding.

    Args:
        weight: [V, D]. With tied embeddings the very Parameter of the embedding.
        bias: [V] or None.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    keeps_rows = False
    """As `Linear.keeps_rows`, for the ops in `KEEPS_ROWS`."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.weight = weight
        self.register_parameter("bias", bias)

    def forward(
        self, hidden: Tensor, op: Callable[..., Result], *args: Any, **kwargs: Any
    ) -> Result:
        """`op(hidden, weight, *args, bias=bias, **kwargs)`.

        Args:
            hidden: [M, D].
            op: Such as `fastrl.ops.linear_logprobs`, or `torch.nn.functional.linear` for logits.
        """
        if self.keeps_rows and op in KEEPS_ROWS:
            kwargs["keeps_rows"] = True
        return op(hidden, self.weight, *args, bias=self.bias, **kwargs)


class ScalarHead(nn.Module):
    """One number per hidden state: `hidden . weight + bias`.

    Args:
        weight: [D].
        bias: The reward shift; a buffer, because it is set and not learned.
    """

    weight: nn.Parameter
    bias: Tensor

    def __init__(self, weight: nn.Parameter, bias: float = 0.0) -> None:
        super().__init__()
        self.weight = weight
        self.register_buffer("bias", torch.tensor(bias, dtype=torch.float32, device=weight.device))

    def forward(self, hidden: Tensor) -> Tensor:
        """[N] float32 (float64 of float64 states) from hidden [N, D]."""
        wide = torch.promote_types(hidden.dtype, torch.float32)
        # A sum per row, not a matrix product: its bits do not depend on the other rows.
        return (hidden.to(wide) * self.weight).sum(-1) + self.bias

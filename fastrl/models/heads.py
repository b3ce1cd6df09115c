"""Heads: modules whose forward is the only place that reads their weights.

A sharded parameter is whole only while its module runs, so an op that needs the weight of a head
is handed to the head, never the other way round.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Result = TypeVar("Result")


def project_logits(
    hidden: Tensor, weight: Tensor, *, bias: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """[R, V] logits, computed in float32 at least, of hidden [R, D] under weight [V, D].

    Args:
        out: [at least R, V], memory for the result. A CPU that takes fresh memory for so large a
            tensor in every step spends as long on that as on the product.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    out = None if out is None else out[: len(hidden)]
    if hidden.is_cuda and hidden.dtype != wide:  # products of 16 bits, sums of 32, no wide copy
        logits = torch.mm(hidden, weight.t(), out_dtype=wide)
    else:
        logits = torch.mm(hidden.to(wide), weight.to(wide).t(), out=out)
    return logits if bias is None else logits.add_(bias)


class LMHead(nn.Module):
    """Turns hidden states into whatever an op makes of them and the unembedding.

    Args:
        weight: [V, D]. With tied embeddings the very Parameter of the embedding.
        bias: [V] or None.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

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

"""A trunk with a head: language models, and models that give one number per token."""

import copy
from typing import Literal

import torch
from torch import Tensor, nn

from fastrl.models.attention import Attention
from fastrl.models.heads import LMHead, ScalarHead
from fastrl.models.spec import Adapters, ModelSpec


class CausalLM(nn.Module):
    """A language model whose logits are never stored: the head is applied by an op.

    Args:
        backbone: `(token_ids [N], positions [N], attention) -> hidden [N, D]`, final norm applied.
        lm_head: The unembedding.
        spec: Sizes.
    """

    def __init__(self, backbone: nn.Module, lm_head: LMHead, spec: ModelSpec) -> None:
        super().__init__()
        self.backbone, self.lm_head, self.spec = backbone, lm_head, spec
        self.adapters: Adapters | None = None
        """See fastrl.models.lora."""
        self.folder: str | None = None
        """Where it was loaded from."""

    def forward(
        self, token_ids: Tensor, positions: Tensor, attention: Attention,
        outputs: Tensor | None = None,
    ) -> Tensor:
        """Hidden states of packed tokens.

        Args:
            token_ids: [N] int64.
            positions: [N] int64, counted from 0 in each sequence.
            attention: What each token may look at.
            outputs: [M] int64, the rows that are wanted; None: all. The native decoder's last
                layer attends with all and computes no more than these after that.
        Returns:
            [N, D], or [M, D] of `outputs`: the states that `lm_head` takes; that of token i
            predicts the token after it.
        """
        hidden: Tensor = self.backbone(token_ids, positions, attention, outputs)
        return hidden


class ScalarModel(nn.Module):
    """A reward model or a critic: one number per token.

    Args:
        backbone: As in `CausalLM`.
        head: The scalar head; its bias is the reward shift.
        spec: Sizes.
    """

    def __init__(self, backbone: nn.Module, head: ScalarHead, spec: ModelSpec) -> None:
        super().__init__()
        self.backbone, self.head, self.spec = backbone, head, spec
        self.adapters: Adapters | None = None
        """See fastrl.models.lora."""
        self.folder: str | None = None
        """Where the trunk was loaded from."""

    def forward(self, token_ids: Tensor, positions: Tensor, attention: Attention) -> Tensor:
        """[N] float32, the number at each token, bias included. Arguments as in `CausalLM`."""
        values: Tensor = self.head(self.backbone(token_ids, positions, attention))
        return values


def scalar_from_causal(
    model: CausalLM, seed: int, init: Literal["normal", "zero"] = "normal", *,
    copies_trunk: bool = True,
) -> ScalarModel:
    """A scalar model on a copy of a language model's trunk, or on the trunk itself.

    Args:
        model: Left as it is.
        seed: Of the new head.
        init: `normal` draws the head from N(0, 1/(D+1)), `zero` starts from 0.
        copies_trunk: The result shares no memory with `model`; else the trunk is one and the same.
    Source: Stiennon et al. 2020 (arXiv 2009.01325), code: standard deviation 1/sqrt(D+1).
    """
    backbone = copy.deepcopy(model.backbone) if copies_trunk else model.backbone
    weight = torch.zeros(model.spec.hidden_size)
    if init == "normal":
        generator = torch.Generator().manual_seed(seed)
        weight.normal_(0, (model.spec.hidden_size + 1) ** -0.5, generator=generator)
    like = model.lm_head.weight
    head = ScalarHead(nn.Parameter(weight.to(like.device, like.dtype)))
    scalar = ScalarModel(backbone, head, model.spec).train(model.training)
    scalar.folder = model.folder
    return scalar

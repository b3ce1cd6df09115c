"""LoRA: two thin matrices beside a frozen one, `y = x W' + scale (x A') B'`, unmerged in training.

A merged weight would be another one in rollout than in the update, and ratios would not be 1.
Letters: N rows, r rank, P projections that share one matrix here (q, k and v; gate and up).
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastrl.config import TrainConfig
from fastrl.errors import ConfigError
from fastrl.models.causal_lm import CausalLM, ScalarModel
from fastrl.models.decoder import Decoder
from fastrl.models.heads import KEEPS_ROWS, LMHead, Result
from fastrl.models.linear import Linear
from fastrl.models.names import Source, trunk_sources
from fastrl.models.spec import Adapters

Model = TypeVar("Model", CausalLM, ScalarModel)
HEAD = "lm_head"
"""Target that is a projection of a language model, but of no layer."""


@dataclass(frozen=True, slots=True)
class Site:
    """A matrix of the decoder that has projections which can be adapted."""

    path: str
    """Of its module in the trunk, such as `layers.0.attention.qkv`."""
    source: Source
    rows: tuple[int, ...]
    """Of each projection in it."""

    @property
    def names(self) -> tuple[str, ...]:
        """Projections as checkpoints spell them, such as `layers.0.self_attn.q_proj`."""
        return tuple(name.removesuffix(".weight") for name in self.source.names)


def sites(decoder: Decoder) -> list[Site]:
    """Every matrix in the decoder's layers, in order."""
    modules = dict(decoder.named_modules())
    found = []
    for name, source in trunk_sources(decoder.config).items():
        path = name.removesuffix(".weight")
        module = modules.get(path)
        if path != name and isinstance(module, Linear):
            found.append(Site(path, source, source.rows or (module.out_features,)))
    return found


def _matrix(outputs: int, inputs: int, like: Tensor) -> Linear:
    """A product without bias whose weight is not yet written."""
    with torch.device("meta"):
        made = Linear(inputs, outputs, bias=False)
    return made.to(like.dtype).to_empty(device=like.device)


class LoRALinear(Linear):
    """A frozen matrix with adapters on some of the projections that it holds.

    Args:
        base: Its parameters become this module's, under the same names.
        rows: Of each projection, from the first row on.
        is_adapted: For each projection, whether it has an adapter.
        rank: r.
        scale: Multiplies what the adapters add.
    """

    def __init__(self, base: Linear, rows: Sequence[int], is_adapted: Sequence[bool],
                 rank: int, scale: float) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight = base.weight
        self.register_parameter("bias", base.bias)
        self.rank, self.scale = rank, scale
        self.rows, self.is_adapted = tuple(rows), tuple(is_adapted)
        self.lora_a = _matrix(rank * sum(is_adapted), base.in_features, base.weight)
        self.lora_b = nn.ModuleList(
            _matrix(count, rank, base.weight)
            for count, adapted in zip(rows, is_adapted, strict=True) if adapted)

    def forward(self, x: Tensor) -> Tensor:
        """[N, outputs] from x [N, inputs]."""
        added = self._added(x)
        return super().forward(x).add_(added, alpha=self.scale)  # backward needs no product

    def _added(self, x: Tensor) -> Tensor:
        """[N, outputs]: what the adapters give, zeros where there is none."""
        thin = iter(self.lora_a(x).split(self.rank, dim=-1))  # [N, r] of each adapted projection
        wide = iter(self.lora_b)
        parts = [next(wide)(next(thin)) if adapted else x.new_zeros(()).expand(*x.shape[:-1], count)
                 for count, adapted in zip(self.rows, self.is_adapted, strict=True)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def plain(self) -> Linear:
        """The frozen matrix alone: the same parameters, no adapters."""
        base = Linear(self.in_features, self.out_features, device="meta")
        base.weight = self.weight
        base.register_parameter("bias", self.bias)
        return base


class LoRAHead(LMHead):
    """A frozen LM head with an adapter.

    An op takes states and one matrix, so it gets [x, scale x A'] and [W, B]: the same product. The
    joined matrix is made for each call.
    """

    def __init__(self, base: LMHead, rank: int, scale: float) -> None:
        super().__init__(base.weight, base.bias)
        self.scale = scale
        self.lora_a = _matrix(rank, base.weight.shape[1], base.weight)
        self.lora_b = _matrix(base.weight.shape[0], rank, base.weight)

    def forward(
        self, hidden: Tensor, op: Callable[..., Result], *args: Any, **kwargs: Any
    ) -> Result:
        """As `LMHead.forward`, with D + r in place of D."""
        states = torch.cat([hidden, self.scale * self.lora_a(hidden)], dim=-1)
        b = self.lora_b.weight
        if self.weight.dim() == 3:  # the engine's copy, [tiles, D, W]; see fastrl.models.by_input
            b = b.view(len(self.weight), -1, b.shape[1]).transpose(1, 2)
        weight = torch.cat([self.weight, b], dim=1)
        if self.keeps_rows and op in KEEPS_ROWS:
            kwargs["keeps_rows"] = True
        return op(states, weight, *args, bias=self.bias, **kwargs)

    def plain(self) -> LMHead:
        """The frozen head alone."""
        return LMHead(self.weight, self.bias)


def adapt(model: CausalLM | ScalarModel, config: TrainConfig) -> None:
    """Give a model the adapters that a config asks for, unless it has some or none are asked for.

    All other weights are frozen but a scalar head. B starts at 0, so that the model computes what
    it did, bit for bit; A is drawn from U(-1/sqrt(inputs), 1/sqrt(inputs)).

    Args:
        model: Changed in place.
        config: `lora_rank`, `lora_alpha`, `lora_targets` and `seed`.
    Raises:
        ConfigError: when a target is no projection of the model, or names only some of several
            that the family keeps in one.
        ModelError: when the model runs through transformers and peft is not installed.
    Source: Hu et al. 2021 (arXiv 2106.09685); start of A as in peft.
    """
    if config.lora_rank == 0 or model.adapters is not None:
        return
    if not isinstance(model.backbone, Decoder):
        from fastrl.models import hf_lora

        adapters = hf_lora.add_adapters(model, config)
    else:
        adapters = _adapt_decoder(model, config)
    model.adapters = adapters
    model.requires_grad_(False)
    for parameter in trained_parameters(model):
        parameter.requires_grad_(True)


def _adapt_decoder(model: CausalLM | ScalarModel, config: TrainConfig) -> Adapters:
    """Put the adapters into the native decoder, and under an LM head where that is a target."""
    decoder = model.backbone
    assert isinstance(decoder, Decoder)
    places = sites(decoder)
    targets = checked_targets(config.lora_targets, places, has_head=isinstance(model, CausalLM))
    rank, scale = config.lora_rank, config.lora_alpha / config.lora_rank
    added: list[nn.Module] = []
    for site in places:
        is_adapted = [_leaf(name) in targets for name in site.names]
        if any(is_adapted):
            owner, name = decoder.get_submodule(site.path.rpartition(".")[0]), _leaf(site.path)
            adapted = LoRALinear(getattr(owner, name), site.rows, is_adapted, rank, scale)
            setattr(owner, name, adapted)
            added.append(adapted)
    if HEAD in targets and isinstance(model, CausalLM):
        model.lm_head = LoRAHead(model.lm_head, rank, scale)
        added.append(model.lm_head)
    generator = torch.Generator().manual_seed(config.seed)
    with torch.no_grad():
        for module in added:
            for name, parameter in module.named_parameters():
                if parameter.is_meta:  # a plan's
                    continue
                if name.startswith("lora_a."):
                    bound = 1 / math.sqrt(parameter.shape[1])
                    drawn = torch.rand(parameter.shape, generator=generator)
                    parameter.copy_((2 * drawn - 1) * bound)
                elif name.startswith("lora_b."):
                    parameter.zero_()
    return Adapters(rank=rank, alpha=config.lora_alpha, targets=targets)


def checked_targets(
    asked: tuple[str, ...] | None, places: Sequence[Site], *, has_head: bool
) -> tuple[str, ...]:
    """The names of the projections that get adapters; None: of all in the layers.

    Raises:
        ConfigError: names what the model has.
    """
    known = dict.fromkeys(_leaf(name) for site in places for name in site.names)
    if asked is None:
        return tuple(known)
    if has_head:
        known[HEAD] = None
    else:  # a critic has the targets of its policy, but for this one
        asked = tuple(name for name in asked if name != HEAD)
    unknown = [name for name in asked if name not in known]
    if unknown or not asked:
        raise ConfigError(f"lora_targets: expected names out of {', '.join(known)}, got "
                          f"{', '.join(unknown) or 'none'}; change lora_targets")
    return tuple(name for name in known if name in asked)


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def trained_parameters(model: CausalLM | ScalarModel) -> list[nn.Parameter]:
    """The weights that training changes: all, or those of the adapters and a scalar head."""
    return [parameter for name, parameter in model.named_parameters()
            if model.adapters is None or ".lora_" in name or name.startswith("head.")]


def sharing_copy(model: Model) -> Model:
    """The same model with modules of its own over the same parameters and buffers."""
    tensors = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def without_adapters(model: Model) -> Model:
    """A model with the adapters off: the frozen weights of `model`, which are not copied.

    Returns:
        Modules of its own over the same parameters; what it computes is what `model` computed
        before it was adapted, bit for bit.
    """
    plain = sharing_copy(model)
    if model.adapters is None:
        return plain
    plain.adapters = None
    if isinstance(plain, CausalLM) and isinstance(plain.lm_head, LoRAHead):
        plain.lm_head = plain.lm_head.plain()
    if not isinstance(plain.backbone, Decoder):
        from fastrl.models import hf_lora

        hf_lora.remove_adapters(plain.backbone)
        return plain
    for path, module in list(plain.backbone.named_modules()):
        if isinstance(module, LoRALinear):
            owner, _, name = path.rpartition(".")
            setattr(plain.backbone.get_submodule(owner), name, module.plain())
    return plain

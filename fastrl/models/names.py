"""Which tensors of a Hugging Face checkpoint a native parameter is made of, and how.

Q, K, V and gate, up are one matrix here and several (or one in another order) there.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fastrl.models.config import DecoderConfig

TRUNK_PREFIX: dict[str, str] = {
    "llama": "model.", "mistral": "model.", "qwen2": "model.", "qwen3": "model.",
    "gpt2": "transformer.", "gpt_neox": "gpt_neox.",
}
"""What stands before the trunk's names when there is a head; a file without a head may omit it."""

LM_HEAD_NAMES: dict[str, str] = dict.fromkeys(TRUNK_PREFIX, "lm_head.weight") | {
    "gpt_neox": "embed_out.weight"}
"""The unembedding as published checkpoints spell it; `lm_head.weight` is read everywhere."""

IGNORED_SUFFIXES = (".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias",
                    "rotary_emb.inv_freq")
"""Constants (causal masks, frequencies) that older checkpoints carry along."""

Layout = Literal["plain", "rows", "transposed", "by_head"]


@dataclass(frozen=True, slots=True)
class Source:
    """Where a native parameter comes from.

    `plain`: as it is. `rows`: several tensors, one under the other. `transposed`: [in, out]
    instead of [out, in]. `by_head`: rows ordered head by head (q, k, v of head 0, then of head 1).
    """

    names: tuple[str, ...]
    layout: Layout = "plain"
    rows: tuple[int, ...] = ()
    """Rows of each tensor, for `rows`."""
    num_heads: int = 0
    """For `by_head`."""

    def shapes(self, shape: torch.Size) -> list[list[int]]:
        """Shapes the checkpoint's tensors must have for a native parameter of this shape."""
        if self.layout == "rows":
            return [[rows, *shape[1:]] for rows in self.rows]
        return [list(reversed(shape)) if self.layout == "transposed" else list(shape)]

    def merge(self, tensors: list[Tensor]) -> Tensor:
        """The native parameter from the checkpoint's tensors."""
        if self.layout == "rows":
            return torch.cat(tensors)
        if self.layout == "transposed":
            return tensors[0].t()
        if self.layout == "by_head":
            heads = tensors[0].reshape(self.num_heads, 3, -1, *tensors[0].shape[1:])
            return heads.transpose(0, 1).flatten(0, 2)
        return tensors[0]

    def split(self, tensor: Tensor) -> list[Tensor]:
        """The checkpoint's tensors from the native parameter; undoes `merge`."""
        if self.layout == "rows":
            return list(torch.split(tensor, list(self.rows)))
        if self.layout == "transposed":
            return [tensor.t()]
        if self.layout == "by_head":
            parts = tensor.reshape(3, self.num_heads, -1, *tensor.shape[1:])
            return [parts.transpose(0, 1).flatten(0, 2)]
        return [tensor]


def trunk_sources(config: DecoderConfig) -> dict[str, Source]:
    """Source of every parameter of `Decoder(config)`, without the trunk's prefix."""
    if config.family == "gpt2":
        return _gpt2(config)
    return _gpt_neox(config) if config.family == "gpt_neox" else _llama_like(config)


def _both(native: str, theirs: str, bias: bool, layout: Layout = "plain",
          num_heads: int = 0) -> dict[str, Source]:
    """A weight, and its bias where there is one. Transposing concerns weights only."""
    sources = {f"{native}.weight": Source((f"{theirs}.weight",), layout, num_heads=num_heads)}
    if bias:
        bias_layout: Layout = "plain" if layout == "transposed" else layout
        sources[f"{native}.bias"] = Source((f"{theirs}.bias",), bias_layout, num_heads=num_heads)
    return sources


def _stacked(native: str, theirs: list[str], rows: list[int], bias: bool) -> dict[str, Source]:
    """Several matrices (and their biases) one under the other."""
    kinds = ("weight", "bias") if bias else ("weight",)
    return {f"{native}.{kind}": Source(tuple(f"{name}.{kind}" for name in theirs), "rows",
                                       tuple(rows)) for kind in kinds}


def _llama_like(config: DecoderConfig) -> dict[str, Source]:
    sources = _both("embed", "embed_tokens", False) | _both("final_norm", "norm", False)
    heads = [config.num_heads, config.num_kv_heads, config.num_kv_heads]
    inner = config.intermediate_size
    for i in range(config.num_layers):
        here = there = f"layers.{i}"
        attention = f"{there}.self_attn"
        sources |= _both(f"{here}.attention_norm", f"{there}.input_layernorm", False)
        sources |= _both(f"{here}.mlp_norm", f"{there}.post_attention_layernorm", False)
        sources |= _stacked(f"{here}.attention.qkv",
                            [f"{attention}.{name}_proj" for name in "qkv"],
                            [count * config.head_dim for count in heads], config.qkv_bias)
        sources |= _both(f"{here}.attention.out", f"{attention}.o_proj", config.attention_out_bias)
        if config.qk_norm:
            sources |= _both(f"{here}.attention.q_norm", f"{attention}.q_norm", False)
            sources |= _both(f"{here}.attention.k_norm", f"{attention}.k_norm", False)
        sources |= _stacked(f"{here}.mlp.up", [f"{there}.mlp.gate_proj", f"{there}.mlp.up_proj"],
                            [inner, inner], config.mlp_bias)
        sources |= _both(f"{here}.mlp.down", f"{there}.mlp.down_proj", config.mlp_bias)
    return sources


def _gpt2(config: DecoderConfig) -> dict[str, Source]:
    sources = (_both("embed", "wte", False) | _both("embed_positions", "wpe", False)
               | _both("final_norm", "ln_f", True))
    for i in range(config.num_layers):
        here, there = f"layers.{i}", f"h.{i}"
        sources |= _both(f"{here}.attention_norm", f"{there}.ln_1", True)
        sources |= _both(f"{here}.mlp_norm", f"{there}.ln_2", True)
        for native, theirs in (("attention.qkv", "attn.c_attn"), ("attention.out", "attn.c_proj"),
                               ("mlp.up", "mlp.c_fc"), ("mlp.down", "mlp.c_proj")):
            sources |= _both(f"{here}.{native}", f"{there}.{theirs}", True, "transposed")
    return sources


def _gpt_neox(config: DecoderConfig) -> dict[str, Source]:
    sources = _both("embed", "embed_in", False) | _both("final_norm", "final_layer_norm", True)
    for i in range(config.num_layers):
        here = there = f"layers.{i}"
        sources |= _both(f"{here}.attention_norm", f"{there}.input_layernorm", True)
        sources |= _both(f"{here}.mlp_norm", f"{there}.post_attention_layernorm", True)
        sources |= _both(f"{here}.attention.qkv", f"{there}.attention.query_key_value",
                         config.qkv_bias, "by_head", config.num_heads)
        sources |= _both(f"{here}.attention.out", f"{there}.attention.dense",
                         config.attention_out_bias)
        sources |= _both(f"{here}.mlp.up", f"{there}.mlp.dense_h_to_4h", True)
        sources |= _both(f"{here}.mlp.down", f"{there}.mlp.dense_4h_to_h", True)
    return sources

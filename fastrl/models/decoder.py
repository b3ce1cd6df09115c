"""The native decoder family: llama, mistral, qwen2, qwen3, gpt2 and gpt_neox as one configuration.

N packed tokens, D width, Hq and Hk query and KV heads, C channels per head, R rotary channels.
Sums and casts are in transformers' order, so that logits agree to rounding.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastrl.models.attention import Attention, Projections
from fastrl.models.causal_lm import CausalLM
from fastrl.models.checkpointing import checkpointed
from fastrl.models.config import DecoderConfig, RotaryScaling
from fastrl.models.heads import LMHead
from fastrl.models.linear import Linear
from fastrl.ops import add_layer_norm, add_rms_norm, gelu, layer_norm, rms_norm, swiglu

__all__ = ["Decoder", "DecoderConfig", "RotaryScaling", "empty_decoder", "new_decoder"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "relu": F.relu,
    "gelu": gelu,
    "gelu_new": partial(gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(gelu, approximate="tanh"),
}


class RMSNorm(nn.Module):
    """`weight * x / rms(x)`, the mean square in float32 or wider."""

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.epsilon = epsilon

    def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """The norm of x + residual, and that sum; shape and dtype of x [..., size] each."""
        if residual is None:
            return rms_norm(x, self.weight, epsilon=self.epsilon), x
        return add_rms_norm(x, residual, self.weight, epsilon=self.epsilon)


class LayerNorm(nn.LayerNorm):
    """`weight * (x - mean(x)) / std(x) + bias`, the moments in float32 or wider."""

    def forward(  # type: ignore[override]
        self, x: Tensor, residual: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The norm of x + residual, and that sum; shape and dtype of x [..., size] each."""
        if residual is None:
            return layer_norm(x, self.weight, self.bias, epsilon=self.eps), x
        return add_layer_norm(x, residual, self.weight, self.bias, epsilon=self.eps)


def _norm(config: DecoderConfig) -> nn.Module:
    kind = RMSNorm if config.norm == "rms" else LayerNorm
    return kind(config.hidden_size, config.norm_epsilon)


def rotary_frequencies(config: DecoderConfig) -> Tensor:
    """[R/2] float32, radians per position of each rotary pair, scaling applied."""
    exponents = torch.arange(0, config.rotary_dim, 2, dtype=torch.float32, device="cpu")
    frequencies = 1.0 / config.rotary_base ** (exponents / config.rotary_dim)
    scaling = config.rotary_scaling
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    wavelengths = 2 * math.pi / frequencies
    share = ((scaling.original_max_positions / wavelengths - scaling.low_freq_factor)
             / (scaling.high_freq_factor - scaling.low_freq_factor)).clamp(0, 1)
    return (1 - share) * frequencies / scaling.factor + share * frequencies


class Rotary(nn.Module):
    """Cosines and sines of the rotary angles."""

    frequencies: Tensor

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("frequencies", rotary_frequencies(config), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Rotary":
        # `model.to(bfloat16)` would round the frequencies, and `to_empty` would lose them.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.frequencies = rotary_frequencies(self.config).to(self.frequencies.device)
        return self

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos, sin: [N, 1, R/2] each, computed in float32."""
        angles = positions[:, None, None].float() * self.frequencies
        return angles.cos().to(dtype), angles.sin().to(dtype)


class SelfAttention(nn.Module):
    """Projections around an attention state; Q, K and V are one matrix, in this order of rows."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.sizes = [config.num_heads, config.num_kv_heads, config.num_kv_heads]
        self.scale = config.head_dim**-0.5
        self.window = None if config.windows is None else config.windows[layer]
        self.qkv = Linear(config.hidden_size, sum(self.sizes) * config.head_dim,
                          bias=config.qkv_bias)
        self.out = Linear(config.num_heads * config.head_dim, config.hidden_size,
                          bias=config.attention_out_bias)
        self.q_norm = RMSNorm(config.head_dim, config.norm_epsilon) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.norm_epsilon) if config.qk_norm else None

    def forward(
        self, x: Tensor, cos_sin: tuple[Tensor, Tensor] | None, attention: Attention,
        outputs: Tensor | None,
    ) -> Tensor:
        """[N, D] from x [N, D], or [M, D], the rows `outputs` [M] alone."""
        heads = self.qkv(x).unflatten(-1, (sum(self.sizes), -1))  # [N, Hq + 2 Hk, C]
        if self.q_norm is not None and self.k_norm is not None:
            projections = Projections(self.sizes[1], cos_sin,
                                      (self.q_norm.weight, self.k_norm.weight),
                                      self.q_norm.epsilon)
        else:
            projections = Projections(self.sizes[1], cos_sin)
        mixed = attention.from_projections(self.layer, heads, projections, scale=self.scale,
                                           window=self.window)
        mixed = _selected(mixed, outputs)
        out: Tensor = self.out(mixed.flatten(1))
        return out


class MLP(nn.Module):
    """Feed-forward block; with a gate the rows of `up` are gate, then up."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gated = config.gated_mlp
        self.activation = ACTIVATIONS[config.activation]
        self.up = Linear(config.hidden_size, config.intermediate_size * (1 + self.gated),
                         bias=config.mlp_bias)
        self.down = Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        """[N, D] from x [N, D]."""
        if self.gated and self.activation is F.silu:
            inner = swiglu(self.up(x))
        elif self.gated:
            gate, up = self.up(x).chunk(2, dim=-1)
            inner = self.activation(gate) * up
        else:
            inner = self.activation(self.up(x))
        out: Tensor = self.down(inner)
        return out


class DecoderLayer(nn.Module):
    """Attention and MLP, each behind a norm, each adding to the residual stream.

    What the last block adds is handed on beside the stream, so that the next norm can take both.
    """

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.parallel_residual = config.parallel_residual
        self.attention_norm, self.mlp_norm = _norm(config), _norm(config)
        self.attention = SelfAttention(config, layer)
        self.mlp = MLP(config)

    def forward(
        self, added: Tensor, stream: Tensor | None, cos_sin: tuple[Tensor, Tensor] | None,
        attention: Attention, dropout: Callable[[Tensor], Tensor], outputs: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(added, stream) [N, D] from those of the layer before; None: there was no layer.

        With `outputs` [M] the block ends with these rows alone, [M, D].
        """
        normed, stream = self.attention_norm(added, stream)
        mixed = dropout(self.attention(normed, cos_sin, attention, outputs))
        stream = _selected(stream, outputs)
        if self.parallel_residual:
            normed, _ = self.mlp_norm(stream, None)
            stream = stream + mixed
        else:
            normed, stream = self.mlp_norm(mixed, stream)
        return dropout(self.mlp(normed)), stream


def _unchanged(x: Tensor) -> Tensor:
    return x


def _selected(x: Tensor, rows: Tensor | None) -> Tensor:
    return x if rows is None else x.index_select(0, rows)


class Decoder(nn.Module):
    """Embedding, layers and final norm: `(token_ids [N], positions [N], attention) -> [N, D]`.

    `residual_dropout` is the rate on the output of each attention and MLP block, in train mode.
    With `activation_checkpointing` a layer keeps its two inputs and runs again in backward.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.residual_dropout = 0.0
        self.activation_checkpointing = False
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        learned = config.rotary_dim == 0
        self.embed_positions = (nn.Embedding(config.max_positions, config.hidden_size)
                                if learned else None)
        self.rotary = None if learned else Rotary(config)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_layers))
        self.final_norm = _norm(config)

    def untie(self) -> None:
        """From now on the LM head is a matrix of its own, which the caller makes."""
        self.config = dataclasses.replace(self.config, tie_embeddings=False)

    def forward(
        self, token_ids: Tensor, positions: Tensor, attention: Attention,
        outputs: Tensor | None = None,
    ) -> Tensor:
        """[N, D] or [M, D], final norm applied; see `CausalLM.forward`."""
        x = self.embed(token_ids)
        if self.embed_positions is not None:
            x = x + self.embed_positions(positions)
        cos_sin = None if self.rotary is None else self.rotary(positions, x.dtype)
        drops = self.training and self.residual_dropout > 0
        dropout = partial(F.dropout, p=self.residual_dropout) if drops else _unchanged
        stream = None
        recompute = self.activation_checkpointing and torch.is_grad_enabled()
        for layer in self.layers:
            run = partial(checkpointed, layer, keeps_random_state=self.training) if recompute \
                else layer
            is_last = layer is self.layers[-1]
            x, stream = run(x, stream, cos_sin, attention, dropout, outputs if is_last else None)
        out: Tensor = self.final_norm(x, stream)[0]
        return out


def empty_decoder(
    config: DecoderConfig, dtype: torch.dtype, device: torch.device | str
) -> Decoder:
    """A decoder whose weights are not yet written; no random numbers are drawn."""
    with torch.device("meta"):
        decoder = Decoder(config)
    return decoder.to(dtype).to_empty(device=device)


def causal_lm(decoder: Decoder) -> CausalLM:
    """A decoder with its unembedding: the embedding itself when tied, else not yet written."""
    weight = decoder.embed.weight
    assert isinstance(weight, nn.Parameter)
    if not decoder.config.tie_embeddings:
        weight = nn.Parameter(torch.empty_like(weight))
    return CausalLM(decoder, LMHead(weight), decoder.config.spec)


@torch.no_grad()
def new_decoder(
    config: DecoderConfig, seed: int, *, dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> CausalLM:
    """A language model with random weights.

    Matrices and embeddings are drawn from N(0, initializer_range^2), the projections back into the
    residual stream scaled by 1 / sqrt(2 L); norms start at 1, biases at 0.

    Args:
        config: Shape; `fastrl.models.decoder_config` makes one.
        seed: The same seed gives the same weights on every device.
    Source: Radford et al. 2019 (GPT-2), section 2.3.
    """
    model = causal_lm(empty_decoder(config, dtype, device))
    generator = torch.Generator().manual_seed(seed)
    residual_std = config.initializer_range / math.sqrt(2 * config.num_layers)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.fill_(1.0 if name.endswith("norm.weight") else 0.0)
            continue
        into_stream = name.endswith((".out.weight", ".down.weight"))
        std = residual_std if into_stream else config.initializer_range
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model

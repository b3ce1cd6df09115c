"""What `python -m benchmarks engine` generates, and the floor of each call."""

import random
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch

from fastrl.models import CausalLM, DecoderConfig
from fastrl.models.decoder import causal_lm, empty_decoder

_QWEN: dict[str, Any] = {"family": "qwen3", "qk_norm": True, "rotary_base": 1e6}
_LLAMA: dict[str, Any] = {"family": "llama", "rotary_base": 5e5}
MODELS = {
    "qwen3-0.6b": DecoderConfig(
        **_QWEN, vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_layers=28,
        num_heads=16, num_kv_heads=8, head_dim=128, rotary_dim=128, max_positions=4096,
        tie_embeddings=True),
    "llama-3.1-8b": DecoderConfig(
        **_LLAMA, vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_layers=32,
        num_heads=32, num_kv_heads=8, head_dim=128, rotary_dim=128, max_positions=4096),
}
SMALL = DecoderConfig(**_LLAMA, vocab_size=97, hidden_size=32, intermediate_size=48, num_layers=2,
                      num_heads=4, num_kv_heads=2, head_dim=8, rotary_dim=8, max_positions=64)
"""For trying the flow."""
OUTPUTS = 512
SHORTEST = 16
"""The shortest response of a mixed case has one in so many of the longest's tokens."""


@dataclass(frozen=True)
class Workload:
    """One call."""

    model: str
    batch: int
    """Responses, all decoded together."""
    prompt: int
    """Tokens of each prompt."""
    new: int
    """Tokens of the longest response."""
    samples: int
    """Responses to each prompt."""
    lengths: str
    """equal or mixed."""

    @property
    def sizes(self) -> dict[str, int]:
        """For the row."""
        return {"B": self.batch, "P": self.prompt, "T": self.new, "G": self.samples}

    @property
    def wanted(self) -> list[int]:
        """Tokens of each prompt's responses."""
        count = self.batch // self.samples
        if self.lengths == "equal" or count == 1:
            return [self.new] * count
        low = self.new // SHORTEST
        spread = [low + round(i * (self.new - low) / (count - 1)) for i in range(count)]
        random.Random(0).shuffle(spread)
        return spread

    @property
    def num_tokens(self) -> int:
        """Tokens of all responses."""
        return sum(self.wanted) * self.samples

    def prompts(self, vocab_size: int) -> list[list[int]]:
        """Random token ids, the same at every call."""
        rng = random.Random(0)
        return [[rng.randrange(vocab_size) for _ in range(self.prompt)]
                for _ in range(self.batch // self.samples)]


FIRST = (
    Workload("qwen3-0.6b", 256, 128, OUTPUTS, 1, "equal"),
    Workload("llama-3.1-8b", 32, 128, OUTPUTS, 1, "equal"),
    Workload("qwen3-0.6b", 512, 128, OUTPUTS, 1, "mixed"),
    Workload("llama-3.1-8b", 256, 128, OUTPUTS, 8, "equal"),
    Workload("qwen3-0.6b", 256, 1024, OUTPUTS, 8, "equal"),
    Workload("qwen3-0.6b", 32, 1024, OUTPUTS, 1, "equal"),
)
"""What is measured before the time is used up; the rest of the grid follows."""


def workloads(small: bool) -> list[Workload]:
    """The grid, the most telling first."""
    if small:
        return [Workload("small", 8, 5, 16, samples, lengths)
                for samples, lengths in ((1, "mixed"), (4, "equal"))]
    grid = [Workload(model, batch, prompt, OUTPUTS, samples, lengths) for
            model, batch, prompt, samples, lengths in product(
                MODELS, (32, 256, 512), (128, 1024), (1, 8), ("equal", "mixed"))]
    return [*FIRST, *(load for load in grid if load not in FIRST)]


@torch.no_grad()
def random_model(config: DecoderConfig, dtype: torch.dtype, device: str) -> CausalLM:
    """A model with random weights that were drawn where they are."""
    model = causal_lm(empty_decoder(config, dtype, device))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.fill_(1.0 if name.endswith("norm.weight") else 0.0)
        else:
            parameter.normal_(0, config.initializer_range)
    return model


def floor(load: Workload, config: DecoderConfig, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes and operations of a call at least: weights once a step, cached tokens, logits.

    The samples of a prompt read its tokens once for all of them.
    """
    weights = _num_weights(config)
    read = weights if config.tie_embeddings else weights - config.vocab_size * config.hidden_size
    cached = sum(load.prompt * t + load.samples * (t * (t - 1) // 2) for t in load.wanted)
    logits = load.num_tokens * config.vocab_size * 4
    prompt_tokens = load.prompt * load.batch // load.samples
    return (max(load.wanted) * read * dtype.itemsize + cached * _kv_numel(config) * dtype.itemsize
            + logits, 2 * read * (load.num_tokens + prompt_tokens))


def memory(load: Workload, config: DecoderConfig, dtype: torch.dtype) -> int:
    """Bytes of weights and cache."""
    cached = load.batch * (load.prompt + load.new) * _kv_numel(config)
    return dtype.itemsize * (_num_weights(config) + cached)


def _kv_numel(config: DecoderConfig) -> int:
    """Numbers in the cache for a token."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim


def _num_weights(config: DecoderConfig) -> int:
    model = causal_lm(empty_decoder(config, torch.bfloat16, "meta"))
    return sum(parameter.numel() for parameter in model.parameters())

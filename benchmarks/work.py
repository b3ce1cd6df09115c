"""Operations and bytes of what a training step does, from the sizes of its model.

Products of many rows (prompts, scoring, updates) run near the machine's product rate; a decode step
multiplies few rows with every weight and reads the cache, so its operations and bytes are counted
apart. Counts are those of the algorithms that fastrl runs, not of an ideal: the LM head only where
a token is predicted, no logits kept, each chunk of them made once (`linear_policy_loss`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

from fastrl.models import DecoderConfig

OPTIMIZER_BYTES = 28
"""Of AdamW per float32 weight: weight, gradient and two moments read, all but the gradient written.
"""


@dataclass(frozen=True)
class Work:
    """What is to be done; the sum of two is both, one after the other."""

    products: float = 0.0
    """Operations of matrix products of many rows."""
    decode_products: float = 0.0
    """Operations of those of a decode step."""
    bytes: float = 0.0
    """Read and written where no product of many rows hides it."""

    def __add__(self, other: "Work") -> "Work":
        return Work(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __mul__(self, factor: float) -> "Work":
        return Work(*(getattr(self, f.name) * factor for f in fields(self)))


def layer_weights(config: DecoderConfig) -> int:
    """Weights of a layer that are multiplied with every token."""
    D, C = config.hidden_size, config.head_dim
    attention = D * C * (2 * config.num_heads + 2 * config.num_kv_heads)
    return attention + (3 if config.gated_mlp else 2) * D * config.intermediate_size


def num_weights(config: DecoderConfig, with_head: bool = True) -> int:
    """Weights of all matrices; a scalar model has no LM head."""
    embeddings = 1 + int(with_head and not config.tie_embeddings)
    return (config.num_layers * layer_weights(config)
            + embeddings * config.vocab_size * config.hidden_size)


def forward(config: DecoderConfig, lengths: Sequence[int], num_predicted: int = 0) -> Work:
    """A pass over packed sequences, with the log-probs of so many tokens."""
    tokens, pairs = sum(lengths), sum(n * (n + 1) // 2 for n in lengths)
    head = config.vocab_size * config.hidden_size
    return Work(products=2.0 * (tokens * config.num_layers * layer_weights(config)
                                + num_predicted * head
                                + 2 * pairs * config.num_layers * config.num_heads
                                * config.head_dim))


def training(config: DecoderConfig, lengths: Sequence[int], num_predicted: int,
             num_steps: int = 1, with_head: bool = True) -> Work:
    """Forward, backward (twice the forward's operations) and optimiser steps."""
    weights = num_weights(config, with_head)
    return forward(config, lengths, num_predicted) * 3.0 + Work(
        bytes=float(OPTIMIZER_BYTES * weights * num_steps))


def generation(config: DecoderConfig, prompts: Sequence[int], wanted: Sequence[int],
               itemsize: int) -> Work:
    """Prompts, then decode steps until the longest response is done, one token of each a step.

    A step reads every weight once, the keys and values of every sequence, and writes and reads the
    logits of its rows.
    """
    cached = sum(p * t + t * (t - 1) // 2 for p, t in zip(prompts, wanted, strict=True))
    kv_numel = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    per_token = config.num_layers * layer_weights(config) + config.vocab_size * config.hidden_size
    attention = 4 * cached * config.num_layers * config.num_heads * config.head_dim
    return forward(config, prompts) + Work(
        decode_products=2.0 * sum(wanted) * per_token + attention,
        bytes=float(itemsize * (max(wanted) * per_token + cached * kv_numel)
                    + 2 * 4 * sum(wanted) * config.vocab_size))


def ppo_phases(config: DecoderConfig, prompts: Sequence[int], responses: Sequence[int],
               num_minibatches: int, itemsize: int) -> dict[str, Work]:
    """One iteration with a critic, a reward model and a reference of the policy's shape."""
    lengths = [p + t for p, t in zip(prompts, responses, strict=True)]
    return {
        "rollout": generation(config, prompts, responses, itemsize),
        "scoring": forward(config, lengths, sum(responses)) + forward(config, lengths) * 2.0,
        "policy_update": training(config, lengths, sum(responses), num_minibatches),
        "critic_update": training(config, lengths, 0, num_minibatches, with_head=False),
    }

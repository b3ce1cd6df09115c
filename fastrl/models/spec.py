"""What the rest of fastrl knows of a model's architecture."""

from dataclasses import dataclass

from fastrl.errors import ModelError


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec:
    """Sizes of a decoder, whichever implementation runs it."""

    architecture: str
    """The `model_type` of its config.json, such as llama or opt."""
    num_layers: int
    num_heads: int
    """Query heads."""
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    vocab_size: int
    """Rows of the embedding; may be more than the tokenizer uses."""
    max_positions: int
    """Longest sequence the model was made for."""
    eos_token_ids: tuple[int, ...]
    """Tokens that end a text; empty when the checkpoint names none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Adapters:
    """The LoRA adapters that a model has."""

    rank: int
    alpha: float
    """What adapters add is scaled by alpha / rank."""
    targets: tuple[str, ...]
    """Adapted projections as checkpoints spell them, such as q_proj."""


def check_tokenizer(spec: ModelSpec, num_token_ids: int) -> None:
    """Refuse a tokenizer that can produce ids the model has no embedding for.

    Args:
        spec: The model's sizes.
        num_token_ids: The tokenizer's largest id plus one, added tokens included.
    Raises:
        ModelError: when an id would be outside the vocabulary.
    """
    if num_token_ids > spec.vocab_size:
        raise ModelError(
            f"tokenizer does not match the model: expected ids below {spec.vocab_size} "
            f"(vocab_size of the {spec.architecture} model), got a tokenizer with ids up to "
            f"{num_token_ids - 1}; use the tokenizer that the model was trained with"
        )

"""Does a transformers model compute the same through fastrl's attention as through its own?"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastrl.errors import ModelError
from fastrl.models.attention import Attention, PackedAttention
from fastrl.models.spec import ModelSpec
from fastrl.packing import pack_sequences

# A plain name: transformers treats names with "flash", "sdpa" or a slash in a special way.
ATTENTION_NAME = "fastrl_attention"

PROBE_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.1}
"""Largest difference on the probe, as a share of the largest logit."""


class _Recorder:
    """An attention state that notes what the layers ask for."""

    def __init__(self, inner: Attention) -> None:
        self.inner = inner
        self.layers: list[int] = []
        self.shapes: set[tuple[int, int, int]] = set()
        self.num_windows = 0

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scale: float,
        window: int | None = None,
    ) -> Tensor:
        self.layers.append(layer)
        self.shapes.add((query.shape[1], key.shape[1], query.shape[2]))
        self.num_windows += window is not None
        return self.inner(layer, query, key, value, scale=scale, window=window)


@torch.no_grad()
def probe(
    full: Any, backbone: nn.Module, head: Callable[[Tensor], Tensor], path: str | Path
) -> ModelSpec:
    """Sizes of a model, after two packed sequences agreed with transformers' own forward.

    Args:
        full: The transformers model with its head, its attention set to `ATTENTION_NAME`.
        backbone: Its trunk under fastrl's contract.
        head: `hidden [M, D]` to the logits that `full` would give.
        path: Folder, for the error.
    Raises:
        ModelError: when logits differ, or when a layer does not go through fastrl's attention.
    """
    config = full.config
    vocab_size = full.get_input_embeddings().weight.shape[0]
    ids = [i for i in range(min(vocab_size, 64)) if i != config.pad_token_id]
    sequences = [[ids[(i * 7 + shift) % len(ids)] for i in range(length)]
                 for shift, length in ((1, 5), (3, 3))]
    batch = pack_sequences(sequences, full.device)
    recorder = _Recorder(PackedAttention.of(batch))
    try:
        hidden = backbone(batch.token_ids, batch.positions, recorder)
    except (TypeError, AttributeError) as error:
        raise ModelError(f"{path}: fastrl cannot run the architecture {config.model_type}: its "
                         f"forward takes other arguments ({error}); use another model") from error
    ours = head(hidden[batch.cu_seqlens[1:] - 1])
    full.set_attn_implementation("eager")
    theirs = torch.stack([
        full(input_ids=torch.tensor([s], device=full.device), use_cache=False).logits[0, ..., :]
        .reshape(-1, ours.shape[-1])[-1] for s in sequences])
    full.set_attn_implementation(ATTENTION_NAME)
    gap = float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-6))
    if gap > PROBE_TOLERANCE[full.dtype]:
        raise ModelError(f"{path}: fastrl cannot run the architecture {config.model_type}: its "
                         f"logits differ from transformers' by {gap:.1e} of the largest one; use "
                         "another model")
    num_layers, shapes = config.num_hidden_layers, recorder.shapes
    if (sorted(recorder.layers) != list(range(num_layers)) or len(shapes) != 1
            or recorder.num_windows < _num_windows(config)):
        raise ModelError(f"{path}: fastrl cannot run the architecture {config.model_type}: its "
                         f"{num_layers} layers made {len(recorder.layers)} attention calls with "
                         f"{len(shapes)} shapes and {recorder.num_windows} windows; use another "
                         "model")
    return _spec(config, vocab_size, *next(iter(shapes)))


def _num_windows(config: Any) -> int:
    """Layers that must ask for a window: some architectures put it into their own mask only."""
    types = getattr(config, "layer_types", None)
    if types is not None:
        return list(types).count("sliding_attention")
    window = getattr(config, "sliding_window", None)
    return int(window is not None and getattr(config, "use_sliding_window", True))


def _spec(
    config: Any, vocab_size: int, num_heads: int, num_kv_heads: int, head_dim: int
) -> ModelSpec:
    eos = config.eos_token_id
    # Past its original length `longrope` turns to other frequencies for the whole batch at once.
    rotary = getattr(config, "rope_parameters", None) or {}
    longest = config.max_position_embeddings
    if rotary.get("rope_type") == "longrope":
        longest = rotary.get("original_max_position_embeddings", longest)
    return ModelSpec(
        architecture=config.model_type, num_layers=config.num_hidden_layers, num_heads=num_heads,
        num_kv_heads=num_kv_heads, head_dim=head_dim, hidden_size=config.hidden_size,
        vocab_size=vocab_size, max_positions=longest,
        eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
    )

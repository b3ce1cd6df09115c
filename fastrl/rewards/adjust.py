"""What PPO does to a score before it becomes a reward."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastrl.errors import ShapeError


def adjust_scores(
    scores: Tensor,
    finish_reasons: Sequence[str],
    *,
    clip: float | None = None,
    missing_eos_penalty: float | None = None,
) -> Tensor:
    """Scores as PPO uses them: clipped, then replaced where a response did not stop.

    Args:
        scores: [B] float.
        finish_reasons: B words; everything but "stop" counts as not stopped.
        clip: Bound on both sides; None: not clipped.
        missing_eos_penalty: Score of a response that did not stop, itself not clipped; None: its
            score stays.
    Returns:
        adjusted: [B] float.
    Raises:
        ShapeError: when there is not one reason per score.
    Source: Ziegler et al. 2019 (arXiv 1909.08593), section 3.1.1, for the penalty.
    """
    if scores.shape != (len(finish_reasons),):
        raise ShapeError(
            f"adjust_scores: expected scores of shape ({len(finish_reasons)},), one per finish "
            f"reason, got {tuple(scores.shape)}"
        )
    adjusted = scores if clip is None else scores.clamp(-clip, clip)
    if missing_eos_penalty is None:
        return adjusted
    stopped = torch.tensor([r == "stop" for r in finish_reasons], device=scores.device)
    return torch.where(stopped, adjusted, torch.full_like(adjusted, missing_eos_penalty))

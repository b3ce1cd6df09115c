"""What DPO compares: log-probs of completions, and the pairs of a ranking."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastrl.models.causal_lm import CausalLM
from fastrl.ops import linear_logprobs
from fastrl.packing import predict_rows
from fastrl.trainers.common import packed_forward
from fastrl.trainers.rankings import prompted_sequences
from fastrl.types import Comparison


def completion_logprobs(
    model: CausalLM, comparisons: Sequence[Comparison], *, is_mean: bool = False,
    share_prefix: bool = True,
) -> Tensor:
    """Log-prob of every completion after its prompt, one forward pass for all.

    Args:
        model: A language model over the rankings' vocabulary.
        comparisons: Rankings; completions of at least one token.
        is_mean: Divide by the completion's tokens.
        share_prefix: Encode the prompt of a ranking once.
    Returns:
        [sum of K] float32 or wider, in order of comparison, then completion; differentiable.
    """
    hidden, batch = packed_forward(model, *prompted_sequences(comparisons),
                                   share_prefix=share_prefix)
    lengths = torch.tensor([len(ids) for c in comparisons for ids in c.completions],
                           device=hidden.device)
    rows, targets = predict_rows(batch.is_response, batch)
    logprobs, _ = model.lm_head(hidden[rows], linear_logprobs, batch.token_ids[targets])
    totals: Tensor = torch.segment_reduce(logprobs, "sum", lengths=lengths)
    return totals / lengths if is_mean else totals


def ranked_pairs(comparisons: Sequence[Comparison]) -> tuple[list[tuple[int, int]], list[float]]:
    """Every pair of different ranks, as numbers of completions counted over all comparisons.

    Returns:
        pairs: (better, worse) each. weights: 1 / pairs of the same comparison.
    """
    pairs: list[tuple[int, int]] = []
    weights: list[float] = []
    begin = 0
    for c in comparisons:
        own = [(begin + i, begin + j) for i, rank in enumerate(c.ranks)
               for j, other in enumerate(c.ranks) if rank < other]
        pairs += own
        weights += [1 / len(own)] * len(own)
        begin += len(c.ranks)
    return pairs, weights

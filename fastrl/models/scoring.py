"""Passes without gradient over finished responses: log-probs, values and scores.

Microbatches are filled to a budget of tokens; what comes out does not depend on the budget beyond
rounding. B sequences, T response tokens, N packed tokens.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastrl.checks import check_resident
from fastrl.models.attention import PackedAttention
from fastrl.models.causal_lm import CausalLM, ScalarModel
from fastrl.ops import linear_logprobs
from fastrl.packing import (
    PackedBatch,
    pack_sequences,
    predict_rows,
    response_target_mask,
    split_by_tokens,
)
from fastrl.types import Rollout


@contextmanager
def inference(model: nn.Module) -> Iterator[torch.device]:
    """No gradients and eval mode inside the block; yields the model's device."""
    weight = next(model.parameters())
    check_resident(type(model).__name__, weight)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield weight.device
    finally:
        model.train(was_training)


def _groups(
    sequences: Sequence[Sequence[int]], max_tokens: int, device: torch.device
) -> Iterator[tuple[slice, PackedBatch]]:
    """Microbatches, each with the rows it covers."""
    for group in split_by_tokens([len(s) for s in sequences], max_tokens):
        rows = slice(group[0], group[-1] + 1)
        yield rows, pack_sequences(sequences[rows], device)


def _forward(model: CausalLM | ScalarModel, batch: PackedBatch) -> Tensor:
    out: Tensor = model(batch.token_ids, batch.positions,
                        PackedAttention(batch.cu_seqlens, batch.max_seqlen))
    return out


def _response_rows(batch: PackedBatch, prompt_lens: Tensor) -> tuple[Tensor, Tensor]:
    """rows, targets [M] of a microbatch's response tokens, in order of sequence, then t."""
    return predict_rows(response_target_mask(batch.cu_seqlens, prompt_lens))


def _sequences(rollout: Rollout) -> list[list[int]]:
    return [rollout.sequence(i) for i in range(rollout.batch_size)]


def response_logprobs(
    model: CausalLM, rollout: Rollout, temperature: float, max_tokens: int
) -> tuple[Tensor, Tensor]:
    """Log-probs of the responses' tokens, and the entropy at each of them.

    Args:
        model: Any language model over the rollout's vocabulary.
        rollout: B responses.
        temperature: Divides the logits.
        max_tokens: Tokens of one forward pass; a longer sequence gets a pass of its own.
    Returns:
        logprobs, entropy: [B, T] float32 each on the model's device, 0 where masked. No gradient.
    """
    with inference(model) as device:
        mask, prompt_lens = rollout.response_mask.to(device), rollout.prompt_lens.to(device)
        logprobs = torch.zeros(mask.shape, device=device)
        entropy = torch.zeros(mask.shape, device=device)
        for group, batch in _groups(_sequences(rollout), max_tokens, device):
            rows, targets = _response_rows(batch, prompt_lens[group])
            taken, spread = model.lm_head(
                _forward(model, batch)[rows], linear_logprobs, batch.token_ids[targets],
                temperature=temperature,
            )
            logprobs[group][mask[group]] = taken.float()
            entropy[group][mask[group]] = spread.float()
    return logprobs, entropy


def response_values(model: ScalarModel, rollout: Rollout, max_tokens: int) -> Tensor:
    """Values of the states before each response token.

    Args:
        model: The critic.
        rollout: B responses.
        max_tokens: Tokens of one forward pass.
    Returns:
        [B, T] float32 on the model's device; `[:, t]` is read at the token before response token
        t; 0 where masked. No gradient.
    """
    with inference(model) as device:
        mask, prompt_lens = rollout.response_mask.to(device), rollout.prompt_lens.to(device)
        values = torch.zeros(mask.shape, device=device)
        for group, batch in _groups(_sequences(rollout), max_tokens, device):
            rows, _ = _response_rows(batch, prompt_lens[group])
            values[group][mask[group]] = _forward(model, batch)[rows].float()
    return values


def response_scores(model: ScalarModel, rollout: Rollout, max_tokens: int) -> Tensor:
    """[B] float32: the scalar at the last token of each prompt + response. No gradient.

    Args:
        model: The reward model.
        rollout: B responses.
        max_tokens: Tokens of one forward pass.
    """
    return sequence_scores(model, _sequences(rollout), max_tokens)


def sequence_scores(
    model: ScalarModel, sequences: Sequence[Sequence[int]], max_tokens: int
) -> Tensor:
    """[B] float32: the scalar at the last token of each sequence. No gradient.

    Args:
        model: The reward model.
        sequences: B token lists, none empty.
        max_tokens: Tokens of one forward pass.
    """
    with inference(model) as device:
        scores = [_forward(model, batch)[batch.cu_seqlens[1:] - 1].float()
                  for _, batch in _groups(sequences, max_tokens, device)]
        return torch.cat(scores) if scores else torch.zeros(0, device=device)

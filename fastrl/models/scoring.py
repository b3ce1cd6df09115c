"""Passes without gradient over finished responses: log-probs, values and scores.

Microbatches are filled to a budget of tokens; what comes out does not depend on the budget beyond
rounding. Where memory ends all passes begin anew with half of the budget, and a caller that gives a
`PassBudget` keeps the lower one. B sequences, T response tokens, N packed tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from fastrl.checks import check_resident
from fastrl.models.attention import PackedAttention
from fastrl.models.causal_lm import CausalLM, ScalarModel
from fastrl.models.heads import ScalarHead
from fastrl.ops import linear_logprobs
from fastrl.out_of_memory import PassBudget
from fastrl.packing import PackedBatch, pack_sequences, predict_rows, split_by_tokens
from fastrl.types import Rollout

Result = TypeVar("Result")


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


def _run_passes(
    model: nn.Module, sequences: Sequence[Sequence[int]], prompt_lens: Sequence[int] | None,
    max_tokens: int, share_prefix: bool, take: Callable[[list[int], PackedBatch, Tensor], None],
) -> None:
    """Give `take` each microbatch: which sequences, how they are packed, the model's output.

    Prompts that are shared stand beside each other, so sequences may come in another order.
    """
    device = next(model.parameters()).device
    prompts = None
    if prompt_lens is not None and share_prefix:
        prompts = [s[:length] for s, length in zip(sequences, prompt_lens, strict=True)]
    for rows in split_by_tokens([len(s) for s in sequences], max_tokens, prompts):
        batch = pack_sequences(
            [sequences[i] for i in rows], device, share_prefix=share_prefix,
            prompt_lens=None if prompt_lens is None else [prompt_lens[i] for i in rows])
        take(rows, batch, model(batch.token_ids, batch.positions, PackedAttention.of(batch)))


def _responses(
    rollout: Rollout, group: list[int], batch: PackedBatch
) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
    """Where the M response tokens of a microbatch lie in [B, T]; the rows before them and theirs,
    [M] each."""
    rows, targets = predict_rows(batch.is_response, batch)
    members = torch.tensor(group, device=rows.device)
    places, times = rollout.response_mask.to(rows.device)[members].nonzero(as_tuple=True)
    return (members[places], times), rows, targets


def _run_response_passes(
    model: CausalLM | ScalarModel, rollout: Rollout, max_tokens: int, share_prefix: bool,
    take: Callable[[tuple[Tensor, Tensor], Tensor, Tensor], None],
) -> None:
    """Give `take` each microbatch of a rollout.

    These are: where its M response tokens lie in [B, T]; the tokens [M]; the model's output
    [M, ...] at the token before each.
    """
    def take_responses(group: list[int], batch: PackedBatch, output: Tensor) -> None:
        where, rows, targets = _responses(rollout, group, batch)
        take(where, batch.token_ids[targets], output[rows])

    _run_passes(model, _sequences(rollout), rollout.prompt_lens.tolist(), max_tokens, share_prefix,
                take_responses)


def _sequences(rollout: Rollout) -> list[list[int]]:
    return [rollout.sequence(i) for i in range(rollout.batch_size)]


def _score(
    attempt: Callable[[torch.device, int], Result], model: nn.Module,
    sequences: Sequence[Sequence[int]], max_tokens: int | PassBudget,
) -> Result:
    """What `attempt` reads with a model, given its device and the tokens of a pass."""
    with inference(model) as device:
        return PassBudget.of(max_tokens).run(
            partial(attempt, device), [len(s) for s in sequences], "scoring")


def response_logprobs(
    model: CausalLM, rollout: Rollout, temperature: float, max_tokens: int | PassBudget, *,
    share_prefix: bool = True,
) -> tuple[Tensor, Tensor]:
    """Log-probs of the responses' tokens, and the entropy at each of them.

    Args:
        model: Any language model over the rollout's vocabulary.
        rollout: B responses.
        temperature: Divides the logits.
        max_tokens: Tokens of one forward pass; a longer sequence gets a pass of its own.
        share_prefix: Encode the prompt of several responses once.
    Returns:
        logprobs, entropy: [B, T] float32 each on the model's device, 0 where masked. No gradient.
    """
    def attempt(device: torch.device, max_tokens: int) -> tuple[Tensor, Tensor]:
        logprobs = torch.zeros(rollout.response_mask.shape, device=device)
        entropy = torch.zeros_like(logprobs)

        def take(where: tuple[Tensor, Tensor], token_ids: Tensor, hidden: Tensor) -> None:
            taken, spread = model.lm_head(hidden, linear_logprobs, token_ids,
                                          temperature=temperature)
            logprobs[where], entropy[where] = taken.float(), spread.float()

        _run_response_passes(model, rollout, max_tokens, share_prefix, take)
        return logprobs, entropy

    return _score(attempt, model, _sequences(rollout), max_tokens)


def response_values(
    model: ScalarModel, rollout: Rollout, max_tokens: int | PassBudget, *, share_prefix: bool = True
) -> Tensor:
    """Values of the states before each response token.

    Args:
        model: The critic.
        rollout: B responses.
        max_tokens: Tokens of one forward pass.
        share_prefix: Encode the prompt of several responses once.
    Returns:
        [B, T] float32 on the model's device; `[:, t]` is read at the token before response token
        t; 0 where masked. No gradient.
    """
    def attempt(device: torch.device, max_tokens: int) -> Tensor:
        values = torch.zeros(rollout.response_mask.shape, device=device)

        def take(where: tuple[Tensor, Tensor], _: Tensor, output: Tensor) -> None:
            values[where] = output.float()

        _run_response_passes(model, rollout, max_tokens, share_prefix, take)
        return values

    return _score(attempt, model, _sequences(rollout), max_tokens)


@dataclass(frozen=True, slots=True)
class TrunkReading:
    """What one pass of a trunk over a rollout gives to the heads on it."""

    values: Tensor
    """[B, T] float32, as `response_values` gives them."""
    scores: Tensor | None
    """[B] float32, as `response_scores` gives them; None without a second head."""
    states: list[Tensor] | None
    """B tensors [T_i, D]: the hidden states that `values` were read from; None: not kept."""


def read_trunk(
    trunk: nn.Module, rollout: Rollout, max_tokens: int | PassBudget, *, value_head: ScalarHead,
    score_head: ScalarHead | None = None, keeps_states: bool = False, share_prefix: bool = True,
) -> TrunkReading:
    """Values, and where asked for scores and hidden states, from one pass over the responses.

    Args:
        trunk: `(token_ids, positions, attention) -> [N, D]`.
        rollout: B responses.
        max_tokens: Tokens of one forward pass.
        value_head: Read at the token before each response token.
        score_head: Read at the last token of each sequence.
        keeps_states: Keep the states that values are read from, D numbers per response token.
        share_prefix: Encode the prompt of several responses once.
    Returns:
        No gradient anywhere.
    """
    sequences = _sequences(rollout)

    def attempt(device: torch.device, max_tokens: int) -> TrunkReading:
        values = torch.zeros(rollout.response_mask.shape, device=device)
        scores = torch.zeros(rollout.batch_size, device=device)
        states, lengths = dict[int, Tensor](), rollout.response_lens.tolist()

        def take(group: list[int], batch: PackedBatch, hidden: Tensor) -> None:
            where, rows, _ = _responses(rollout, group, batch)
            read = hidden[rows]
            values[where] = value_head(read).float()
            if score_head is not None:
                scores[group] = score_head(hidden[batch.ends]).float()
            if keeps_states:
                states.update(zip(group, torch.split(read, [lengths[i] for i in group]),
                                  strict=True))

        _run_passes(trunk, sequences, rollout.prompt_lens.tolist(), max_tokens, share_prefix, take)
        return TrunkReading(values, None if score_head is None else scores,
                            [states[i] for i in range(len(lengths))] if keeps_states else None)

    return _score(attempt, trunk, sequences, max_tokens)


def response_scores(
    model: ScalarModel, rollout: Rollout, max_tokens: int | PassBudget, *, share_prefix: bool = True
) -> Tensor:
    """[B] float32: the scalar at the last token of each prompt + response. No gradient.

    Args:
        model: The reward model.
        rollout: B responses.
        max_tokens: Tokens of one forward pass.
        share_prefix: Encode the prompt of several responses once.
    """
    return sequence_scores(model, _sequences(rollout), max_tokens, rollout.prompt_lens.tolist(),
                           share_prefix=share_prefix)


def sequence_scores(
    model: ScalarModel, sequences: Sequence[Sequence[int]], max_tokens: int | PassBudget,
    prompt_lens: Sequence[int] | None = None, *, share_prefix: bool = True,
) -> Tensor:
    """[B] float32: the scalar at the last token of each sequence. No gradient.

    Args:
        model: The reward model.
        sequences: B token lists, none empty.
        max_tokens: Tokens of one forward pass.
        prompt_lens: Tokens of each one's prompt; None: no prompt is known, so none is shared.
        share_prefix: Encode the prompt of several sequences once.
    """
    def attempt(device: torch.device, max_tokens: int) -> Tensor:
        scores = torch.zeros(len(sequences), device=device)

        def take(rows: list[int], batch: PackedBatch, output: Tensor) -> None:
            scores[rows] = output[batch.ends].float()

        _run_passes(model, sequences, prompt_lens, max_tokens, share_prefix, take)
        return scores

    return _score(attempt, model, sequences, max_tokens)

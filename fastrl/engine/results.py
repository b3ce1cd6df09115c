"""What one call has drawn, a row per response, and the rollout that it becomes.

Shape letters: R rows of the decode batch, K steps of a round, B responses, T longest response.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastrl.engine.batch import DecodeBatch, RecentTokens
from fastrl.engine.request import Request
from fastrl.types import Rollout


class Results:
    """Tokens, log-probs and entropies of all responses.

    Args:
        requests: One per response, in order.
        device: Of the model.
    """

    def __init__(self, requests: Sequence[Request], device: torch.device) -> None:
        self._requests = requests
        longest = max(request.max_tokens for request in requests)
        # One row more than there are responses: what belongs nowhere is written there.
        self.token_ids = torch.zeros(len(requests) + 1, longest, dtype=torch.int64, device=device)
        """[B+1, T] int64."""
        self.logprobs = torch.zeros_like(self.token_ids, dtype=torch.float32)
        """[B+1, T] float32."""
        self.entropy = torch.zeros_like(self.logprobs)
        """[B+1, T] float32."""
        self.lengths = [0] * len(requests)
        """Tokens of each finished response."""

    def begin_round(self, batch: DecodeBatch, recent: RecentTokens, *, replays: bool) -> Tensor:
        """Make `recent` ready for what is drawn next.

        Args:
            replays: Tokens may be replayed; then they are put into `recent`.
        Returns:
            num_generated [R] int64 as it is now.
        """
        recent.column.zero_()
        if replays:
            columns = self._columns(batch.num_generated, recent)
            columns = columns.clamp_max(self.token_ids.shape[1] - 1)
            recent.token_ids.copy_(self.token_ids[batch.index[:, None], columns])
        return batch.num_generated.clone()

    def record(self, batch: DecodeBatch, recent: RecentTokens, begun: Tensor) -> None:
        """Take over what a round has drawn.

        Args:
            begun: [R] int64, what `begin_round` returned.
        """
        columns = self._columns(begun, recent)
        is_new = ((columns >= batch.num_recorded[:, None])
                  & (columns < batch.num_generated[:, None]))
        place = (torch.where(is_new, batch.index[:, None], len(self._requests)),
                 torch.where(is_new, columns, 0))
        self.token_ids[place] = recent.token_ids
        self.logprobs[place] = recent.logprobs
        self.entropy[place] = recent.entropy

    @staticmethod
    def _columns(begun: Tensor, recent: RecentTokens) -> Tensor:
        """[R, K] int64, columns of the results that the steps of a round write."""
        return begun[:, None] + torch.arange(recent.token_ids.shape[1], device=begun.device)

    def rollout(self, num_samples_per_prompt: int) -> Rollout:
        """The rollout, once every response has ended."""
        lengths, requests, device = self.lengths, self._requests, self.token_ids.device
        longest = max(lengths)
        mask = torch.arange(longest, device=device) < torch.tensor(lengths, device=device)[:, None]
        response_ids, logprobs, entropy = (
            values[:-1, :longest].masked_fill(~mask, 0)
            for values in (self.token_ids, self.logprobs, self.entropy))
        responses = response_ids.tolist()
        sequences = [[*request.prompt.token_ids, *responses[row][: lengths[row]]]
                     for row, request in enumerate(requests)]
        bounds = torch.tensor([0, *map(len, sequences)], dtype=torch.int64).cumsum(0)
        return Rollout(
            token_ids=torch.tensor([token for sequence in sequences for token in sequence],
                                   dtype=torch.int64, device=device),
            cu_seqlens=bounds.to(device),
            prompt_lens=torch.tensor([len(r.prompt.token_ids) for r in requests], device=device),
            response_ids=response_ids, response_mask=mask, rollout_logprobs=logprobs,
            entropy=entropy,
            finish_reasons=tuple(request.finish_reason or "cancelled" for request in requests),
            num_samples_per_prompt=num_samples_per_prompt,
        )

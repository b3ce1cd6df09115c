"""The values that flow between data, engine, rewards and trainers: frozen dataclasses.

Shape letters: B sequences, T response tokens, S prompt + response, N packed tokens, K completions.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt, encoded and ready for the engine."""

    token_ids: tuple[int, ...]
    """Template and content, as the model reads it; ends where the response begins."""
    text: str
    """What a person reads: the prompt text, or the last user turn of a conversation."""
    source: str = ""
    """Where the row came from, for reports by source."""
    row: Mapping[str, Any] = field(default_factory=dict)
    """The original row, for reward functions and reports."""


@dataclass(frozen=True, slots=True)
class TokenExample:
    """Tokens to learn from: a demonstration, or a window of pretraining text."""

    token_ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]
    """One flag per token: True where the token is a target. Index 0 is never a target."""
    source: str = ""


@dataclass(frozen=True, slots=True)
class Comparison:
    """A prompt with K ranked completions."""

    prompt_ids: tuple[int, ...]
    completions: tuple[tuple[int, ...], ...]
    """K token lists, each ending as a finished response does (with EOS where there is one)."""
    ranks: tuple[int, ...]
    """K ranks, 0 is best, equal ranks are ties."""
    source: str = ""
    num_characters: tuple[int, ...] = ()
    """Length of each completion's text, for the length-only baseline."""


@dataclass(frozen=True, slots=True)
class Rollout:
    """Generated responses: packed tokens for models, `[B, T]` tensors for everything per response.

    Sequence i is prompt i followed by its response. Responses keep the order of the request:
    sample j of prompt p is row `p * num_samples_per_prompt + j`.
    """

    token_ids: Tensor
    """[N] int64, every sequence (prompt then response) end to end."""
    cu_seqlens: Tensor
    """[B+1] int64, where each sequence begins; the last entry is N."""
    prompt_lens: Tensor
    """[B] int64, tokens of each prompt."""
    response_ids: Tensor
    """[B, T] int64, right-padded with 0 where `response_mask` is False."""
    response_mask: Tensor
    """[B, T] bool, True for sampled tokens, EOS included."""
    rollout_logprobs: Tensor
    """[B, T] float32, as reported by the sampler; 0 where masked."""
    entropy: Tensor
    """[B, T] float32, nats, of the distribution drawn from; 0 where masked."""
    finish_reasons: tuple[str, ...]
    """Per response: "stop" (stop token or string), "length" or "cancelled"."""
    num_samples_per_prompt: int = 1

    @property
    def batch_size(self) -> int:
        """B, the number of responses."""
        return int(self.response_mask.shape[0])

    @property
    def max_response_len(self) -> int:
        """T, tokens of the longest response."""
        return int(self.response_mask.shape[1])

    @property
    def seqlens(self) -> Tensor:
        """[B] int64, prompt plus response tokens of each sequence."""
        return self.cu_seqlens[1:] - self.cu_seqlens[:-1]

    @property
    def response_lens(self) -> Tensor:
        """[B] int64, sampled tokens of each response."""
        return self.response_mask.sum(dim=1)

    def sequence(self, index: int) -> list[int]:
        """Token ids of one sequence, prompt and response."""
        begin, end = int(self.cu_seqlens[index]), int(self.cu_seqlens[index + 1])
        return [int(t) for t in self.token_ids[begin:end].tolist()]

    def response(self, index: int) -> list[int]:
        """Token ids of one response, EOS included."""
        length = int(self.response_lens[index])
        return [int(t) for t in self.response_ids[index, :length].tolist()]

    def to(self, device: torch.device | str) -> "Rollout":
        """The same rollout with every tensor on `device`."""
        names = ("token_ids", "cu_seqlens", "prompt_lens", "response_ids", "response_mask",
                 "rollout_logprobs", "entropy")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})

    def select(self, indices: list[int]) -> "Rollout":
        """The rows `indices`, in that order, repacked; T stays as it is."""
        sequences = [self.sequence(i) for i in indices]
        lengths = torch.tensor([0, *[len(s) for s in sequences]], dtype=torch.int64)
        rows = torch.tensor(indices, dtype=torch.int64, device=self.response_mask.device)
        return Rollout(
            token_ids=torch.tensor([t for s in sequences for t in s], dtype=torch.int64,
                                   device=self.token_ids.device),
            cu_seqlens=lengths.cumsum(0).to(self.cu_seqlens.device),
            prompt_lens=self.prompt_lens[rows],
            response_ids=self.response_ids[rows],
            response_mask=self.response_mask[rows],
            rollout_logprobs=self.rollout_logprobs[rows],
            entropy=self.entropy[rows],
            finish_reasons=tuple(self.finish_reasons[i] for i in indices),
            num_samples_per_prompt=1,
        )

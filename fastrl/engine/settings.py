"""The sampling settings of requests as tensors: one row per request, or per row of a batch.

Shape letters: R rows, V vocabulary, E stop tokens of the request with the most.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from fastrl.engine.request import Request
from fastrl.ops import sample_tokens
from fastrl.ops.logprob import gather_logprobs


@dataclass(frozen=True, slots=True)
class Settings:
    """How the token of each row is drawn; the fields are those of `SamplingConfig`."""

    temperature: Tensor
    """[R] float32."""
    top_k: Tensor
    """[R] int64."""
    top_p: Tensor
    """[R] float32."""
    min_p: Tensor
    """[R] float32."""
    greedy: Tensor
    """[R] bool."""
    raw_logprobs: Tensor
    """[R] bool."""
    repetition_penalty: Tensor
    """[R] float32."""
    min_new_tokens: Tensor
    """[R] int64."""
    stop_ids: Tensor
    """[R, E] int64, -1 where a row has fewer."""
    has_penalty: bool
    """Some request has a repetition penalty."""
    has_minimum: bool
    """Some request has stop tokens and a least number of tokens before them."""

    @classmethod
    def of(
        cls, requests: Sequence[Request], default_stops: Sequence[int], device: torch.device
    ) -> "Settings":
        """A row per request and one more, for dummies, which draws plainly and never stops.

        Args:
            default_stops: Stop tokens of requests that name none.
        """
        configs = [request.sampling for request in requests]
        stops = [default_stops if c.stop_token_ids is None else c.stop_token_ids for c in configs]
        width = max(map(len, stops))

        def column(values: list[float], dummy: float) -> Tensor:
            return torch.tensor([*values, dummy], device=device)

        return cls(
            temperature=column([c.temperature for c in configs], 1.0),
            top_k=column([c.top_k for c in configs], 0),
            top_p=column([c.top_p for c in configs], 1.0),
            min_p=column([c.min_p for c in configs], 0.0),
            greedy=column([c.greedy for c in configs], False),
            raw_logprobs=column([c.logprobs == "raw" for c in configs], False),
            repetition_penalty=column([c.repetition_penalty for c in configs], 1.0),
            min_new_tokens=column([c.min_new_tokens for c in configs], 0),
            stop_ids=torch.tensor(
                [[*ids, *[-1] * (width - len(ids))] for ids in (*stops, ())],
                dtype=torch.int64, device=device),
            has_penalty=any(c.repetition_penalty != 1 for c in configs),
            has_minimum=any(c.min_new_tokens and ids
                            for c, ids in zip(configs, stops, strict=True)),
        )

    def select(self, rows: Tensor) -> "Settings":
        """The rows `rows` [R] int64."""
        columns = {f.name: getattr(self, f.name).index_select(0, rows) for f in fields(self)
                   if isinstance(getattr(self, f.name), Tensor)}
        return replace(self, **columns)

    def draw(
        self, logits: Tensor, seeds: Tensor, positions: Tensor, num_generated: Tensor, seen: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A token for every row.

        Args:
            logits: [R, V].
            seeds, positions: [R] int64, as `sample_tokens` takes them.
            num_generated: [R] int64, response tokens so far.
            seen: [R, V] bool, tokens of prompt and response; read where `has_penalty`.
        Returns:
            token_ids [R] int64; logprobs, entropy [R] float32.
        """
        adjusted = logits
        if self.has_penalty:
            penalty = self.repetition_penalty[:, None]
            penalised = torch.where(logits > 0, logits / penalty, logits * penalty)
            adjusted = torch.where(seen, penalised, logits)
        if self.has_minimum:
            is_early = (num_generated < self.min_new_tokens)[:, None] & (self.stop_ids >= 0)
            highest = torch.full_like(self.stop_ids, torch.inf, dtype=logits.dtype)
            adjusted = adjusted.scatter_reduce(
                1, self.stop_ids.clamp_min(0), highest.masked_fill_(is_early, -torch.inf), "amin")
        token_ids, logprobs, entropy = sample_tokens(
            adjusted, seeds, positions, temperature=self.temperature, top_k=self.top_k,
            top_p=self.top_p, min_p=self.min_p, greedy=self.greedy, raw_logprobs=self.raw_logprobs)
        if adjusted is not logits and self.raw_logprobs.any():
            raw, _ = gather_logprobs(logits / self.temperature[:, None], token_ids)
            is_adjusted = (self.repetition_penalty != 1) | (self.min_new_tokens > 0)
            logprobs = torch.where(self.raw_logprobs & is_adjusted, raw.float(), logprobs)
        return token_ids, logprobs, entropy

    def is_stop(self, token_ids: Tensor) -> Tensor:
        """[R] bool, True where token_ids [R] is a stop token of its row."""
        return (token_ids[:, None] == self.stop_ids).any(dim=1)

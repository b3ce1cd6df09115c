"""The sampling settings of requests as tensors: one row per request, or per row of a batch.

Shape letters: R rows, V vocabulary, E stop tokens of the request with the most.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from fastrl.engine.request import Request
from fastrl.ops import SampledTokens, sample_tokens


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
    is_truncated: bool
    """Some request has top_k, top_p or min_p."""

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
            is_truncated=any(c.top_k > 0 or c.top_p < 1 or c.min_p > 0 for c in configs),
        )

    def select(self, rows: Tensor) -> "Settings":
        """The rows `rows` [R] int64."""
        columns = {f.name: getattr(self, f.name).index_select(0, rows) for f in fields(self)
                   if isinstance(getattr(self, f.name), Tensor)}
        return replace(self, **columns)

    def draw(
        self, logits: Tensor, seeds: Tensor, positions: Tensor, num_generated: Tensor, seen: Tensor
    ) -> SampledTokens:
        """A token for every row, and whether it is one of the row's stop tokens.

        Args:
            logits: [R, V].
            seeds, positions: [R] int64, as `sample_tokens` takes them.
            num_generated: [R] int64, response tokens so far.
            seen: [R, V] bool, tokens of prompt and response; read where `has_penalty`.
        """
        return sample_tokens(
            logits, seeds, positions, temperature=self.temperature, top_k=self.top_k,
            top_p=self.top_p, min_p=self.min_p, greedy=self.greedy,
            raw_logprobs=self.raw_logprobs, stop_token_ids=self.stop_ids,
            repetition_penalty=self.repetition_penalty if self.has_penalty else None,
            seen=seen if self.has_penalty else None,
            suppresses_stops=num_generated < self.min_new_tokens if self.has_minimum else None,
            is_truncated=self.is_truncated)

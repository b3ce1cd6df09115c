"""Settings of generation: how tokens are drawn, and the engine that draws them."""

from dataclasses import dataclass
from typing import Literal

from fastrl.config.checks import check, check_not_negative, check_positive, check_types


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingConfig:
    """How the engine draws tokens."""

    temperature: float = 1.0
    """Divides the logits before sampling; paper: 1."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens with at least this probability; 1 keeps all."""
    min_p: float = 0.0
    """Drop tokens less likely than this share of the most likely one; 0 keeps all."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens seen before; 1 is off."""
    greedy: bool = False
    """Take the most likely token instead of sampling."""
    max_new_tokens: int = 128
    """Longest response, in tokens."""
    min_new_tokens: int = 0
    """No stop token before this many tokens."""
    stop_token_ids: tuple[int, ...] | None = None
    """Tokens that end a response; None takes the model's own end-of-text tokens."""
    stop_strings: tuple[str, ...] = ()
    """Texts that end a response; the text itself is kept in the tokens."""
    logprobs: Literal["processed", "raw"] = "processed"
    """Log-probs of the distribution drawn from, or of the model's own (temperature only)."""

    def __post_init__(self) -> None:
        check_types(self, SamplingConfig)
        check_positive(self, ("temperature", "max_new_tokens", "repetition_penalty"))
        check_not_negative(self, ("top_k", "min_new_tokens"))
        check(1e-6 <= self.temperature <= 1e6, "temperature",
              "at least 1e-6 (set greedy to take the most likely token) and at most 1e6",
              self.temperature)
        check(1e-6 <= self.repetition_penalty <= 1e6, "repetition_penalty",
              "a number from 1e-6 to 1e6", self.repetition_penalty)
        check(all(self.stop_strings), "stop_strings", "texts, none of them empty",
              self.stop_strings)
        check(all(token >= 0 for token in self.stop_token_ids or ()), "stop_token_ids",
              "token ids of at least 0", self.stop_token_ids)
        check(0 < self.top_p <= 1, "top_p", "a number above 0 and at most 1", self.top_p)
        check(0 <= self.min_p < 1, "min_p", "a number from 0 to below 1", self.min_p)
        check(self.min_new_tokens <= self.max_new_tokens, "min_new_tokens",
              f"at most max_new_tokens ({self.max_new_tokens})", self.min_new_tokens)

    @property
    def is_truncated(self) -> bool:
        """True when some tokens can never be drawn, or logits depend on earlier tokens."""
        return (self.greedy or self.top_k > 0 or self.top_p < 1 or self.min_p > 0
                or self.repetition_penalty != 1 or self.min_new_tokens > 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """The rollout engine's sizes."""

    page_size: int | None = None
    """Tokens per page of the KV cache; None: 16, or on a CPU where `num_pages` is None as many as
    the longest sequence of the request has, because attention there reads whole sequences."""
    num_pages: int | None = None
    """Pages of the KV cache; None makes room for `max_batch_size` sequences of the request."""
    max_batch_size: int = 256
    """Sequences decoded together."""
    max_prefill_tokens: int | None = None
    """Prompt tokens processed in one forward pass; None: 8192, or 2048 on a CPU, whose caches hold
    more of what a layer passes to the next. A longer prompt is processed alone."""
    order: Literal["given", "longest_first"] = "given"
    """Which requests start first where not all fit: those given first, or those with the largest
    `max_new_tokens`, so that none of these runs alone at the end. Never changes a response."""
    share_prefix: bool = True
    """Samples of one prompt share the pages of the prompt."""
    sync_every: int | None = None
    """Decode steps between two looks at which responses have ended; None: 8 on a GPU, which then
    never waits for the host, or 1 on a CPU. With stop strings and in a stream always 1. Never
    changes a response."""
    cuda_graphs: Literal["auto", "on", "off"] = "auto"
    """Decode steps on a GPU are captured once for each size of the batch and then replayed: auto
    where all of a step can be captured, with a warning that says why not; on fails where not. The
    pages then keep their memory between calls. Never changes a response."""
    exact: bool = True
    """A response has the same bits whatever runs beside it, and log-probs that are the update's:
    the settings of fastrl/exactness/settings.py, and passes padded to rows that kernels treat
    alike. False pads nothing and leaves torch's defaults."""

    def __post_init__(self) -> None:
        check_types(self, EngineConfig)
        check_positive(self, ("page_size", "num_pages", "max_batch_size", "max_prefill_tokens",
                              "sync_every"))

"""What the engine knows about one response while it is being made."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from fastrl.config import SamplingConfig
from fastrl.engine.text import TextPieces
from fastrl.errors import ConfigError, DataError
from fastrl.models.spec import ModelSpec


@dataclass(slots=True, eq=False)
class SharedPrompt:
    """A prompt and, once computed, its pages; samples that share it start from them."""

    token_ids: tuple[int, ...]
    num_waiting: int
    """Samples that have not started."""
    pages: list[int] = field(default_factory=list)
    """Pages of the prompt, one reference each; empty when not computed or already given away."""
    hidden: Tensor | None = None
    """[D], hidden state of the last prompt token."""


@dataclass(slots=True, eq=False)
class Request:
    """One response."""

    index: int
    """Row of the result."""
    prompt: SharedPrompt
    seed: int
    """Key of its random numbers."""
    max_tokens: int
    """Longest response that settings and model allow."""
    sampling: SamplingConfig
    """How its tokens are drawn, and when it ends."""
    text: TextPieces | None = None
    """Decoder of its text, where someone reads it."""
    piece: str = ""
    """Text that its newest token completed."""
    pages: list[int] = field(default_factory=list)
    """Pages of prompt and response, one reference each; empty while it waits."""
    num_tokens: int = 0
    """Response tokens that the host knows of."""
    num_recorded: int = 0
    """Response tokens known when it was last preempted; they are replayed, not drawn again."""
    started: int = -1
    """Decode step that fed its first token."""
    boundary: int = 0
    """It needs a page at decode steps that equal this modulo the page size."""
    place: int = -1
    """Among all requests, in the order in which they start."""
    row: int = -1
    """Row of the decode batch; -1 while it waits."""
    finish_reason: str | None = None

    @property
    def max_cached_tokens(self) -> int:
        """Most tokens that ever lie in its pages: the last one drawn is never fed back."""
        return len(self.prompt.token_ids) + self.max_tokens - 1

    @property
    def tokens_to_start(self) -> int:
        """Tokens whose pages should be free before it starts: all that it had, and one more."""
        wanted = len(self.prompt.token_ids) + max(1, self.num_recorded)
        return min(wanted, self.max_cached_tokens)


def check_stops(spec: ModelSpec, stop_token_ids: Sequence[int]) -> None:
    """Raise ConfigError where a stop token is none of the vocabulary, and so is never drawn."""
    beyond = [token for token in stop_token_ids if token >= spec.vocab_size]
    if beyond:
        raise ConfigError(
            f"stop_token_ids: expected token ids from 0 to {spec.vocab_size - 1}, the model's "
            f"vocabulary, got {beyond[0]}; does the tokenizer fit the model?")


def checked_prompt(spec: ModelSpec, number: int, prompt: Sequence[int]) -> tuple[int, ...]:
    """The token ids of prompt `number`.

    Raises:
        DataError: when it is empty, too long, or has ids outside the vocabulary.
    """
    token_ids = tuple(int(token) for token in prompt)
    if not 0 < len(token_ids) < spec.max_positions:
        raise DataError(
            f"prompt {number}: expected 1 to {spec.max_positions - 1} tokens, so that the "
            f"model's {spec.max_positions} positions leave room for a response, got "
            f"{len(token_ids)}; shorten or drop it")
    if min(token_ids) < 0 or max(token_ids) >= spec.vocab_size:
        raise DataError(
            f"prompt {number}: expected token ids from 0 to {spec.vocab_size - 1}, got "
            f"{min(token_ids)} to {max(token_ids)}; does the tokenizer fit the model?")
    return token_ids

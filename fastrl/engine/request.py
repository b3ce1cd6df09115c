"""What the engine knows about one response while it is being made."""

from dataclasses import dataclass, field

from torch import Tensor

from fastrl.config import SamplingConfig
from fastrl.engine.text import TextPieces


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

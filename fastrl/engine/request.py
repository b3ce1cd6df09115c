"""What the engine knows about one response while it is being made."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import index

import torch
from torch import Tensor

from fastrl.config import SamplingConfig, check
from fastrl.engine.text import Decoder, TextPieces
from fastrl.errors import ConfigError, DataError
from fastrl.field_types import fits
from fastrl.models.spec import ModelSpec
from fastrl.ops.sampling import request_seeds


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
        DataError: when it is empty, too long, or anything but ids of the vocabulary.
    """
    try:
        token_ids = tuple(map(index, prompt))
    except TypeError:
        raise DataError(f"prompt {number}: expected a list of token ids, whole numbers, got "
                        f"{prompt!r:.60}; encode text first") from None
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


def new_requests(
    spec: ModelSpec, prompts: Sequence[Sequence[int]],
    sampling: SamplingConfig | Sequence[SamplingConfig] | None, *, seed: int, num_samples: int,
    first_request_id: int, shares_prompts: bool, encoder: Decoder | None, reads_text: bool = False,
) -> list[Request]:
    """One request per response, samples of a prompt after each other.

    Args:
        spec: The model's vocabulary and positions.
        prompts, sampling, seed, num_samples, first_request_id: As `Engine.generate` takes them.
        shares_prompts: Samples of a prompt share it.
        encoder: Decodes tokens where somebody reads the text.
        reads_text: Someone does, even where no stop string is looked for.
    Raises:
        ConfigError, DataError: as `Engine.generate`.
    """
    for name, number, least in (("num_samples_per_prompt", num_samples, 1),
                                ("first_request_id", first_request_id, 0)):
        check(fits(int, number) and least <= number < 2**62, name,
              f"a whole number of at least {least}, below 2**62", number)
    check(fits(int, seed), "seed", "a 64-bit integer", seed)
    check(len(prompts) > 0, "prompts", "at least one prompt", prompts)
    settings = _one_for_each(prompts, sampling)
    if any(own.stop_strings for own in settings) and encoder is None:
        raise ConfigError("stop_strings: expected an engine with an encoder, which turns "
                          "tokens into text; give Engine(..., encoder=...)")
    for stops in {own.stop_token_ids for own in settings}:
        check_stops(spec, stops or ())
    ids = first_request_id + torch.arange(len(prompts) * num_samples)
    seeds = request_seeds(seed, ids).tolist()
    requests: list[Request] = []
    for number, (prompt, own) in enumerate(zip(prompts, settings, strict=True)):
        token_ids = checked_prompt(spec, number, prompt)
        max_tokens = min(own.max_new_tokens, spec.max_positions - len(token_ids))
        shared = SharedPrompt(token_ids, num_samples)
        for _ in range(num_samples):
            text = None
            if encoder is not None and (reads_text or own.stop_strings):
                text = TextPieces(encoder, token_ids, own.stop_strings)
            row = len(requests)
            requests.append(Request(row, shared if shares_prompts else SharedPrompt(token_ids, 1),
                                    seeds[row], max_tokens, own, text))
    return requests


def _one_for_each(
    prompts: Sequence[Sequence[int]], sampling: SamplingConfig | Sequence[SamplingConfig] | None
) -> Sequence[SamplingConfig]:
    """The settings of every prompt."""
    if sampling is None or isinstance(sampling, SamplingConfig):
        return [sampling or SamplingConfig()] * len(prompts)
    wrong = [own for own in sampling if not isinstance(own, SamplingConfig)]
    if wrong or len(sampling) != len(prompts):
        raise ConfigError(
            f"sampling: expected one SamplingConfig, or one for each of {len(prompts)} prompts, "
            f"got {f'{wrong[0]!r:.60}' if wrong else len(sampling)}")
    return sampling

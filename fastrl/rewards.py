"""One score per response, from a reward model or from a function.

A scorer is anything that can be called as `scorer(rollout) -> [B] float32`.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from fastrl.errors import DataError, NumericsError, ShapeError
from fastrl.models.causal_lm import ScalarModel
from fastrl.models.scoring import response_scores
from fastrl.types import Prompt, Rollout

if TYPE_CHECKING:
    from fastrl.data import TextEncoder

RewardFunction = Callable[[list[str], list[str]], Sequence[float]]
"""`fn(prompts, completions) -> scores`, B of each."""


class Scorer(Protocol):
    """What a PPO trainer asks for scores."""

    def __call__(self, rollout: Rollout) -> Tensor:
        """Score [B] float32 of every response."""


class TextDecoder(Protocol):
    """The part of `fastrl.data.TextEncoder` that a reward function needs."""

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a text."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of some tokens."""


class RewardModelScorer:
    """Scores responses with a reward model: its value at the last token, shift included.

    Args:
        model: Reward model; put into eval mode and frozen, since no one trains it from here on.
        max_tokens: Token budget of one forward pass; never changes the result.
    """

    def __init__(self, model: ScalarModel, max_tokens: int = 8192) -> None:
        self.model = model.eval().requires_grad_(False)
        self.max_tokens = max_tokens

    def __call__(self, rollout: Rollout) -> Tensor:
        """Score [B] float32 of every response."""
        return response_scores(self.model, rollout, self.max_tokens).float()


class FunctionScorer:
    """Scores responses with a Python function of texts.

    The function gets the prompts and the completions as lists of strings. A completion is the
    decoded response without its end-of-text token; a prompt is its `Prompt.text` where the prompt
    is one of `prompts`, else the decoded prompt tokens.

    Args:
        fn: `fn(prompts, completions) -> scores`, one finite number per completion.
        encoder: Decodes tokens.
        prompts: Prompts whose `text` the function should see.
    """

    def __init__(
        self, fn: RewardFunction, encoder: TextDecoder, prompts: Iterable[Prompt] = ()
    ) -> None:
        self.fn = fn
        self.encoder = encoder
        self.name = getattr(fn, "__name__", type(fn).__name__)
        self._texts = {prompt.token_ids: prompt.text for prompt in prompts}

    def __call__(self, rollout: Rollout) -> Tensor:
        """Score [B] float32 of every response.

        Raises:
            DataError: when the function returns another number of scores, or not numbers.
            NumericsError: when a score is not finite.
        An exception of the function itself passes through, with a note that names the function.
        """
        prompts, completions = self.texts(rollout)
        try:
            scores = self.fn(prompts, completions)
        except BaseException as error:
            error.add_note(
                f"raised by reward function {self.name} while it scored {len(prompts)} responses; "
                f"the first: prompt {prompts[0][:200]!r}, completion {completions[0][:200]!r}"
            )
            raise
        if len(scores) != len(prompts):
            raise DataError(
                f"reward function {self.name}: expected {len(prompts)} scores, one per completion, "
                f"got {len(scores)}; return a list as long as its arguments"
            )
        values = [self._number(score, i, prompts, completions) for i, score in enumerate(scores)]
        return torch.tensor(values, dtype=torch.float32, device=rollout.response_mask.device)

    def texts(self, rollout: Rollout) -> tuple[list[str], list[str]]:
        """Prompts and completions of a rollout as the function sees them, B of each."""
        prompts, completions = [], []
        for index in range(rollout.batch_size):
            prompt_ids = rollout.sequence(index)[: int(rollout.prompt_lens[index])]
            text = self._texts.get(tuple(prompt_ids))
            prompts.append(self.encoder.decode(prompt_ids) if text is None else text)
            completions.append(decode_response(rollout, index, self.encoder))
        return prompts, completions

    def _number(
        self, score: object, index: int, prompts: list[str], completions: list[str]
    ) -> float:
        """One score as a finite float."""
        sample = f"prompt {prompts[index][:200]!r}, completion {completions[index][:200]!r}"
        try:
            value = float(score)  # type: ignore[arg-type]
        except (TypeError, ValueError) as error:
            raise DataError(
                f"reward function {self.name}: expected a number for response {index}, got "
                f"{score!r}; {sample}"
            ) from error
        if not abs(value) < float("inf"):
            raise NumericsError(
                f"reward function {self.name}: expected a finite score for response {index}, got "
                f"{value}; {sample}"
            )
        return value


def decode_response(rollout: Rollout, index: int, decoder: TextDecoder) -> str:
    """Text of one response, without the end-of-text token."""
    token_ids = rollout.response(index)
    if token_ids and token_ids[-1] in decoder.eos_token_ids:
        token_ids.pop()
    return decoder.decode(token_ids)


def decode_continuation(
    rollout: Rollout, index: int, encoder: "TextEncoder", prompt: Prompt
) -> str:
    """Text of one response as a data file holds it: read again, it continues its prompt.

    Decoders in the style of SentencePiece drop the space that begins a text. Without it the reward
    model would read ` She` glued to the prompt, in other tokens than the policy writes. And some
    chat templates write that space themselves.

    Args:
        rollout: Responses with their prompts.
        index: Which response.
        encoder: Decodes them, and encodes the text that is returned.
        prompt: What the response answers.
    """
    begin = int(rollout.prompt_lens[index])
    prompt_ids, response_ids = rollout.sequence(index)[:begin], rollout.response(index)
    if response_ids and response_ids[-1] in encoder.eos_token_ids:
        response_ids.pop()
    before, whole = encoder.decode(prompt_ids), encoder.decode(prompt_ids + response_ids)
    alone = encoder.decode(response_ids)
    if not whole.startswith(before):  # a character whose bytes begin in the prompt
        return alone
    text = whole[len(before):]
    form = prompt.row.get("prompt", prompt.row.get("messages", prompt.text))
    for candidate in dict.fromkeys((alone, text, text.removeprefix(" "))):
        again = encoder.encode_completion(candidate, end=False, prompt=form)
        if encoder.decode(prompt_ids + again) == whole:
            return candidate
    return text


def adjust_scores(
    scores: Tensor,
    finish_reasons: Sequence[str],
    *,
    clip: float | None = None,
    missing_eos_penalty: float | None = None,
) -> Tensor:
    """Scores as PPO uses them: clipped, then replaced where a response did not stop.

    Args:
        scores: [B] float.
        finish_reasons: B words; everything but "stop" counts as not stopped.
        clip: Bound on both sides; None: not clipped.
        missing_eos_penalty: Score of a response that did not stop, itself not clipped; None: its
            score stays.
    Returns:
        adjusted: [B] float.
    Raises:
        ShapeError: when there is not one reason per score.
    Source: Ziegler et al. 2019 (arXiv 1909.08593), section 3.1.1, for the penalty.
    """
    if scores.shape != (len(finish_reasons),):
        raise ShapeError(
            f"adjust_scores: expected scores of shape ({len(finish_reasons)},), one per finish "
            f"reason, got {tuple(scores.shape)}"
        )
    adjusted = scores if clip is None else scores.clamp(-clip, clip)
    if missing_eos_penalty is None:
        return adjusted
    stopped = torch.tensor([r == "stop" for r in finish_reasons], device=scores.device)
    return torch.where(stopped, adjusted, torch.full_like(adjusted, missing_eos_penalty))

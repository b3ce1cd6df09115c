"""One score per response, from a reward model or from a function.

A scorer is anything that can be called as `scorer(rollout) -> [B] float32`.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from fastrl.errors import ConfigError, NumericsError, RewardError, ShapeError
from fastrl.models.causal_lm import ScalarModel
from fastrl.models.scoring import response_scores
from fastrl.out_of_memory import PassBudget
from fastrl.types import Prompt, Rollout

if TYPE_CHECKING:
    from fastrl.data import TextEncoder


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
        max_tokens: Token budget of one forward pass; never changes the result. Less from then on
            where memory ended in one.
        share_prefix: Encode the prompt of several responses once.
    """

    def __init__(
        self, model: ScalarModel, max_tokens: int = 8192, *, share_prefix: bool = True
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.passes, self.share_prefix = PassBudget(max_tokens), share_prefix

    def __call__(self, rollout: Rollout) -> Tensor:
        """Score [B] float32 of every response."""
        return response_scores(self.model, rollout, self.passes,
                               share_prefix=self.share_prefix).float()


class FunctionScorer:
    """Scores responses with a Python function of texts.

    The function gets the prompts and the completions as lists of strings, and every field of the
    prompts' rows that it names, as `fn(prompts, completions, answer)` names `answer`; one that
    takes `**columns` gets all of them. A column is a list with one value per completion, None where
    a row has no such field. A completion is the decoded response without its end-of-text token; a
    prompt is its `Prompt.text` where the prompt is one of `prompts`, else the decoded tokens.

    Args:
        fn: `fn(prompts, completions, **columns) -> scores`, one finite number per completion.
        encoder: Decodes tokens.
        prompts: Prompts whose `text` and fields the function should see.
        timeout_s: Seconds that a call may take; None: as long as it likes. The call that is given
            up goes on in a thread of its own until the process ends.
    Raises:
        ConfigError: when `fn` cannot be called, or the timeout is not above 0.
    """

    def __init__(
        self, fn: Callable[..., Sequence[float]], encoder: TextDecoder,
        prompts: Iterable[Prompt] = (), *, timeout_s: float | None = None,
    ) -> None:
        if timeout_s is not None and timeout_s <= 0:
            raise ConfigError(f"timeout_s: expected seconds above 0, or None, got {timeout_s}")
        if not callable(fn):
            raise ConfigError(f"fn: expected a function of prompts and completions, got {fn!r}")
        self.fn, self.encoder, self.timeout_s = fn, encoder, timeout_s
        self.name = getattr(fn, "__name__", type(fn).__name__)
        self._prompts = {prompt.token_ids: prompt for prompt in prompts}
        self._parameters = _parameters(fn)

    def __call__(self, rollout: Rollout) -> Tensor:
        """Score [B] float32 of every response.

        Raises:
            RewardError: when the function raises, takes too long, or returns another number of
                scores or not numbers; names the function and, where it can be known, the response.
            NumericsError: when a score is not finite.
        """
        batch = self._texts(rollout)
        try:
            scores = self._call(batch)
        except Exception as error:
            raise self._explained(error, batch) from error
        is_list = isinstance(scores, Sequence | Tensor | np.ndarray) \
            and not isinstance(scores, str | bytes)
        if not is_list or len(scores) != len(batch):
            size = f"{len(scores)}" if is_list else f"{type(scores).__name__} {scores!r:.200}"
            raise RewardError(
                f"reward function {self.name}: expected {len(batch)} scores, one per completion, "
                f"got {size}; return a list as long as its arguments")
        values = [self._number(score, sample) for score, sample in zip(scores, batch, strict=True)]
        return torch.tensor(values, dtype=torch.float32, device=rollout.response_mask.device)

    def _texts(self, rollout: Rollout) -> "list[_Sample]":
        """What the function sees of each response."""
        samples = []
        for index in range(rollout.batch_size):
            prompt_ids = rollout.sequence(index)[: int(rollout.prompt_lens[index])]
            prompt = self._prompts.get(tuple(prompt_ids))
            if prompt is None:
                prompt = Prompt(tuple(prompt_ids), self.encoder.decode(prompt_ids))
            samples.append(_Sample(index, prompt.text, decode_response(rollout, index,
                                                                       self.encoder), prompt.row))
        return samples

    def _columns(self, batch: "Sequence[_Sample]") -> dict[str, list[Any]]:
        """The fields of the rows that the function asks for, by name."""
        parameters = self._parameters
        named = {p.name for p in parameters[2:] if p.kind in (p.POSITIONAL_OR_KEYWORD,
                                                              p.KEYWORD_ONLY)}
        takes_all = any(p.kind == p.VAR_KEYWORD for p in parameters)
        present = dict.fromkeys(name for sample in batch for name in sample.row)
        taken = {p.name for p in parameters[:2]}
        return {name: [sample.row.get(name) for sample in batch] for name in present
                if name in named or (takes_all and name not in taken)}

    def _call(self, batch: "Sequence[_Sample]") -> Sequence[float]:
        """The function's scores of some responses; in a thread where it has a time limit."""
        call = partial(self.fn, [sample.prompt for sample in batch],
                       [sample.completion for sample in batch], **self._columns(batch))
        if self.timeout_s is None:
            return call()
        answers: SimpleQueue[tuple[Any, Exception | None]] = SimpleQueue()

        def work() -> None:
            try:
                answers.put((call(), None))
            except Exception as error:
                answers.put((None, error))

        Thread(target=work, daemon=True, name=f"reward-{self.name}").start()
        try:
            scores, error = answers.get(timeout=self.timeout_s)
        except Empty:
            raise TimeoutError(f"no answer within {self.timeout_s:g} s") from None
        if error is not None:
            raise error
        return cast(Sequence[float], scores)

    def _explained(self, error: Exception, batch: "Sequence[_Sample]") -> RewardError:
        """The error that stops a run: it names the function, and the response if one alone fails.

        Each response is tried alone, up to the first that fails; a function that takes too long is
        not tried again.
        """
        culprit = None
        if not isinstance(error, TimeoutError):
            culprit = next((sample for sample in batch if self._error_of(sample)), None)
        where = f"{len(batch)} responses together; the first: {batch[0]}" if culprit is None \
            else f"response {culprit.index}: {culprit}"
        advice = "raise timeout_s, or make it faster" if isinstance(error, TimeoutError) \
            else "correct the function, or drop the row"
        return RewardError(f"reward function {self.name}: expected scores, got "
                           f"{type(error).__name__}: {error}, from {where}; {advice}")

    def _error_of(self, sample: "_Sample") -> Exception | None:
        """What the function raises for one response alone."""
        try:
            self._call([sample])
        except Exception as error:
            return error
        return None

    def _number(self, score: object, sample: "_Sample") -> float:
        """One score as a finite float."""
        try:
            value = float(score)  # type: ignore[arg-type]
        except (TypeError, ValueError) as error:
            raise RewardError(
                f"reward function {self.name}: expected a number for response {sample.index}, got "
                f"{score!r}; {sample}") from error
        if not abs(value) <= torch.finfo(torch.float32).max:
            raise NumericsError(
                f"reward function {self.name}: expected a finite score for response "
                f"{sample.index}, got {value}; {sample}")
        return value


def _parameters(fn: Callable[..., Any]) -> list[inspect.Parameter]:
    """Of a function; empty where it is not written in Python and does not say."""
    try:
        return list(inspect.signature(fn).parameters.values())
    except ValueError:
        return []


@dataclass(frozen=True, slots=True)
class _Sample:
    """A response as a reward function sees it."""

    index: int
    prompt: str
    completion: str
    row: Mapping[str, Any]

    def __str__(self) -> str:
        return f"prompt {self.prompt[:200]!r}, completion {self.completion[:200]!r}"


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

"""Scores from a Python function of texts."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from fastrl.errors import ConfigError, DataError, RewardError
from fastrl.rewards.texts import TextDecoder, decode_response
from fastrl.types import Prompt, Rollout


class FunctionScorer:
    """Scores responses with a Python function of texts.

    The function gets the prompts and the completions as lists of strings, and every field of the
    prompts' rows that it names, as `fn(prompts, completions, answer)` names `answer`; one that
    takes `**columns` gets all of them. A column is a list with one value per completion, None where
    a row has no such field. A completion is the decoded response without its end-of-text token; a
    prompt is its `Prompt.text` where the prompt is one of `prompts`, else the decoded tokens.
    Arguments go by keyword to a function that names `completions`, so that `fn(completions,
    **columns)` works too; else the first two are the prompts and the completions.

    Differs from TRL: in conversations, too, prompts and completions are texts.

    Args:
        fn: `fn(prompts, completions, **columns) -> scores`, one finite number per completion.
        encoder: Decodes tokens.
        prompts: Prompts whose `text` and fields the function should see.
        timeout_s: Seconds that a call may take; None: as long as it likes. The call that is given
            up goes on in a thread of its own until the process ends.
    Raises:
        ConfigError: when `fn` cannot be called with prompts and completions, or the timeout is not
            above 0.
        RewardError: when the function names a column that no row of `prompts` has.
        DataError: when equal prompts differ in a column that it names: no one could tell which
            row a response belongs to.
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
        self._signature = _Signature.of(fn, self.name)
        self._prompts: dict[tuple[int, ...], Prompt] = {}
        self._columns: dict[str, None] = {}
        for prompt in prompts:
            self._columns.update(dict.fromkeys(prompt.row))
            self._add(prompt)
        if self._prompts:
            self._check_columns()

    def __call__(self, rollout: Rollout) -> Tensor:
        """Score [B] float32 of every response.

        Raises:
            RewardError: when the function raises, takes too long, or returns another number of
                scores or not finite numbers; names the function and, where it can be known, the
                response.
        """
        batch = self._texts(rollout)
        self._check_columns()
        try:
            scores = self._call(batch)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # sys.exit would end the run in silence
            raise self._explained(error, batch) from error
        # A tensor or array without a dimension is one number, and has no length.
        is_list = isinstance(scores, Sequence | Tensor | np.ndarray) \
            and not isinstance(scores, str | bytes) and getattr(scores, "ndim", 1) > 0
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

    def _add(self, prompt: Prompt) -> None:
        """Take a prompt that is not there yet, or an equal one."""
        other = self._prompts.setdefault(prompt.token_ids, prompt)
        for name in self._signature.columns:
            if other.row.get(name) != prompt.row.get(name):
                raise DataError(
                    f"reward function {self.name}: expected equal prompts to have equal values of "
                    f"{name!r}, got {other.row.get(name)!r:.80} and {prompt.row.get(name)!r:.80} "
                    f"for {prompt.text[:80]!r}; drop one of the rows")

    def _check_columns(self) -> None:
        """Raise RewardError when the function needs a column that no row has."""
        for name in self._signature.required:
            if name not in self._columns:
                raise RewardError(
                    f"reward function {self.name}: expected a column {name!r} in the prompts' rows,"
                    f" because the function names it, got rows with "
                    f"{', '.join(map(repr, self._columns)) or 'no columns'}; add it to the rows, "
                    f"or give the parameter a default")

    def _arguments(self, batch: "Sequence[_Sample]") -> tuple[list[list[str]], dict[str, Any]]:
        """What the function is called with for some responses: by position, and by keyword."""
        signature = self._signature
        columns: dict[str, Any] = {
            name: [sample.row.get(name) for sample in batch] for name in self._columns
            if name in signature.columns or (signature.takes_all and name not in signature.texts)}
        texts = [[sample.prompt for sample in batch], [sample.completion for sample in batch]]
        if not signature.by_keyword:
            return texts, columns
        named = dict(zip(("prompts", "completions"), texts, strict=True))
        return [], columns | {name: named[name] for name in signature.texts}

    def _call(self, batch: "Sequence[_Sample]") -> Sequence[float]:
        """The function's scores of some responses; in a thread where it has a time limit."""
        texts, columns = self._arguments(batch)
        call = partial(self.fn, *texts, **columns)
        if self.timeout_s is None:
            return call()
        answers: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()

        def work() -> None:
            try:
                answers.put((call(), None))
            except BaseException as error:
                answers.put((None, error))

        Thread(target=work, daemon=True, name=f"reward-{self.name}").start()
        try:
            scores, error = answers.get(timeout=self.timeout_s)
        except Empty:
            raise _TooSlow(f"no answer within {self.timeout_s:g} s") from None
        if isinstance(error, KeyboardInterrupt):  # the user's own reaches the main thread only
            raise RuntimeError("KeyboardInterrupt raised in the function") from error
        if error is not None:
            raise error
        return cast(Sequence[float], scores)

    def _explained(self, error: BaseException, batch: "Sequence[_Sample]") -> RewardError:
        """The error that stops a run: it names the function, and the response if one alone fails.

        Each response is tried alone, up to the first that fails; a function that takes too long is
        not tried again.
        """
        if isinstance(error, _TooSlow):
            culprit, got, advice = None, str(error), "raise timeout_s, or make it faster"
        else:
            culprit = next((sample for sample in batch if self._error_of(sample)), None)
            got = f"{type(error).__name__}: {error}"
            advice = "correct the function, or drop the row"
        where = f"{len(batch)} responses together; the first: {batch[0]}" if culprit is None \
            else f"response {culprit.index}: {culprit}"
        return RewardError(f"reward function {self.name}: expected scores, got {got}, "
                           f"from {where}; {advice}")

    def _error_of(self, sample: "_Sample") -> BaseException | None:
        """What the function raises for one response alone."""
        try:
            self._call([sample])
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            return error
        return None

    def _number(self, score: object, sample: "_Sample") -> float:
        """One score as a finite float."""
        try:
            if isinstance(score, str | bytes):
                raise TypeError("a text is no number")
            value = float(score)  # type: ignore[arg-type]
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise RewardError(
                f"reward function {self.name}: expected a number for response {sample.index}, got "
                f"{score!r:.200}; {sample}") from error
        if not abs(value) <= torch.finfo(torch.float32).max:
            raise RewardError(
                f"reward function {self.name}: expected a finite score for response "
                f"{sample.index}, got {value}; {sample}")
        return value


class _TooSlow(Exception):
    """A call took longer than `timeout_s`; a TimeoutError of the function is its own."""


@dataclass(frozen=True, slots=True)
class _Signature:
    """How a function wants to be called."""

    by_keyword: bool
    """True for a function that names `completions`."""
    texts: tuple[str, ...]
    """Parameters that are no columns."""
    columns: tuple[str, ...]
    """Columns that it names."""
    required: tuple[str, ...]
    """Those without a default."""
    takes_all: bool
    """True for one that takes `**columns`."""

    @classmethod
    def of(cls, fn: Callable[..., Any], name: str) -> "_Signature":
        """Of a function; of one that is not written in Python and does not say: two texts."""
        try:
            signature = inspect.signature(fn)
        except ValueError:
            return cls(False, (), (), (), False)
        parameters = list(signature.parameters.values())
        named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        takes_all = any(p.kind == p.VAR_KEYWORD for p in parameters)
        texts = {"prompts", "completions"} & {p.name for p in named}
        by_keyword = "completions" in texts
        if by_keyword and takes_all:
            texts.add("prompts")
        elif not by_keyword:
            begin = [p for p in parameters[:2] if p.kind != p.KEYWORD_ONLY]
            if len(begin) < 2 and not any(p.kind == p.VAR_POSITIONAL for p in begin):
                raise ConfigError(
                    f"reward function {name}: expected parameters (prompts, completions, "
                    f"**columns), got {signature}; write it so, see docs/rewards.md")
            texts = {p.name for p in begin}
        columns = [p for p in named if p.name not in texts]
        return cls(by_keyword, tuple(sorted(texts)), tuple(p.name for p in columns),
                   tuple(p.name for p in columns if p.default is p.empty), takes_all)


@dataclass(frozen=True, slots=True)
class _Sample:
    """A response as a reward function sees it."""

    index: int
    prompt: str
    completion: str
    row: Mapping[str, Any]

    def __str__(self) -> str:
        return f"prompt {self.prompt[:200]!r}, completion {self.completion[:200]!r}"

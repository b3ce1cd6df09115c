"""Engine: prompts in, responses with log-probabilities out.

    engine = Engine(model)
    rollout = engine.generate(prompts, SamplingConfig(max_new_tokens=64), seed=0)
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch

from fastrl.checks import check_resident
from fastrl.config import EngineConfig, SamplingConfig, check
from fastrl.engine.cache import KVCache, new_cache, page_shape, pages_for
from fastrl.engine.generation import Generation
from fastrl.engine.graphs import StepGraphs, graphs_for, rung
from fastrl.engine.request import Request, new_requests
from fastrl.engine.text import Decoder
from fastrl.errors import ConfigError, DeviceMemoryError
from fastrl.exactness import (
    choose_products,
    exact_math,
    invariant_rows,
    multiplies_by_input,
    row_multiple,
    set_workspaces,
)
from fastrl.field_types import fits
from fastrl.memory.pages import tokens_per_page
from fastrl.models import CausalLM
from fastrl.out_of_memory import call_again, is_out_of_memory
from fastrl.types import Rollout

MAX_HALVINGS = 8
"""Of the pages, when there is no memory for what a call needs beside them."""
Progress = Callable[[int, int, int], None]
"""Called after every round with (tokens drawn, responses finished, responses)."""


@dataclass(frozen=True, slots=True)
class StreamedToken:
    """One token of a streamed response."""

    token_id: int
    text: str
    """Text that became complete with this token; empty in the middle of a character."""
    logprob: float
    """As `SamplingConfig.logprobs` asks for."""
    finish_reason: str | None
    """"stop" or "length" with the last token, else None; a cancelled stream ends without."""


class Engine:
    """Generates from a model with a paged KV cache and continuous batching.

    Tokens of a request depend on the model, its prompt, the sampling settings, the seed and its
    request id: not on what else is generated, in which order, with how many pages or places.

    Args:
        model: Used where it is, with the weights that it has at each call.
        config: Sizes.
        encoder: Has `decode(ids) -> str`; needed for stop strings and for the text of `stream`.
    """

    def __init__(
        self, model: CausalLM, config: EngineConfig | None = None, encoder: Decoder | None = None
    ) -> None:
        check(fits(EngineConfig | None, config), "config", "an EngineConfig or None", config)
        check_resident("engine", model.lm_head.weight)
        self.model = model
        self.config = config or EngineConfig()
        self.encoder = encoder
        self._min_rows, self._row_multiple = 1, 1
        self._by_input = multiplies_by_input(model)
        if self.config.exact:
            set_workspaces(model.lm_head.weight.device.type)
            with self._exact_math():
                choose_products(model, by_input=self._by_input)
                self._min_rows = invariant_rows(model, by_input=self._by_input)
                self._row_multiple = row_multiple(model)
        self.sharing_must_pay = True
        """False reads shared pages once however little that saves: for looking at that path."""
        self._idle_cache: KVCache | None = None
        self._active: list[Generation] = []
        self._calls: list[Generation] = []  # of `generate`, the innermost last
        self._graphs: StepGraphs | None = None
        self._max_batch_size = self.config.max_batch_size
        self._max_cache_bytes: int | None = None  # once there was no memory for more

    def generate(
        self, prompts: Sequence[Sequence[int]],
        sampling: SamplingConfig | Sequence[SamplingConfig] | None = None, *, seed: int = 0, 
        num_samples_per_prompt: int = 1, first_request_id: int = 0,
        on_progress: Progress | None = None,
    ) -> Rollout:
        """Responses to every prompt.

        Args:
            prompts: Token ids, none empty.
            sampling: How tokens are drawn, and when a response ends: for all prompts, or one for
                each. A response is the one that its settings would give alone.
            seed: Of the run, a 64-bit integer.
            num_samples_per_prompt: Responses to each prompt.
            first_request_id: Number of the first response; two calls with one seed draw
                independent tokens when their numbers do not overlap.
            on_progress: Called after every round with (tokens, finished, total); may call `cancel`.
        Returns:
            A rollout on the model's device. Row `p * num_samples_per_prompt + j` is sample j of
            prompt p. Greedy log-probs are those of the distribution at `temperature`.
        Raises:
            DataError: when a prompt is empty, too long, or anything but ids of the vocabulary.
            ConfigError: when a number is out of bounds, when stop strings have no encoder, when a
                stop token is none of the vocabulary, when there are not as many settings as
                prompts, or when one sequence cannot fit the cache.
        """
        requests = call_again(partial(
            new_requests, self.model.spec, prompts, sampling, seed=seed,
            num_samples=num_samples_per_prompt, first_request_id=first_request_id,
            shares_prompts=self.config.share_prefix, encoder=self.encoder),
            f"generate: seeds for {len(prompts)} prompts", "ask for fewer at a time")
        generation = self._begin(
            requests, one_at_a_time=any(request.text is not None for request in requests))
        self._calls.append(generation)
        try:
            with self._exact_math(), _evaluating(self.model):
                while not generation.is_finished:
                    generation.step()
                    if on_progress is not None:
                        on_progress(generation.num_tokens, generation.num_finished, len(requests))
        finally:
            self._calls.pop()
            self._end(generation)
        try:
            return generation.results.rollout(num_samples_per_prompt)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        self.release_memory()
        return call_again(partial(generation.results.rollout, num_samples_per_prompt),
                          f"generate: {len(requests)} responses", "ask for fewer at a time")

    def stream(
        self, prompt_ids: Sequence[int], sampling: SamplingConfig | None = None, *, seed: int = 0,
        request_id: int = 0,
    ) -> Iterator[StreamedToken]:
        """The tokens of one response as they are drawn; the same as `generate` would give.

        Args:
            prompt_ids: Token ids.
            sampling: How tokens are drawn, and when the response ends.
            seed, request_id: Together they determine the random numbers.
        Yields:
            Tokens; the last one has a finish reason and all text that was left, unless `cancel`
            ends the stream.
        Raises:
            DataError, ConfigError: as `generate`.
        """
        requests = call_again(partial(
            new_requests, self.model.spec, [prompt_ids], sampling, seed=seed, num_samples=1,
            first_request_id=request_id, shares_prompts=False, encoder=self.encoder,
            reads_text=True), "generate: a seed")
        return self._stream(requests[0])

    def _stream(self, request: Request) -> Iterator[StreamedToken]:
        generation = self._begin([request], one_at_a_time=True)
        try:
            while not generation.is_finished:
                count = generation.num_tokens
                with self._exact_math(), _evaluating(self.model):
                    generation.step()
                if generation.num_tokens == count:
                    continue  # a token was replayed into a new cache
                text = request.piece
                if request.finish_reason is not None and request.text is not None:
                    text += request.text.flush()
                yield StreamedToken(
                    token_id=int(generation.results.token_ids[0, count]), text=text,
                    logprob=float(generation.results.logprobs[0, count]),
                    finish_reason=request.finish_reason)
        finally:
            self._end(generation)

    def cancel(self, rows: Iterable[int] | None = None) -> None:
        """End responses now, with what they have; to be called from `on_progress`.

        Args:
            rows: Rows of the rollout that reports its progress; None ends these and all streams.
        """
        if rows is None:
            for generation in self._active:
                generation.cancel(generation.requests)
        elif self._calls:
            chosen, generation = set(rows), self._calls[-1]
            generation.cancel([r for r in generation.requests if r.index in chosen])

    @property
    def idle_cache(self) -> KVCache | None:
        """The cache of the last call, which the next one takes if it fits; with memory or, after
        `release_memory`, without. None: there is none to keep.
        """
        return self._idle_cache

    def weights_changed(self) -> None:
        """Drop every cached page: no token is drawn from keys and values of old weights.

        The idle cache gives its memory back where no captured graph would be lost by that.
        """
        if self._graphs is None or (
                self._idle_cache is not None and self._idle_cache.arena.keeps_addresses):
            self.release_memory()
        for generation in self._active:
            call_again(generation.forget, "generate: rows without pages")

    def release_memory(self) -> None:
        """Give back the memory of the cache until the next call.

        Captured graphs stay: they know the addresses of the pages, and those are kept. Where the
        device has no virtual memory, graphs go with the cache. A call that is under way keeps
        its own pages.
        """
        cache = self._idle_cache
        if cache is None:
            return
        cache.unmap()
        if not cache.arena.keeps_addresses:
            self._idle_cache = None
            if not self._active:
                self._graphs = None

    def _begin(self, requests: Sequence[Request], one_at_a_time: bool) -> Generation:
        check_resident("engine", self.model.lm_head.weight)
        for _ in range(MAX_HALVINGS):
            cache = self._take_cache(requests)
            try:
                generation = self._generation(cache, requests, one_at_a_time)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
            else:
                self._active.append(generation)
                return generation
            self._max_cache_bytes = cache.num_pages // 2 * cache.page_bytes
            cache.arena.close()
        raise DeviceMemoryError(
            f"generate: expected memory for {len(requests)} responses beside the pages, got none; "
            "ask for fewer at a time, lower max_new_tokens, or free memory on the device")

    def _generation(
        self, cache: KVCache, requests: Sequence[Request], one_at_a_time: bool
    ) -> Generation:
        graphs = None
        if all(active.graphs is None for active in self._active):  # their tensors are for one call
            with self._exact_math():
                graphs = self._graphs = graphs_for(self.model, self.config, cache, self._graphs)
        return Generation(
            self.model, replace(self.config, max_batch_size=self._max_batch_size), cache, requests,
            tuple(self.model.spec.eos_token_ids), row_count=self._row_count,
            batch_rows=self._batch_rows, graphs=graphs, one_at_a_time=one_at_a_time,
            by_input=self._by_input, sharing_must_pay=self.sharing_must_pay)

    def _exact_math(self) -> AbstractContextManager[None]:
        """The settings of exact mode, where it is on."""
        return exact_math(self.model.lm_head.weight.device.type, is_exact=self.config.exact)

    def _row_count(self, num_rows: int) -> int:
        """Rows of a forward pass that has `num_rows` real ones."""
        return -(-max(num_rows, self._min_rows) // self._row_multiple) * self._row_multiple

    def _batch_rows(self, num_rows: int) -> int:
        """Rows of a decode batch that has `num_rows` real ones."""
        if self.model.lm_head.weight.device.type == "cpu":
            return self._row_count(num_rows)
        most = self.config.max_batch_size
        return rung(min(max(num_rows, self._min_rows), most), most)

    def _end(self, generation: Generation) -> None:
        """Keep the memory of the cache for the next call."""
        self._active.remove(generation)
        generation.cancel(generation.requests)
        self._idle_cache = cache = generation.cache
        self._max_batch_size = generation.scheduler.max_batch_size
        if cache.has_shrunk:
            self._max_cache_bytes = cache.num_pages * cache.page_bytes

    def _take_cache(self, requests: Sequence[Request]) -> KVCache:
        """A cache without a page in use, large enough for what can run together."""
        weight = self.model.lm_head.weight
        page_size = tokens_per_page(self.config, weight.device.type,
                                    max(request.max_cached_tokens for request in requests))
        needed = [pages_for(request.max_cached_tokens, page_size) for request in requests]
        num_pages = self.config.num_pages
        if num_pages is None:
            # One prompt may be kept for samples that wait, beside those that run.
            num_pages = sum(sorted(needed, reverse=True)[: self.config.max_batch_size + 1])
        elif max(needed) > num_pages:
            row = needed.index(max(needed))
            raise ConfigError(
                f"num_pages: response {row} may need {needed[row]} pages of {page_size} tokens "
                f"(prompt {len(requests[row].prompt.token_ids)}, up to "
                f"{requests[row].max_tokens} new), got {num_pages}; raise num_pages or lower "
                f"max_new_tokens")
        page_bytes = math.prod(page_shape(self.model.spec, page_size)) * weight.dtype.itemsize
        if self._max_cache_bytes is not None:
            num_pages = max(max(needed), min(num_pages, self._max_cache_bytes // page_bytes))
        idle, self._idle_cache = self._idle_cache, None
        if idle is not None and idle.kv_pages.dtype == weight.dtype \
                and idle.kv_pages.device == weight.device \
                and (idle.page_size == page_size or self.config.page_size is None
                     and idle.page_size > page_size) \
                and (idle.num_pages == num_pages
                     or self.config.num_pages is None and idle.num_pages > num_pages) \
                and _has_memory(idle):
            return idle
        if idle is not None:
            idle.arena.close()
            del idle
        cache = new_cache(self.model.spec, num_pages, max(needed), page_size, weight.dtype,
                          weight.device)
        if cache.num_pages < num_pages:
            self._max_cache_bytes = cache.num_pages * page_bytes
        return cache


def _has_memory(cache: KVCache) -> bool:
    """True once an idle cache has memory again; False where there is none for it."""
    try:
        cache.map()
    except torch.OutOfMemoryError:
        return False
    return True


@contextmanager
def _evaluating(model: CausalLM) -> Iterator[None]:
    """Eval mode and no gradients inside; every module's own mode afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True

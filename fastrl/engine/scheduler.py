"""Who runs, who waits, and who holds which page. Host side only: no tensor is touched here."""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from fastrl.config import EngineConfig
from fastrl.engine.cache import KVCache, pages_for
from fastrl.engine.request import Request, SharedPrompt
from fastrl.memory.pages import max_prefill_tokens


@dataclass(slots=True)
class Admission:
    """What enters at one step."""

    started: list[Request] = field(default_factory=list)
    """Requests that start, their pages assigned."""
    prompts: list[SharedPrompt] = field(default_factory=list)
    """Prompts to compute first, each with its pages."""
    prompt_pages: list[list[int]] = field(default_factory=list)
    """The pages of each of them: by now the prompt itself may have given them away."""
    copies: list[tuple[int, int]] = field(default_factory=list)
    """Pages to copy once the prompts are computed: (source, target)."""


def starting_order(requests: Sequence[Request], order: str) -> Sequence[Request]:
    """Requests in the order in which they start, by `EngineConfig.order`."""
    if order == "given":
        return requests
    return sorted(requests, key=lambda request: -request.max_tokens)  # stable: samples together


class Scheduler:
    """Starts waiting requests while pages last, and takes pages from the youngest when they end.

    Nothing overtakes: those that run are always the first of those that have not ended, and the
    first of all is never preempted, so it gets a token at every decode step. Hence request k starts
    at decode step sum over i < k of (max_tokens_i - 1 + late) at the latest, however few pages
    there are; late are the steps until the end of a response is noticed (0 where every step is
    looked at).

    Args:
        requests: In the order in which they start. Samples that share a prompt share the object.
        cache: Where pages come from.
        config: Batch size and prefill budget.
    """

    def __init__(self, requests: Sequence[Request], cache: KVCache, config: EngineConfig) -> None:
        self.waiting = deque(requests)
        for place, request in enumerate(requests):
            request.place = place
        self.running: list[Request] = []
        """Oldest first; the order of the decode batch."""
        self.max_batch_size = config.max_batch_size
        """Requests that run at a time."""
        self.max_prefill_tokens = max_prefill_tokens(config, cache.kv_pages.device.type)
        """Prompt tokens that start together; a longer prompt starts alone."""
        self._cache = cache
        self._computed: list[SharedPrompt] = []
        self._growth = 0  # pages that running requests may still ask for
        # Requests by the remainder of the decode steps at which they need a page, oldest first.
        self._boundaries: list[dict[Request, None]] = [{} for _ in range(cache.page_size)]

    def admit(self, step: int) -> Admission:
        """Start what fits; `step` is the decode step that follows."""
        admission, num_tokens = Admission(), 0
        while self.waiting and len(self.running) < self.max_batch_size:
            request = self.waiting[0]
            to_compute = 0 if request.prompt.pages else len(request.prompt.token_ids)
            if num_tokens and num_tokens + to_compute > self.max_prefill_tokens:
                break
            if not self._fits(request):
                if self.running or not self._drop_prompts():
                    break
                continue
            self.waiting.popleft()
            self._start(request, admission, step)
            num_tokens += to_compute
        return admission

    def _fits(self, request: Request) -> bool:
        """True when its pages are free, and what those that run may ask for in one step."""
        page_size = self._cache.page_size
        prompt_pages = pages_for(len(request.prompt.token_ids), page_size)
        needed = pages_for(request.tokens_to_start, page_size)
        if request.prompt.pages:
            needed -= prompt_pages
        reserve = min(self._growth, pages_for(len(self.running), page_size))
        return self._cache.num_free >= needed + reserve

    def _start(self, request: Request, admission: Admission, step: int) -> None:
        prompt, cache = request.prompt, self._cache
        num_tokens = len(prompt.token_ids)
        if not prompt.pages:
            prompt.pages = cache.allocate(pages_for(num_tokens, cache.page_size))
            admission.prompts.append(prompt)
            admission.prompt_pages.append(prompt.pages)
            self._computed.append(prompt)
        prompt.num_waiting -= 1
        num_full = num_tokens // cache.page_size
        partial = prompt.pages[num_full:]
        if prompt.num_waiting and cache.num_free >= len(partial):
            copy = cache.allocate(len(partial))
            admission.copies.extend(zip(partial, copy, strict=True))
            cache.retain(prompt.pages[:num_full])
            request.pages = prompt.pages[:num_full] + copy
        else:  # the last sample, or the last page: it takes the prompt's own pages
            request.pages, prompt.pages = prompt.pages, []
            self._computed.remove(prompt)
        self._growth += self._missing(request)
        request.row, request.started = len(self.running), step
        self.running.append(request)
        request.boundary = (step - num_tokens) % cache.page_size
        self._boundaries[request.boundary][request] = None
        admission.started.append(request)

    def _growing(self, step: int) -> list[Request]:
        """Those that fill their last page at decode step `step`, unless they have ended by then."""
        return [request for request in self._boundaries[step % self._cache.page_size]
                if step - request.started + 1 < request.max_tokens]

    def steps_ahead(self, step: int, num_steps: int) -> int:
        """Decode steps from `step` on, `num_steps` at most, that free pages last for."""
        num_free = self._cache.num_free
        for ahead in range(num_steps):
            num_free -= len(self._growing(step + ahead))
            if num_free < 0:
                return ahead
        return num_steps

    def grow(self, step: int, num_steps: int = 1) -> list[tuple[int, int, int]]:
        """Give pages to those that fill their last one in `num_steps` decode steps from `step` on.

        Preempts the youngest while none is free; they leave `running` and wait at the front. Then
        `num_steps` must be 1.
        Returns:
            (row of the decode batch, column of its page table, page).
        """
        grown = []
        for ahead in range(num_steps):
            for request in self._growing(step + ahead):
                while request.row >= 0 and not self._cache.num_free:
                    if not self._drop_prompts():
                        assert len(self.running) > 1, "a single request must fit"
                        self._preempt(self.running[-1], step)
                if request.row >= 0:
                    request.pages += self._cache.allocate(1)
                    self._growth -= 1
                    grown.append((request.row, len(request.pages) - 1, request.pages[-1]))
        return grown

    def _preempt(self, request: Request, step: int) -> None:
        """Take its pages; it starts again when there is room. Its tokens stay as they are."""
        self._requeue(request, step - request.started + 1)

    def _requeue(self, request: Request, num_recorded: int) -> None:
        request.num_recorded = max(request.num_recorded, num_recorded)
        self._stop(request)
        request.prompt.num_waiting += 1
        self.waiting.appendleft(request)

    def finish(self, requests: Iterable[Request]) -> None:
        """Take the pages of requests that are done, running or waiting."""
        for request in requests:
            if request.row >= 0:
                self._stop(request)
            else:
                self.waiting.remove(request)
                request.prompt.num_waiting -= 1
                if not request.prompt.num_waiting and request.prompt.pages:
                    self._drop(request.prompt)

    def _missing(self, request: Request) -> int:
        """Pages that it may still ask for."""
        return pages_for(request.max_cached_tokens, self._cache.page_size) - len(request.pages)

    def _stop(self, request: Request) -> None:
        self._growth -= self._missing(request)
        self._cache.release(request.pages)
        self.running.remove(request)
        del self._boundaries[request.boundary][request]
        request.pages, request.row = [], -1

    def close_gaps(self) -> list[tuple[Request, int]]:
        """Give the sequences in the highest pages the lowest free ones, while nobody waits and each
        has a single page: what a CPU reads in one call lies side by side.

        Returns:
            (request, the page that it had).
        """
        moves: list[tuple[Request, int]] = []
        if self.waiting or any(len(request.pages) != 1 for request in self.running):
            return moves
        for request in sorted(self.running, key=lambda request: -request.pages[0]):
            if self._cache.lowest_free > request.pages[0]:
                break
            moves.append((request, request.pages[0]))
            self._cache.release(request.pages)
            request.pages = self._cache.allocate(1)
        return moves

    def number_rows(self) -> None:
        """Renumber the rows of running requests after some have left."""
        for row, request in enumerate(self.running):
            request.row = row

    def forget(self, step: int) -> None:
        """Preempt everything and drop every computed prompt: the weights have changed."""
        for request in reversed(list(self.running)):
            self._preempt(request, step)
        self._drop_prompts()

    def restart(self) -> None:
        """Preempt everything after a step that did not end: tokens that the host has seen stay."""
        for request in reversed(list(self.running)):
            self._requeue(request, request.num_tokens)
        self._drop_prompts()

    def _drop_prompts(self) -> bool:
        """Free the pages kept for samples that wait; False when there are none."""
        prompts = list(self._computed)
        for prompt in prompts:
            self._drop(prompt)
        return bool(prompts)

    def _drop(self, prompt: SharedPrompt) -> None:
        self._computed.remove(prompt)
        self._cache.release(prompt.pages)
        prompt.pages = []

    def check(self) -> None:
        """Assert that every page is accounted for."""
        self._cache.check([request.pages for request in self.running]
                          + [prompt.pages for prompt in self._computed])
        assert all(not request.pages for request in self.waiting)
        unfinished = [request.place for request in (*self.running, *self.waiting)]
        assert unfinished == sorted(unfinished), "a request has overtaken another"
        assert self._growth == sum(map(self._missing, self.running)) >= 0

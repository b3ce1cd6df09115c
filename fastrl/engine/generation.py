"""One call of the engine: prompts are computed, tokens drawn, finished sequences leave.

Shape letters: R rows of the decode batch.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from fastrl.config import EngineConfig
from fastrl.dense_attention import size_bucket
from fastrl.engine.batch import DecodeBatch, RecentTokens, pad_rows, send, upload
from fastrl.engine.cache import KVCache, pages_for
from fastrl.engine.flags import Flags
from fastrl.engine.graphs import StepGraphs
from fastrl.engine.prefill import compute_prompts
from fastrl.engine.prefixes import prefix_groups
from fastrl.engine.request import Request, SharedPrompt
from fastrl.engine.results import Results
from fastrl.engine.scheduler import Admission, Scheduler, starting_order
from fastrl.engine.settings import Settings
from fastrl.engine.step import DeviceStep
from fastrl.engine.text import TextPieces
from fastrl.errors import DeviceMemoryError
from fastrl.models import CausalLM
from fastrl.models.by_input import WeightsByInput, matrices
from fastrl.out_of_memory import is_out_of_memory

logger = logging.getLogger("fastrl")

STEPS_PER_ROUND = {"cpu": 1, "cuda": 8}
"""Decode steps of a round where the config names no number."""
ROUNDS_BEHIND = {"cpu": 0, "cuda": 1}
"""Rounds that are queued before the flags of one are read: a GPU has the next while we look."""


class Generation:
    """The state of one call: requests, their pages, the decode batch and the results.

    Args:
        model: In eval mode, gradients off, whenever `step` is called.
        config: Batch size, prefill budget, steps of a round.
        cache: Pages, all free; they are free again at the end.
        requests: `index` counts from 0.
        stop_token_ids: Tokens that end a response whose settings name none.
        row_count: Rows that a pass over n prompt tokens is padded to.
        batch_rows: Rows that a batch of n sequences is padded to.
        graphs: Captured steps; None runs every step eagerly.
        one_at_a_time: Every token is looked at before the next is drawn.
        by_input: Multiply with copies of the matrices stored by input.
        sharing_must_pay: Pages that sequences share are read once only where that saves time.
    """

    def __init__(
        self, model: CausalLM, config: EngineConfig, cache: KVCache, requests: Sequence[Request],
        stop_token_ids: Sequence[int], *, row_count: Callable[[int], int],
        batch_rows: Callable[[int], int], graphs: StepGraphs | None, one_at_a_time: bool,
        by_input: bool, sharing_must_pay: bool = True,
    ) -> None:
        self.requests = requests
        self.scheduler = Scheduler(starting_order(requests, config.order), cache, config)
        self.num_tokens = 0
        """Tokens drawn and seen by the host so far, all responses together."""
        self.num_finished = 0
        self.cache = cache
        self.graphs = graphs
        self._model, self._is_exact = model, config.exact
        self._weights = WeightsByInput(matrices(model) if by_input else ())
        self._device = cache.kv_pages.device
        self._row_count, self._batch_rows = row_count, batch_rows
        self._sharing_must_pay = sharing_must_pay
        self._step = 0
        self._replay_until = 0
        self._max_pages = max(pages_for(r.max_cached_tokens, cache.page_size) for r in requests)
        if graphs is not None:  # which calls of about one length share
            self._max_pages = size_bucket(self._max_pages)
        self.results = Results(requests, self._device)
        self._device_step = DeviceStep(model, cache, is_exact=config.exact)
        kind = self._device.type
        self._steps_per_round = 1 if one_at_a_time else (
            config.sync_every or STEPS_PER_ROUND.get(kind, STEPS_PER_ROUND["cuda"]))
        self._rounds_behind = 0 if one_at_a_time else ROUNDS_BEHIND.get(kind, 0)
        self._unread: deque[Flags] = deque()
        self._settings = Settings.of(requests, stop_token_ids, self._device)
        self._batch = self._new_rows([])
        self._row_settings = self._settings
        self._recent = RecentTokens.empty(0, 0, self._device)

    @property
    def is_finished(self) -> bool:
        """True when every response has ended."""
        return self.num_finished == len(self.requests)

    def step(self) -> None:
        """Start waiting requests, or else a round: a few tokens for each running one.

        Where an allocation fails, all sequences start again from the tokens that they have, half as
        many at a time.

        Raises:
            DeviceMemoryError: when there is no memory even for one.
        """
        num_failures = 0
        while True:
            try:
                if num_failures:
                    self._restart()
                if not self.is_finished:
                    self._advance()
                return
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                num_failures += 1
                if self.scheduler.max_batch_size == 1 and num_failures > 1:
                    raise DeviceMemoryError(
                        "generate: expected memory for at least one sequence at a time, got none "
                        f"beside {self.cache.num_pages} pages of {self.cache.page_size} tokens; "
                        "lower num_pages, max_new_tokens or the length of prompts, or free memory "
                        "on the device") from error
            scheduler = self.scheduler
            scheduler.max_batch_size = max(1, min(
                scheduler.max_batch_size, len(scheduler.running)) // 2)
            scheduler.max_prefill_tokens = max(1, scheduler.max_prefill_tokens // 2)

    def _restart(self) -> None:
        """Begin again after a step that did not end, with fewer pages: the same responses."""
        while self._unread:
            self._read(self._unread.popleft())
        self.scheduler.restart()
        if self.graphs is None or self.cache.arena.keeps_addresses:
            least = max(pages_for(r.max_cached_tokens, self.cache.page_size) for r in self.requests)
            self.cache.shrink(max(least, self.cache.num_pages // 2))
        self._batch = self._new_rows([])
        logger.warning("generate: no memory for a pass; going on with at most %d sequences at a "
                       "time and %d pages, responses are the same", self.scheduler.max_batch_size,
                       self.cache.num_pages)

    def _advance(self) -> None:
        """One step that may fail."""
        self._compact()
        admission = self.scheduler.admit(self._step)
        with self._weights.in_use():
            if admission.started:
                self._start(admission)
            else:
                self._decode()
        while len(self._unread) > self._rounds_behind:
            self._read(self._unread.popleft())
        self._compact()

    def cancel(self, requests: Iterable[Request]) -> None:
        """End requests that have not ended; what they have stays."""
        while self._unread:
            self._read(self._unread.popleft())
        ending = [request for request in requests if request.finish_reason is None]
        for request in ending:
            self._end(request, request.num_tokens, "cancelled")
        self.scheduler.finish(ending)  # the next step drops their rows, where it may run out

    def forget(self) -> None:
        """Drop what comes from old weights; sequences go on from the tokens that they have."""
        self._weights = self._weights.renewed()
        self._read_all()
        no_rows = self._new_rows([])  # all memory first
        self.scheduler.forget(self._step)
        self._batch = no_rows

    def _start(self, admission: Admission) -> None:
        """Compute new prompts, then draw the first token of every request that starts."""
        if admission.prompts:
            self._compute_prompts(admission.prompts, admission.prompt_pages)
        sources, targets = zip(*admission.copies, strict=True) if admission.copies else ((), ())
        self.cache.copy(sources, targets)
        rows = self._new_rows(admission.started)
        rows = rows.pad(self._batch_rows(rows.size), len(self.requests))
        hidden = torch.stack([_last_hidden(request.prompt) for request in admission.started])
        for request in admission.started:
            self._replay_until = max(self._replay_until, request.started + request.num_recorded)
        recent = RecentTokens.empty(len(rows.index), 1, self._device)
        replays = self._step < self._replay_until
        begun = self.results.begin_round(rows, recent, replays=replays)
        self._device_step.draw(pad_rows(hidden, len(rows.index)), rows,
                               self._settings.select(rows.index), recent, replays=replays)
        self.results.record(rows, recent, begun)
        self._unread.append(Flags(rows, admission.started))
        self._arrange(self._batch.join(rows))

    def _compute_prompts(
        self, prompts: Sequence[SharedPrompt], pages: Sequence[Sequence[int]]
    ) -> None:
        """Put the keys and values of new prompts into `pages`, and keep their hidden states."""
        hidden = compute_prompts(self._model, self.cache, [p.token_ids for p in prompts], pages,
                                 self._row_count, is_exact=self._is_exact)
        for prompt, row in zip(prompts, hidden.unbind(), strict=True):
            prompt.hidden = row

    def _new_rows(self, requests: Sequence[Request]) -> DecodeBatch:
        """Rows of requests whose prompts are in the cache and that have no token yet."""
        def column(values: Iterable[int]) -> Tensor:
            return upload(list(values), self._device)

        table = torch.zeros(len(requests), self._max_pages, dtype=torch.int64)
        needs_seen = self._settings.has_penalty
        vocab_size = self._model.spec.vocab_size if needs_seen else 0
        seen = torch.zeros(len(requests), vocab_size, dtype=torch.bool)
        for row, request in enumerate(requests):
            table[row, : len(request.pages)] = torch.tensor(request.pages)
            if needs_seen:
                seen[row, torch.tensor(request.prompt.token_ids)] = True
        zeros = column([0] * len(requests))
        return DecodeBatch(
            size=len(requests), has_groups=False, index=column(r.index for r in requests),
            alive=zeros + 1, stopped=zeros.clone(),
            seeds=column(r.seed for r in requests), token_ids=zeros.clone(),
            kv_lens=column(len(r.prompt.token_ids) for r in requests),
            num_generated=zeros.clone(), max_tokens=column(r.max_tokens for r in requests),
            num_recorded=column(r.num_recorded for r in requests),
            page_table=send(table, self._device), seen=send(seen, self._device),
            shared_lens=zeros.clone(), groups=zeros[:, None].repeat(1, 2),
        )

    def _decode(self) -> None:
        """A round: as many steps as it may have without the host, and their tokens recorded."""
        running = self.scheduler.running
        # Beyond the first number nobody is alive, beyond the second pages are missing.
        num_steps = min(self._steps_per_round, max(
            r.max_tokens + r.started - self._step - 1 for r in running))
        num_steps = self.scheduler.steps_ahead(self._step, num_steps)
        if num_steps < 1 and self._unread:
            self._read_all()  # some may have ended, and nobody who has may be preempted
            return
        num_steps = max(num_steps, 1)
        grown = self.scheduler.grow(self._step, num_steps)
        if grown:
            rows, columns, pages = upload(grown, self._device).unbind(1)
            self._batch.page_table[rows, columns] = pages
        self._compact()
        batch = self._batch
        most = self._max_pages * self.cache.page_size
        max_kv_len = self._step + num_steps + max(
            len(r.prompt.token_ids) - r.started for r in running)
        replays = self._step < self._replay_until
        begun = self.results.begin_round(batch, self._recent, replays=replays)
        step = self._device_step
        for _ in range(num_steps):
            if self.graphs is None:
                step.decode(batch, self._row_settings, self._recent,
                            max_kv_len=min(max_kv_len, most), replays=replays)
            else:
                self.graphs.run(step, batch, self._row_settings, self._recent, max_kv_len=most,
                                replays=replays)
        self._step += num_steps
        self.results.record(batch, self._recent, begun)
        self._unread.append(Flags(batch, running))

    def _compact(self) -> None:
        """Drop the rows of sequences that no longer run."""
        running = self.scheduler.running
        if len(running) < self._batch.size:
            self._arrange(self._batch.select([request.row for request in running]))
            self.scheduler.number_rows()
            if self._device.type == "cpu":
                self._close_gaps()

    def _close_gaps(self) -> None:
        """Move pages into those that sequences have left, so that the rest is read in one call."""
        moves = self.scheduler.close_gaps()
        for request, source in moves:
            num_tokens = len(request.prompt.token_ids) + self._step - request.started
            self.cache.copy_tokens(source, request.pages[0], num_tokens)
        for request, _ in moves:
            self._batch.page_table[request.row, 0] = request.pages[0]

    def _arrange(self, batch: DecodeBatch) -> None:
        """Make `batch` the decode batch: dummies after its rows, settings beside it.

        Its rows are those of `scheduler.running`.
        """
        batch = batch.pad(self._batch_rows(batch.size), len(self.requests)).with_groups(
            prefix_groups(self.scheduler.running, self.cache.page_size, self.cache.token_bytes,
                          must_pay=self._sharing_must_pay))
        settings = self._settings.select(batch.index)
        if self.graphs is None:
            self._batch, self._row_settings = batch, settings
            self._recent = RecentTokens.empty(len(batch.index), self._steps_per_round, self._device)
        else:
            self._batch, self._row_settings, self._recent = self.graphs.place(
                batch, settings, self._steps_per_round)

    def _read_all(self) -> None:
        """Know all that the device has done."""
        while self._unread:
            self._read(self._unread.popleft())
        self._compact()

    def _read(self, flags: Flags) -> None:
        """Count tokens, read text, and take finished sequences out of the batch."""
        ending = []
        for request, is_alive, has_stopped, count, token_id in flags.read():
            if request.finish_reason is not None:
                continue  # known from an earlier look
            self.num_tokens += max(0, count - request.num_tokens)
            request.num_tokens = max(count, request.num_tokens)
            if request.text is not None and _meets_stop_string(
                    request, request.text, token_id, count):
                is_alive, has_stopped = False, True
            if not is_alive:
                self._end(request, count, "stop" if has_stopped else "length")
                ending.append(request)
        self.scheduler.finish(ending)

    def _end(self, request: Request, num_tokens: int, reason: str) -> None:
        request.finish_reason = reason
        self.results.lengths[request.index] = num_tokens
        self.num_finished += 1


def _meets_stop_string(request: Request, text: TextPieces, token_id: int, count: int) -> bool:
    """Give token number `count` of a request to its text."""
    request.piece = ""
    if count <= request.num_recorded:
        return False
    request.piece = text.push(token_id)
    return text.has_stopped and count >= request.sampling.min_new_tokens


def _last_hidden(prompt: SharedPrompt) -> Tensor:
    """[D], of a prompt that has been computed."""
    assert prompt.hidden is not None
    return prompt.hidden

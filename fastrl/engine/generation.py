"""One call of the engine: prompts are computed, tokens drawn, finished sequences leave.

Shape letters: R rows of the decode batch, B responses, T longest response, N packed prompt tokens,
D width, V vocabulary.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from fastrl.config import EngineConfig
from fastrl.engine.batch import DecodeBatch, pad_rows
from fastrl.engine.cache import KVCache, pages_for
from fastrl.engine.prefill import compute_prompts
from fastrl.engine.request import Request, SharedPrompt
from fastrl.engine.scheduler import Admission, Scheduler, starting_order
from fastrl.engine.settings import Settings
from fastrl.models import CausalLM, PagedAttention
from fastrl.ops.paged_attention import PagedPlan


def project_logits(
    hidden: Tensor, weight: Tensor, *, bias: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """[R, V] logits, computed in float32 at least, of hidden [R, D] under weight [V, D].

    Args:
        out: [at least R, V], memory for the result. A CPU that takes fresh memory for so large a
            tensor in every step spends as long on that as on the product.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    out = None if out is None else out[: len(hidden)]
    logits = torch.mm(hidden.to(wide), weight.to(wide).t(), out=out)
    return logits if bias is None else logits.add_(bias)


class Generation:
    """The state of one call: requests, their pages, the decode batch and the results.

    Args:
        model: In eval mode, gradients off, whenever `step` is called.
        config: Batch size and prefill budget.
        cache: Pages, all free; they are free again at the end.
        requests: `index` counts from 0.
        stop_token_ids: Tokens that end a response whose settings name none.
        row_count: Rows that a forward pass of n rows is padded to.
    """

    def __init__(
        self, model: CausalLM, config: EngineConfig, cache: KVCache, requests: Sequence[Request],
        stop_token_ids: Sequence[int], row_count: Callable[[int], int],
    ) -> None:
        self.requests = requests
        self.scheduler = Scheduler(starting_order(requests, config.order), cache, config)
        self.num_tokens = 0
        """Tokens drawn so far, all responses together."""
        self.num_finished = 0
        self.cache = cache
        self._model = model
        self._device = cache.kv_pages.device
        self._row_count = row_count
        self._step = 0
        self._replay_until = 0
        self._max_pages = max(pages_for(r.max_cached_tokens, cache.page_size) for r in requests)
        longest = max(request.max_tokens for request in requests)
        # One row more than there are responses: dummy rows of the batch write there.
        self.token_ids = torch.zeros(len(requests) + 1, longest, dtype=torch.int64,
                                     device=self._device)
        self.logprobs = torch.zeros_like(self.token_ids, dtype=torch.float32)
        self.entropy = torch.zeros_like(self.logprobs)
        self.lengths = [0] * len(requests)
        """Tokens of each finished response."""
        self._logits = torch.empty(0)
        self._reads_text = any(request.text is not None for request in requests)
        self._settings = Settings.of(requests, stop_token_ids, self._device)
        self._row_settings, self._settings_rows = self._settings, torch.empty(0)
        self._batch = self._new_rows([])

    @property
    def is_finished(self) -> bool:
        """True when every response has ended."""
        return self.num_finished == len(self.requests)

    def step(self) -> None:
        """Start waiting requests, or else draw one token for each running one."""
        admission = self.scheduler.admit(self._step)
        if admission.started:
            self._start(admission)
        else:
            self._decode()

    def cancel(self, requests: Iterable[Request]) -> None:
        """End requests that have not ended; what they have stays."""
        ending = [request for request in requests if request.finish_reason is None]
        for request in ending:
            count = self._step - request.started + 1 if request.row >= 0 else 0
            self._end(request, max(count, request.num_recorded), "cancelled")
        self.scheduler.finish(ending)
        self._compact()

    def forget(self) -> None:
        """Drop every cached page; sequences go on from the tokens that they have."""
        self.scheduler.forget(self._step)
        self._batch = self._new_rows([])

    def _start(self, admission: Admission) -> None:
        """Compute new prompts, then draw the first token of every request that starts."""
        if admission.prompts:
            self._compute_prompts(admission.prompts, admission.prompt_pages)
        sources, targets = zip(*admission.copies, strict=True) if admission.copies else ((), ())
        self.cache.copy(sources, targets)
        rows = self._new_rows(admission.started)
        rows = rows.pad(self._row_count(rows.size), len(self.requests))
        hidden = torch.stack([_last_hidden(request.prompt) for request in admission.started])
        first_row = self._batch.size
        for request in admission.started:
            self._replay_until = max(self._replay_until, request.started + request.num_recorded)
        ended, stopped = self._draw(pad_rows(hidden, rows.index.shape[0]), rows, first_row)
        joined = self._batch.join(rows)
        self._batch = joined.pad(self._row_count(joined.size), len(self.requests))
        self._retire(ended, stopped, first_row)

    def _compute_prompts(
        self, prompts: Sequence[SharedPrompt], pages: Sequence[Sequence[int]]
    ) -> None:
        """Put the keys and values of new prompts into `pages`, and keep their hidden states."""
        hidden = compute_prompts(self._model, self.cache, [p.token_ids for p in prompts], pages,
                                 self._row_count)
        for prompt, row in zip(prompts, hidden.unbind(), strict=True):
            prompt.hidden = row

    def _new_rows(self, requests: Sequence[Request]) -> DecodeBatch:
        """Rows of requests whose prompts are in the cache and that have no token yet."""
        def column(values: Iterable[int]) -> Tensor:
            return torch.tensor(list(values), dtype=torch.int64, device=self._device)

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
            size=len(requests), index=column(r.index for r in requests), alive=zeros + 1,
            seeds=column(r.seed for r in requests), token_ids=zeros.clone(),
            kv_lens=column(len(r.prompt.token_ids) for r in requests),
            num_generated=zeros.clone(), max_tokens=column(r.max_tokens for r in requests),
            num_recorded=column(r.num_recorded for r in requests),
            page_table=table.to(self._device), seen=seen.to(self._device),
        )

    def _decode(self) -> None:
        """One pass over the newest token of every running sequence, and one token more."""
        grown = self.scheduler.grow(self._step)
        if grown:
            rows, columns, pages = torch.tensor(grown, device=self._device).unbind(1)
            self._batch.page_table[rows, columns] = pages
        self._compact()
        batch, page_size = self._batch, self.cache.page_size
        positions = batch.kv_lens.clone()
        page = batch.page_table.gather(1, (positions // page_size)[:, None]).squeeze(1)
        slots = torch.where(batch.alive > 0, page * page_size + positions % page_size, -1)
        batch.kv_lens.add_(batch.alive)
        max_kv_len = self._step + 1 + max(
            len(r.prompt.token_ids) - r.started for r in self.scheduler.running)
        attention = PagedAttention(
            self.cache.kv_pages, batch.page_table, slots,
            torch.arange(len(slots) + 1, device=self._device), batch.kv_lens, 1, max_kv_len,
            PagedPlan(slots_are_finite=True))
        hidden = self._model(batch.token_ids, positions, attention)
        self._step += 1
        ended, stopped = self._draw(hidden, batch, 0)
        self._retire(ended, stopped, 0)

    def _compact(self) -> None:
        """Drop the rows of sequences that no longer run."""
        running = self.scheduler.running
        if len(running) < self._batch.size:
            batch = self._batch.select([request.row for request in running])
            self._batch = batch.pad(self._row_count(batch.size), len(self.requests))
            self.scheduler.number_rows()

    def _draw(
        self, hidden: Tensor, batch: DecodeBatch, first_row: int
    ) -> tuple[Tensor, Tensor]:
        """Draw a token for every row of `batch`, record it, and say who has ended.

        Args:
            hidden: [R, D].
            first_row: Place of the batch's first row among the running requests.
        Returns:
            ended, stopped: [R] bool each; stopped is True where a stop token or string was met.
        """
        num_rows = len(hidden)
        if len(self._logits) < num_rows:
            self._logits = torch.empty(
                num_rows, self._model.spec.vocab_size, device=self._device,
                dtype=torch.promote_types(hidden.dtype, torch.float32))
        logits = self._model.lm_head(hidden, project_logits, out=self._logits)
        if self._settings_rows is not batch.index:
            self._settings_rows = batch.index
            self._row_settings = self._settings.select(batch.index)
        token_ids, logprobs, entropy, is_stop = self._row_settings.draw(
            logits, batch.seeds, batch.kv_lens, batch.num_generated, batch.seen)
        place = (batch.index, batch.num_generated)
        is_replay = batch.num_generated < batch.num_recorded
        if self._step < self._replay_until:
            token_ids = torch.where(is_replay, self.token_ids[place], token_ids)
            logprobs = torch.where(is_replay, self.logprobs[place], logprobs)
            entropy = torch.where(is_replay, self.entropy[place], entropy)
            self.num_tokens -= int(is_replay.sum())
        self.num_tokens += batch.size
        self.token_ids[place], self.logprobs[place], self.entropy[place] = (
            token_ids, logprobs, entropy)
        batch.token_ids.copy_(token_ids)
        batch.num_generated.add_(batch.alive)
        if batch.seen.shape[1]:
            batch.seen.scatter_(1, token_ids[:, None], True)
        stopped = is_stop & ~is_replay
        self._read_text(token_ids, stopped, first_row, batch.size)
        return (stopped | (batch.num_generated >= batch.max_tokens)) & (batch.alive > 0), stopped

    def _read_text(
        self, token_ids: Tensor, stopped: Tensor, first_row: int, num_rows: int
    ) -> None:
        """Give new tokens to the requests whose text is read; marks stop strings in `stopped`."""
        if not self._reads_text:
            return
        requests = self.scheduler.running[first_row : first_row + num_rows]
        for row, (request, token_id) in enumerate(
                zip(requests, token_ids[:num_rows].tolist(), strict=True)):
            count = self._step - request.started + 1
            request.piece = ""
            if request.text is not None and count > request.num_recorded:
                request.piece = request.text.push(token_id)
                if request.text.has_stopped and count >= request.sampling.min_new_tokens:
                    stopped[row] = True

    def _retire(self, ended: Tensor, stopped: Tensor, first_row: int) -> None:
        """Take finished sequences out of the batch."""
        if not ended.any():
            return
        ending = []
        for row in ended.nonzero().squeeze(1).tolist():
            request = self.scheduler.running[first_row + row]
            self._end(request, self._step - request.started + 1,
                      "stop" if stopped[row] else "length")
            ending.append(request)
        self.scheduler.finish(ending)
        self._compact()

    def _end(self, request: Request, num_tokens: int, reason: str) -> None:
        request.finish_reason = reason
        self.lengths[request.index] = num_tokens
        self.num_finished += 1


def _last_hidden(prompt: SharedPrompt) -> Tensor:
    """[D], of a prompt that has been computed."""
    assert prompt.hidden is not None
    return prompt.hidden

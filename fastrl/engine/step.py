"""The device step: a token for every row of the decode batch, from tensors to tensors.

Nothing here waits for the device: no number is read by the host, and no shape depends on a value.
The same code runs eagerly and inside a CUDA graph. Shape letters: R rows, D width, V vocabulary.
"""

import torch
from torch import Tensor

from fastrl.engine.batch import DecodeBatch, RecentTokens
from fastrl.engine.cache import KVCache
from fastrl.engine.settings import Settings
from fastrl.models import CausalLM, PagedAttention
from fastrl.models.heads import project_logits
from fastrl.ops.paged_attention import SharedPrefixes
from fastrl.paged_plan import PagedPlan


class DeviceStep:
    """Steps of one model over one cache.

    Args:
        model: In eval mode, gradients off, whenever a step runs.
        cache: Where keys and values lie.
        is_exact: Rows of attention get the bits of a packed pass.
    """

    def __init__(self, model: CausalLM, cache: KVCache, *, is_exact: bool) -> None:
        self._model = model
        self._cache = cache
        self._is_exact = is_exact
        self._logits: Tensor | None = None

    def decode(
        self, batch: DecodeBatch, settings: Settings, recent: RecentTokens, *, max_kv_len: int,
        replays: bool,
    ) -> None:
        """Feed the newest token of every row and draw the next one.

        Args:
            batch, recent: Changed in place.
            settings: A row per row of the batch.
            max_kv_len: No row has more tokens in the cache, the newest included.
            replays: Some row may have tokens that are replayed, not drawn.
        """
        page_size = self._cache.page_size
        positions = batch.kv_lens * batch.alive  # a dead row may have no page for a next token
        page = batch.page_table.gather(1, (positions // page_size)[:, None]).squeeze(1)
        slots = torch.where(batch.alive > 0, page * page_size + positions % page_size, -1)
        batch.kv_lens.add_(batch.alive)
        prefixes = None
        if batch.has_groups:  # of two rows at least
            prefixes = SharedPrefixes(batch.groups[: len(slots) // 2], batch.shared_lens)
        attention = PagedAttention(
            self._cache.kv_pages, batch.page_table, slots,
            torch.arange(len(slots) + 1, device=slots.device), positions + batch.alive, 1,
            max_kv_len,
            PagedPlan(slots_are_finite=self._cache.slots_are_finite, is_exact=self._is_exact),
            prefixes)
        hidden = self._model(batch.token_ids, positions, attention)
        self.draw(hidden, batch, settings, recent, replays=replays)

    def draw(
        self, hidden: Tensor, batch: DecodeBatch, settings: Settings, recent: RecentTokens, *,
        replays: bool,
    ) -> None:
        """Draw a token for every row from hidden [R, D]; rows that end with it are dead after."""
        logits = self._model.lm_head(hidden, project_logits, out=self._memory(hidden))
        token_ids, logprobs, entropy, stopped = settings.draw(
            logits, batch.seeds, batch.kv_lens, batch.num_generated, batch.seen)
        if replays:
            is_replay = batch.num_generated < batch.num_recorded
            recorded = recent.token_ids.index_select(1, recent.column).squeeze(1)
            token_ids = torch.where(is_replay, recorded, token_ids)
            stopped = stopped & ~is_replay
        for columns, values in ((recent.token_ids, token_ids), (recent.logprobs, logprobs),
                                (recent.entropy, entropy)):
            columns.index_copy_(1, recent.column, values[:, None])
        recent.column.add_(1)
        batch.token_ids.copy_(token_ids)
        batch.num_generated.add_(batch.alive)
        if batch.seen.shape[1]:
            batch.seen.scatter_(1, token_ids[:, None], True)
        batch.stopped.add_(stopped * batch.alive)
        batch.alive.mul_(~stopped & (batch.num_generated < batch.max_tokens))

    def _memory(self, hidden: Tensor) -> Tensor | None:
        """Where a CPU puts logits; a GPU's allocator hands out the same memory anyway."""
        if hidden.is_cuda:
            return None
        if self._logits is None or len(self._logits) < len(hidden):
            self._logits = torch.empty(
                len(hidden), self._model.spec.vocab_size, device=hidden.device,
                dtype=torch.promote_types(hidden.dtype, torch.float32))
        return self._logits

"""CUDA graphs of the device step: captured once for a size of the batch, replayed for every step.

A graph reads and writes fixed addresses, so the decode batch is copied into tensors that stay
where they are, and what a graph was captured with is compared before each call. Weights that change
in place change nothing here. Shape letters: R rows, K steps of a round, V vocabulary.
"""

import logging
import time
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from fastrl.backends import choose
from fastrl.config import EngineConfig
from fastrl.engine.batch import DecodeBatch, RecentTokens
from fastrl.engine.cache import KVCache
from fastrl.engine.settings import Settings
from fastrl.engine.step import DeviceStep
from fastrl.environment import checks_values
from fastrl.errors import ConfigError
from fastrl.models import CausalLM
from fastrl.ops import kv_cache, sampling
from fastrl.ops.paged_attention import PREFERENCE as PAGED_PREFERENCE
from fastrl.out_of_memory import is_out_of_memory

logger = logging.getLogger("fastrl")

Run = Callable[[], None]
SMALL_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128)
"""Up to here a product takes as long as reading its weights: steps may be wide."""
LARGE_STEP = 64
"""Beyond, rows cost time of their own."""
WARM_UPS = 2
"""Runs before a capture: kernels are compiled, libraries take their memory."""
OPS: dict[str, tuple[str, tuple[str, ...]]] = {
    "write_kv": ("kv_cache", kv_cache.PREFERENCE),
    "paged_attention": ("paged_attention", PAGED_PREFERENCE),
    "sample_tokens": ("sampling", sampling.PREFERENCE),
}
"""Ops of a step with their files and backends."""
READS_ON_HOST = ("paged_attention", "sample_tokens")
"""Those whose plain form reads numbers on the host."""


@cache
def ladder(max_batch_size: int) -> tuple[int, ...]:
    """Rows that a decode batch may have: dummies fill it up to the next of these.

    Example:
        >>> ladder(40), ladder(200)[-3:]
        ((1, 2, 4, 8, 16, 24, 32, 40), (128, 192, 200))
    """
    sizes = (*SMALL_SIZES, *range(SMALL_SIZES[-1] + LARGE_STEP, max_batch_size, LARGE_STEP))
    return (*(size for size in sizes if size < max_batch_size), max_batch_size)


def rung(num_rows: int, max_batch_size: int) -> int:
    """The smallest size of the ladder that holds `num_rows`, at most `max_batch_size` of them."""
    sizes = ladder(max_batch_size)
    return sizes[bisect_left(sizes, num_rows)]


@dataclass(frozen=True, slots=True)
class StepKey:
    """What else a captured step depends on: its shapes, and the path that it takes."""

    num_rows: int
    table_width: int
    num_columns: int
    num_stops: int
    has_penalty: bool
    has_minimum: bool
    is_truncated: bool
    has_groups: bool
    replays: bool

    @classmethod
    def of(
        cls, batch: DecodeBatch, settings: Settings, recent: RecentTokens, replays: bool
    ) -> "StepKey":
        """Of a step over placed tensors."""
        num_rows, table_width = batch.page_table.shape
        return cls(num_rows, table_width, recent.token_ids.shape[1], settings.stop_ids.shape[1],
                   settings.has_penalty, settings.has_minimum, settings.is_truncated,
                   batch.has_groups, replays)


def fixed_parts(model: CausalLM, pages: KVCache, max_batch_size: int) -> tuple[Any, ...]:
    """What has to stay for captured graphs to stay right: addresses, shapes, types, backends.

    Values are not part of it: an optimiser's step in place leaves this equal.
    """
    tensors = [*model.parameters(), *model.buffers(), pages.kv_pages]
    places = tuple((tensor.data_ptr(), tuple(tensor.shape), tensor.dtype, tensor.device)
                   for tensor in tensors)
    return (id(model.backbone), getattr(model.backbone, "config", None), max_batch_size,
            pages.page_size, tuple(_backends(model).items()), places)


def _backends(model: CausalLM) -> dict[str, str]:
    """Op -> backend that a step would take now."""
    weight = model.lm_head.weight
    wide = torch.promote_types(weight.dtype, torch.float32)
    return {op: choose(op, kernel, preference, weight.device.type,
                       wide if op == "sample_tokens" else weight.dtype)
            for op, (kernel, preference) in OPS.items()}


def refusal(model: CausalLM) -> str | None:
    """Why no step of this model can be captured here, or None."""
    device = model.lm_head.weight.device
    if device.type != "cuda":
        return f"the model is on {device.type}"
    if checks_values():
        return "FASTRL_CHECK=1 looks at values in every op"
    backends = _backends(model)
    plain = [op for op in READS_ON_HOST if backends[op] == "torch"]
    if plain:
        return f"{', '.join(plain)} would run as plain torch, which reads numbers on the host"
    return None


def graphs_for(
    model: CausalLM, config: EngineConfig, pages: KVCache, previous: "StepGraphs | None"
) -> "StepGraphs | None":
    """Graphs for the next call, by `EngineConfig.cuda_graphs`; None where every step runs eagerly.

    Args:
        previous: Those of the last call; what still holds is kept.
    Raises:
        ConfigError: when they are "on" and impossible.
    """
    if config.cuda_graphs == "off":
        return None
    reason = refusal(model)
    if reason is not None:
        if config.cuda_graphs == "on":
            raise ConfigError(f"cuda_graphs: expected a model whose decode step can be captured, "
                              f"but {reason}; set cuda_graphs to auto or off")
        if model.lm_head.weight.is_cuda:
            _warn_once(reason)
        return None
    parts = fixed_parts(model, pages, config.max_batch_size)
    if previous is not None and previous.parts == parts:
        return previous
    return StepGraphs(parts, config.max_batch_size, is_required=config.cuda_graphs == "on")


@cache
def _warn_once(reason: str) -> None:
    logger.warning("cuda_graphs: decode steps run eagerly: %s", reason)


class StepGraphs:
    """Captured steps of one model over one cache, and the tensors that they read and write.

    Args:
        parts: `fixed_parts` when the first of them is captured.
        max_batch_size: Rows of the largest batch.
        is_required: A step that cannot be captured is an error, not a warning.
        capture: Turns a way of warming up and a run into what replays the run; the default
            captures a CUDA graph.
    """

    def __init__(
        self, parts: tuple[Any, ...], max_batch_size: int, *, is_required: bool = False,
        capture: Callable[[Run, Run], Run] | None = None,
    ) -> None:
        self.parts = parts
        self.capture_s: dict[StepKey, float] = {}
        """Seconds that each capture took, warm-up included."""
        self._max_batch_size = max_batch_size
        self._is_required = is_required
        self._capture = capture or partial(capture_graph, pool=torch.cuda.graph_pool_handle())
        self._replays: dict[StepKey, Run] = {}
        self._places: dict[tuple[int, ...], tuple[DecodeBatch, Settings, RecentTokens]] = {}

    def place(
        self, batch: DecodeBatch, settings: Settings, num_columns: int
    ) -> tuple[DecodeBatch, Settings, RecentTokens]:
        """Copies of `batch` and `settings` [R, ...] at fixed addresses, and room for K columns.

        They take the place of those of the call before, unless the shape of a row differs.
        """
        shape = (batch.page_table.shape[1], batch.seen.shape[1], settings.stop_ids.shape[1],
                 num_columns)
        if shape not in self._places:
            largest = partial(_like, num_rows=self._max_batch_size)
            self._places[shape] = (
                _map_tensors(batch, largest), _map_tensors(settings, largest),
                RecentTokens.empty(self._max_batch_size, num_columns, batch.index.device))
        all_rows, all_settings, recent = self._places[shape]
        num_rows = len(batch.index)
        for source, target in ((batch, all_rows), (settings, all_settings)):
            for name, tensor in _tensors(source).items():
                getattr(target, name)[:num_rows].copy_(tensor)
        first = partial(_first_rows, num_rows=num_rows)
        return (replace(_map_tensors(all_rows, first), size=batch.size,
                        has_groups=batch.has_groups),
                replace(_map_tensors(all_settings, first), has_penalty=settings.has_penalty,
                        has_minimum=settings.has_minimum, is_truncated=settings.is_truncated),
                replace(_map_tensors(recent, first), column=recent.column))

    def run(
        self, step: DeviceStep, batch: DecodeBatch, settings: Settings, recent: RecentTokens, *,
        max_kv_len: int, replays: bool,
    ) -> None:
        """`step.decode` by its graph, which is captured where it does not exist.

        Args:
            batch, settings, recent: As `place` gave them.
            max_kv_len: The most that the page table can hold.
        """
        key = StepKey.of(batch, settings, recent, replays)
        if key not in self._replays:
            decode = partial(step.decode, batch, settings, recent, max_kv_len=max_kv_len,
                             replays=replays)
            begin = time.perf_counter()
            self._replays[key] = self._captured(decode, batch, recent)
            self.capture_s[key] = time.perf_counter() - begin
        self._replays[key]()

    def _captured(self, decode: Run, batch: DecodeBatch, recent: RecentTokens) -> Run:
        """Capture with every row dead, so that warming up writes nothing; then all is as before."""
        tensors = [*_tensors(batch).values(), *_tensors(recent).values()]
        before = [tensor.clone() for tensor in tensors]
        batch.alive.zero_()

        def warm_up() -> None:
            recent.column.zero_()  # there may be one column only
            decode()

        try:
            return self._capture(warm_up, decode)
        except RuntimeError as error:  # of an op that waits for the device
            if is_out_of_memory(error):
                raise
            reason = f"a step cannot be captured: {str(error).splitlines()[0]}"
            if self._is_required:
                raise ConfigError(f"cuda_graphs: {reason}; set cuda_graphs to auto or off") \
                    from error
            _warn_once(reason)
            return decode
        finally:
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)


def capture_graph(warm_up: Run, run: Run, pool: Any) -> Run:
    """A CUDA graph of `run`, whose tensors come from `pool`; another thread may allocate meanwhile.

    All graphs of a pool share its memory: they run one after the other, and what outlives a run
    lies outside.
    """
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            warm_up()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        run()
    return graph.replay


def _tensors(values: Any) -> dict[str, Tensor]:
    """The tensors of a dataclass by name."""
    found = {f.name: getattr(values, f.name) for f in fields(values)}
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


def _map_tensors(values: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """A dataclass with `function` applied to its tensors."""
    return replace(values, **{name: function(tensor) for name, tensor in _tensors(values).items()})


def _like(tensor: Tensor, num_rows: int) -> Tensor:
    return tensor.new_zeros(num_rows, *tensor.shape[1:])


def _first_rows(tensor: Tensor, num_rows: int) -> Tensor:
    return tensor[:num_rows]

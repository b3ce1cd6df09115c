"""`python -m benchmarks exact`: are rollout and update log-probs the same, and what does it cost?

Random weights made on the device, responses of full length. Rows, by workload:

    generate, case exact and fast    one call of the engine; the largest and the mean difference to
                                     the update's log-probs of the same tokens
    update, case exact and fast      forward and backward of the policy loss over those tokens
    sweep                            the start-up sweep; the lines that fail, by name
    arena                            the engine gives its cache's memory back, and takes it again
    update beside the cache          peak memory and the largest microbatch that fits, with the
                                     memory of the engine's cache held and given back
    parking                          the policy leaves for the host and comes back

Exact and fast take turns; `extra.cost` of an exact row is its median over that of the fast row.
"""

import gc
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from benchmarks.engine_workloads import MODELS, SMALL, random_model
from benchmarks.results import Row, head, save
from benchmarks.timing import Timing, peak_bytes
from fastrl.config import EngineConfig, PPOConfig, SamplingConfig
from fastrl.engine import Engine
from fastrl.engine.cache import KVCache
from fastrl.exactness import exact_math
from fastrl.exactness.sweep import sweep
from fastrl.memory.parking import storages_of
from fastrl.memory.residents import Residents, tensors_of
from fastrl.ops import linear_policy_loss
from fastrl.packing import predict_rows
from fastrl.trainers.common import packed_forward
from fastrl.trainers.old_logprobs import update_logprobs
from fastrl.types import Rollout

SIZES = {False: {"B": 256, "P": 128, "T": 400}, True: {"B": 6, "P": 5, "T": 12}}
"""By --small: responses, prompt and response tokens; 102,400 response tokens."""
MICROBATCH_TOKENS = {False: 16384, True: 64}
MAX_DOUBLINGS = 8
"""Of the microbatch, on the way to what does not fit."""
ROUNDS = 3


class ExactBench:
    """The model, what was generated, and the rows so far.

    Args:
        device: cuda or cpu.
        small: Sizes for trying the flow.
        path: Result file, written after every row.
        deadline: time.monotonic() after which nothing is begun.
    """

    def __init__(self, device: str, small: bool, path: Path, deadline: float) -> None:
        self.device, self.small, self.path, self.deadline = device, small, path, deadline
        self.sizes = SIZES[small]
        self.rows: list[Row] = []
        self._document = head("exact", device, None, None)
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.dtype = str(dtype).removeprefix("torch.")
        self.model = random_model(SMALL if small else MODELS["qwen3-0.6b"], dtype, device)
        generator = torch.Generator().manual_seed(0)
        self.prompts = torch.randint(self.model.spec.vocab_size,
                                     (self.sizes["B"], self.sizes["P"]), generator=generator)
        self._cache: KVCache | None = None
        self.config = PPOConfig(max_tokens_per_microbatch=MICROBATCH_TOKENS[small])

    def run(self) -> list[Row]:
        """All rows; one that raises says so, and the next one runs."""
        for workload, measure in (
            ("sweep", self.sweep), ("generate", self.generate), ("update", self.update),
            ("arena", self.arena), ("update beside the cache", self.beside_the_cache),
            ("parking", self.parking),
        ):
            row = Row(workload=workload, sizes=self.sizes, dtype=self.dtype, provider="fastrl",
                      status="skipped", reason="the time is used up")
            if time.monotonic() > self.deadline:
                self._add(row)
                continue
            try:
                measure(row)
            except Exception as error:  # a row says what was raised
                reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
                self._add(row.without_figure("error", reason))
            gc.collect()
        return self.rows

    def sweep(self, row: Row) -> None:
        """The start-up sweep."""
        seconds, lines = self._timed(lambda: sweep(self.model))
        failed = [f"{line.work} {line.shape}: {line.result}" for line in lines if not line.is_exact]
        self._add(_timed_row(row, [seconds], {"num_lines": len(lines), "failed": failed}))

    def generate(self, row: Row) -> None:
        """Whole calls of two engines, in turns, and the update's log-probs of their tokens."""
        engines = self._engines
        sampling = SamplingConfig(max_new_tokens=self.sizes["T"], stop_token_ids=())
        prompts, seconds = self.prompts.tolist(), {case: list[float]() for case in engines}
        rollouts: dict[str, Rollout] = {}
        for number in range(1 + ROUNDS):  # the first one warms up
            for case, engine in engines.items():
                taken, rollouts[case] = self._timed(
                    lambda engine=engine: engine.generate(  # type: ignore[misc]
                        prompts, sampling))
                if number:
                    seconds[case].append(taken)
        gaps = {case: self._gaps(case, rollout) for case, rollout in rollouts.items()}
        self._add_pair(row, seconds, gaps)

    def _gaps(self, case: str, rollout: Rollout) -> dict[str, Any]:
        """Differences between the engine's log-probs and the update's."""
        with exact_math(self.device, is_exact=case == "exact"):
            again = update_logprobs(self.model, rollout, self.config)
        gaps = (again - rollout.rollout_logprobs).abs()[rollout.response_mask]
        return {"num_tokens": len(gaps), "logprob_gap_max": float(gaps.max()),
                "logprob_gap_mean": float(gaps.mean()),
                "share_of_equal_tokens": float((gaps == 0).double().mean())}

    def update(self, row: Row) -> None:
        """Forward and backward of one microbatch."""
        sequences = self._sequences(self.config.max_tokens_per_microbatch)
        seconds = {case: list[float]() for case in ("exact", "fast")}
        for number in range(1 + ROUNDS):
            for case in seconds:
                with exact_math(self.device, is_exact=case == "exact"):
                    taken, _ = self._timed(lambda: self._backward(sequences))
                if number:
                    seconds[case].append(taken)
        extra = {"num_tokens": sum(map(len, sequences))}
        self._add_pair(row, seconds, {case: dict(extra) for case in seconds})

    def arena(self, row: Row) -> None:
        """Switches of the memory of the cache that `generate` has left."""
        engine, cache = self._engines["exact"], self._idle_cache()
        seconds: dict[str, list[float]] = {"map": [], "unmap": []}
        for _ in range(1 + ROUNDS):
            seconds["unmap"].append(self._timed(engine.release_memory)[0])
            seconds["map"].append(self._timed(cache.map)[0])
        extra = {"num_bytes": self._cache_bytes(), "keeps_addresses": cache.arena.keeps_addresses}
        for case, taken in seconds.items():
            self._add(_timed_row(replace(row, case=case), taken[1:], extra))

    def beside_the_cache(self, row: Row) -> None:
        """Peak memory of an update and the largest microbatch, by what the engine's cache does."""
        engine, cache = self._engines["exact"], self._idle_cache()
        for case in ("cache held", "cache given back"):
            if case == "cache held":
                cache.map()
                cache.kv_pages.zero_()  # a CPU gives pages as they are touched
            else:
                engine.release_memory()
            held = self._cache_bytes() * cache.arena.is_mapped
            with exact_math(self.device):
                sequences = self._sequences(self.config.max_tokens_per_microbatch)
                peak = peak_bytes(lambda s=sequences: self._backward(s),  # type: ignore[misc]
                                  self.device) + held
                taken, largest = self._timed(self._largest_microbatch)
            extra = {"cache_bytes": self._cache_bytes(), "held_bytes": held,
                     "largest_microbatch_tokens": largest,
                     "microbatch_tokens": sum(map(len, sequences))}
            self._add(replace(_timed_row(replace(row, case=case), [taken], extra),
                              peak_bytes=peak))

    def parking(self, row: Row) -> None:
        """The policy's way to the host and back, and whether its addresses stay."""
        residents = Residents({"policy": lambda: tensors_of(self.model)}, {"policy"},
                              torch.device(self.device))
        seconds: dict[str, list[float]] = {"leaves": [], "comes back": []}
        addresses = set[tuple[int, ...]]()
        for _ in range(1 + ROUNDS):  # the first one takes host memory and the arena
            for case, phase in (("leaves", "critic_update"), ("comes back", "rollout")):
                seconds[case].append(self._timed(
                    lambda phase=phase: _begin(residents, phase))[0])  # type: ignore[misc]
            addresses.add(tuple(tensor.data_ptr() for tensor in tensors_of(self.model)))
        extra = {"num_bytes": sum(s.nbytes() for s in storages_of(tensors_of(self.model)).values()),
                 "keeps_addresses": len(addresses) == 1}
        for case, taken in seconds.items():
            self._add(_timed_row(replace(row, case=case), taken[1:], extra))

    def _idle_cache(self) -> KVCache:
        """The cache of the exact engine, the only one that has memory from here on."""
        self._engines["fast"].release_memory()
        self._cache = self._engines["exact"].idle_cache or self._cache
        if self._cache is None:
            raise LookupError("generate has left no cache")
        return self._cache

    def _largest_microbatch(self) -> int:
        """Tokens of the largest microbatch that fits, by doubling; on a CPU only one doubling."""
        num_tokens, fits = self.config.max_tokens_per_microbatch, 0
        for _ in range(MAX_DOUBLINGS if self.device == "cuda" else 1):
            if time.monotonic() > self.deadline:
                break
            try:
                self._backward(self._sequences(num_tokens))
            except torch.OutOfMemoryError:
                break
            fits, num_tokens = num_tokens, 2 * num_tokens
        if self.device == "cuda":
            torch.cuda.empty_cache()
        return fits

    @cached_property
    def _engines(self) -> dict[str, Engine]:
        return {case: Engine(self.model, EngineConfig(
            max_batch_size=self.sizes["B"], exact=case == "exact")) for case in ("exact", "fast")}

    def _sequences(self, num_tokens: int) -> list[list[int]]:
        """Random sequences of the rollout's length, `num_tokens` in all or a few more."""
        length = self.sizes["P"] + self.sizes["T"]
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(self.model.spec.vocab_size, (-(-num_tokens // length), length),
                            generator=generator)
        rows: list[list[int]] = ids.tolist()
        return rows

    def _backward(self, sequences: list[list[int]]) -> None:
        """Forward and backward of the policy loss over everything but the first tokens."""
        hidden, packed = packed_forward(self.model, sequences)
        mask = torch.ones(len(packed.token_ids), dtype=torch.bool, device=self.device)
        mask[packed.cu_seqlens[:-1]] = False
        sources, targets = predict_rows(mask, packed)
        old = torch.full((len(sources),), -5.0, device=self.device)
        loss, _ = self.model.lm_head(
            hidden[sources], linear_policy_loss, packed.token_ids[targets], old,
            torch.ones_like(old), torch.ones_like(old, dtype=torch.bool),
            denominator=len(old), clip_range=0.2, temperature=1.0, entropy_coef=0.0)
        loss.backward()
        self.model.zero_grad(set_to_none=True)

    def _cache_bytes(self) -> int:
        """Of all pages of the engine's cache."""
        cache = self._idle_cache()
        return cache.num_pages * cache.page_bytes

    def _timed(self, call: Callable[[], Any]) -> tuple[float, Any]:
        """Seconds by the clock until the device is done, and what the call gave."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        result = call()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin, result

    def _add_pair(
        self, row: Row, seconds: dict[str, list[float]], extra: dict[str, dict[str, Any]]
    ) -> None:
        """The rows of exact and fast, the first with its cost."""
        medians = {case: Timing("clock", taken).quantile(0.5) for case, taken in seconds.items()}
        extra["exact"]["cost"] = round(medians["exact"] / medians["fast"], 4)
        for case, taken in seconds.items():
            self._add(_timed_row(replace(row, case=case), taken, extra[case]))

    def _add(self, row: Row) -> None:
        self.rows.append(row)
        save(self._document, self.rows, self.path)
        print(row.workload, row.case, row.status, row.median_s, row.extra or row.reason, flush=True)


def _timed_row(row: Row, seconds: list[float], extra: dict[str, Any]) -> Row:
    return replace(row.timed(Timing("clock", seconds), None, None, None), extra=extra)


def _begin(residents: Residents, phase: str) -> None:
    """Move what a phase moves."""
    with residents.phase(phase):
        pass


def run_exact(device: str, small: bool, path: Path, deadline: float) -> list[Row]:
    """Measure everything above; `path` has all rows so far."""
    return ExactBench(device, small, path, deadline).run()

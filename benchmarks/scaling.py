"""`python -m benchmarks scaling`: how time and memory grow when one size doubles, on a CPU.

A generation and a training step of a random llama; batch, sequence length, vocabulary and number of
layers are doubled one by one. The sizes of an axis take turns, so that another load meets all of
them, and a doubling is the median of the turns' ratios. It may be 10% above twice, or above what
attention adds, whose operations and cached bytes grow with the square of the length
(`benchmarks/work.py`).
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.ceilings import measured_ceilings
from benchmarks.engine_workloads import random_model
from benchmarks.results import Row, head, save
from benchmarks.timing import Call, Sampler, interleaved, peak_bytes, sampler
from benchmarks.work import Work, generation, training
from fastrl.config import SamplingConfig, SFTConfig
from fastrl.engine import Engine
from fastrl.models import DecoderConfig
from fastrl.trainers import SFTTrainer
from fastrl.types import TokenExample

SLACK = 1.1
"""A doubling may cost so many times twice as much."""
HEAD_DIM = 48


@dataclass(frozen=True)
class Sizes:
    """One point; letters as in docs/design.md, S tokens of a sequence, half of them a prompt."""

    B: int = 16
    S: int = 64
    V: int = 8000
    D: int = 288
    L: int = 3

    @property
    def config(self) -> DecoderConfig:
        """A llama of these sizes."""
        heads = self.D // HEAD_DIM
        return DecoderConfig(
            family="llama", vocab_size=self.V, hidden_size=self.D,
            intermediate_size=8 * self.D // 3, num_layers=self.L, num_heads=heads,
            num_kv_heads=heads, head_dim=HEAD_DIM, rotary_dim=HEAD_DIM, max_positions=4096,
            rotary_base=1e4, tie_embeddings=True)

    def token_ids(self, tokens: int) -> list[list[int]]:
        """B random sequences of so many tokens."""
        random = torch.Generator().manual_seed(0)
        rows: list[list[int]] = torch.randint(3, self.V, (self.B, tokens),
                                              generator=random).tolist()
        return rows

    def work(self, workload: str) -> Work:
        """Operations and bytes of a call."""
        if workload == "generate":
            half = [self.S // 2] * self.B
            return generation(self.config, half, half, itemsize=4)
        return training(self.config, [self.S] * self.B, self.B * (self.S - 1))


BASE, SMALL = Sizes(), Sizes(B=2, S=16, V=400, D=48, L=2)
AXES = {"batch": ("B", 3), "length": ("S", 4), "vocabulary": ("V", 3), "layers": ("L", 3)}
"""What doubles, and how many points there are."""


def train_call(sizes: Sizes) -> Call:
    """One step of SFT on all tokens."""
    rows = sizes.token_ids(sizes.S)
    mask = (False, *[True] * (sizes.S - 1))
    trainer = SFTTrainer(
        SFTConfig(batch_size=sizes.B, num_epochs=10**6, residual_dropout=0.0, loss_on="all",
                  max_seq_tokens=sizes.S, select_by="last", device="cpu", dtype="float32",
                  learning_rate=1e-5, max_tokens_per_microbatch=8192),
        random_model(sizes.config, torch.float32, "cpu"),
        [TokenExample(tuple(row), mask) for row in rows])
    return trainer.step


def generate_call(sizes: Sizes) -> Call:
    """As many new tokens as the prompts have."""
    engine = Engine(random_model(sizes.config, torch.float32, "cpu"))
    prompts = sizes.token_ids(sizes.S // 2)
    sampling = SamplingConfig(max_new_tokens=sizes.S // 2, stop_token_ids=())
    return lambda: engine.generate(prompts, sampling)


WORKLOADS: dict[str, Callable[[Sizes], Call]] = {
    "generate": generate_call, "train": train_call}


def limit(workload: str, smaller: Sizes, larger: Sizes) -> float:
    """How many times as long the larger may take: SLACK times two, its operations or its bytes.
    """
    below, above = (s.work(workload) for s in (smaller, larger))
    operations = (above.products + above.decode_products) / (below.products + below.decode_products)
    return SLACK * max(2.0, operations, above.bytes / below.bytes)


def measure_axis(workload: str, axis: str, base: Sizes, rounds: int) -> list[Row]:
    """A row per point of an axis; `extra.doubling` is the ratio to the one before."""
    letter, count = AXES[axis]
    points = [replace(base, **{letter: getattr(base, letter) * 2**i}) for i in range(count)]
    samplers: dict[str, Sampler] = {}
    peaks = []
    for number, sizes in enumerate(points):
        call = WORKLOADS[workload](sizes)
        call()  # what is made once
        peaks.append(peak_bytes(call, "cpu"))
        samplers[str(number)] = sampler([call], "cpu")
    times = list(interleaved(samplers, seconds_each=0.0, min_rounds=rounds).values())
    rows = []
    for number, (sizes, timing) in enumerate(zip(points, times, strict=True)):
        work = sizes.work(workload)
        tokens = sizes.B * (sizes.S if workload == "train" else sizes.S // 2)
        extra = {"tokens_per_s": round(tokens / timing.quantile(0.5), 1), "num_threads": 1}
        if number:
            turns = zip(times[number - 1].seconds, timing.seconds, strict=True)
            extra |= {"doubling": round(statistics.median(b / a for a, b in turns), 3),
                      "limit": round(limit(workload, points[number - 1], sizes), 3)}
        row = Row(workload=workload, case=axis, sizes=vars(sizes) | {}, dtype="float32",
                  provider="fastrl", status="checked", reason="not timed yet",
                  bytes=round(work.bytes), flops=round(work.products + work.decode_products),
                  extra=extra)
        rows.append(row.timed(timing, peaks[number], None, None))
    return rows


def beyond_limit(rows: list[Row]) -> list[str]:
    """A line for each doubling that costs more than it may."""
    return [f"{row.workload} {row.case} {row.sizes}: {row.extra['doubling']} times as long as with "
            f"half of it, {row.extra['limit']} allowed" for row in rows
            if row.extra.get("doubling", 0) > row.extra.get("limit", 0)]


def run_scaling(small: bool, rounds: int, path: Path) -> list[Row]:
    """Measure both workloads along every axis on one thread; `path` has all rows so far."""
    torch.set_num_threads(1)
    document, rows = head("scaling", "cpu", measured_ceilings("cpu", small), None), []
    for workload in WORKLOADS:
        for axis in AXES:
            rows += measure_axis(workload, axis, SMALL if small else BASE, rounds)
            save(document, rows, path)
            for row in rows[-AXES[axis][1]:]:
                print(row.workload, row.case, row.sizes, row.extra, flush=True)
    return rows

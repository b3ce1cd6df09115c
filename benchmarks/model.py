"""`python -m benchmarks model`: seconds of a step from operations and bytes, beside measured ones.

    seconds = products / (rate * a) + decode products / (rate * b) + bytes / (bandwidth * c)

`rate` (of all threads) and `bandwidth` are the machine's ceilings (`benchmarks/ceilings.py`), the
counts those of `benchmarks/work.py`. The three shares of the ceilings are fitted to every point
that the result files of one kind of device have, by least squares of the relative error; each
point's error is given with the fit that knows it and with the fit of all others.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import bench_generate
from benchmarks.ceilings import ASSUMED, Ceilings
from benchmarks.engine_workloads import MODELS
from benchmarks.engine_workloads import Workload as EngineLoad
from benchmarks.peers.common import read_workload
from benchmarks.results import ROOT, Row, load
from benchmarks.scaling import Sizes
from benchmarks.work import Work, generation, num_weights, ppo_phases
from fastrl.models import DecoderConfig

TERMS = ("products", "decode_products", "bytes")
Shares = tuple[float, float, float]
"""Of the ceilings, for each of TERMS; infinite where the points show no cost."""


@dataclass(frozen=True)
class Point:
    """One measured time and what was done in it."""

    name: str
    work: Work
    seconds: float
    ceilings: Ceilings
    num_threads: int = 1

    @property
    def floors(self) -> tuple[float, float, float]:
        """Seconds of each term at the ceilings."""
        rate = self.ceilings.flops_per_s * self.num_threads
        return (self.work.products / rate, self.work.decode_products / rate,
                self.work.bytes / self.ceilings.bytes_per_s)


def fit(points: Sequence[Point]) -> Shares:
    """The shares with the least sum of squared relative errors; none is negative.

    Raises:
        ValueError: without a point.
    """
    if not points:
        raise ValueError("expected at least one measured point to fit the shares to, got none")
    matrix = np.array([[floor / p.seconds for floor in p.floors] for p in points])
    best, least = np.zeros(3), np.inf
    for count in (1, 2, 3):
        for columns in map(list, combinations(range(3), count)):
            found = np.linalg.lstsq(matrix[:, columns], np.ones(len(points)), rcond=None)[0]
            costs = np.zeros(3)
            costs[columns] = found
            error = float(((matrix @ costs - 1) ** 2).sum())
            if (found >= 0).all() and error < least:
                best, least = costs, error
    first, second, third = (float(1 / cost) if cost > 0 else np.inf for cost in best)
    return first, second, third


def predict(point: Point, shares: Shares) -> float:
    """Seconds of a point's work."""
    return sum(floor / share for floor, share in zip(point.floors, shares, strict=True))


def errors(points: Sequence[Point]) -> list[tuple[float, float | None]]:
    """(predicted - measured) / measured: by the fit to all points, and to all others."""
    shares = fit(points)
    return [(predict(p, shares) / p.seconds - 1,
             predict(p, fit([q for q in points if q is not p])) / p.seconds - 1
             if len(points) > 1 else None) for p in points]


def measured_points(folder: Path, device: str = "cpu") -> list[Point]:
    """Every point of the result files of a kind of device; the newest file of each topic.

    A file without ceilings takes those of another on a device of the same name; one that finds none
    has no points.
    """
    files = [f for f in map(load, sorted(folder.glob("*.json")))
             if f[0]["device"]["type"] == device and "pairs" not in f[0]["topic"]]
    newest = {document["topic"]: (document, rows)
              for document, rows in sorted(files, key=lambda f: str(f[0]["date"]))}
    by_device = {d["device"]["name"]: Ceilings(**d["ceilings"]["measured"])
                 for d, _ in newest.values() if d["ceilings"]["measured"]}
    points: list[Point] = []
    for document, rows in newest.values():
        own = document["ceilings"]["measured"]
        ceilings = Ceilings(**own) if own else by_device.get(document["device"]["name"])
        if ceilings is not None:
            points += [p for row in rows if row.median_s is not None
                       and row.provider in ("fastrl", "torch") for p in _points(row, ceilings)]
    return points


def _points(row: Row, ceilings: Ceilings) -> list[Point]:
    """The points of a row; none where its work is not counted."""
    threads, sizes = int(row.extra.get("num_threads", 1)), row.sizes
    name = " ".join(x for x in (row.workload, row.case) if x)
    point = Point(name, Work(), row.median_s or 0.0, ceilings, threads)
    if "S" in sizes:  # scaling
        work = Sizes(**sizes).work(row.workload)
        return [replace(point, work=work, name=f"{name} {_sizes(sizes)}")]
    if row.workload == "generate":
        config, wanted = _llama(sizes), bench_generate.wanted_tokens(row.case)
        work = generation(config, [sizes["P"]] * sizes["B"], wanted, itemsize=4)
        return [replace(point, work=work, name=f"{name}, {threads} threads")]
    if row.workload == "ppo" and "phases_s" in row.extra:
        workload = read_workload(ROOT / "benchmarks/workloads" / f"{row.case}.yaml")
        phases = ppo_phases(
            _of_workload(workload["model"]), [sizes["P"]] * sizes["B"],
            [sizes["T"]] * sizes["B"], workload["num_minibatches"],
            itemsize=2 if row.dtype == "bfloat16" else 4)
        return [replace(point, name=f"{name} {phase}, {threads} threads", work=work,
                        seconds=row.extra["phases_s"][f"{phase}_s"])
                for phase, work in phases.items()]
    if row.workload == "linear_policy_loss":
        return [replace(point, work=Work(products=float(row.flops)))]
    if row.workload.startswith("generate ") and row.workload.split()[1] in MODELS:
        lengths, samples, _ = row.case.split()
        loaded = EngineLoad(row.workload.split()[1], sizes["B"], sizes["P"], sizes["T"],
                            int(samples), lengths)
        wanted = [n for n in loaded.wanted for _ in range(loaded.samples)]
        work = generation(MODELS[loaded.model], [sizes["P"]] * sizes["B"], wanted, itemsize=2)
        return [replace(point, work=work, name=f"{name} {_sizes(sizes)}")]
    return []


def _sizes(sizes: Mapping[str, int]) -> str:
    return " ".join(f"{letter}={size}" for letter, size in sizes.items())


def _llama(sizes: Mapping[str, int]) -> DecoderConfig:
    """The shape of the CPU workloads: tied embeddings, heads of 48 channels."""
    return Sizes(V=sizes["V"], D=sizes["D"], L=sizes["L"]).config


def _of_workload(model: Mapping[str, int]) -> DecoderConfig:
    """The llama that a workload file describes."""
    head_dim = model.get("head_dim", model["hidden_size"] // model["num_heads"])
    return DecoderConfig(
        family="llama", vocab_size=model["vocab_size"], hidden_size=model["hidden_size"],
        intermediate_size=model["intermediate_size"], num_layers=model["num_layers"],
        num_heads=model["num_heads"], num_kv_heads=model.get("num_kv_heads", model["num_heads"]),
        head_dim=head_dim, rotary_dim=head_dim, max_positions=model["max_positions"],
        tie_embeddings=True)


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A PPO iteration by data-parallel ranks with sharded weights, and where it runs."""

    model: str = "llama-3.1-8b"
    num_gpus: int = 8
    num_prompts: int = 1024
    prompt_tokens: int = 1024
    response_tokens: int = 1024
    num_minibatches: int = 4
    ceilings: Ceilings = ASSUMED["NVIDIA H200"]
    link_bytes_per_s: float = 450e9
    """One direction of a GPU's links, as published for NVLink 4."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, int) and value < 1:
                raise SystemExit(f"{name}: expected at least 1, got {value}")
        if self.model not in MODELS:
            raise SystemExit(f"model: expected one of {', '.join(MODELS)}, got {self.model!r}")
        if self.num_prompts % self.num_gpus:
            raise SystemExit(f"num_prompts: expected a multiple of the {self.num_gpus} GPUs, got "
                             f"{self.num_prompts}: every rank takes as many")

    def phases(self) -> dict[str, tuple[float, float, float]]:
        """By phase: seconds of operations, of memory and of links, each at its ceiling.

        A rank has its share of the prompts. Every pass of a phase gathers the weights once in
        bfloat16; an update gathers them twice and scatters the gradient, per minibatch; each rank
        steps its shard.
        """
        config, share = MODELS[self.model], self.num_prompts // self.num_gpus
        work = ppo_phases(config, [self.prompt_tokens] * share, [self.response_tokens] * share,
                          0, itemsize=2)
        weights = num_weights(config)
        others = (self.num_gpus - 1) / self.num_gpus
        passes = {"rollout": 1, "scoring": 3, "policy_update": 3 * self.num_minibatches,
                  "critic_update": 3 * self.num_minibatches}
        steps = self.num_minibatches * 28 * weights / self.num_gpus
        found = {}
        for name, one in work.items():
            moved = one.bytes + (steps if name.endswith("update") else 0.0)
            found[name] = ((one.products + one.decode_products) / self.ceilings.flops_per_s,
                           moved / self.ceilings.bytes_per_s,
                           passes[name] * 2 * weights * others / self.link_bytes_per_s)
        return found


def points_table(points: Sequence[Point]) -> str:
    """Markdown: every point with its errors."""
    lines = ["| measured | seconds | error | not knowing it |", "|---|---:|---:|---:|"]
    for point, (known, unknown) in zip(points, errors(points), strict=True):
        lines.append(f"| {point.name} | {point.seconds:.3g} | {known:+.0%} | "
                     f"{'' if unknown is None else f'{unknown:+.0%}'} |")
    return "\n".join(lines)


def answer_table(cluster: Cluster) -> str:
    """Markdown: seconds of each phase, all at once at the ceilings, and in turn at half of them."""
    lines = ["| phase | operations | memory | links | at least | in turn, at half |",
             "|---|---:|---:|---:|---:|---:|"]
    sums = [0.0] * 5
    for name, terms in cluster.phases().items():
        cells = [*terms, max(terms), 2 * sum(terms)]
        sums = [a + b for a, b in zip(sums, cells, strict=True)]
        lines.append(f"| {name.replace('_', ' ')} | "
                     + " | ".join(f"{c:.1f}" for c in cells) + " |")
    lines.append("| iteration | " + " | ".join(f"{c:.1f}" for c in sums) + " |")
    tokens = cluster.num_prompts * cluster.response_tokens
    lines.append(f"| response tokens per second |  |  |  | {tokens / sums[3]:,.0f} | "
                 f"{tokens / sums[4]:,.0f} |")
    return "\n".join(lines)


def markdown(folder: Path, cluster: Cluster) -> str:
    """What docs/step_time.md holds of it."""
    parts = []
    for device, title in (("cpu", "CPU"), ("cuda", "GPU")):
        points = measured_points(folder, device)
        if not points:
            parts.append(f"**{title}**: not yet measured.")
            continue
        shares = fit(points)
        known, unknown = ([abs(e or 0.0) for e in side]
                          for side in zip(*errors(points), strict=True))
        texts = ["no cost" if np.isinf(s) else f"{s:.2f}" for s in shares]
        parts.append(
            f"**{title}**: {len(points)} points. Shares of the ceilings: products {texts[0]}, "
            f"decode products {texts[1]}, bytes {texts[2]}. Largest error {max(known):.0%}, median "
            f"{np.median(known):.0%}; of points that the fit does not know {max(unknown):.0%} and "
            f"{np.median(unknown):.0%}.\n\n{points_table(points)}")
    return "\n\n".join([*parts, answer_table(cluster)])


def read_cluster(values: Mapping[str, Any]) -> Cluster:
    """A cluster from the options of the command line.

    Raises:
        SystemExit: when a number is not positive, or prompts do not divide.
    """
    return Cluster(**{name: value for name, value in values.items() if value is not None})

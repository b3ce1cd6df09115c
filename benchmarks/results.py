"""The one format of a result file: where and how it was measured, and a row per figure.

docs/benchmarks.md explains every field. A row without a figure says why there is none.
"""

import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.ceilings import Ceilings
from benchmarks.timing import Timing, last_cache_bytes
from fastrl.backends import BACKENDS

ROOT = Path(__file__).resolve().parents[1]
SCHEMA = 1
STATUSES = ("ok", "checked", "wrong", "error", "unavailable", "skipped")
"""Timed; right but not timed; results differ from the reference; raised; cannot run here; no time
was left for it."""
OWN = (*BACKENDS, "fastrl")
"""Providers that have to work."""
PACKAGES = ("torch", "triton", "transformers", "liger-kernel", "vllm", "numpy")
SOURCES = ("fastrl", "kernels", "csrc", "benchmarks")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One provider on one workload. Times in seconds, sizes in bytes."""

    workload: str
    """The op, or what is done from end to end."""
    case: str = ""
    sizes: dict[str, int]
    dtype: str
    provider: str
    status: str = "ok"
    reason: str = ""
    timer: str = ""
    rounds: int = 0
    median_s: float | None = None
    p10_s: float | None = None
    p90_s: float | None = None
    bytes: int = 0
    flops: int = 0
    share_of_floor: float | None = None
    share_of_assumed_floor: float | None = None
    peak_bytes: int | None = None
    samples_s: list[float] = field(default_factory=list)
    """In the order in which they were taken; files of before 2026-11-24, evening, have none."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Figures that only this workload has, such as tokens_per_s."""

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise ValueError(f"status: expected one of {', '.join(STATUSES)}, got {self.status!r}")
        if (self.status == "ok") != (self.median_s is not None) or (
                self.status != "ok" and not self.reason):
            raise ValueError(f"{self.workload} by {self.provider}: a row has a median, or a "
                             f"status other than ok and a reason")

    @property
    def is_failure(self) -> bool:
        """True when something of fastrl's is broken, not merely absent."""
        return self.provider.split("_")[0] in OWN and self.status in ("wrong", "error")

    def timed(self, timing: Timing, peak: int | None, measured: Ceilings | None,
              assumed: Ceilings | None) -> "Row":
        """This row with figures. Floors are those of its bytes and operations."""
        median = timing.quantile(0.5)

        def share(ceilings: Ceilings | None) -> float | None:
            floor = ceilings.floor_s(self.bytes, self.flops) if ceilings else 0.0
            return round(floor / median, 4) if floor else None

        return Row(**{**asdict(self), "status": "ok", "reason": "", "timer": timing.timer,
                      "rounds": len(timing.seconds), "median_s": median,
                      "samples_s": [float(f"{s:.6g}") for s in timing.seconds],
                      "p10_s": timing.quantile(0.1), "p90_s": timing.quantile(0.9),
                      "share_of_floor": share(measured), "share_of_assumed_floor": share(assumed),
                      "peak_bytes": peak})

    def without_figure(self, status: str, reason: str) -> "Row":
        """This row with the reason why there is no figure."""
        return Row(**{**asdict(self), "status": status, "reason": reason, "median_s": None,
                      "p10_s": None, "p90_s": None, "samples_s": []})


def head(topic: str, device: str, measured: Ceilings | None, assumed: Ceilings | None
         ) -> dict[str, Any]:
    """Everything of a result file but its rows."""
    return {
        "schema": SCHEMA, "topic": topic,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command(),
        **source_version(), "device": device_facts(device), "versions": versions(),
        "ceilings": {"measured": measured and measured.as_dict(),
                     "assumed": assumed and assumed.as_dict()},
        "rows": [],
    }


HEAD = ("schema", "topic", "date", "command", "commit", "has_changes", "source_sha256", "device",
        "versions", "ceilings", "rows")
"""Keys of a result file."""


def as_document(document: dict[str, Any], rows: list[Row]) -> dict[str, Any]:
    """A result file: its head and its rows."""
    return {**document, "rows": [asdict(row) for row in rows]}


def save(document: dict[str, Any], rows: list[Row], path: Path) -> None:
    """Write a result file as a whole; what was there stays until the new one is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(as_document(document, rows), indent=1) + "\n")
    partial.replace(path)


def load(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """A result file and its rows.

    Raises:
        ValueError: when a field is missing or unknown.
    """
    document = json.loads(path.read_text())
    if set(document) != set(HEAD):
        raise ValueError(f"{path}: fields differ by {sorted(set(document) ^ set(HEAD))}")
    names = {f.name for f in fields(Row)}
    for row in document["rows"]:
        if set(row) | {"samples_s"} != names:
            raise ValueError(f"{path}: a row's fields differ by {sorted(set(row) ^ names)}")
    return document, [Row(**row) for row in document["rows"]]


def file_name(topic: str, device: str) -> str:
    """<topic>_<device>_<yyyymmdd>.json, the device as one word."""
    word = device
    if device == "cuda":
        word = torch.cuda.get_device_name().removeprefix("NVIDIA ").split()[0].lower()
    return f"{topic}_{word}_{datetime.now(UTC):%Y%m%d}.json"


def command() -> str:
    """The command line of this process, without the folder of a program."""
    program = Path(sys.argv[0])
    if program.name == "__main__.py":
        return shlex.join(["python", "-m", program.parent.name, *sys.argv[1:]])
    return shlex.join([program.name, *sys.argv[1:]])


def source_version() -> dict[str, Any]:
    """The commit, whether the tree has changes, and a hash of the sources themselves."""
    digest = hashlib.sha256()
    for path in sorted(p for folder in SOURCES for p in (ROOT / folder).rglob("*")
                       if p.suffix in (".py", ".cu", ".cuh", ".cpp", ".h")):
        digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    commit = _output("git", "rev-parse", "HEAD")
    changes = _output("git", "status", "--porcelain", "--", *SOURCES)
    return {"commit": commit or "unknown", "has_changes": None if commit is None else bool(changes),
            "source_sha256": digest.hexdigest()}


def device_facts(device: str) -> dict[str, Any]:
    """Name, driver, clocks and sizes of the device, as it is found; nothing is set."""
    facts: dict[str, Any] = {"type": device, "system": platform.platform(),
                             "processors": os.cpu_count(),
                             "cache_bytes": last_cache_bytes(device)}
    if device == "cpu":
        info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
        lines = dict(re.split(r"\s*:\s*", line, maxsplit=1)
                     for line in info.splitlines() if ":" in line)
        return {**facts, "name": lines.get("model name", platform.machine()),
                "driver": None, "clocks_mhz": {"processor": lines.get("cpu MHz")},
                "threads": torch.get_num_threads(),
                "load": os.getloadavg()[0]}
    properties = torch.cuda.get_device_properties(0)
    found = _output("nvidia-smi", "--id=0", "--format=csv,noheader,nounits",
                    "--query-gpu=driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit")
    names = ("driver", "sm", "memory", "max_sm", "power_limit_w")
    read = dict(zip(names, (found or "").split(", "), strict=False))
    return {**facts, "name": properties.name, "driver": read.pop("driver", None) or None,
            "clocks_mhz": read, "memory_bytes": properties.total_memory,
            "num_multiprocessors": properties.multi_processor_count,
            "compute_capability": f"{properties.major}.{properties.minor}"}


def versions() -> dict[str, str | None]:
    """Versions of Python, of the packages that matter, and of CUDA."""
    found: dict[str, str | None] = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def _output(*command: str) -> str | None:
    """What a command prints, None where it is missing or fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def table(rows: list[Row]) -> str:
    """A short table: a line per figure and per failure; what was left out in one line each."""
    lines = [("op", "provider", "median", "p10", "p90", "rate", "floor", "speed-up", "peak",
              "sizes")]
    left_out: dict[tuple[str, str], int] = {}
    for row in rows:
        name = f"{row.workload} {row.case}".strip()
        if row.median_s is not None:
            lines.append((name, row.provider, *_figures(row, rows)))
        elif row.status in ("wrong", "error"):
            lines.append((name, row.provider, f"{row.status}: {row.reason}"))
        else:
            reason = row.reason.removeprefix(f"{row.workload}: ")
            left_out[row.provider, reason] = left_out.get((row.provider, reason), 0) + 1
    widths = [max(len(line[i]) for line in lines if len(line) > 3) for i in range(len(lines[0]))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=False)).rstrip()
            for line in lines]
    return "\n".join([*text, *(f"{provider}, {number} cases: {reason}"
                               for (provider, reason), number in left_out.items())])


def _figures(row: Row, rows: list[Row]) -> tuple[str, ...]:
    """The cells of a row; the speed-up is that over torch on the same case."""
    assert row.median_s is not None and row.p10_s is not None and row.p90_s is not None
    same = (row.workload, row.case, row.sizes, row.dtype)
    base = [r.median_s for r in rows if r.provider == "torch" and r.median_s is not None
            and (r.workload, r.case, r.sizes, r.dtype) == same]
    rate = (f"{row.flops / row.median_s / 1e12:.3g} TFLOP/s" if row.flops
            else f"{row.bytes / row.median_s / 1e9:.3g} GB/s")
    return (*(time_text(s) for s in (row.median_s, row.p10_s, row.p90_s)), rate,
            "" if row.share_of_floor is None else f"{row.share_of_floor:.1%}",
            f"{base[0] / row.median_s:.2f}" if base else "",
            "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.1f} MiB",
            " ".join([*(f"{k}={v}" for k, v in row.sizes.items()), row.dtype]))


def time_text(seconds: float) -> str:
    """Three digits and a unit."""
    for unit, factor in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= factor:
            return f"{seconds / factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"

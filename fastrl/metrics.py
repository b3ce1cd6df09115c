"""The folder of a run: config, versions, metrics as JSON lines, samples, and the end mark."""

import json
import math
import os
import platform
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import yaml

from fastrl.backends import chosen_backends
from fastrl.checkpoints import Checkpoint
from fastrl.config import to_dict
from fastrl.continuation import cut_files, refuse_used_folder
from fastrl.errors import ConfigError
from fastrl.memory.arena import gpu_peak_bytes

TIMING_AREAS = ("time", "throughput", "memory")
"""Areas whose values differ between two equal runs, settings among them left out; they go to
timing.jsonl."""
SETTINGS = frozenset({"memory/max_tokens_per_microbatch"})
"""Values of those areas that an equal run repeats."""

_PACKAGES = ("fastrl-engine", "torch", "transformers", "tokenizers", "safetensors", "numpy",
             "triton")


def to_json(value: Any) -> str:
    """One line of strict JSON; NaN and infinities, which JSON cannot hold, become null."""
    return json.dumps(_finite(value), ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    """`value` with every non-finite float replaced by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def write_atomic(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old content or the new one, never a part."""
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def peak_memory_gib(device: torch.device | str) -> float:
    """Most memory since the peak was last started anew (`fastrl.memory.measure`), or so far.

    Of the process on a CPU, of PyTorch's allocator and the arenas on a GPU.
    """
    if torch.device(device).type == "cuda":
        return gpu_peak_bytes(device) / 2**30
    import resource  # absent on Windows

    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class PhaseTimer:
    """Seconds spent in the named phases of one step.

    Example:
        >>> timer = PhaseTimer()
        >>> with timer.phase("generate"):
        ...     pass
        >>> sorted(timer.metrics())
        ['time/generate_s', 'time/step_s']
    """

    def __init__(self) -> None:
        self._begin = time.perf_counter()
        self._seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the block's seconds to phase `name`."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - begin

    def metrics(self, num_tokens: int | None = None) -> dict[str, float]:
        """`time/<phase>_s`, `time/step_s` since creation, and tokens per second of the step."""
        step = time.perf_counter() - self._begin
        metrics = {f"time/{name}_s": seconds for name, seconds in self._seconds.items()}
        metrics["time/step_s"] = step
        if num_tokens is not None:
            metrics["throughput/tokens_per_s"] = num_tokens / max(step, 1e-9)
        return metrics


def is_timing(name: str) -> bool:
    """True for a metric that may differ between two equal runs."""
    return name.partition("/")[0] in TIMING_AREAS and name not in SETTINGS


class RunFolder:
    """The folder of one run, and the only way trainers write to disk.

    Files: `config.yaml` (every setting), `run.json` (stage, versions, device, lineage, backends),
    `metrics.jsonl` (values that an equal run repeats bit for bit), `timing.jsonl` (seconds, tokens
    per second, memory), `samples.jsonl`, `model/` (written by the stage), and last `finished.json`:
    a folder without it holds a run that did not end.

    Args:
        path: The folder; created with its parents.
        config: A config dataclass of fastrl.
        stage: Name of the stage, such as "sft".
        report_to: Extra sinks: "tensorboard".
        device: Where the stage runs, for run.json and peak memory.
        lineage: What the run was made from (hashes of data and parent models), for run.json.
        checkpoint: Continue the run that the folder holds from here: what was appended to its
            files since then is cut off, to be written again. See `fastrl.continuation`.
    Raises:
        ConfigError: when the folder holds anything already, or a sink is not installed.
    """

    def __init__(
        self,
        path: str | Path,
        config: object,
        *,
        stage: str,
        report_to: Sequence[str] = (),
        device: torch.device | str = "cpu",
        lineage: Mapping[str, Any] | None = None,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        self.path = Path(path)
        self.stage = stage
        self.device = torch.device(device)
        self.checkpoint = checkpoint
        if checkpoint is None:
            refuse_used_folder(self.path)
        for sink in report_to:
            _check_sink(sink)
        self._is_new = not self.path.exists()
        self.path.mkdir(parents=True, exist_ok=True)
        self._begin = time.time()
        settings = yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)
        write_atomic(self.path / "config.yaml", settings)
        machine = {"versions": _versions(), "device": _describe(self.device)}
        if checkpoint is None:
            self.update_run({"stage": stage, "started_at": _utc(self._begin), **machine,
                             "lineage": dict(lineage or {})})
        else:
            cut_files(self.path, checkpoint.facts["files"])
            self.update_run({"resumed_at": _utc(self._begin), "resumed_from": checkpoint.step,
                             **machine})
        self._tensorboard = None if "tensorboard" not in report_to else _tensorboard_writer(
            self.path, None if checkpoint is None else checkpoint.step + 1)

    @property
    def model_path(self) -> Path:
        """Where the stage saves its model."""
        return self.path / "model"

    def remove_if_unused(self) -> None:
        """Delete a run that did not begin: one whose folder holds nothing but its settings."""
        written = list(self.path.iterdir())
        if {path.name for path in written} <= {"config.yaml", "run.json", "plan.json"}:
            for path in written:
                path.unlink()
            if self._is_new:
                self.path.rmdir()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one step's metrics: what `is_timing` to timing.jsonl, the others to metrics.jsonl.

        Args:
            step: Finished steps, from 1 (0 is the state before training).
            metrics: `area/name` to number.
        """
        timing = {k: v for k, v in metrics.items() if is_timing(k)}
        values = {k: v for k, v in metrics.items() if k not in timing}
        if values:
            self.append("metrics.jsonl", {"step": step, **values})
        if timing:
            self.append("timing.jsonl", {"step": step, **timing})
        if self._tensorboard is not None:
            for name, value in metrics.items():
                self._tensorboard.add_scalar(name, value, step)

    def log_samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """Append rows (prompt, response, score, ...) to samples.jsonl."""
        for sample in samples:
            self.append("samples.jsonl", {"step": step, **sample})

    def append(self, name: str, row: Mapping[str, Any]) -> None:
        """Append one JSON line to a file of the run."""
        path = self.path / name
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(to_json(row) + "\n")
        except OSError as error:  # a write that finds no room does not say where
            error.filename = error.filename or str(path)
            raise

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write a whole JSON file of the run, atomically."""
        write_atomic(self.path / name, json.dumps(_finite(value), indent=2, ensure_ascii=False,
                                                  allow_nan=False) + "\n")

    def update_run(self, facts: Mapping[str, Any]) -> None:
        """Add facts to run.json (chosen backends, lineage found later)."""
        path = self.path / "run.json"
        known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        self.write_json("run.json", {**known, **facts})

    def finish(self, summary: Mapping[str, Any] | None = None) -> None:
        """Note the backends, close the sinks, then write finished.json: the run is complete."""
        self.update_run({"backends": chosen_backends()})
        self.close()
        now = time.time()
        self.write_json("finished.json", {
            "stage": self.stage, "finished_at": _utc(now), "seconds": round(now - self._begin, 3),
            "peak_memory_gib": round(peak_memory_gib(self.device), 3),
            "summary": dict(summary or {}),
        })

    def close(self) -> None:
        """Close the extra sinks without marking the run as finished."""
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = None

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        self.close()


def _check_sink(name: str) -> None:
    """Raise ConfigError when a sink is unknown or its package is missing."""
    if name != "tensorboard":
        raise ConfigError(f"report_to: expected 'tensorboard', got {name!r}; change report_to")
    if find_spec("tensorboard") is None:
        raise ConfigError("report_to: expected the package tensorboard to be installed, found "
                          "none; pip install 'fastrl-engine[tensorboard]' or remove it from "
                          "report_to (metrics.jsonl is always written)")


def _tensorboard_writer(path: Path, purge_step: int | None) -> Any:
    """A TensorBoard writer into `path/tensorboard`; what is there from `purge_step` on is hidden.

    The import takes a second, so it is local.
    """
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(log_dir=str(path / "tensorboard"), purge_step=purge_step)


def _versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that decide the numbers; None when absent."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return versions


def _describe(device: torch.device) -> dict[str, Any]:
    """What the run computes on."""
    facts: dict[str, Any] = {"type": device.type, "platform": platform.platform(),
                             "threads": torch.get_num_threads()}
    if device.type == "cuda":
        facts["name"] = torch.cuda.get_device_name(device)
        facts["cuda"] = torch.version.cuda
    return facts


def _utc(seconds: float) -> str:
    """Time as 2026-01-31T12:00:00Z."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))

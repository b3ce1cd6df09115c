"""`fastrl doctor`: what this machine can run, and a real two-second try."""

import os
import platform
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fastrl.errors import FastRLError

if TYPE_CHECKING:
    import torch

    from fastrl.console import Console

REQUIRED = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "PyYAML", "jinja2",
            "rich")
OPTIONAL = {"triton": "GPU kernels", "flash-attn": "GPU attention",
            "tensorboard": "--report_to tensorboard", "pyarrow": ".parquet files"}
LOGPROB_TOLERANCE = 1e-4
"""Largest difference of log-probs of engine and full forward, in float32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DoctorRun:
    """The settings of `fastrl doctor`."""

    device: str = "auto"
    """auto, cpu, cuda or cuda:N; auto takes a GPU when there is one."""
    exact: str | None = None
    """Folder of a model: only try whether its rows have the same bits in rollout and update."""
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    """Type of that model's weights; auto is float32 on a CPU and bfloat16 on a GPU."""


@dataclass(frozen=True, slots=True)
class SelfCheck:
    """A tiny decoder that generated, and the same tokens in one full forward pass."""

    num_tokens: int
    gap: float
    """Largest difference of log-probs between engine and full forward."""
    seconds: float

    @property
    def is_passed(self) -> bool:
        """True when both sides agree."""
        return self.num_tokens > 0 and self.gap <= LOGPROB_TOLERANCE


def examine(config: DoctorRun, console: "Console") -> bool:
    """Print what was found and return True when the self check, or the sweep, passed.

    Raises:
        ConfigError: when a device is named that is not there.
    """
    from fastrl import ops
    from fastrl.backends import backend_table
    from fastrl.trainers.common import resolve_device

    device = resolve_device(config.device)
    if config.exact is not None:
        return examine_exactness(config.exact, config.dtype, device, console)
    console.table("machine", ("what", "found"), list(machine_facts(device)))
    console.table("packages", ("package", "version", "needed for"), list(package_rows()))
    rows = backend_table(ops, device.type)
    console.table(f"operations on {device.type}", ("op", "backend", "status", "reason"),
                  [(row.op, row.backend, row.status, row.reason) for row in rows])
    try:
        check = self_check(device)
    except (FastRLError, RuntimeError) as error:
        console.warning(f"self check failed: {error}")
        return False
    verdict = "passed" if check.is_passed else f"failed (tolerance {LOGPROB_TOLERANCE:g})"
    console.result(f"self check {verdict}: {check.num_tokens} tokens generated in "
                   f"{check.seconds:.1f} s, log-probs of engine and full forward differ by at most "
                   f"{check.gap:.1e}")
    return check.is_passed


def examine_exactness(path: str, dtype: str, device: "torch.device", console: "Console") -> bool:
    """Print the sweep of exact mode for a model; True when every line of it passed.

    Raises:
        ModelError: when the model cannot be loaded.
    """
    from fastrl.exactness import set_workspaces
    from fastrl.exactness.sweep import sweep
    from fastrl.models.weights import load_causal_lm
    from fastrl.trainers.common import resolve_dtype

    name = str(resolve_dtype(dtype, device)).removeprefix("torch.")
    set_workspaces(device.type)
    begin = time.perf_counter()
    lines = sweep(load_causal_lm(path, name, str(device)).eval())
    console.table(f"exact mode of {path} on {device} in {name}",
                  ("work", "shape", "result", "used"),
                  [(line.work, line.shape, line.result, line.used) for line in lines])
    failed = [line for line in lines if not line.is_exact]
    console.result(f"exact mode {'failed' if failed else 'passed'}: {len(lines) - len(failed)} of "
                   f"{len(lines)} lines exact, {time.perf_counter() - begin:.1f} s")
    return not failed


def machine_facts(device: "torch.device") -> Iterator[tuple[str, str]]:
    """Yield (what, found) about system, processor, memory, GPU and compilers."""
    import torch

    yield "system", platform.platform()
    yield "python", platform.python_version()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield "processor", f"{cores} cores usable, torch uses {torch.get_num_threads()} threads"
    yield "free memory", _gib(_free_memory_bytes())
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        yield "GPU", f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
        yield "free GPU memory", f"{_gib(free)} of {_gib(total)}"
    else:
        yield "GPU", "none in use"
    found = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)
    if named := os.environ.get("FASTRL_BACKEND"):
        yield "FASTRL_BACKEND", f"{named}, for every operation, whatever auto would take"
    yield "C++ compiler", found or "none (needed only to build the CUDA extension)"
    yield "CUDA compiler", shutil.which("nvcc") or "none (needed only to build the CUDA extension)"


def package_rows() -> Iterator[tuple[str, str, str]]:
    """Yield (package, version, what it is needed for)."""
    for name in REQUIRED:
        yield name, _version(name), "always"
    for name, purpose in OPTIONAL.items():
        yield name, _version(name), purpose


def self_check(device: "torch.device") -> SelfCheck:
    """Generate with a tiny random decoder and compare its log-probs with a full forward pass."""
    from fastrl.config import SamplingConfig
    from fastrl.engine import Engine
    from fastrl.models import DecoderConfig, new_decoder, response_logprobs

    begin = time.perf_counter()
    config = DecoderConfig(family="llama", vocab_size=101, hidden_size=32, intermediate_size=48,
                           num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, rotary_dim=8,
                           max_positions=64)
    model = new_decoder(config, seed=0).to(device).eval()
    rollout = Engine(model).generate([[1, 2, 3], [5, 6, 7, 8, 9]],
                                     SamplingConfig(max_new_tokens=16), num_samples_per_prompt=2)
    logprobs, _ = response_logprobs(model, rollout, 1.0, 1024)
    gap = float((logprobs - rollout.rollout_logprobs).abs().max())
    return SelfCheck(int(rollout.response_mask.sum()), gap, time.perf_counter() - begin)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _free_memory_bytes() -> int | None:
    """Memory that can be had without swapping; None where the system does not say."""
    from fastrl.memory.measure import kernel_bytes

    return kernel_bytes(Path("/proc/meminfo"), "MemAvailable") or None


def _gib(num_bytes: int | None) -> str:
    return "unknown" if num_bytes is None else f"{num_bytes / 2**30:.1f} GiB"

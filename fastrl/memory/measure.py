"""What a run really takes: the peak of each phase, beside what was planned for it."""

import dataclasses
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastrl.config import PPOConfig, TrainConfig, read_bytes
from fastrl.errors import ConfigError
from fastrl.memory.arena import gpu_peak_bytes
from fastrl.memory.plan import MemoryPlan, gib
from fastrl.memory.report import describe, headline
from fastrl.memory.sizes import GIB
from fastrl.memory.stages import Config
from fastrl.memory.training import Device
from fastrl.metrics import RunFolder
from fastrl.models.causal_lm import CausalLM, ScalarModel

logger = logging.getLogger("fastrl")

TOLERANCE = {"cuda": 0.10, "cpu": 0.20}
"""Share of the plan by which a measured peak may differ before it is worth a warning."""
MIN_PLANNED_BYTES = {"cuda": 0, "cpu": GIB}
"""Below, what a process has beside tensors outweighs what was planned."""


def free_bytes(device: torch.device) -> int:
    """Memory that a device has for this process, what the process holds already included."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():  # not Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return kernel_bytes(meminfo, "MemAvailable") + resident_set_bytes()


def budget_bytes(config: TrainConfig, device: torch.device) -> int:
    """Memory to plan for: what `gpu_memory` says, else what the device has."""
    if config.gpu_memory is not None:
        return read_bytes(config.gpu_memory, "gpu_memory")
    return free_bytes(device)


def resident_set_bytes() -> int:
    """Memory of this process that is in RAM now; 0 where the kernel does not say."""
    return kernel_bytes(Path("/proc/self/status"), "VmRSS")


def kernel_bytes(path: Path, name: str) -> int:
    """A line `name: N kB` of a file of the kernel, in bytes; 0 where there is none."""
    if not path.exists():
        return 0
    lines = (line.split() for line in path.read_text("ascii").splitlines())
    return next((int(words[1]) * 1024 for words in lines if words[:1] == [f"{name}:"]), 0)


class MemoryWatch:
    """A plan, told before the first step, and the peaks of that step beside it.

    On a GPU a peak is that of PyTorch's allocator and of the arenas; on a CPU the largest resident
    set, as the kernel keeps it, above what the process had beside its tensors when this was made.

    Args:
        plan: For this device.
        device: Where the run is.
        ready: Tensors that are there already and are part of the plan: the weights.
        run: Gets plan.json; None writes nothing.
    Raises:
        ConfigError: when the plan does not fit on a GPU; a CPU's may lean on swap, with a warning.
    """

    def __init__(
        self, plan: MemoryPlan, device: torch.device, ready: Iterable[Tensor],
        run: RunFolder | None = None,
    ) -> None:
        self.plan, self.device = plan, device
        if not plan.fits and device.type == "cuda":
            raise ConfigError(describe(plan))
        if not plan.fits:
            logger.warning("%s", describe(plan))
        logger.info("%s", headline(plan))
        if run is not None:
            run.write_json("plan.json", plan.to_dict())
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in ready}
        self._baseline = resident_set_bytes() - sum(storages.values())
        self._peaks: dict[str, int] = {}
        self._is_over = device.type == "cpu" and not _begin_peak(device)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Inside the block the peak is that of this phase; until `metrics` was called."""
        if self._is_over:
            yield
            return
        _begin_peak(self.device)
        yield
        self._peaks[name] = max(self._peaks.get(name, 0), self._peak())

    def metrics(self) -> dict[str, float]:
        """Planned and measured GiB of each phase of the first step; nothing later.

        Warns where a peak is above its plan by more than TOLERANCE, and where that of the largest
        phase is below it.
        """
        if self._is_over or not self._peaks:
            return {}
        self._is_over = True
        metrics: dict[str, float] = {}
        for name, peak in self._peaks.items():
            planned = self.plan.total(name)
            metrics |= {f"memory/{name}_planned_gib": planned / GIB,
                        f"memory/{name}_peak_gib": peak / GIB}
            difference = peak - planned
            if planned < MIN_PLANNED_BYTES[self.device.type] \
                    or (difference < 0 and name != self.plan.peak_phase) \
                    or abs(difference) <= TOLERANCE[self.device.type] * planned:
                continue
            logger.warning("memory of %s: planned %s, measured %s; %s", name, gib(planned),
                           gib(peak), "lower max_tokens_per_microbatch if memory runs out"
                           if difference > 0 else "larger microbatches may fit")
        return metrics

    def _peak(self) -> int:
        if self.device.type == "cuda":
            return gpu_peak_bytes(self.device)
        return kernel_bytes(Path("/proc/self/status"), "VmHWM") - self._baseline


def _begin_peak(device: torch.device) -> bool:
    """Forget the peak so far; False where the kernel does not let a process do that."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")  # "reset the peak resident set size"
    except OSError:  # not Linux, or a container without the file
        return False
    return True


def device_of(model: CausalLM | ScalarModel, config: TrainConfig) -> Device:
    """Where a model is, as a plan asks."""
    weight = next(model.parameters())
    return Device(weight.device.type, budget_bytes(config, weight.device), weight.dtype)


def fitted(config: Config, plan: MemoryPlan, device_type: str) -> Config:
    """The settings with the sizes that a plan found; a CPU, which can swap, keeps its own."""
    if device_type != "cuda":
        return config
    tokens = min(config.max_tokens_per_microbatch, plan.max_tokens_per_microbatch)
    changes: dict[str, Any] = {"max_tokens_per_microbatch": tokens}
    if isinstance(config, PPOConfig) and config.engine.num_pages is None:
        changes["engine"] = dataclasses.replace(config.engine, num_pages=plan.num_pages)
    return dataclasses.replace(config, **changes)

"""What a run really takes: the peak of each phase, beside what was planned for it."""

import os
from pathlib import Path

import torch

from fastrl.config import TrainConfig, read_bytes
from fastrl.memory.sizes import GIB

TOLERANCE = {"cuda": 0.10, "cpu": 0.20}
"""Share of the plan by which a measured peak may differ before it is worth a warning."""
MIN_PLANNED_BYTES = {"cuda": 0, "cpu": GIB}
"""Below, what a process has beside tensors outweighs what was planned."""


def free_bytes(device: torch.device) -> int:
    """Memory that a device has for this process, what the process holds already included."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    return _meminfo("MemAvailable") + resident_set_bytes()


def budget_bytes(config: TrainConfig, device: torch.device) -> int:
    """Memory to plan for: what `gpu_memory` says, else what the device has."""
    if config.gpu_memory is not None:
        return read_bytes(config.gpu_memory, "gpu_memory")
    return free_bytes(device)


def _meminfo(name: str) -> int:
    for line in Path("/proc/meminfo").read_text("ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _status(name: str) -> int:
    """A line of the kernel's account of this process, in bytes."""
    for line in Path("/proc/self/status").read_text("ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return 0


def resident_set_bytes() -> int:
    """Memory of this process that is in RAM now."""
    return _status("VmRSS")

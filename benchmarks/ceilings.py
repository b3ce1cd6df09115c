"""What the machine can do at most, measured in the same run: floors come from it."""

from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import torch

from benchmarks.timing import interleaved, sampler


@dataclass(frozen=True)
class Ceilings:
    """Rates that no op exceeds."""

    bytes_per_s: float
    """Of a large copy, bytes read plus bytes written."""
    flops_per_s: float
    """Of a large matrix product of random numbers."""
    product_dtype: str
    """Type of that product's operands."""

    def floor_s(self, bytes_moved: int, flops: int) -> float:
        """The least time for so many bytes and operations."""
        return max(bytes_moved / self.bytes_per_s, flops / self.flops_per_s)

    def as_dict(self) -> dict[str, Any]:
        """For the result file."""
        return asdict(self)


ASSUMED = {"NVIDIA H200": Ceilings(4.3e12, 790e12, "bfloat16")}
"""Published targets are shares of these, so a file holds the share of them as well."""


@cache
def measured_ceilings(device: str, small: bool) -> Ceilings:
    """Copy bandwidth and product rate of this machine, now."""
    on_gpu = device == "cuda" and not small
    numel = 2**30 if on_gpu else 2**24 if not small else 2**20
    width = 8192 if on_gpu else 1024 if not small else 256
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.device(device):
        source, target = torch.randn(numel), torch.empty(numel)
        # Random numbers: a product of zeros draws less power and runs faster.
        left, right = torch.randn(2, width, width, dtype=dtype)
        product = torch.empty(width, width, dtype=dtype)
    target.copy_(source), torch.mm(left, right, out=product)
    times = interleaved({
        "copy": sampler([lambda: target.copy_(source)], device),
        "product": sampler([lambda: torch.mm(left, right, out=product)], device),
    }, seconds_each=0.02 if small else 0.5)
    medians = {name: timing.quantile(0.5) for name, timing in times.items()}
    return Ceilings(2 * source.nbytes / medians["copy"], 2 * width**3 / medians["product"],
                    str(dtype).removeprefix("torch."))


def assumed_ceilings(device_name: str) -> Ceilings | None:
    """The ceilings that docs/benchmarks.md assumes for a device, where it does."""
    return ASSUMED.get(device_name)

"""Seconds and memory of calls: interleaved, on cold caches, by device events or processor time.

A sample goes through the input sets in turn, and the sets together are larger than the cache, so a
call finds its inputs in memory. On a GPU, work without a host synchronisation that takes less than
a millisecond is captured in a graph with one call per input set, which leaves out what the host
needs to launch it; other short work is queued back to back.
"""

import ctypes
import gc
import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

Call = Callable[[], object]
GRAPH_BELOW_S = 1e-3
MAX_INPUT_SETS = 64
MIN_ROUNDS, MAX_ROUNDS = 5, 100


@dataclass(frozen=True)
class Sampler:
    """`sample()` is the seconds of one call; `timer` says how they are measured."""

    timer: str
    sample: Callable[[], float]


@dataclass(frozen=True)
class Timing:
    """What a provider needed."""

    timer: str
    seconds: list[float]

    def quantile(self, share: float) -> float:
        """The sample below which `share` of the samples are; 0.5 is the median."""
        if share == 0.5:
            return statistics.median(self.seconds)
        ordered = sorted(self.seconds)
        return ordered[round(share * (len(ordered) - 1))]


def interleaved(samplers: Mapping[str, Sampler], seconds_each: float = 0.3,
                min_rounds: int = MIN_ROUNDS) -> dict[str, Timing]:
    """Sample several providers in turns, so that a change of the machine meets all of them.

    Args:
        samplers: By provider; everything is compiled already.
        seconds_each: Time to spend on each, from `min_rounds` to MAX_ROUNDS rounds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in samplers}
    names, rounds, spent = list(samplers), 0, 0.0
    while rounds < min_rounds or (rounds < MAX_ROUNDS and spent < seconds_each * len(names)):
        begin = time.perf_counter()
        first = rounds % len(names)
        for name in names[first:] + names[:first]:
            seconds[name].append(samplers[name].sample())
        rounds, spent = rounds + 1, spent + time.perf_counter() - begin
    return {name: Timing(samplers[name].timer, seconds[name]) for name in names}


def sampler(calls: Sequence[Call], device: str) -> Sampler:
    """The way to time calls on a device that suits their length."""
    if device == "cpu":
        ring = itertools.cycle(calls)
        return Sampler("processor_time", lambda: _processor_seconds(next(ring)))
    estimate = min(_events_seconds([call]) for call in [*calls[:2], calls[0]])
    if estimate >= GRAPH_BELOW_S:
        ring = itertools.cycle(calls)
        return Sampler("events", lambda: _events_seconds([next(ring)]))
    if synchronizes(calls[0]):
        return Sampler("queue", lambda: _events_seconds(calls))
    graph = captured(calls)
    return Sampler("graph", lambda: _events_seconds([graph.replay]) / len(calls))


def _processor_seconds(call: Call) -> float:
    """Processor time of this process: what other processes do to the clock does not count."""
    begin = time.process_time_ns()
    call()
    return (time.process_time_ns() - begin) * 1e-9


def _events_seconds(calls: Sequence[Call]) -> float:
    """Device seconds per call of calls that are queued one behind the other."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for call in calls:
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e-3 / len(calls)


def synchronizes(call: Call) -> bool:
    """True when a call waits for the device, which a graph cannot hold."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        if "synchronizing" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def captured(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    """A graph that makes the calls one after the other."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in (calls[0], calls[-1]):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    torch.cuda.synchronize()
    return graph


def num_input_sets(bytes_of_one: int, device: str, cache_bytes: int | None = None) -> int:
    """How many sets of inputs are three times the cache, from 2 to MAX_INPUT_SETS."""
    cache_bytes = last_cache_bytes(device) if cache_bytes is None else cache_bytes
    return min(MAX_INPUT_SETS, max(2, -(-3 * cache_bytes // max(1, bytes_of_one))))


def size_of(inputs: Mapping[str, object]) -> int:
    """Bytes of the tensors among the inputs."""
    return sum(x.numel() * x.element_size() for x in inputs.values() if isinstance(x, Tensor))


@cache
def last_cache_bytes(device: str) -> int:
    """The last cache before memory; 32 MiB where Linux does not say."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(0).L2_cache_size)
    files = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    sizes = [int(text[:-1]) * 1024 for text in (f.read_text().strip() for f in files)
             if text.endswith("K")]
    return max(sizes, default=32 * 2**20)


def peak_bytes(call: Call, device: str) -> int:
    """Memory that a call takes beyond what is there before it."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)  # what the C library keeps for later would hide an allocation
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark restarts from here
    before = _resident_bytes("VmHWM")
    call()
    return _resident_bytes("VmHWM") - before


def _resident_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise LookupError(f"/proc/self/status has no {field}")

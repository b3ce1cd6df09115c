"""`python -m benchmarks kernels`: every op by every provider, compared, then timed in turns."""

import gc
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import results
from benchmarks.cases import Case, Inputs, Provider, call, check, make_inputs, providers
from benchmarks.ceilings import Ceilings, assumed_ceilings, measured_ceilings
from benchmarks.results import Row
from benchmarks.timing import (
    MIN_ROUNDS,
    Call,
    Sampler,
    interleaved,
    num_input_sets,
    peak_bytes,
    sampler,
    size_of,
)
from fastrl.errors import BackendUnavailableError

MAX_CPU_INPUT_BYTES = 512 * 2**20
Rows = dict[str, Row]
"""By provider."""


class DeviceInError(Exception):
    """The device answers nothing any more: what is left needs a new process."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a run does."""

    device: str
    """cpu or cuda."""
    small: bool = False
    """Take the sizes for trying the flow."""
    wanted: tuple[str, ...] = ()
    """Providers; none: all, but on a CPU not torch.compile, which takes minutes there."""
    check_only: bool = False
    """Compare results, time nothing."""
    min_rounds: int = MIN_ROUNDS
    """Samples of each provider, at least."""
    deadline: float = float("inf")
    """time.monotonic() after which no further case is begun."""

    def providers(self, case: Case) -> list[Provider]:
        """Who is asked to run a case."""
        without = () if self.wanted or self.device == "cuda" else ("compile",)
        return providers(case, self.wanted, without)


def run_kernels(settings: Settings, cases: Iterable[Case], path: Path, topic: str,
                resume: bool = False) -> list[Row]:
    """Measure the cases and write `path`, which is complete after every one of them.

    Under a deadline torch.compile waits until everything else is measured, because an op takes
    longer to compile than to measure; its cases are then measured as a whole again.

    Args:
        resume: Keep what `path` has, but for rows that were skipped.
    Raises:
        DeviceInError: when only a new process can go on; `path` has what there is.
    """
    torch.set_num_threads(1)
    ceilings = None if settings.check_only else measured_ceilings(settings.device, settings.small)
    assumed = assumed_ceilings(torch.cuda.get_device_name()) if settings.device == "cuda" else None
    head = results.head(topic, settings.device, ceilings, assumed)
    table: dict[tuple[str, str], Rows] = {}
    if resume and path.exists():
        for row in results.load(path)[1]:
            table.setdefault((row.workload, row.case), {})[row.provider] = row

    def save() -> list[Row]:
        rows = [row for by_provider in table.values() for row in by_provider.values()]
        results.save(head, rows, path)
        return rows

    everybody = [(case, settings.providers(case)) for case in cases]
    plan = everybody
    if settings.deadline != float("inf"):
        plan = [(case, [p for p in who if p.name != "compile"]) for case, who in everybody] + plan
    for case, who in plan:
        rows = table.setdefault((case.op_name, case.name), {})
        if all(p.name in rows and rows[p.name].status != "skipped" for p in who):
            continue
        if time.monotonic() > settings.deadline:
            for p in who:
                rows.setdefault(p.name, empty_row(case, p, settings, "skipped",
                                                  "the time is used up"))
            continue
        try:
            measure_case(settings, case, who, rows, ceilings, assumed)
        finally:
            save()
    return save()


def empty_row(case: Case, provider: Provider, settings: Settings, status: str, reason: str) -> Row:
    """A row without a figure."""
    sizes, dtype = case.sizes(settings.device, settings.small), case.dtype_on(settings.device)
    return Row(workload=case.op_name, case=case.name, sizes=sizes, provider=provider.name,
               dtype=str(dtype).removeprefix("torch."), status=status, reason=reason,
               bytes=case.bytes_moved(dtype=dtype, **sizes),
               flops=case.flops(dtype=dtype, **sizes))


def measure_case(settings: Settings, case: Case, who: list[Provider], rows: Rows,
                 ceilings: Ceilings | None, assumed: Ceilings | None) -> None:
    """Put one row per provider into `rows`; a figure only where the results are right.

    Raises:
        DeviceInError: after a provider that broke the device.
    """
    sizes, device = case.sizes(settings.device, settings.small), settings.device
    for p in who:
        rows[p.name] = empty_row(case, p, settings, "unavailable",
                                 "another provider broke the device")
    for p in who:
        status, reason, _ = guarded(partial(compare, case, p, sizes, device), device)
        rows[p.name] = rows[p.name].without_figure(status, reason)
        raise_if_broken(device, rows[p.name])
    right = [p for p in who if rows[p.name].status == "checked"]
    if settings.check_only or not right:
        return
    inputs = input_sets(settings, case)
    samplers: dict[str, Sampler] = {}
    peaks: dict[str, int] = {}
    for p in right:
        calls = [partial(call, case, p.op, one) for one in inputs]
        status, reason, prepared = guarded(partial(prepare, calls, device), device)
        if prepared is None:
            rows[p.name] = rows[p.name].without_figure(status, reason)
            raise_if_broken(device, rows[p.name])
        else:
            samplers[p.name], peaks[p.name] = prepared
    seconds_each = 0.01 if settings.small else 0.3
    for name, timing in interleaved(samplers, seconds_each, settings.min_rounds).items():
        rows[name] = rows[name].timed(timing, peaks[name], ceilings, assumed)
    del inputs, samplers
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def compare(case: Case, provider: Provider, sizes: dict[str, int], device: str) -> str | None:
    """What is wrong with a provider's results, or None."""
    if provider.op is None:
        raise BackendUnavailableError(provider.reason)
    return check(case, provider, sizes, device)


def prepare(calls: list[Call], device: str) -> tuple[Sampler, int]:
    """A sampler and the peak memory, once everything is compiled for all input sets."""
    for one in calls:
        one()
    peak = peak_bytes(calls[0], device)
    return sampler(calls, device), peak


def input_sets(settings: Settings, case: Case) -> list[Inputs]:
    """Enough sets of inputs for cold caches; two where only the flow is tried."""
    device, sizes = settings.device, case.sizes(settings.device, settings.small)
    first = make_inputs(case, sizes, device, seed=1)
    number = 2 if settings.small else num_input_sets(size_of(first), device)
    if device == "cpu":
        number = min(number, max(2, MAX_CPU_INPUT_BYTES // max(1, size_of(first))))
    return [first, *(make_inputs(case, sizes, device, seed) for seed in range(2, number + 1))]


def guarded(action: Callable[[], Any], device: str) -> tuple[str, str, Any]:
    """Status, reason and value of an action that may raise anything: an error becomes a row."""
    try:
        value = action()
        if device == "cuda":
            torch.cuda.synchronize()
    except BackendUnavailableError as error:
        return "unavailable", str(error), None
    except torch.OutOfMemoryError:
        return "unavailable", "out of memory", None
    except Exception as error:
        traceback.print_exc()
        return "error", f"{type(error).__name__}: {str(error).splitlines()[0][:300]}", None
    if isinstance(value, str):
        return "wrong", value, None
    return "checked", "compared, not timed", value


def raise_if_broken(device: str, row: Row) -> None:
    """Raise DeviceInError where a failure has left a device that answers nothing."""
    if device == "cuda" and row.status == "error":
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            raise DeviceInError(row.reason) from error

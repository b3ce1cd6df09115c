"""pytest-benchmark times the cases of every bench file: `pytest benchmarks --benchmark-json=FILE`.

The file is in the format of docs/benchmarks.md. `python -m benchmarks kernels` does the same in
turns and on a GPU; this is the way to compare two commits with pytest-benchmark's own tools.
"""

import itertools
from functools import partial

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.cases import Case, Inputs, Op, Provider, call, load_cases
from benchmarks.ceilings import measured_ceilings
from benchmarks.kernels import Settings, compare, empty_row, input_sets
from benchmarks.results import Row
from benchmarks.timing import Timing, peak_bytes
from fastrl.errors import BackendUnavailableError

SETTINGS = Settings(device="cpu")
PAIRS = [pytest.param(case, provider, id=f"{case.op_name} {case.name} {provider.name}")
         for case in load_cases() for provider in SETTINGS.providers(case)]


@pytest.mark.parametrize("case, provider", PAIRS)
def test_op(benchmark: BenchmarkFixture, case: Case, provider: Provider,
            pytestconfig: pytest.Config) -> None:
    torch.set_num_threads(1)
    row = measured(benchmark, case, provider, pytestconfig.getoption("benchmark_timer"))
    benchmark.extra_info["row"] = row
    if row.status == "unavailable":
        pytest.skip(row.reason)
    assert row.status in ("ok", "checked"), row.reason


def measured(benchmark: BenchmarkFixture, case: Case, provider: Provider, timer: str) -> Row:
    """The row of a provider. Between its rounds the other providers run, as they do in turns."""
    sizes = case.sizes("cpu", SETTINGS.small)
    row = empty_row(case, provider, SETTINGS, "checked", "compared, not timed")
    try:
        wrong = compare(case, provider, sizes, "cpu")
    except BackendUnavailableError as error:
        return row.without_figure("unavailable", str(error))
    if wrong is not None:
        return row.without_figure("wrong", wrong)
    inputs = itertools.cycle(input_sets(SETTINGS, case))
    others = [p.op for p in SETTINGS.providers(case) if p.name in ("torch", *case.others)
              and p.name != provider.name and can_run(case, p.op, next(inputs))]

    def before_a_round() -> tuple[tuple[object], dict[str, object]]:
        for other in others:
            call(case, other, next(inputs))
        return (next(inputs),), {}

    assert provider.op is not None
    peak = peak_bytes(partial(call, case, provider.op, next(inputs)), "cpu")
    benchmark.pedantic(partial(call, case, provider.op), setup=before_a_round, rounds=5,
                       warmup_rounds=1)
    if benchmark.stats is None:  # --benchmark-disable
        return row
    return row.timed(Timing(str(timer), benchmark.stats.stats.data), peak,
                     measured_ceilings("cpu", SETTINGS.small), None)


def can_run(case: Case, op: Op | None, inputs: Inputs) -> bool:
    """False where a backend or a library is missing here."""
    if op is None:
        return False
    try:
        call(case, op, inputs)
    except BackendUnavailableError:
        return False
    return True

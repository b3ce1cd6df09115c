"""What every bench file uses: red tests stop it, timings come with bytes, operations and memory.

A bench file declares inputs, providers, and the bytes or operations that an ideal kernel needs.
pytest-benchmark times; `--benchmark-json=benchmarks/results/<topic>_<device>_<yyyymmdd>.json`
writes the result file with command, hardware and commit.
"""

import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

ROOT = Path(__file__).resolve().parents[1]


@cache
def require_green(op_file: str) -> None:
    """Fail unless the tests of an op pass: a wrong op has no speed.

    Args:
        op_file: Name of its file, as in `tests/ops/test_<op_file>.py`.
    """
    tests = ROOT / "tests/ops" / f"test_{op_file}.py"
    outcome = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", str(tests)],
                             cwd=ROOT, capture_output=True, text=True)
    if outcome.returncode != 0:
        pytest.fail(f"the tests of {op_file} are red: nothing to time\n{outcome.stdout[-2000:]}")


def measure(
    benchmark: BenchmarkFixture,
    op_file: str,
    function: Callable[[], object],
    *,
    bytes_moved: int = 0,
    flops: int = 0,
) -> None:
    """Time `function`, and put rates and peak memory beside the time.

    Args:
        op_file: Whose tests have to be green.
        bytes_moved: Bytes that an ideal kernel reads and writes.
        flops: Operations that an ideal kernel does.
    """
    require_green(op_file)
    torch.set_num_threads(1)
    benchmark.extra_info["peak_mib"] = round(peak_mib(function), 1)  # also the warm-up
    benchmark.pedantic(function, rounds=5, iterations=1, warmup_rounds=1)
    if benchmark.stats is None:  # --benchmark-disable
        return
    median = benchmark.stats.stats.median
    benchmark.extra_info["gb_per_s"] = round(bytes_moved / median / 1e9, 3)
    benchmark.extra_info["gflop_per_s"] = round(flops / median / 1e9, 3)
    benchmark.extra_info["torch"] = torch.__version__


def peak_mib(function: Callable[[], object]) -> float:
    """Memory that a call takes beyond what is resident before it, in MiB (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark restarts from here
    before = _resident_kib("VmHWM")
    function()
    return (_resident_kib("VmHWM") - before) / 1024


def _resident_kib(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise LookupError(f"/proc/self/status has no {field}")

"""The measuring harness: what it refuses to time, what it times, and the file it writes."""

import dataclasses
import json
import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import kernels, results, timing
from benchmarks.cases import (
    Case,
    Provider,
    backends_that_ran,
    call,
    check,
    disagreement,
    load_cases,
    make_inputs,
)
from benchmarks.ceilings import Ceilings
from benchmarks.kernels import DeviceInError, Settings, run_kernels
from benchmarks.results import Row
from fastrl.errors import BackendUnavailableError
from fastrl.ops import masked_mean
from fastrl.ops.masked import masked_mean_reference

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = Settings(device="cpu", small=True)


def case(**changes: Any) -> Case:
    """masked_mean with other providers."""
    (declared,) = load_cases(["masked_mean"])
    return dataclasses.replace(declared, **changes)


def run(tmp_path: Path, settings: Settings = SETTINGS, **changes: Any) -> dict[str, Row]:
    """The rows of one case by provider, which are also those of the file."""
    rows = run_kernels(settings, [case(**changes)], tmp_path / "file.json", "topic")
    assert results.load(tmp_path / "file.json")[1] == rows
    return {row.provider: row for row in rows}


def test_a_figure_has_times_memory_and_a_share_of_the_floor(tmp_path: Path) -> None:
    row = run(tmp_path)["torch"]
    assert row.status == "ok" and row.rounds >= timing.MIN_ROUNDS
    assert row.timer == "processor_time"
    assert 0 < row.p10_s <= row.median_s <= row.p90_s
    assert (row.workload, row.sizes, row.dtype) == ("masked_mean", {"B": 3, "T": 37}, "float32")
    assert row.bytes == 5 * 3 * 37 and row.peak_bytes >= 0 and 0 < row.share_of_floor < 1


def wrong(values: Tensor, mask: Tensor) -> Tensor:
    return masked_mean_reference(values, mask) * 1.001


def broken(values: Tensor, mask: Tensor) -> Tensor:
    raise RuntimeError("a kernel failed")


def absent(values: Tensor, mask: Tensor) -> Tensor:
    raise BackendUnavailableError("not here")


@pytest.mark.parametrize("op, status, reason", [
    (wrong, "wrong", "result 0: error 1.00e-03 of the largest value"),
    (broken, "error", "RuntimeError: a kernel failed"),
    (absent, "unavailable", "not here"),
])
def test_no_figure_without_right_results(tmp_path: Path, op: Callable[..., Tensor], status: str,
                                         reason: str) -> None:
    rows = run(tmp_path, others={"other": op})
    assert rows["torch"].status == "ok"
    assert rows["other"].status == status and rows["other"].reason.startswith(reason)
    assert rows["other"].median_s is None and rows["other"].share_of_floor is None


def test_only_what_is_ours_makes_the_run_fail() -> None:
    given = {"workload": "op", "sizes": {}, "dtype": "float32", "reason": "why"}
    for provider, status, expected in [("triton", "wrong", True), ("cuda", "error", True),
                                       ("torch", "unavailable", False), ("liger", "wrong", False)]:
        assert Row(**given, provider=provider, status=status).is_failure is expected


def test_a_wrong_result_sets_the_exit_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                             capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks import __main__

    declared = case(reference=wrong)
    monkeypatch.setattr(__main__, "load_cases", lambda ops: [declared])
    monkeypatch.setattr("sys.argv", ["benchmarks", "kernels", "--device", "cpu", "--small",
                                     "--out", str(tmp_path)])
    assert __main__.main() == 1
    assert "wrong: result 0" in capsys.readouterr().out


def entering(module: str) -> Callable[..., Tensor]:
    """masked_mean_reference through a function that lives in `module`."""
    def function(values: Tensor, mask: Tensor) -> Tensor:
        return inner(values, mask)  # type: ignore[name-defined] # noqa: F821

    return types.FunctionType(function.__code__, {"__name__": module, "inner":
                                                  masked_mean_reference})


def test_a_fallback_is_not_shown_as_a_kernel() -> None:
    fallback = Provider("triton", masked_mean_reference)
    assert check(case(), fallback, {"B": 3, "T": 37}, "cpu") == (
        "asked for triton, but code of torch ran")
    real = Provider("triton", entering("fastrl_kernels.triton.masked"))
    assert check(case(), real, {"B": 3, "T": 37}, "cpu") is None
    hidden = Provider("torch", entering("fastrl_kernels.cuda.masked"))
    assert check(case(), hidden, {"B": 3, "T": 37}, "cpu") == (
        "asked for torch, but code of cuda ran")
    assert backends_that_ran(lambda: masked_mean(torch.ones(1), torch.tensor([True]))) == set()


EXACT = [torch.tensor([1.0, -2.0, torch.inf], dtype=torch.float64)]


@pytest.mark.parametrize("result, expected", [
    ([1.0, -2.0, torch.inf], None),
    ([1.0, -2.00003, torch.inf], None),  # twice torch's error and the floor
    ([1.0, -2.00005, torch.inf], "result 0: error 2.50e-05"),
    ([1.0, torch.nan, torch.inf], "result 0: not finite in other places"),
    ([1.0, -2.0, 3.0], "result 0: not finite in other places"),
    ([[1.0, -2.0, torch.inf]], "result 0: shape [1, 3], expected [3]"),
])
def test_disagreement(result: list[Any], expected: str | None) -> None:
    torchs = [torch.tensor([1.0, -2.00001, torch.inf])]
    got = disagreement([torch.tensor(result)], EXACT, torchs, floor=1e-5)
    assert got is None if expected is None else str(got).startswith(expected)
    assert disagreement([], EXACT, torchs, floor=1.0) == "0 results where the reference has 1"


def test_all_providers_get_the_same_random_inputs() -> None:
    for declared in load_cases():
        sizes = declared.sizes("cpu", True)
        first, again, other = (make_inputs(declared, sizes, "cpu", seed) for seed in (5, 5, 6))
        tensors = [name for name, value in first.items() if isinstance(value, Tensor)]
        assert all(torch.equal(first[name], again[name]) for name in tensors)
        assert any(not torch.equal(first[name], other[name]) for name in tensors)
        for name in tensors:  # a product of zeros is faster than one of numbers
            if first[name].is_floating_point() and first[name].numel() > 20:
                assert first[name].std() > 0 or name in ("temperature", "top_p", "min_p"), name


def test_every_op_file_has_cases_that_need_torch_and_fastrl_alone() -> None:
    """A bare machine has neither pytest-benchmark nor the other packages of the tests."""
    code = """
import sys
for name in ("pytest", "pytest_benchmark", "transformers", "liger_kernel", "rich", "yaml"):
    sys.modules[name] = None
import benchmarks.__main__, benchmarks.machine
from benchmarks.cases import load_cases
print(*sorted({case.file for case in load_cases()}))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT / "kernels")})
    assert done.returncode == 0, done.stderr
    files = {p.stem for p in (ROOT / "fastrl/ops").glob("*.py")} - {"__init__"}
    assert set(done.stdout.split()) == files


def test_every_case_has_a_floor() -> None:
    for declared in load_cases():
        for device in ("cpu", "cuda"):
            sizes, dtype = declared.sizes(device, False), declared.dtype_on(device)
            assert sizes.keys() == declared.small.keys()
            cost = declared.bytes_moved(dtype=dtype, **sizes), declared.flops(dtype=dtype, **sizes)
            assert max(cost) > 0, f"{declared.op_name} {declared.name}"


def test_an_unknown_op_is_an_error_that_names_the_known() -> None:
    with pytest.raises(SystemExit, match="no bench of nothing; known: .*compute_gae"):
        load_cases(["nothing"])
    assert {c.op_name for c in load_cases(["gae", "kl_estimate"])} == {"compute_gae", "kl_estimate"}


def test_floors_and_rates() -> None:
    ceilings = Ceilings(bytes_per_s=100.0, flops_per_s=1000.0, product_dtype="float32")
    assert ceilings.floor_s(200, 0) == 2 and ceilings.floor_s(200, 5000) == 5
    row = Row(workload="op", sizes={}, dtype="float32", provider="torch", status="checked",
              reason="not timed", bytes=200)
    timed = row.timed(timing.Timing("events", [5.0, 4.0, 3.0]), 7, ceilings,
                      dataclasses.replace(ceilings, bytes_per_s=200.0))
    assert (timed.median_s, timed.share_of_floor, timed.share_of_assumed_floor) == (4.0, 0.5, 0.25)
    assert timed.timed(timing.Timing("events", [1.0]), 7, None, None).share_of_floor is None


def test_quantiles() -> None:
    spread = timing.Timing("events", [float(x) for x in range(10, -1, -1)])
    assert [spread.quantile(q) for q in (0.1, 0.5, 0.9)] == [1.0, 5.0, 9.0]


def test_providers_take_turns() -> None:
    order: list[str] = []

    def sampler(name: str) -> timing.Sampler:
        return timing.Sampler("events", lambda: order.append(name) or 1.0)

    timing.interleaved({name: sampler(name) for name in "abc"}, seconds_each=0)
    assert "".join(order) == "abcbcacababcbca"


def test_input_sets_outgrow_the_cache() -> None:
    assert timing.num_input_sets(100, "cpu", cache_bytes=1000) == 30
    assert timing.num_input_sets(10**6, "cpu", cache_bytes=1000) == 2
    assert timing.num_input_sets(1, "cpu", cache_bytes=1000) == timing.MAX_INPUT_SETS
    assert timing.last_cache_bytes("cpu") >= 2**18


def test_peak_memory_of_a_call() -> None:
    def takes_40_mib() -> None:
        torch.ones(10 * 2**20).sum()

    measured = timing.peak_bytes(takes_40_mib, "cpu") / 2**20
    assert 39 < measured < 48


def test_a_deadline_leaves_rows_that_resume_fills(tmp_path: Path) -> None:
    late = dataclasses.replace(SETTINGS, deadline=0.0)
    assert run(tmp_path, late)["torch"].status == "skipped"
    path = tmp_path / "file.json"
    (row,) = [r for r in run_kernels(SETTINGS, [case()], path, "topic", resume=True)
              if r.provider == "torch"]
    assert row.status == "ok"
    again = run_kernels(SETTINGS, [case()], path, "topic", resume=True)
    assert [r for r in again if r.provider == "torch"] == [row]  # not measured a second time


def test_under_a_deadline_the_compiler_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch
                                             ) -> None:
    order: list[list[str]] = []

    def note(settings: Settings, case: Case, who: list[Provider], rows: dict[str, Row], *_: object
             ) -> None:
        order.append([case.op_name, *(p.name for p in who)])
        rows.update({p.name: kernels.empty_row(case, p, settings, "checked", "-") for p in who})

    monkeypatch.setattr(kernels, "measure_case", note)
    cases = load_cases(["masked_mean", "policy_loss"])
    settings = Settings(device="cpu", small=True, wanted=("torch", "compile"), deadline=1e12)
    run_kernels(settings, cases, tmp_path / "file.json", "topic")
    assert order == [["masked_mean", "torch"], ["policy_loss", "torch"],
                     ["masked_mean", "torch", "compile"], ["policy_loss", "torch", "compile"]]


def test_a_device_that_answers_nothing_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    row = Row(workload="op", sizes={}, dtype="float32", provider="triton", status="error",
              reason="an illegal memory access")

    def fails() -> None:
        raise RuntimeError("CUDA error")

    monkeypatch.setattr(torch.cuda, "synchronize", fails)
    kernels.raise_if_broken("cpu", row)
    with pytest.raises(DeviceInError, match="an illegal memory access"):
        kernels.raise_if_broken("cuda", row)


def test_a_row_has_a_median_or_a_reason() -> None:
    given = {"workload": "op", "sizes": {}, "dtype": "float32", "provider": "torch"}
    for fields in ({}, {"status": "wrong"}, {"status": "fine", "median_s": 1.0},
                   {"status": "wrong", "reason": "why", "median_s": 1.0}):
        with pytest.raises(ValueError):
            Row(**given, **fields)


def test_a_file_with_other_fields_is_refused(tmp_path: Path) -> None:
    run(tmp_path)
    path = tmp_path / "file.json"
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, "extra": 1}))
    with pytest.raises(ValueError, match=r"fields differ by \['extra'\]"):
        results.load(path)
    del document["rows"][0]["timer"]
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=r"a row's fields differ by \['timer'\]"):
        results.load(path)


def test_a_file_says_where_it_was_measured(tmp_path: Path) -> None:
    run(tmp_path)
    document, _ = results.load(tmp_path / "file.json")
    assert len(document["source_sha256"]) == 64 and document["device"]["type"] == "cpu"
    assert document["versions"]["torch"] == torch.__version__ and document["command"]
    assert document["ceilings"]["measured"]["bytes_per_s"] > 1e8
    assert results.file_name("kernels", "cpu").startswith("kernels_cpu_20")


def test_the_result_files_are_in_the_documented_format() -> None:
    files = [p for p in (ROOT / "benchmarks/results").glob("*.json")
             if "schema" in json.loads(p.read_text())]
    for path in files:
        document, rows = results.load(path)
        assert document["schema"] == results.SCHEMA and rows, path
    text = (ROOT / "docs/benchmarks.md").read_text()
    for name in [*results.HEAD, *(f.name for f in dataclasses.fields(Row)), *results.STATUSES]:
        assert f"`{name}`" in text, f"docs/benchmarks.md does not explain {name}"


def test_the_table_shows_failures_and_groups_what_is_missing() -> None:
    given = {"workload": "op", "sizes": {"B": 3}, "dtype": "float32"}
    shown = results.table([
        Row(**given, provider="torch", median_s=2e-3, p10_s=1e-3, p90_s=3e-3, bytes=2 * 10**6),
        Row(**given, provider="plain", median_s=4e-3, p10_s=1e-3, p90_s=3e-3, flops=4 * 10**9,
            share_of_floor=0.25, peak_bytes=2**20),
        Row(**given, provider="triton", status="wrong", reason="result 0: error"),
        Row(**given, provider="cuda", status="unavailable", reason="op: no GPU")])
    lines = [line.split() for line in shown.splitlines()]
    assert lines[1] == "op torch 2 ms 1 ms 3 ms 1 GB/s 1.00 B=3 float32".split()
    assert lines[2] == "op plain 4 ms 1 ms 3 ms 1 TFLOP/s 25.0% 0.50 1.0 MiB B=3 float32".split()
    assert shown.splitlines()[3].endswith("wrong: result 0: error")
    assert shown.splitlines()[4] == "cuda, 1 cases: no GPU"


def test_in_place_ops_start_from_fresh_inputs() -> None:
    seen: list[float] = []

    def spoils(values: Tensor, mask: Tensor) -> Tensor:
        seen.append(float(values.sum()))
        result = masked_mean_reference(values, mask)
        values.zero_()
        return result

    assert check(case(), Provider("other", spoils), {"B": 3, "T": 37}, "cpu") is None
    (declared,) = load_cases(["masked_mean"])
    fresh = make_inputs(declared, {"B": 3, "T": 37}, "cpu", seed=0)
    assert seen == [float(fresh["values"].sum())]
    assert len(call(declared, masked_mean_reference, fresh)) == 1


SLOW_TO_INTERPRET = {"packed_attention", "sampling"}
"""Files whose cases take seconds each; tests/kernels has their tests."""


def test_triton_kernels_pass_the_comparison_in_the_interpreter(tmp_path: Path) -> None:
    files = {declared.file for declared in load_cases()} - SLOW_TO_INTERPRET
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "benchmarks", "kernels", "--device", "cpu",
         "--small", "--check_only", "--providers", "triton", "--ops", *files,
         "--out", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "TRITON_INTERPRET": "1",
             "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))})
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("kernels_cpu_*.json")
    _, rows = results.load(path)
    assert len(rows) >= 30 and {row.status for row in rows} == {"checked"}

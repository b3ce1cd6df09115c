"""linear_policy_loss beside log_softmax, gather and autograd on a CPU: memory and time.

benchmarks/results/linear_policy_loss_cpu_*.json has the figures at 4096 x 288 x 32000; here a
smaller size guards them.
"""

from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks.cases import call, check, load_cases, make_inputs, providers
from benchmarks.results import load
from benchmarks.timing import Call, interleaved, peak_bytes, sampler

ROOT = Path(__file__).resolve().parents[2]
SIZES = {"M": 1536, "D": 64, "V": 32000}


@pytest.fixture
def calls() -> dict[str, Call]:
    """One forward and backward pass each, on the same inputs."""
    torch.set_num_threads(1)
    (case,) = load_cases(["linear_policy_loss"])
    inputs = make_inputs(case, SIZES, "cpu", seed=0)
    return {p.name: partial(call, case, p.op, inputs) for p in providers(case, ["torch", "plain"])}


def test_what_it_is_compared_with_computes_the_same() -> None:
    """All logits at once, and chunks of 512 tokens: here two and a bit."""
    (case,) = load_cases(["linear_policy_loss"])
    others = providers(case, ["plain", "chunked"])
    assert [check(case, p, {"M": 1100, "D": 16, "V": 301}, "cpu") for p in others] == [None, None]


def test_a_fifth_of_the_memory(calls: dict[str, Call]) -> None:
    for one in calls.values():
        one()  # what a first call leaves behind, threads and tables, is nobody's
    ours, plain = (peak_bytes(calls[name], "cpu") for name in ("torch", "plain"))
    logits = 4 * SIZES["M"] * SIZES["V"]
    assert plain > 1.9 * logits, "the plain way has to keep log-probs and their gradient"
    assert ours < plain / 5, f"{ours / 2**20:.0f} MiB, the plain way {plain / 2**20:.0f} MiB"


def test_not_slower(calls: dict[str, Call]) -> None:
    """Loosely, in processor time: a busy machine slows both, not always alike."""
    ratios = []
    for _ in range(4):
        times = interleaved({name: sampler([one], "cpu") for name, one in calls.items()}, 0.0,
                            min_rounds=3)
        ratios.append(times["torch"].quantile(0.5) / times["plain"].quantile(0.5))
        if ratios[-1] < 1.1:
            return
    pytest.fail(f"linear_policy_loss takes {ratios} times as long as the plain way")


def test_the_result_file_shows_both_at_full_size() -> None:
    path = sorted((ROOT / "benchmarks/results").glob("linear_policy_loss_cpu_*.json"))[-1]
    rows = {row.provider: row for row in load(path)[1]}
    ours, plain = rows["torch"], rows["plain"]
    assert ours.sizes == plain.sizes == {"M": 4096, "D": 288, "V": 32000}
    assert ours.peak_bytes <= plain.peak_bytes / 5 and ours.median_s <= plain.median_s

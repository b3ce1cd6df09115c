"""The step-time model: its counts against autograd's own, its fit, its errors, its answer."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import __main__, model
from benchmarks.ceilings import Ceilings
from benchmarks.engine_workloads import MODELS, random_model
from benchmarks.model import Cluster, Point, fit, measured_points, predict
from benchmarks.results import ROOT, Row
from benchmarks.scaling import Sizes
from benchmarks.work import Work, forward, generation, num_weights, training
from fastrl.models import PackedAttention
from fastrl.packing import pack_sequences

RESULTS = ROOT / "benchmarks/results"
CEILINGS = Ceilings(1e10, 1e11, "float32")


def test_operations_of_a_pass_are_those_that_torch_counts() -> None:
    """Products by torch's counter; it counts attention on full rectangles, so that is taken apart.
    """
    config = Sizes(V=400, D=96, L=2).config
    network, lengths = random_model(config, torch.float32, "cpu"), [32, 16]
    packed = pack_sequences([list(range(n)) for n in lengths])
    with FlopCounterMode(display=False) as counter:
        hidden = network(packed.token_ids, packed.positions,
                         PackedAttention(packed.cu_seqlens, packed.max_seqlen))
        torch.nn.functional.linear(hidden, network.lm_head.weight)
    counts = {str(op): number for op, number in counter.get_flop_counts()["Global"].items()}
    products = sum(number for op, number in counts.items() if "mm" in op and "bmm" not in op)
    pairs = sum(n * (n + 1) // 2 for n in lengths)
    attention = 4 * pairs * config.num_layers * config.num_heads * config.head_dim
    assert forward(config, lengths, sum(lengths)).products - attention == products > 0


def test_weights_are_those_of_the_models() -> None:
    for config in MODELS.values():
        from benchmarks.engine_workloads import _num_weights
        matrices = num_weights(config)
        assert 0 <= _num_weights(config) - matrices < 1e-3 * matrices  # norms


def test_a_generation_by_hand() -> None:
    """One layer of width 48, one head, MLP 128, 10 words: 9,216 + 18,432 + 480 weights."""
    config = Sizes(V=10, D=48, L=1).config
    work = generation(config, prompts=[3, 1], wanted=[2, 1], itemsize=4)
    weights = 4 * 48 * 48 + 3 * 48 * 128
    cached = (3 + 4) + 1  # tokens read by each step: the prompt's and those before
    assert work.decode_products == 2 * 3 * (weights + 480) + 4 * cached * 48
    assert work.bytes == 4 * (2 * (weights + 480) + cached * 2 * 48) + 2 * 4 * 3 * 10
    assert work.products == 2 * (4 * weights + 2 * (6 + 1) * 48)


def test_training_is_three_passes_and_the_optimiser() -> None:
    config = Sizes(V=10, D=48, L=1).config
    once, work = forward(config, [5], 4), training(config, [5], 4, num_steps=2)
    assert work.products == 3 * once.products
    assert work.bytes == 2 * 28 * num_weights(config)


def points(shares: model.Shares, rng: np.random.Generator, noise: float) -> list[Point]:
    found = []
    for number in range(12):
        work = Work(*(rng.uniform(0.1, 10, 3) * (1e11, 1e11, 1e10)))
        point = Point(str(number), work, 1.0, CEILINGS)
        seconds = predict(point, shares) * rng.lognormal(0, noise)
        found.append(Point(str(number), work, seconds, CEILINGS))
    return found


def test_the_fit_finds_the_shares_that_made_the_times() -> None:
    made = points((0.6, 0.25, 0.5), np.random.default_rng(0), noise=0.0)
    assert fit(made) == pytest.approx((0.6, 0.25, 0.5), rel=1e-6)
    assert max(abs(e) for pair in model.errors(made) for e in pair if e is not None) < 1e-6


def test_errors_are_stated_with_and_without_the_point() -> None:
    made = points((0.6, 0.25, 0.5), np.random.default_rng(1), noise=0.02)
    odd = Point("odd", made[0].work, made[0].seconds * 2, CEILINGS)
    known, unknown = model.errors([*made, odd])[-1]
    assert known < -0.3 and unknown is not None and unknown < known  # it pulls the fit
    assert "| odd | " in model.points_table([*made, odd])


def test_a_share_is_never_negative_and_needs_a_point() -> None:
    made = points((0.6, np.inf, 0.5), np.random.default_rng(2), noise=0.2)
    assert min(fit(made)) > 0
    with pytest.raises(ValueError, match="at least one measured point"):
        fit([])


def test_two_threads_multiply_at_twice_the_rate() -> None:
    one, two = (Point("", Work(products=1e11), 1.0, CEILINGS, threads) for threads in (1, 2))
    assert predict(one, (0.5, 1, 1)) == 2.0 and predict(two, (0.5, 1, 1)) == 1.0


def test_every_row_that_fastrl_has_on_a_cpu_is_a_point_and_the_page_states_its_error() -> None:
    found = measured_points(RESULTS)
    names = [point.name for point in found]
    for part in ("linear_policy_loss", "generate equal", "generate mixed",
                 "ppo ppo_cpu rollout", "ppo ppo_cpu scoring", "ppo ppo_cpu policy_update",
                 "ppo ppo_cpu critic_update"):
        assert any(name.startswith(part) for name in names), part
    page = (ROOT / "docs/step_time.md").read_text()
    assert all(f"| {name} | " in page for name in names)
    assert np.median([abs(known) for known, _ in model.errors(found)]) < 0.3


def test_a_ppo_row_is_counted_with_the_sizes_of_its_workload() -> None:
    """On a GPU: 8 KV heads of 128 channels, in bfloat16, 8 minibatches."""
    sizes = {"B": 2, "P": 3, "T": 1, "V": 151936, "D": 1024, "L": 28}
    phases = {f"{name}_s": 1.0 for name in ("rollout", "scoring", "policy_update", "critic_update")}
    row = Row(workload="ppo", case="ppo_gpu", sizes=sizes, dtype="bfloat16", provider="fastrl",
              median_s=4.0, extra={"phases_s": phases})
    rollout, _, policy, _ = (point.work for point in model._points(row, CEILINGS))
    weights = 28 * (1024 * 128 * 48 + 3 * 1024 * 3072) + 151936 * 1024
    assert rollout.bytes == 2 * (weights + 6 * 2 * 28 * 8 * 128) + 8 * 2 * 151936
    assert policy.bytes == 8 * 28 * weights


def test_without_ceilings_there_are_no_points(tmp_path: Path) -> None:
    path = RESULTS / "ppo_cpu_20261124.json"
    (tmp_path / path.name).write_text(path.read_text())
    assert measured_points(tmp_path) == []
    assert "not yet measured" in model.markdown(tmp_path, Cluster())


def test_the_answer_for_eight_gpus_by_hand() -> None:
    """Products of an update: 3 * 2 * (layers' weights * tokens + head * responses) + attention."""
    cluster = Cluster(num_minibatches=2)
    phases = cluster.phases()
    layers, head, share = 32 * 218_103_808, 128256 * 4096, 128
    tokens, pairs = share * 2048, share * 2048 * 2049 // 2
    products = 6 * (layers * tokens + head * share * 1024) + 12 * pairs * 32 * 4096
    assert phases["policy_update"][0] == pytest.approx(products / 790e12, rel=1e-9)
    # Weights gathered twice and a gradient scattered in each of two minibatches, 7/8 from others.
    moved = 2 * 3 * 2 * (layers + 2 * head) * 7 / 8
    assert phases["policy_update"][2] == pytest.approx(moved / 450e9, rel=1e-9)
    table = model.answer_table(cluster)
    least = sum(max(terms) for terms in phases.values())
    assert f"| {1024 * 1024 / least:,.0f} |" in table
    assert len(table.splitlines()) == 2 + 4 + 2


@pytest.mark.parametrize("options, message", [
    (["--num_gpus", "0"], "num_gpus: expected at least 1, got 0"),
    (["--num_gpus", "3"], "a multiple of the 3 GPUs, got 1024"),
    (["--model", "gpt"], "model: expected one of .*llama-3.1-8b, got 'gpt'"),
])
def test_an_iteration_that_cannot_be_is_refused(
    options: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["benchmarks", "model", *options])
    with pytest.raises(SystemExit, match=message):
        __main__.main()


def test_the_command_prints_errors_and_the_answer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["benchmarks", "model", "--results", str(RESULTS),
                                     "--num_gpus", "16"])
    assert __main__.main() == 0
    out = capsys.readouterr().out
    assert "| linear_policy_loss | " in out and "response tokens per second" in out

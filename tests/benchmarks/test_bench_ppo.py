"""The PPO benchmark: its rows, its check of a peer's numbers, and the peer itself where it is."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import bench_ppo
from benchmarks.engine_workloads import MODELS
from benchmarks.peers.common import prompts, read_workload
from benchmarks.results import ROOT, Row
from fastrl.models import load_causal_lm, load_scalar_model
from fastrl.models.scoring import response_logprobs, response_values, sequence_scores

TINY = ROOT / "benchmarks/workloads/ppo_tiny.yaml"


def measured(peers: list[str], **options: Any) -> list[Row]:
    """The rows after the last process, fastrl's first."""
    *_, rows = bench_ppo.measure(TINY, peers, threads=1, rounds=1, **options)
    return rows


def test_a_peer_that_is_not_installed_has_a_row_that_says_so() -> None:
    own, peer = measured(["nobody"])
    assert own.provider == "fastrl" and own.status == "ok" and own.rounds == 1
    assert own.extra["ratio"] == 1.0 and own.extra["response_tokens_per_s"] > 0
    assert {"rollout_s", "scoring_s"} < set(own.extra["phases_s"])
    assert own.peak_bytes is not None and own.peak_bytes > 0
    assert (peer.status, peer.reason) == ("unavailable", "no environment: make peers")


def test_trl_agrees_and_is_timed() -> None:
    if bench_ppo.interpreter("trl") is None:
        pytest.skip("no environment: make peers")
    rows = {row.provider: row for row in measured(["trl"])}
    assert rows["trl"].status == "ok"
    assert max(rows["trl"].extra["differences"].values()) <= bench_ppo.TOLERANCE


@pytest.fixture
def models(tmp_path: Path) -> Path:
    bench_ppo.make_models(read_workload(TINY), tmp_path)
    return tmp_path


@torch.no_grad()
def a_peers_rollout(models: Path) -> dict[str, np.ndarray]:
    """What TRL would save of some responses, by its formulas written out."""
    workload = read_workload(TINY)
    random = torch.Generator().manual_seed(0)
    responses = torch.randint(1, 320, (8, 8), generator=random)
    token_ids = torch.cat([torch.tensor(prompts(workload)), responses], dim=1)
    rollout = bench_ppo.as_rollout(token_ids, torch.zeros(8, 8), workload)
    ref_logprobs, _ = response_logprobs(load_causal_lm(models / "policy"), rollout, 1.0, 1024)
    reward_model = load_scalar_model(models / "reward")
    values = response_values(reward_model, rollout, 1024)
    scores = sequence_scores(reward_model, token_ids.tolist(), 1024)
    logprobs = ref_logprobs + 0.3 * torch.randn(8, 8, generator=random)
    kl = logprobs - ref_logprobs
    rewards = -workload["kl_coef"] * kl
    rewards[:, -1] += scores
    advantages, last = torch.zeros(8, 8), torch.zeros(8)
    for t in reversed(range(8)):
        following = values[:, t + 1] if t < 7 else torch.zeros(8)
        last = rewards[:, t] + following - values[:, t] + workload["lam"] * last
        advantages[:, t] = last
    named = {"query_responses": token_ids, "logprobs": logprobs, "kl": kl, "rewards": rewards,
             "advantages": advantages, "values": values, "scores": scores[:, None]}
    return {name: tensor.numpy().copy() for name, tensor in named.items()}


def test_equal_numbers_agree(models: Path) -> None:
    np.savez(models / "saved.npz", **a_peers_rollout(models))
    found = bench_ppo.differences(models / "saved.npz", models, read_workload(TINY))
    assert set(found) == {"kl", "rewards", "advantages", "values", "scores"}
    assert max(found.values()) < 1e-5


@pytest.mark.parametrize("name", ["kl", "rewards", "advantages", "values", "scores"])
def test_a_number_that_is_off_is_seen(models: Path, name: str) -> None:
    saved = a_peers_rollout(models)
    saved[name].reshape(-1)[3] += 1e-3
    np.savez(models / "saved.npz", **saved)
    found = bench_ppo.differences(models / "saved.npz", models, read_workload(TINY))
    assert found[name] > bench_ppo.TOLERANCE


def test_a_peer_with_other_numbers_gets_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_ppo, "differences", lambda *_: {"kl": 0.5})
    monkeypatch.setattr(bench_ppo, "interpreter", lambda _: Path("python"))
    monkeypatch.setattr(bench_ppo, "run", lambda *_, **__: {
        "seconds": [2.0, 1.0], "processor_s": [2.0, 1.0], "peak_bytes": 5, "versions": {},
        "peak_bytes_above_imports": 3})
    rows = {row.provider: row for row in measured(["trl"])}
    assert rows["trl"].status == "wrong" and "0.5" in rows["trl"].reason
    assert rows["fastrl"].median_s == 1.0  # the first iteration does not count


RESULT = {"seconds": [2.0, 1.0], "processor_s": [2.0, 1.0], "peak_bytes": 5, "versions": {},
          "peak_bytes_above_imports": 3}


def fake_run(**raised: Exception) -> Any:
    """A provider's process measures RESULT, or raises what is given for it."""
    def run(provider: str, *_: Any, **__: Any) -> dict[str, Any]:
        if provider in raised:
            raise raised[provider]
        return RESULT
    return run


@pytest.mark.parametrize("error, status, reason", [
    (RuntimeError("trl: out of memory"), "error", "out of memory"),
    (subprocess.TimeoutExpired("trl", 1.0), "skipped", "the time is used up"),
])
def test_a_peer_that_fails_has_a_row_and_fastrl_its_figure(
    monkeypatch: pytest.MonkeyPatch, error: Exception, status: str, reason: str
) -> None:
    monkeypatch.setattr(bench_ppo, "interpreter", lambda _: Path("python"))
    monkeypatch.setattr(bench_ppo, "run", fake_run(trl=error))
    monkeypatch.setattr(bench_ppo, "agreement", lambda *_: {"kl": 0.0})
    own, peer = measured(["trl"])
    assert own.status == "ok" and peer.status == status and reason in peer.reason


def test_a_fastrl_that_fails_fails_the_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(bench_ppo, "run", fake_run(fastrl=RuntimeError("fastrl: raised")))
    monkeypatch.setattr("sys.argv", ["bench_ppo", "--workload", str(TINY), "--peers", "nobody",
                                     "--out", str(tmp_path)])
    assert bench_ppo.main() == 1
    monkeypatch.setattr(bench_ppo, "run", fake_run())
    assert bench_ppo.main() == 0


def test_a_process_ends_at_the_deadline(tmp_path: Path) -> None:
    begin = time.monotonic()
    with pytest.raises(subprocess.TimeoutExpired):
        bench_ppo.run("fastrl", TINY, tmp_path, 1, deadline=begin + 0.2)
    assert time.monotonic() - begin < 5


def test_a_peer_beside_torch_is_found_where_no_environment_was_made() -> None:
    assert bench_ppo.interpreter("fastrl") == Path(sys.executable)
    assert bench_ppo.interpreter("numpy") == Path(sys.executable)
    assert bench_ppo.interpreter("nobody") is None


def test_the_gpu_workload_is_the_shape_of_qwen3_06b_and_checked_in_float32() -> None:
    workload = read_workload(ROOT / "benchmarks/workloads/ppo_gpu.yaml")
    assert (workload["num_prompts"], workload["response_tokens"]) == (256, 512)
    assert workload["dtype"] == "bfloat16" and workload["checked_by"] == TINY.stem
    model = workload["model"]
    shape = MODELS["qwen3-0.6b"]
    for name, size in model.items():
        assert size == getattr(shape, name), name


def test_a_workload_may_be_checked_by_another(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The peer runs on the named one, and its numbers are compared with fastrl's there."""
    large = tmp_path / "large.yaml"
    large.write_text(TINY.read_text().replace("num_prompts: 8", "num_prompts: 512")
                     + "checked_by: small\n")
    (tmp_path / "small.yaml").write_text(TINY.read_text())
    ran: list[Path] = []

    def run(provider: str, workload: Path, models: Path, threads: int, rollout: Path,
            **_: Any) -> None:
        ran.append(workload)
        np.savez(rollout, **a_peers_rollout(models))

    monkeypatch.setattr(bench_ppo, "run", run)
    gaps = bench_ppo.agreement("trl", large, tmp_path, 1, "cpu", float("inf"))
    assert ran == [tmp_path / "small.yaml"] and max(gaps.values()) < 1e-5

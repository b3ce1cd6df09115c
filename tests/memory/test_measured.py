"""Plans beside what processes really took, and what trainers do with them."""

import dataclasses
import json
import logging
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from fastrl.config import DPOConfig, PPOConfig, RewardConfig, SamplingConfig, SFTConfig
from fastrl.errors import ConfigError
from fastrl.glossary import GLOSSARY
from fastrl.memory import measure
from fastrl.memory.measure import MemoryWatch, fitted
from fastrl.memory.plan import MemoryPlan
from fastrl.memory.sizes import GIB
from fastrl.metrics import RunFolder
from fastrl.models import CausalLM, new_decoder, scalar_from_causal
from fastrl.models.families import decoder_config
from fastrl.rewards import RewardModelScorer
from fastrl.trainers.dpo import DPOTrainer
from fastrl.trainers.ppo import PPOTrainer
from fastrl.trainers.ppo_trunks import initial_critic
from fastrl.trainers.reward import RewardTrainer
from fastrl.trainers.sft import SFTTrainer
from fastrl.types import Comparison, Prompt, TokenExample

SCRIPT = Path(__file__).with_name("measured_stage.py")
ROOT = SCRIPT.parents[2]
needs_linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(),
                                 reason="the kernel keeps no peak that can be reset")


def measured(stage: str, *settings: str) -> dict[str, Any]:
    """A step in a process of its own, whose allocator gives memory back at once."""
    path = os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1",
                        "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    out = subprocess.run([sys.executable, str(SCRIPT), stage, *settings], env=env, text=True,
                         capture_output=True, check=True)
    result: dict[str, Any] = json.loads(out.stdout.splitlines()[-1])
    return result


@needs_linux
@pytest.mark.parametrize("stage", ["sft", "long", "reward", "dpo", "ppo", "lora"])
def test_plan_and_peak_agree_to_a_fifth(stage: str) -> None:
    """At least 1 GiB planned; every phase; in "long" mostly activations, else mostly weights."""
    metrics = measured(stage)
    assert metrics[f"memory/{metrics['peak_phase']}_planned_gib"] >= 1
    if stage == "long":
        present = metrics["phases"]["update"]
        assert present["activations"] >= sum(present.values()) / 2
    iteration = ("rollout", "scoring", "policy_update", "critic_update")
    phases = {"ppo": iteration, "lora": iteration, "dpo": ("scoring", "update")}
    for phase in phases.get(stage, ("update",)):
        planned = metrics[f"memory/{phase}_planned_gib"]
        assert metrics[f"memory/{phase}_peak_gib"] == pytest.approx(planned, rel=0.2), phase


def plan_of(num_bytes: int, *, fits: bool = True) -> MemoryPlan:
    return MemoryPlan(
        residents=(), phases={"update": {"policy": num_bytes}}, budget_bytes=4 * GIB,
        reserve_bytes=0, parks=frozenset(), page_size=16, num_pages=7,
        max_tokens_per_microbatch=64, fits=fits, advice=() if fits else ("set something",))


@needs_linux
@pytest.mark.parametrize(("planned_mib", "says"), [
    (300, None), (100, "measured"), (900, "larger microbatches may fit")])
def test_a_peak_far_from_its_plan_is_a_warning(
    planned_mib: int, says: str | None, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setitem(measure.MIN_PLANNED_BYTES, "cpu", 2**20)
    watch = MemoryWatch(plan_of(planned_mib * 2**20), torch.device("cpu"), [])
    with watch.phase("update"):
        taken = torch.ones(300 * 2**18)  # 300 MiB
    del taken
    with caplog.at_level(logging.WARNING, logger="fastrl"):
        metrics = watch.metrics()
    assert metrics["memory/update_planned_gib"] == planned_mib / 1024
    assert metrics["memory/update_peak_gib"] == pytest.approx(300 / 1024, rel=0.1)
    assert (says is None) == (not caplog.text) and (says or "") in caplog.text
    with watch.phase("update"):
        pass
    assert watch.metrics() == {}  # once per run


def test_weights_that_are_there_belong_to_the_plan() -> None:
    """Their bytes, storages once, are taken off the baseline."""
    weight = torch.ones(64 * 2**18)  # 64 MiB
    watch = MemoryWatch(plan_of(2**26), torch.device("cpu"), [weight, weight.view(-1, 2)])
    with watch.phase("update"):
        pass
    assert watch.metrics()["memory/update_peak_gib"] == pytest.approx(1 / 16, rel=0.2)


def test_what_does_not_fit_stops_on_a_gpu_and_warns_on_a_cpu(
    caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ConfigError, match=r"(?s)does not fit.*set something"):
        MemoryWatch(plan_of(GIB, fits=False), torch.device("cuda"), [])
    with caplog.at_level(logging.WARNING, logger="fastrl"):
        MemoryWatch(plan_of(GIB, fits=False), torch.device("cpu"), [])
    assert "set something" in caplog.text


def test_a_gpu_gets_the_sizes_of_the_plan() -> None:
    plan = plan_of(GIB)
    config = fitted(PPOConfig(), plan, "cuda")
    assert config.max_tokens_per_microbatch == 64 and config.engine.num_pages == 7
    own = PPOConfig(engine=dataclasses.replace(PPOConfig().engine, num_pages=3))
    assert fitted(own, plan, "cuda").engine.num_pages == 3
    small = SFTConfig(max_tokens_per_microbatch=8)  # rows that are longer stand alone anyway
    assert fitted(small, plan, "cuda").max_tokens_per_microbatch == 8
    assert fitted(config, plan, "cpu") is config


def tiny() -> CausalLM:
    return new_decoder(decoder_config("llama", vocab_size=31, hidden_size=16, num_layers=1,
                                      num_heads=2, max_positions=32), 0)


def tiny_ppo(config: PPOConfig, run: RunFolder | None = None) -> PPOTrainer:
    policy, reward_model = tiny(), scalar_from_causal(tiny(), 0)
    return PPOTrainer(config, policy, tiny(), initial_critic(config, policy, reward_model),
                      RewardModelScorer(reward_model, 64), [Prompt((2, 3, 4), "")], run=run)


def test_ppo_plans_at_its_start_and_measures_every_phase_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = PPOConfig(rollout_batch_size=2, minibatch_size=2, eval_steps=None,
                       gpu_memory="2GiB", ema_decay=0.9, missing_eos_penalty=None,
                       sampling=SamplingConfig(max_new_tokens=4))
    with RunFolder(tmp_path / "ppo", config, stage="ppo") as run, \
            caplog.at_level(logging.INFO, logger="fastrl"):
        trainer = tiny_ppo(config, run)
        first, second = trainer.step(), trainer.step()
    lines = [line for line in caplog.text.splitlines() if "memory plan" in line]
    assert len(lines) == 1 and "memory plan fits: " in lines[0] and "of 2.0 GiB" in lines[0]
    written = json.loads((tmp_path / "ppo/plan.json").read_text("utf-8"))
    phases = ("rollout", "scoring", "policy_update", "critic_update")
    assert set(written["totals"]) == set(phases)
    for phase in phases:
        assert written["totals"][phase] == trainer.memory.plan.total(phase)
        assert first[f"memory/{phase}_planned_gib"] == written["totals"][phase] / GIB
        assert f"memory/{phase}_peak_gib" in first
    assert not any(name.endswith("_planned_gib") for name in second)
    kept = {r["name"]: r["num_bytes"] for r in written["residents"] if r["is_kept"]}
    weights = sum(p.nbytes for p in trainer.policy.parameters())
    assert kept["policy"] == kept["reference"] == weights
    assert kept["policy_optimizer"] == kept["ema"] * 2 == 2 * weights
    assert written["num_pages"] > 0 and kept.keys() >= {"critic", "reward_model"}


@pytest.mark.parametrize("second", [True, False])
def test_dpo_plans_its_reference_before_the_first_step_only(
    second: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = DPOConfig(batch_size=1, gpu_memory="2GiB", max_steps=2)
    rankings = [Comparison((2, 3), ((4, 5), (6, 7)), (0, 1))]
    policy, reference = tiny(), tiny() if second else None
    with RunFolder(tmp_path / "dpo", config, stage="dpo") as run, \
            caplog.at_level(logging.INFO, logger="fastrl"):
        trainer = DPOTrainer(config, policy, rankings, reference=reference, run=run)
        gone = None if reference is None else weakref.ref(reference)
        del reference
        first, again = trainer.step(), trainer.step()
    assert gone is None or gone() is None  # nothing in the trainer holds it
    assert caplog.text.count("memory plan fits: ") == 1 and "of 2.0 GiB" in caplog.text
    written = json.loads((tmp_path / "dpo/plan.json").read_text("utf-8"))
    weights = sum(p.nbytes for p in policy.parameters())
    assert ("reference" in written["phases"]["scoring"]) == second
    assert "reference" not in written["phases"]["update"]
    assert written["phases"]["scoring"].get("reference", weights) == weights
    assert "policy_optimizer" not in written["phases"]["scoring"]
    assert written["phases"]["update"]["policy_optimizer"] == 2 * weights
    names = {f"memory/{phase}_{kind}_gib" for phase in ("scoring", "update")
             for kind in ("planned", "peak")}
    assert names <= first.keys() and not names & again.keys()
    assert first["memory/scoring_planned_gib"] == written["totals"]["scoring"] / GIB
    plain = DPOTrainer(dataclasses.replace(config, reference="none"), tiny(), rankings)
    assert set(plain.memory.plan.phases) == {"update"}


def test_trainers_plan_at_their_start_and_measure_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = SFTConfig(batch_size=2, select_by="last", gpu_memory="2GiB")
    rows = [TokenExample((2, 3, 4, 5 + i), (False, True, True, True)) for i in range(4)]
    ranking = Comparison((2, 3), ((4, 5), (6, 7)), (0, 1))
    with caplog.at_level(logging.INFO, logger="fastrl"):
        run = RunFolder(tmp_path / "sft", config, stage="sft")
        sft = SFTTrainer(config, tiny(), rows, run=run)
        reward = RewardTrainer(RewardConfig(batch_size=1, max_steps=2),
                               scalar_from_causal(tiny(), 0), [ranking])
    assert caplog.text.count("memory plan fits: ") == 2 and "of 2.0 GiB" in caplog.text
    written = json.loads((tmp_path / "sft/plan.json").read_text("utf-8"))
    assert written["budget_bytes"] == 2 * GIB and written["fits"] is True
    assert written["totals"]["update"] == sft.memory.plan.total("update")
    for trainer in (sft, reward):
        first, second = trainer.step(), trainer.step()
        names = {name for name in first if name.startswith("memory/update")}
        assert names <= GLOSSARY.keys()
        assert names == {"memory/update_planned_gib", "memory/update_peak_gib"}
        assert not names & second.keys()

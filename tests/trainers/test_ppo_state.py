"""A PPO run that is continued from its state does what the run that never stopped did, bit for bit.
"""

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastrl.checkpoints import State
from fastrl.checkpoints.state import encode_values
from fastrl.config import PPOConfig
from fastrl.errors import CheckpointError
from fastrl.metrics import RunFolder, is_timing
from fastrl.models.causal_lm import scalar_from_causal
from fastrl.presets import GRPOConfig, RLOOConfig
from fastrl.reward_settings import WatchConfig
from fastrl.rewards import RewardModelScorer
from fastrl.trainers.ppo_trunks import initial_critic
from fastrl.watch import RewardWatch

GROUPS: dict[str, Any] = {"num_samples_per_prompt": 4}
CASES: dict[str, dict[str, Any]] = {
    "ppo": {},
    "ppo_ptx": {"ptx_coef": 2.0, "ptx_ratio": 1.5, "warmup_steps": 3, "lr_schedule": "cosine"},
    "grpo": {"class": GRPOConfig, **GROUPS},
    "rloo": {"class": RLOOConfig, **GROUPS},
    "reinforce_plus_plus": {"advantage": "reinforce_plus_plus"},
    "remax": {"advantage": "remax"},
    "adaptive": {"kl_controller": "adaptive", "kl_target": 0.01, "kl_horizon": 20.0},
    "best_ema": {"eval_steps": 1, "keep_best": True, "ema_decay": 0.6, "eval_with_ema": True},
    "best": {"eval_steps": 1, "keep_best": True, "ema_decay": 0.6, "eval_with_ema": False},
    "reward_trunk": {"critic_trunk": "reward"},
    "policy_trunk": {"critic_trunk": "policy", "critic_init": "policy",
                     "num_critic_warmup_iterations": 1},
    "lora": {"lora_rank": 2, "lora_alpha": 4.0, "reference": "adapters_off"},
    "moments_8bit": {"optimizer_moments": "8bit"},
    "bfloat16": {"dtype": "bfloat16", "num_logprob_checks": 2},
    "parked": {"parking": "on", "eval_steps": 1, "ema_decay": 0.6},
}
EVERYTHING: dict[str, Any] = CASES["adaptive"] | CASES["best_ema"] | CASES["ppo_ptx"] | {
    "num_iterations": 4, "logprob_tolerance": 1e-30, "dtype": "bfloat16", "watch": True}


def make(task: SimpleNamespace, folder: Path | None = None, **settings: Any) -> Any:
    """A trainer as a process that begins anew makes it."""
    kind = settings.pop("class", PPOConfig)
    dtype, watched = settings.pop("dtype", "float32"), settings.pop("watch", False)
    given = {**task.SETTINGS, "num_iterations": 4, **settings}
    if kind is not PPOConfig or settings.get("advantage", "gae") != "gae":
        del given["critic_learning_rate"]
    config = kind(**given)
    policy = task.tiny_model().to(getattr(torch, dtype))
    reward_model = scalar_from_causal(task.tiny_model(seed=5), 6)
    critic = initial_critic(config, policy, reward_model) if config.has_critic else None
    run = None if folder is None else RunFolder(folder, config, stage="ppo")
    watch = RewardWatch(WatchConfig(), task.score_even, run) if watched else None
    return task.PPOTrainer(
        config, policy, copy.deepcopy(policy) if config.reference == "copy" else None, critic,
        RewardModelScorer(reward_model), task.PROMPTS, eval_prompts=task.PROMPTS[:3],
        ptx=task.PTX if config.ptx_coef else (), run=run, watch=watch)


def steps(trainer: Any, number: int) -> list[dict[str, float]]:
    """Metrics of iterations, those left out that differ between equal runs."""
    rows = [trainer.step() for _ in range(number)]
    return [{k: v for k, v in row.items() if not is_timing(k)} for row in rows]


def same(one: State, other: State) -> bool:
    """Equal names, bits and values."""
    return (one.tensors.keys() == other.tensors.keys()
            and all(bits(one.tensors[name]) == bits(other.tensors[name]) for name in one.tensors)
            and encode_values(one.values) == encode_values(other.values))


def bits(tensor: torch.Tensor) -> tuple[Any, ...]:
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return tensor.dtype, tuple(tensor.shape), flat


def files(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.glob("*.jsonl")
            if path.name != "timing.jsonl"}


@pytest.mark.parametrize("name", CASES)
def test_a_continued_run_equals_one_that_never_stopped(
    task: SimpleNamespace, name: str, tmp_path: Path
) -> None:
    whole = make(task, tmp_path / "whole", **CASES[name])
    steps(whole, 2)
    state, written = whole.state().copied(), files(tmp_path / "whole")
    rows = steps(whole, 2)

    resumed = make(task, tmp_path / "resumed", **CASES[name])
    for file, text in written.items():
        (tmp_path / "resumed" / file).write_text(text)
    resumed.load_state(state)
    assert resumed.iteration == 2 and same(resumed.state(), state)
    assert steps(resumed, 2) == rows
    assert same(resumed.state(), whole.state()) and not same(resumed.state(), state)
    assert whole.train() == resumed.train()  # puts the chosen weights into the policy
    assert same(resumed.state(), whole.state())
    assert files(tmp_path / "whole") == files(tmp_path / "resumed")
    assert len(files(tmp_path / "whole")["metrics.jsonl"].splitlines()) >= 4


PARTS = ["policy", "critic", "policy_optimizer.num_steps", "policy_optimizer.first",
         "policy_optimizer.second", "policy_optimizer.remainder", "critic_optimizer", "ema", "best",
         "watch", "iteration", "num_recomputed", "score_std", "kl", "num_ptx_windows",
         "max_tokens", "alarms"]


@pytest.fixture(scope="module")
def stopped(task: SimpleNamespace) -> tuple[State, State, list[dict[str, float]]]:
    """A state after two iterations, the one after two more, and the metrics between."""
    trainer = make(task, **EVERYTHING)
    steps(trainer, 2)
    trainer.weights.offer(2, 1e6)  # no later evaluation is better
    trainer.budget.max_tokens = 64  # as after an allocation that failed
    trainer.alarms.counts["large_update"] = 1
    state = trainer.state().copied()
    rows = steps(trainer, 2)
    return state, trainer.state().copied(), rows


def continued(task: SimpleNamespace, state: State) -> tuple[State, list[dict[str, float]]]:
    trainer = make(task, **EVERYTHING)
    trainer.load_state(state)
    rows = steps(trainer, 2)
    return trainer.state().copied(), rows


def test_everything_at_once(task: SimpleNamespace, stopped: Any) -> None:
    state, end, rows = stopped
    found, found_rows = continued(task, state)
    assert found_rows == rows and same(found, end)
    names = {*state.tensors, *state.values}
    assert all(any(n == part or n.startswith(f"{part}.") for n in names) for part in PARTS)
    assert names == {n for n in names if n in ("stop_reason", "skipped") or any(
        n == part or n.startswith(f"{part}.") for part in PARTS)}


@pytest.mark.parametrize("part", PARTS)
def test_every_part_is_needed(task: SimpleNamespace, stopped: Any, part: str) -> None:
    """With what a new trainer has in place of one part, the run goes another way."""
    state, end, rows = stopped
    new = make(task, **EVERYTHING).state()

    def mixed(theirs: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
        def is_part(name: str) -> bool:
            return name == part or name.startswith(f"{part}.")
        return {k: v for k, v in theirs.items() if not is_part(k)} | {
            k: v for k, v in own.items() if is_part(k)}

    lacking = State(mixed(state.tensors, new.tensors), mixed(state.values, new.values))
    found, found_rows = continued(task, lacking)
    # What the metrics and the weights say, not that the part itself is another.
    weights = {k: bits(v) for k, v in end.tensors.items() if k.startswith(("policy.", "critic."))}
    others = {k: bits(found.tensors[k]) for k in weights}
    chosen = ("ema", "best")  # seen in the end only
    assert found_rows != rows or others != weights or (part in chosen and not same(found, end))


def test_a_run_that_stopped_stays_stopped(task: SimpleNamespace) -> None:
    trainer = make(task, max_kl=1e-9)
    trainer.step(), trainer.step()
    assert trainer.stop_reason is not None
    resumed = make(task, max_kl=1e-9)
    resumed.load_state(trainer.state().copied())
    assert resumed.train() == trainer.stop_reason and resumed.iteration == trainer.iteration


def test_a_run_may_be_continued_many_times(task: SimpleNamespace) -> None:
    whole = make(task, **EVERYTHING)
    steps(whole, 4)
    state = None
    for _ in range(4):
        trainer = make(task, **EVERYTHING)
        if state is not None:
            trainer.load_state(state)
        steps(trainer, 1)
        state = trainer.state().copied()
    assert state is not None and same(state, whole.state())


def test_a_state_of_another_run_is_refused(task: SimpleNamespace, stopped: Any) -> None:
    state, trainer = stopped[0], make(task, **EVERYTHING)
    before = trainer.state().copied()
    name = next(n for n in state.tensors if n.startswith("critic_optimizer.second"))
    without = State({k: v for k, v in state.tensors.items() if k != name}, state.values)
    with pytest.raises(CheckpointError, match=f"missing: {name}"):
        trainer.load_state(without)
    with pytest.raises(CheckpointError, match="unknown: policy.extra"):
        trainer.load_state(State(state.tensors | {"policy.extra": torch.ones(1)}, state.values))
    with pytest.raises(CheckpointError, match="missing: score_std"):
        trainer.load_state(State(state.tensors, {
            k: v for k, v in state.values.items() if k != "score_std"}))
    wrong = State(state.tensors | {name: torch.ones(3)}, state.values)
    with pytest.raises(CheckpointError, match=r"float32 \(3,\)"):
        trainer.load_state(wrong)
    assert same(trainer.state(), before)  # nothing was changed
    with pytest.raises(CheckpointError, match="reward watch: expected.*sights"):
        trainer.load_state(State(state.tensors, {
            k: v for k, v in state.values.items() if k != "watch.sights"}))
    assert same(trainer.state(), before)
    with pytest.raises(CheckpointError, match="best weights: tensors: .*missing: 1"):
        trainer.load_state(State({k: v for k, v in state.tensors.items() if k != "best.1"},
                                 state.values))
    assert json.loads(encode_values(state.values))  # plain values only

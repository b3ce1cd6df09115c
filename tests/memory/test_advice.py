"""Advice: whoever follows a line gets a plan that fits; the least harmful line comes first."""

import dataclasses
import re
from functools import cache
from typing import Any

import pytest
import torch

from fastrl.config import DPOConfig, PPOConfig, RewardConfig, SFTConfig
from fastrl.memory.plan import MemoryPlan
from fastrl.memory.shapes import shape_named
from fastrl.memory.stages import plan_dpo, plan_ppo, plan_reward, plan_sft
from fastrl.memory.training import Device

GB = 10**9
SETTINGS: dict[str, dict[str, Any]] = {
    "parking auto": {"parking": "auto"},
    "activation_checkpointing true": {"activation_checkpointing": True},
    "optimizer_moments 8bit": {"optimizer_moments": "8bit"},
    "ema_decay null": {"ema_decay": None, "eval_with_ema": False},
    "critic_trunk reward": {"critic_trunk": "reward", "critic_init": "reward"},
    "critic_trunk policy": {"critic_trunk": "policy", "critic_init": "policy"},
    "reference none with kl_coef 0": {"reference": "none", "kl_coef": 0.0, "max_kl": None,
                                      "kl_controller": "fixed"},
}
"""What each name stands for, least harm first: the same bits, the same models, fewer models."""
PLANS = {SFTConfig: plan_sft, RewardConfig: plan_reward, DPOConfig: plan_dpo, PPOConfig: plan_ppo}


def plan(config: Any, shape: str, num_bytes: int, **options: Any) -> MemoryPlan:
    planned: MemoryPlan = PLANS[type(config)](
        config, shape_named(shape), Device("cuda", num_bytes, torch.bfloat16), **options)
    return planned


def followed(config: Any, names: list[str]) -> Any:
    return dataclasses.replace(config, **{key: value for name in names
                                          for key, value in SETTINGS[name].items()})


def named_in(line: str) -> list[str]:
    """The settings of a line, which has to name no others."""
    words = re.sub(r"^set (all of )?", "", line).removesuffix(": it fits then")
    return words.split(", ")


CASES = [(config, gigabytes) for config in (
    SFTConfig(), SFTConfig(max_seq_tokens=2**16), RewardConfig(), DPOConfig(), PPOConfig(),
    PPOConfig(parking="off", max_kl=3.0, kl_controller="adaptive"),
    PPOConfig(parking="off", activation_checkpointing=True, optimizer_moments="8bit",
              ema_decay=None))
    for gigabytes in (6, 10, 14, 20, 28, 33, 38, 46)]


@cache
def given_for(config: Any, gigabytes: int) -> MemoryPlan:
    return plan(config, "llama-3.2-1b", gigabytes * GB)


@pytest.mark.parametrize(("config", "gigabytes"), CASES)
def test_every_line_is_true(config: Any, gigabytes: int) -> None:
    """On eight cards, whatever they need: a setting alone, several, or another card."""
    budget = gigabytes * GB
    given = given_for(config, gigabytes)
    lines = [line for line in given.advice if line.endswith("it fits then")]
    order = [list(SETTINGS).index(name) for line in lines for name in named_in(line)]
    assert order == sorted(order)
    for line in lines:
        names = named_in(line)
        assert plan(followed(config, names), "llama-3.2-1b", budget).fits
        if len(names) > 1:  # none of them for nothing
            assert "all of" in line and lines == [line]
            for name in names:
                rest = [other for other in names if other != name]
                assert not plan(followed(config, rest), "llama-3.2-1b", budget).fits
    if given.fits or lines:
        return
    every = named_in(given.advice[1]) if given.advice[1].startswith("set ") else []
    changed, last = followed(config, every), given.advice[-1]
    assert not plan(changed, "llama-3.2-1b", budget).fits
    device = re.search(r"a device with ([\d.]+) GiB", last)
    assert device and plan(changed, "llama-3.2-1b", int(float(device[1]) * 2**30)).fits
    assert not plan(changed, "llama-3.2-1b", int((float(device[1]) - 0.4) * 2**30)).fits
    rows = re.search(r"rows of at most (\d+) tokens", last)
    if rows:
        assert plan(changed, "llama-3.2-1b", budget, longest=int(rows[1])).fits
        assert not plan(changed, "llama-3.2-1b", budget, longest=2 * int(rows[1])).fits


def test_the_cases_meet_every_kind_of_advice() -> None:
    lines = [line for config, gigabytes in CASES
             for line in given_for(config, gigabytes).advice]
    for name in SETTINGS:
        assert any(line == f"set {name}: it fits then" for line in lines) or name == \
            "reference none with kl_coef 0", name
    for words in ("set all of ", "a device with", "rows of at most", "instead of"):
        assert any(words in line for line in lines), words


def test_without_parking_a_reference_alone_can_be_too_much() -> None:
    config = followed(PPOConfig(parking="off"), [
        "activation_checkpointing true", "optimizer_moments 8bit", "ema_decay null",
        "critic_trunk reward"])
    low = plan(followed(config, ["reference none with kl_coef 0"]), "llama-3.2-1b", GB)
    high = plan(config, "llama-3.2-1b", GB)
    between = (low.peak_bytes + high.peak_bytes) // 2
    given = plan(config, "llama-3.2-1b", int((between + 768 * 2**20) / 0.97))
    assert not given.fits
    assert "set reference none with kl_coef 0: it fits then" in given.advice


def test_no_reward_model_no_trunk_of_one() -> None:
    given = plan(PPOConfig(parking="off"), "llama-3.2-1b", 33 * GB, has_reward_model=False)
    assert not given.fits and not any("critic_trunk reward" in line for line in given.advice)


def test_larger_microbatches_are_not_bought_with_models() -> None:
    config = PPOConfig(parking="off", max_tokens_per_microbatch=2**17, ema_decay=None)
    shape = "llama-3.2-1b"
    given = plan(config, shape, 60 * GB)
    assert given.fits and given.max_tokens_per_microbatch < 2**17 and given.advice
    assert any("activation_checkpointing true" in line for line in given.advice)
    for line in given.advice:
        name, tokens = re.fullmatch(r"set (.+): microbatches of (\d+) tokens instead of \d+",
                                    line).groups()  # type: ignore[union-attr]
        assert name in list(SETTINGS)[:4]
        assert plan(followed(config, [name]), shape, 60 * GB).max_tokens_per_microbatch \
            == int(tokens) > given.max_tokens_per_microbatch


def test_a_reference_with_adapters_off_is_not_given_up() -> None:
    """It takes nothing, so that nothing is won."""
    given = plan(PPOConfig(lora_rank=16, reference="adapters_off"), "llama-3.2-1b", GB)
    assert not given.fits and given.advice
    assert not any("reference none" in line for line in given.advice)
    copied = plan(PPOConfig(lora_rank=16), "llama-3.2-1b", GB)
    assert any("reference none" in line for line in copied.advice)

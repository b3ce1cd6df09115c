"""What a plan adds up to, what it parks, what it advises: hand-written numbers, no weights."""

import dataclasses
from typing import Any

import pytest
import torch

from fastrl.config import EngineConfig, PPOConfig, RewardConfig, SamplingConfig, SFTConfig
from fastrl.memory.plan import CONTEXT_BYTES, Demand, Moment, gib, solve
from fastrl.memory.report import describe, phase_rows, resident_rows
from fastrl.memory.shapes import shape_named
from fastrl.memory.stages import plan_ppo, plan_reward, plan_sft
from fastrl.memory.training import Device

GB = 10**9
LLAMA_8B = shape_named("llama-3.1-8b")
BIG = PPOConfig(activation_checkpointing=True, optimizer_moments="8bit", ema_decay=None,
                eval_steps=None)


def gpu(budget_bytes: int) -> Device:
    return Device("cuda", budget_bytes, torch.bfloat16)


def demand(**changes: Any) -> Demand:
    """Three residents of 10, 20 and 30 bytes; a phase that needs the first, one for the others."""
    def moments(tokens: int, pages: int) -> list[Moment]:
        return [Moment("rollout", ("policy",), {"kv_cache": pages}),
                Moment("update", ("policy", "critic"), {"activations": tokens}),
                Moment("update", ("reward_model",), {})]

    values: dict[str, Any] = dict(
        kept={"policy": 10, "critic": 20, "reward_model": 30}, moments=moments, max_tokens=64,
        min_tokens=8, page_size=1, page_bytes=1, min_pages=1, max_pages=40, parking="auto")
    return Demand(**values | changes)


def planned(budget: int, **changes: Any) -> Any:
    return solve(demand(**changes), budget, "cpu", lambda missing: [f"{missing} missing"])


def test_what_fits_is_left_alone() -> None:
    plan = planned(124)
    assert (plan.parks, plan.max_tokens_per_microbatch, plan.num_pages) == (frozenset(), 64, 40)
    assert plan.fits and plan.advice == () and plan.peak_bytes == 124


@pytest.mark.parametrize(("budget", "tokens", "pages"), [
    (123, 32, 40), (91, 16, 31), (76, 16, 16), (75, 8, 15), (68, 8, 8)])
def test_tokens_are_halved_and_pages_shrink(budget: int, tokens: int, pages: int) -> None:
    """60 bytes stay: without parking the rest is for tokens, and for pages in their phase."""
    plan = planned(budget, parking="off")
    assert (plan.max_tokens_per_microbatch, plan.num_pages) == (tokens, pages)
    assert plan.fits and plan.peak_bytes <= budget


@pytest.mark.parametrize(("budget", "parks"), [
    (92, set()), (91, {"reward_model"}), (61, {"critic", "reward_model"}), (42, set())])
def test_parks_only_what_is_needed(budget: int, parks: set[str]) -> None:
    """Room for MIN_SEQUENCES sequences decides: 32 pages beside 60, 30 or 10 bytes."""
    plan = planned(budget)
    assert plan.fits
    if budget == 42:  # 10 + 32 in rollout, 30 + 8 in the first update, 30 in the second
        assert plan.parks == {"reward_model", "critic"}
    else:
        assert plan.parks == parks


def test_what_came_early_comes_back_where_later_ones_are_enough() -> None:
    """43 bytes: policy 10, reward model 1 and 32 pages fit once the critic is away."""
    assert planned(43, kept={"policy": 10, "critic": 20, "reward_model": 1}).parks == {"critic"}


def test_nothing_is_parked_for_pages_that_no_sequence_needs() -> None:
    """60 bytes stay. All sequences take 4 pages; or 32 sequences of 2 pages take 64."""
    assert planned(68, max_pages=4).parks == frozenset()
    assert planned(124, min_pages=2, max_pages=100).parks == frozenset()
    assert planned(123, min_pages=2, max_pages=100).parks == {"reward_model"}


def test_without_a_cache_there_are_no_pages() -> None:
    plan = planned(1000, page_bytes=0)
    assert plan.num_pages == 0


def test_what_a_phase_leaves_free() -> None:
    assert planned(124).spare() == {"rollout": 124 - 100, "update": 0}
    short = planned(29)  # 10 and a page; 10 + 20 + 8 do not fit
    assert short.spare() == {"rollout": 18, "update": 0}
    assert (gib(2**30), gib(2**30 - 2**20), gib(3 * 2**29)) == ("1.0 GiB", "1023 MiB", "1.5 GiB")


def test_a_plan_that_does_not_fit_says_so() -> None:
    plan = planned(29)
    assert not plan.fits and plan.max_tokens_per_microbatch == 8 and plan.num_pages == 1
    assert plan.advice == ("9 missing",)  # 10 + 20 + 8 in the update


def test_parking_on_and_off() -> None:
    assert planned(1000, parking="on").parks == {"policy", "critic", "reward_model"}
    assert planned(30, parking="off").parks == frozenset()


def test_a_phase_is_its_largest_moment() -> None:
    plan = planned(1000, parking="on")
    assert plan.phases["update"] == {"policy": 10, "critic": 20, "activations": 64}
    assert plan.total("rollout") == 50
    assert {r.name: r.phases for r in plan.residents}["policy"] == ("rollout", "update")


def test_a_gpu_keeps_a_reserve() -> None:
    plan = solve(demand(), 100 * GB, "cuda", lambda missing: [])
    assert plan.reserve_bytes == 768 * 2**20 + 3 * GB
    assert solve(demand(), 100 * GB, "cpu", lambda missing: []).reserve_bytes == 0


def test_residents_of_an_8b_ppo_by_hand() -> None:
    """8,030,261,248 weights: 2 B each, and per weight of the optimiser 2 + 2 + 8/256 B."""
    sizes = {r.name: r.num_bytes for r in plan_ppo(BIG, LLAMA_8B, gpu(80 * GB)).residents}
    assert sizes["policy"] == sizes["reference"] == sizes["policy_gradients"] == 16_060_522_496
    assert sizes["policy_optimizer"] == 32_121_044_992 + 250_945_664
    # The scalar models have no LM head of 128256 x 4096, but a row of 4096.
    assert sizes["critic"] == sizes["reward_model"] == 16_060_522_496 - 2 * 525_336_576 + 2 * 4096


def test_8b_ppo_fits_80_gb() -> None:
    plan = plan_ppo(BIG, LLAMA_8B, gpu(80 * GB))
    assert plan.fits
    assert plan.parks == {"policy", "policy_optimizer", "critic", "critic_optimizer", "reference",
                          "reward_model"}
    assert 64 * GB < plan.total("policy_update") < 80 * GB
    present = plan.phases["policy_update"]
    model = sum(present[name] for name in ("policy", "policy_gradients", "policy_optimizer"))
    assert model == 64_493_035_648  # 16 + 16 + 16 + 16 GB, and the scales
    assert plan_ppo(dataclasses.replace(BIG, optimizer_moments="float32"), LLAMA_8B,
                    gpu(80 * GB)).fits is False


def test_8b_ppo_on_141_gb_parks_less() -> None:
    plan = plan_ppo(BIG, LLAMA_8B, gpu(141 * GB))
    assert plan.fits
    assert plan.parks < plan_ppo(BIG, LLAMA_8B, gpu(80 * GB)).parks


@pytest.mark.parametrize("name", ["activation_checkpointing", "optimizer_moments", "ema_decay"])
def test_advice_names_what_is_enough(name: str) -> None:
    """A card between the needs of two settings: the change, and only a needed one, is named."""
    config = PPOConfig(eval_steps=None)
    change: dict[str, Any] = {"activation_checkpointing": True, "optimizer_moments": "8bit",
                              "ema_decay": None}
    shape = shape_named("qwen3-0.6b")
    changed = dataclasses.replace(config, **{name: change[name]})
    low = plan_ppo(changed, shape, gpu(GB)).peak_bytes
    high = plan_ppo(config, shape, gpu(GB)).peak_bytes
    assert low < high
    between = int(((low + high) / 2 + CONTEXT_BYTES) / 0.97)
    plan = plan_ppo(config, shape, gpu(between))
    assert not plan.fits
    assert any(f"set {name} " in line and line.endswith("it fits then") for line in plan.advice)


def test_advice_for_what_never_fits_says_how_much_it_takes() -> None:
    plan = plan_sft(SFTConfig(), LLAMA_8B, gpu(24 * GB))
    assert not plan.fits
    assert plan.advice[0].endswith("GiB too much")
    assert "set activation_checkpointing true, optimizer_moments 8bit" in plan.advice
    assert "update needs" in plan.advice[-1] and "smaller model" in plan.advice[-1]


def test_advice_for_larger_microbatches() -> None:
    shape = shape_named("llama-3.2-1b")
    plan = plan_sft(SFTConfig(), shape, gpu(32 * GB))
    assert plan.fits and plan.max_tokens_per_microbatch < 8192
    assert any("activation_checkpointing true: microbatches of 8192 tokens instead of "
               f"{plan.max_tokens_per_microbatch}" in line for line in plan.advice)


def test_a_row_is_never_split() -> None:
    plan = plan_sft(SFTConfig(max_tokens_per_microbatch=64), LLAMA_8B, gpu(1000 * GB))
    assert plan.max_tokens_per_microbatch == 2048  # the longest example
    plan = plan_reward(RewardConfig(), LLAMA_8B, gpu(1000 * GB), longest=9000)
    assert plan.max_tokens_per_microbatch == 9000


def test_pages_hold_the_sequences_that_run_together() -> None:
    config = dataclasses.replace(BIG, rollout_batch_size=64, minibatch_size=64,
                                 max_prompt_tokens=100, sampling=SamplingConfig(max_new_tokens=28),
                                 engine=EngineConfig(max_batch_size=10))
    plan = plan_ppo(config, LLAMA_8B, gpu(1000 * GB))
    assert (plan.page_size, plan.num_pages) == (16, 11 * 8)
    cache = next(r for r in plan.residents if r.name == "kv_cache")
    assert cache.num_bytes == 88 * 16 * 131_072


def test_without_reward_model_reference_and_average() -> None:
    plan = plan_ppo(BIG, LLAMA_8B, gpu(200 * GB), has_reward_model=False)
    names = {r.name for r in plan.residents}
    assert "reward_model" not in names and "ema" not in names and "critic" in names
    plan = plan_ppo(PPOConfig(), LLAMA_8B, gpu(2000 * GB))
    ema = next(r for r in plan.residents if r.name == "ema")
    assert ema.num_bytes == 4 * 8_030_261_248 and "evaluation" in ema.phases


def test_evaluation_with_the_average_keeps_the_weights_aside() -> None:
    plan = plan_ppo(PPOConfig(), LLAMA_8B, gpu(2000 * GB))
    assert plan.phases["evaluation"]["swapped"] == 16_060_522_496
    plan = plan_ppo(PPOConfig(eval_with_ema=False), LLAMA_8B, gpu(2000 * GB))
    assert "swapped" not in plan.phases["evaluation"]


def test_what_evaluation_swaps_out_waits_on_the_host_where_the_plan_parks() -> None:
    """It is there while weights and average change places, and while nothing else is."""
    average, weights = 4 * 8_030_261_248, 2 * 8_030_261_248
    on = plan_ppo(PPOConfig(parking="on"), LLAMA_8B, gpu(2000 * GB))
    assert {"swapped", "ema"} <= on.parks
    assert on.phases["evaluation"] == {"policy": weights, "ema": average, "swapped": weights}
    assert on.parked_bytes == sum(r.num_bytes for r in on.residents if r.is_kept) + weights
    off = plan_ppo(PPOConfig(parking="off"), LLAMA_8B, gpu(2000 * GB))
    assert off.phases["evaluation"]["swapped"] == weights and off.parked_bytes == 0
    assert off.phases["evaluation"]["kv_cache"] == on.phases["rollout"]["kv_cache"]


def test_tables_say_where_things_are() -> None:
    plan = plan_ppo(BIG, LLAMA_8B, gpu(80 * GB))
    rows = {name: rest for name, *rest in resident_rows(plan)}
    assert rows["reference"] == ["15.0 GiB", "scoring", "on the host"]
    assert rows["activations"][2] == "gone"
    assert {name for name, *_ in phase_rows(plan)} == {"rollout", "scoring", "policy_update",
                                                       "critic_update"}
    assert describe(plan).startswith("memory plan fits: ")
    assert "does not fit" in describe(plan_sft(SFTConfig(), LLAMA_8B, gpu(24 * GB)))

"""What stages ask for, moment by moment: which numbers of tokens, by hand from the settings.

The bytes per token are those of fastrl.memory.sizes, which test_sizes.py and test_heads.py prove.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from fastrl.config import (
    DPOConfig,
    EngineConfig,
    PPOConfig,
    RewardConfig,
    SamplingConfig,
    SFTConfig,
    TrainConfig,
)
from fastrl.memory import sizes
from fastrl.memory.pages import max_prefill_tokens, tokens_per_page
from fastrl.memory.plan import MemoryPlan
from fastrl.memory.ppo_demand import Models, ppo_demand
from fastrl.memory.shapes import ModelShape, shape_of_config, with_adapters
from fastrl.memory.stages import plan_dpo, plan_ppo, plan_reward, plan_sft
from fastrl.memory.training import Device
from fastrl.models.families import decoder_config

BF16 = torch.bfloat16
GPU, CPU = Device("cuda", 10**15, BF16), Device("cpu", 10**15, torch.float32)
LONG = 32
"""Tokens of the longest row: 20 of a prompt and 12 of a response."""


def shape(name: str, width: int, max_positions: int = 64) -> ModelShape:
    """No two models have the same sizes, so that one in the place of another shows."""
    return shape_of_config(name, decoder_config(
        "llama", vocab_size=100 * width, hidden_size=width, num_layers=3, num_heads=4,
        num_kv_heads=2, intermediate_size=3 * width, max_positions=max_positions))


POLICY, CRITIC, REWARD, REFERENCE = (
    shape("policy", 64), shape("critic", 48), shape("reward_model", 32), shape("reference", 80))
FOUR = Models(POLICY, CRITIC, REWARD, REFERENCE)
CONFIG = PPOConfig(
    rollout_batch_size=8, minibatch_size=4, max_prompt_tokens=20, num_eval_prompts=2,
    sampling=SamplingConfig(max_new_tokens=12), engine=EngineConfig(max_batch_size=6),
    max_tokens_per_microbatch=500, ema_decay=0.9, eval_steps=5, optimizer_moments="8bit")


def ppo(models: Models = FOUR, device: Device = GPU, longest: int | None = None,
        **settings: Any) -> Any:
    return ppo_demand(dataclasses.replace(CONFIG, **settings), models, device, longest)


def rows_of(moments: Any) -> list[tuple[str, tuple[str, ...], Mapping[str, int]]]:
    return [(moment.phase, moment.needs, dict(moment.passing)) for moment in moments]


def trained(model: ModelShape, name: str, tokens: int, logits: int, numels: tuple[int, ...],
            device: Device = GPU, **how: Any) -> list[dict[str, int]]:
    """What passes in the two moments of an update: backward, then the optimiser's step."""
    gradients = {f"{name}_gradients": sum(numels) * device.dtype.itemsize}
    moments = how.pop("moments", "8bit")
    activations = sizes.activation_bytes(model.decoder, device.dtype, tokens,
                                         device_type=device.type, **how)
    activations += sizes.adapter_bytes(model.decoder, device.dtype, tokens, model.adapter_width)
    return [gradients | {"activations": activations, "logits": logits},
            gradients | {"scratch": sizes.scratch_bytes(numels, device.dtype, moments,
                                                        device_type=device.type)}]


def test_an_iteration_of_ppo() -> None:
    """Microbatches of 100 tokens: 4 rows, 48 of a response. Nothing is as small as all rows of a
    rollout (8 x 32) or a minibatch (4 x 32); an evaluation (2 x 32, 24 of responses) is."""
    cache = {"kv_cache": 9 * 16 * 2 * 3 * 2 * 16 * 2}  # 9 pages of 16; key, value; 3 layers
    prefill = sizes.forward_bytes(POLICY.decoder, BF16, 8 * LONG)
    decode = sizes.sampling_bytes(POLICY.decoder, BF16, 6, device_type="cuda")
    swapped = {"swapped": 2 * sum(POLICY.language_model)}
    in_rollout, in_update = ("policy", "kv_cache"), (
        "policy", "policy_gradients", "policy_optimizer", "ema", "activations", "logits")
    in_critic = ("critic", "critic_gradients", "critic_optimizer", "activations")

    def scoring(phase: str, tokens: int, scored: int, more: Mapping[str, int],
                *names: str) -> list[Any]:
        shapes = {"policy": POLICY, "reference": REFERENCE, "critic": CRITIC,
                  "reward_model": REWARD}
        rows = []
        for name in names:
            decoder = shapes[name].decoder
            head = sizes.scoring_bytes if name in ("policy", "reference") else sizes.scalar_bytes
            rows += [(phase, (name,), {**more, "activations": sizes.forward_bytes(decoder, BF16,
                                                                                  tokens)}),
                     (phase, (name,), {**more, "logits": head(decoder, BF16, scored)})]
        return rows

    def rollout(phase: str, more: Mapping[str, int]) -> list[Any]:
        return [(phase, in_rollout, {**cache, **more, "scratch": 0, "activations": prefill}),
                (phase, in_rollout, {**cache, **more, "scratch": 0, "logits": decode})]

    expected = [
        *rollout("rollout", {}),
        *scoring("scoring", 100, 48, {}, "policy", "reference", "critic", "reward_model"),
        *[("policy_update", in_update, passing) for passing in trained(
            POLICY, "policy", 100, sizes.loss_bytes(POLICY.decoder, BF16, 48),
            POLICY.language_model)],
        *[("critic_update", in_critic, passing) for passing in trained(
            CRITIC, "critic", 100, sizes.scalar_bytes(CRITIC.decoder, BF16, 100),
            CRITIC.scalar_model)],
        ("evaluation", ("policy", "ema", "swapped"), swapped),
        *rollout("evaluation", swapped),
        *scoring("evaluation", 64, 24, swapped, "policy", "reference", "reward_model")]
    assert rows_of(ppo().moments(100, 9)) == expected


def test_what_an_iteration_of_ppo_keeps() -> None:
    n = {model.name: sum(model.scalar_model if model in (CRITIC, REWARD) else model.language_model)
         for model in (POLICY, CRITIC, REWARD, REFERENCE)}
    assert ppo().kept == {
        "policy": 2 * n["policy"], "critic": 2 * n["critic"], "ema": 4 * n["policy"],
        "reference": 2 * n["reference"], "reward_model": 2 * n["reward_model"],
        "policy_optimizer": sizes.optimizer_bytes(POLICY.language_model, BF16, "8bit"),
        "critic_optimizer": sizes.optimizer_bytes(CRITIC.scalar_model, BF16, "8bit")}
    alone = ppo(Models(POLICY, None, None, None), ema_decay=None)
    assert alone.kept.keys() == {"policy", "policy_optimizer"}
    phases = [(moment.phase, moment.needs[0]) for moment in alone.moments(100, 9)]
    assert phases == [*[("rollout", "policy")] * 2, *[("scoring", "policy")] * 2,
                      *[("policy_update", "policy")] * 2, *[("evaluation", "policy")] * 4]
    plain = {moment.phase for moment in ppo(eval_steps=None).moments(100, 9)}
    assert plain == {"rollout", "scoring", "policy_update", "critic_update"}


def activations(demand: Any, phase: str, number: int = 0, tokens: int = 1000) -> int:
    """Of the moment with this number in a phase."""
    moments = [m for m in demand.moments(tokens, 9) if m.phase == phase]
    return int(moments[number].passing["activations"])


def logits(demand: Any, phase: str, number: int = 1, tokens: int = 1000) -> int:
    moments = [m for m in demand.moments(tokens, 9) if m.phase == phase]
    return int(moments[number].passing["logits"])


def test_a_microbatch_is_no_larger_than_its_batch() -> None:
    """1000 tokens are allowed: a rollout has 8 x 32, a minibatch 4 x 32, of them 12 of 32 new."""
    demand, forward = ppo(), sizes.forward_bytes
    assert activations(demand, "scoring") == forward(POLICY.decoder, BF16, 8 * 32)
    assert logits(demand, "scoring") == sizes.scoring_bytes(POLICY.decoder, BF16, 8 * 12)
    assert activations(demand, "policy_update") == sizes.activation_bytes(
        POLICY.decoder, BF16, 4 * 32, device_type="cuda")
    assert logits(demand, "policy_update", 0) == sizes.loss_bytes(POLICY.decoder, BF16, 4 * 12)
    assert activations(demand, "critic_update") == sizes.activation_bytes(
        CRITIC.decoder, BF16, 4 * 32, device_type="cuda")
    # Windows of pretraining have no prompt: every token has logits.
    assert logits(ppo(ptx_coef=1.0), "policy_update", 0) == sizes.loss_bytes(
        POLICY.decoder, BF16, 4 * 32)
    # Responses that are longer than a microbatch are no more than it has tokens.
    assert logits(demand, "scoring", tokens=7) == sizes.scoring_bytes(POLICY.decoder, BF16, 7)


@pytest.mark.parametrize(("max_prefill_tokens", "tokens"), [
    (10, 32), (100, 100), (1000, 8 * 32), (None, 8 * 32)])
def test_a_prefill_has_a_row_at_least_and_all_at_most(
    max_prefill_tokens: int | None, tokens: int
) -> None:
    demand = ppo(engine=EngineConfig(max_batch_size=6, max_prefill_tokens=max_prefill_tokens))
    assert activations(demand, "rollout") == sizes.forward_bytes(POLICY.decoder, BF16, tokens)
    assert activations(demand, "evaluation", 1) == activations(demand, "rollout")


@pytest.mark.parametrize(("max_batch_size", "rows"), [(6, 6), (200, 8)])
def test_a_decode_step_has_a_row_for_each_sequence_that_runs(
    max_batch_size: int, rows: int
) -> None:
    """And the cache room for one more, which waits for its page."""
    demand = ppo(engine=EngineConfig(max_batch_size=max_batch_size))
    assert logits(demand, "rollout") == sizes.sampling_bytes(POLICY.decoder, BF16, rows,
                                                             device_type="cuda")
    assert (demand.max_pages, demand.min_pages, demand.page_size) == ((rows + 1) * 2, 2, 16)
    assert demand.page_bytes == 16 * (2 * 3 * 2 * 16 * 2)


def test_pages_that_are_asked_for() -> None:
    demand = ppo(engine=EngineConfig(num_pages=11))
    assert (demand.max_pages, demand.min_pages) == (11, 2)
    demand = ppo(engine=EngineConfig(num_pages=1))  # what cannot hold a sequence is not raised
    assert (demand.max_pages, demand.min_pages) == (1, 1)
    demand = ppo(longest=33)
    assert (demand.min_pages, demand.min_tokens) == (3, 33)


@pytest.mark.parametrize(("longest", "max_positions", "row"), [
    (None, 64, 32), (None, 24, 24), (40, 64, 40), (40, 24, 24)])
def test_the_longest_row_ends_where_positions_end(
    longest: int | None, max_positions: int, row: int
) -> None:
    models = dataclasses.replace(FOUR, policy=shape("policy", 64, max_positions))
    demand = ppo(models, longest=longest)
    assert demand.min_tokens == row
    assert activations(demand, "scoring") == sizes.forward_bytes(POLICY.decoder, BF16, 8 * row)


def test_page_sizes_and_prompt_tokens_that_settings_leave_open() -> None:
    own = EngineConfig(page_size=5, max_prefill_tokens=77)
    for device in ("cpu", "cuda"):
        assert tokens_per_page(own, device, 100) == 5 and max_prefill_tokens(own, device) == 77
    assert tokens_per_page(EngineConfig(), "cuda", 100) == 16
    assert tokens_per_page(EngineConfig(num_pages=3), "cpu", 100) == 16
    # A CPU reads a whole sequence in one page: 7 sixteens, and 3 slots that its kernel needs.
    assert tokens_per_page(EngineConfig(), "cpu", 100) == 7 * 16 + 3
    assert max_prefill_tokens(EngineConfig(), "cpu") == 2048
    assert max_prefill_tokens(EngineConfig(), "cuda") == 8192
    assert max_prefill_tokens(EngineConfig(), "xpu") == 8192


def test_a_head_with_an_adapter_is_joined_in_every_call_of_the_policy() -> None:
    """Its matrix and B beside it: 6400 x 64 numbers of 2 bytes in rollout, scoring and update."""
    head, rank = 6400 * 64 * 2, dict(lora_rank=2)
    both = [ppo(dataclasses.replace(FOUR, policy=with_adapters(POLICY, TrainConfig(
        lora_targets=targets, **rank))), lora_targets=targets, reference="adapters_off", **rank)
        for targets in (("q_proj", "lm_head"), ("q_proj",))]
    assert [model.adapts_head for model in (
        with_adapters(POLICY, TrainConfig(lora_targets=("q_proj", "lm_head"), **rank)),
        with_adapters(POLICY, TrainConfig(lora_targets=("q_proj",), **rank)))] == [True, False]
    for phase in ("rollout", "scoring"):
        assert logits(both[0], phase) - logits(both[1], phase) == head
    assert logits(both[0], "policy_update", 0) == head + sizes.loss_bytes(
        POLICY.decoder, BF16, 4 * 12)
    assert logits(both[1], "policy_update", 0) == sizes.loss_bytes(
        POLICY.decoder, BF16, 4 * 12, has_frozen_head=True)


def test_copies_by_input_of_a_cpu_are_there_in_prefill_and_decode() -> None:
    moments = [m for m in ppo(device=CPU).moments(100, 9) if m.phase == "rollout"]
    copies = sizes.copy_bytes(POLICY.decoder, torch.float32, device_type="cpu")
    assert copies > 0 and [m.passing["scratch"] for m in moments] == [copies] * 2


@pytest.mark.parametrize(("settings", "needs"), [
    (dict(critic_init="reward"), ("critic", "reward_model")),
    (dict(critic_init="policy"), ("critic", "policy"))])
def test_a_critic_with_adapters_needs_its_trunk_in_scoring_and_update(
    settings: dict[str, Any], needs: tuple[str, ...]
) -> None:
    lora = dict(lora_rank=2, reference="adapters_off")
    critic = with_adapters(CRITIC, TrainConfig(lora_rank=2), has_head=False)
    models = dataclasses.replace(FOUR, critic=critic)
    demand = ppo(models, **lora, **settings)
    scoring = [m.needs for m in demand.moments(100, 9) if m.phase == "scoring"]
    assert scoring.count(needs) == 2
    updates = [m for m in demand.moments(100, 9) if m.phase == "critic_update"]
    assert all(needs[1] in m.needs for m in updates)
    assert [dict(m.passing) for m in updates] == trained(
        critic, "critic", 100, sizes.scalar_bytes(CRITIC.decoder, BF16, 100),
        (48, *critic.adapters))
    # Without a reward model there is the policy's trunk only.
    alone = ppo(dataclasses.replace(models, reward_model=None), **lora, **settings)
    scoring = [m.needs for m in alone.moments(100, 9) if m.phase == "scoring"]
    assert scoring.count(("critic", "policy")) == 2


def bytes_of(plan: MemoryPlan) -> dict[str, int]:
    return {resident.name: resident.num_bytes for resident in plan.residents}


def update(model: ModelShape, tokens: int, head: int, moments: str = "float32",
           **how: Any) -> dict[str, int]:
    """Largest bytes of what passes in an update in bf16."""
    first, second = trained(model, "x", tokens, head, model.language_model, moments=moments, **how)
    del first["x_gradients"], second["x_gradients"]
    return first | second


@pytest.mark.parametrize(("settings", "longest", "tokens"), [
    ({}, None, 4 * 40),  # all rows of a batch in one microbatch
    ({}, 30, 4 * 30),  # the longest of the data
    ({"packing": True}, 30, 4 * 40),  # rows are full whatever the examples are
    ({"max_tokens_per_microbatch": 100}, None, 100),
    ({"max_tokens_per_microbatch": 10}, 30, 30),  # a row is never split
    ({"max_seq_tokens": 100}, None, 4 * 64),  # positions end at 64
    ({"residual_dropout": 0.1, "activation_checkpointing": True}, None, 160)])
def test_sft(settings: dict[str, Any], longest: int | None, tokens: int) -> None:
    config = SFTConfig(**{"batch_size": 4, "max_seq_tokens": 40, "residual_dropout": 0.0,
                          "optimizer_moments": "8bit"} | settings)
    plan = plan_sft(config, POLICY, GPU, longest=longest)
    n = sum(POLICY.language_model)
    assert bytes_of(plan) == {
        "policy": 2 * n, "policy_gradients": 2 * n,
        "policy_optimizer": sizes.optimizer_bytes(POLICY.language_model, BF16, "8bit"),
    } | update(POLICY, tokens, sizes.loss_bytes(POLICY.decoder, BF16, tokens), "8bit",
               has_dropout=config.residual_dropout > 0,
               is_checkpointed=config.activation_checkpointing)
    assert all(row.phases == ("update",) for row in plan.residents)
    assert {row.name for row in plan.residents if row.is_kept} == {"policy", "policy_optimizer"}


def test_sft_with_adapters() -> None:
    """What learns is small, and no gradient of the head is made."""
    config = SFTConfig(batch_size=1, max_seq_tokens=40, residual_dropout=0.0, lora_rank=2)
    model = with_adapters(POLICY, config)
    rows, learned = bytes_of(plan_sft(config, POLICY, GPU)), sum(model.adapters)
    assert rows["policy"] == 2 * (sum(POLICY.language_model) + learned)
    assert rows["policy_gradients"] == 2 * learned and rows["policy_optimizer"] == 10 * learned
    assert rows["logits"] == sizes.loss_bytes(POLICY.decoder, BF16, 40, has_frozen_head=True)
    assert rows["activations"] == sizes.activation_bytes(
        POLICY.decoder, BF16, 40, device_type="cuda") + sizes.adapter_bytes(
        POLICY.decoder, BF16, 40, model.adapter_width)


@pytest.mark.parametrize(("settings", "longest", "tokens"), [
    ({}, None, 3 * 2 * 40),  # two completions of each prompt
    ({}, 90, 3 * 90),
    ({"max_seq_tokens": 100}, None, 3 * 2 * 64),
    ({"max_tokens_per_microbatch": 100}, None, 100),
    ({"max_tokens_per_microbatch": 10}, None, 80),
    ({"lora_rank": 2}, None, 240)])
def test_reward_models(settings: dict[str, Any], longest: int | None, tokens: int) -> None:
    config = RewardConfig(**{"batch_size": 3, "max_seq_tokens": 40} | settings)
    model = with_adapters(POLICY, config, has_head=False)
    rows = bytes_of(plan_reward(config, POLICY, GPU, longest=longest))
    learned = (64, *model.adapters) if "lora_rank" in settings else POLICY.scalar_model
    passing = trained(model, "reward_model", tokens, sizes.scalar_bytes(
        POLICY.decoder, BF16, tokens), learned, moments="float32")
    assert rows == {
        "reward_model": 2 * (sum(POLICY.scalar_model) + sum(model.adapters)),
        "reward_model_optimizer": 10 * sum(learned)} | passing[0] | passing[1]


@pytest.mark.parametrize(("settings", "longest", "rows", "tokens"), [
    ({}, None, 3 * 80, 8192),  # the reference reads all data, as much at a time as is allowed
    ({}, 50, 3 * 50, 8192),
    ({"max_seq_tokens": 100}, None, 3 * 128, 8192),
    ({"max_tokens_per_microbatch": 100}, None, 100, 100),
    ({"max_tokens_per_microbatch": 10}, None, 80, 80),
    ({"lora_rank": 2}, None, 3 * 80, 8192)])
@pytest.mark.parametrize("second", [None, REFERENCE])
def test_dpo(settings: dict[str, Any], longest: int | None, rows: int, tokens: int,
             second: ModelShape | None) -> None:
    config = DPOConfig(**{"batch_size": 3, "max_seq_tokens": 40} | settings)
    model = with_adapters(POLICY, config)
    plan = plan_dpo(config, POLICY, GPU, reference=second, longest=longest)
    source = (second or POLICY).decoder
    weights = 2 * (sum(POLICY.language_model) + sum(model.adapters))
    learned = model.adapters or POLICY.language_model
    scoring = {"policy": weights} | ({} if second is None else {
        "reference": 2 * sum(REFERENCE.language_model)})
    pass_, head = sizes.forward_bytes(source, BF16, tokens), sizes.scoring_bytes(
        source, BF16, tokens)
    assert plan.phases["scoring"] == scoring | (
        {"activations": pass_} if pass_ > head else {"logits": head})
    first, step = trained(model, "policy", rows, sizes.logprob_bytes(
        POLICY.decoder, BF16, rows, has_frozen_head=bool(model.adapters)), learned,
        moments="float32")
    beside = {"policy": weights, "policy_optimizer": 10 * sum(learned)}
    assert plan.phases["update"] == beside | max(first, step, key=lambda row: sum(row.values()))
    assert {row.name for row in plan.residents if row.is_kept} == {"policy"}
    biggest = bytes_of(plan)
    assert biggest["scratch"] == step["scratch"]
    assert biggest["activations"] == max(pass_, first["activations"])
    assert biggest["logits"] == max(head, first["logits"])
    alone = plan_dpo(dataclasses.replace(config, reference="none"), POLICY, GPU, longest=longest)
    assert set(alone.phases) == {"update"} and alone.phases["update"] == plan.phases["update"]


def test_ppo_takes_the_shapes_that_it_is_given() -> None:
    """Else all models have the policy's, and the critic that of the model it starts from."""
    config = dataclasses.replace(CONFIG, optimizer_moments="float32")

    def kept(**shapes: Any) -> dict[str, int]:
        changed = dataclasses.replace(config, **shapes.pop("settings", {}))
        plan = plan_ppo(changed, POLICY, GPU, **shapes)
        return {row.name: row.num_bytes for row in plan.residents if row.is_kept}

    scalar = {model.name: 2 * sum(model.scalar_model) for model in (POLICY, CRITIC, REWARD)}
    assert kept()["critic"] == kept()["reward_model"] == scalar["policy"]
    assert kept()["reference"] == kept()["policy"] == 2 * sum(POLICY.language_model)
    given = kept(critic=CRITIC, reward_model=REWARD, reference=REFERENCE)
    assert (given["critic"], given["reward_model"]) == (scalar["critic"], scalar["reward_model"])
    assert given["reference"] == 2 * sum(REFERENCE.language_model)
    assert kept(reward_model=REWARD)["critic"] == scalar["reward_model"]
    from_policy = {"critic_init": "policy"}
    assert kept(reward_model=REWARD, settings=from_policy)["critic"] == scalar["policy"]
    function = kept(reward_model=REWARD, has_reward_model=False)
    assert "reward_model" not in function and function["critic"] == scalar["policy"]
    assert "reference" not in kept(settings={"reference": "none", "kl_coef": 0.0},
                                   reference=REFERENCE)
    group = {"advantage": "grpo", "num_samples_per_prompt": 2}
    assert not {"critic", "critic_optimizer"} & kept(settings=group, critic=CRITIC).keys()
    assert "critic" not in kept(settings=group)


def test_ppo_plans_with_the_longest_row_of_its_data() -> None:
    plan = plan_ppo(CONFIG, POLICY, GPU, longest=40)
    assert plan.page_size == 16 and plan.num_pages == 7 * 3
    assert plan_ppo(dataclasses.replace(CONFIG, max_tokens_per_microbatch=8), POLICY, GPU,
                    longest=40).max_tokens_per_microbatch == 40

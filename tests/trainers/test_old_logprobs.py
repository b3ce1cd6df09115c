"""Old log-probs are the rollout's: who says so, who notices where not, and what happens then."""

import copy
import dataclasses
import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fastrl.exactness.sweep as sweep_module
from fastrl.config import EngineConfig, PPOConfig
from fastrl.engine import Engine, difference
from fastrl.engine.difference import NOWHERE, first_difference
from fastrl.errors import ConfigError
from fastrl.models import CausalLM, DecoderConfig, PackedAttention, PagedAttention, new_decoder
from fastrl.trainers import old_logprobs
from fastrl.trainers.old_logprobs import largest_gap, update_logprobs


def engine_with(policy: CausalLM, **changes: Any) -> Engine:
    """An engine whose model has the policy's own weights, at every step, and other settings."""
    other = new_decoder(dataclasses.replace(policy.backbone.config, **changes), seed=0)
    for name, module in other.named_modules():
        for key in list(module._parameters):
            setattr(module, key, policy.get_submodule(name)._parameters[key])
    return Engine(other, EngineConfig(page_size=4, max_batch_size=8))


def deep_model() -> CausalLM:
    """Three layers, wide enough that each one moves the log-probs."""
    return new_decoder(DecoderConfig(
        family="llama", vocab_size=13, hidden_size=16, num_layers=3, num_heads=2, num_kv_heads=2,
        head_dim=8, rotary_dim=8, intermediate_size=24, max_positions=32, initializer_range=0.4,
        eos_token_ids=(1,)), seed=0)


def test_a_planted_rotary_base_is_caught_at_once_named_and_survived(
    task: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = task.make_trainer(deep_model(), num_iterations=3)
    trainer.engine = engine_with(trainer.policy, rotary_base=100.0)
    before = task.weights_of(trainer.policy)
    with caplog.at_level(logging.WARNING, logger="fastrl"):
        metrics = [trainer.step() for _ in range(3)]
    assert [m["logprob/num_recomputed"] for m in metrics] == [1, 2, 3]
    warnings = [r.getMessage() for r in caplog.records if "log-probs of the engine" in r.message]
    assert len(warnings) == 3 and warnings[0].startswith("iteration 0: ")
    assert all("first in: layer 0 attention." in warning for warning in warnings)
    # Training goes on, from log-probs of the update's own forward.
    assert not task.equal(before, task.weights_of(trainer.policy))
    assert all(abs(m["kl/approx"]) < 1 for m in metrics)


@pytest.mark.parametrize(("part", "name"), [
    ("layers.0.mlp.up", "layer 0 mlp"), ("layers.1.attention.out", "layer 1 attention"),
    ("layers.2.mlp.down", "layer 2 mlp"), ("final_norm", "final norm")])
def test_the_first_part_that_differs_is_named(
    task: SimpleNamespace, part: str, name: str
) -> None:
    policy = deep_model()
    other = copy.deepcopy(policy)
    with torch.no_grad():
        other.backbone.get_submodule(part).weight.mul_(1.01)
    found = first_difference(Engine(other), policy, [2, 3, 4], task.SETTINGS["sampling"],
                             tolerance=1e-5, seed=1, request_id=5)
    assert found == name


def test_a_head_of_its_own_and_equal_models_are_told_apart(task: SimpleNamespace) -> None:
    policy, sampling = deep_model(), task.SETTINGS["sampling"]
    other = copy.deepcopy(policy)
    with torch.no_grad():
        other.lm_head.weight.mul_(1.1)
    arguments: dict[str, Any] = {"tolerance": 1e-5, "seed": 1, "request_id": 5}
    assert first_difference(Engine(other), policy, [2, 3], sampling, **arguments) == "lm_head"
    assert first_difference(Engine(policy), policy, [2, 3], sampling, **arguments) == NOWHERE


def test_what_only_adds_up_is_called_rounding(
    task: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = deep_model()
    other = copy.deepcopy(policy)
    with torch.no_grad():
        other.backbone.layers[1].mlp.up.weight.mul_(1 + 1e-6)
    states = difference.first_difference(
        Engine(other), policy, [2, 3], task.SETTINGS["sampling"], tolerance=1e-5, seed=1,
        request_id=5)
    assert states == NOWHERE  # log-probs agree, so that there is nothing to explain
    monkeypatch.setattr(difference, "linear_logprobs", lambda *args, **kwargs: (
        torch.zeros(1), None))
    found = difference.first_difference(
        Engine(other), policy, [2, 3], task.SETTINGS["sampling"], tolerance=1e-5, seed=1,
        request_id=5)
    assert found == "rounding, which begins in layer 1 mlp"


def test_another_architecture_is_compared_as_a_whole(task: SimpleNamespace) -> None:
    class Wrapped(torch.nn.Module):
        """A trunk whose parts nobody knows."""

        def __init__(self, trunk: torch.nn.Module) -> None:
            super().__init__()
            self.trunk = trunk

        def forward(self, *inputs: Any) -> Any:
            return self.trunk(*inputs)

    policy = deep_model()
    other = copy.deepcopy(policy)
    for model in (policy, other):
        model.backbone = Wrapped(model.backbone)
    with torch.no_grad():
        other.backbone.trunk.embed.weight.mul_(1.1)
    assert first_difference(Engine(other), policy, [2, 3], task.SETTINGS["sampling"],
                            tolerance=1e-5, seed=1, request_id=5) == "hidden states"


LONG_PROMPT = [2 + 7 * i % 11 for i in range(70)]
"""Enough tokens that the engine reads them once for several responses."""


@pytest.mark.parametrize(("state", "num_samples", "expected"), [
    (PagedAttention, 3, "layer 1 attention, with a prompt that others share"),
    (PackedAttention, 3, "layer 1 attention, with a prompt that others share"),
    (PagedAttention, 1, NOWHERE), (PackedAttention, 1, NOWHERE)])
@pytest.mark.parametrize("sizes", [{"page_size": 16}, {"num_pages": 7}], ids=str)
def test_a_layer_that_is_wrong_only_where_prompts_are_shared_is_named(
    task: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, state: Any, num_samples: int,
    expected: str, sizes: dict[str, int],
) -> None:
    method = "_attend" if state is PagedAttention else "__call__"
    real = getattr(state, method)

    def faulty(self: Any, layer: int, *args: Any, **kwargs: Any) -> torch.Tensor:
        out = real(self, layer, *args, **kwargs)
        return out if self.prefixes is None or layer != 1 else out * 1.01

    policy = new_decoder(dataclasses.replace(deep_model().backbone.config, max_positions=128), 0)
    engine = Engine(policy, EngineConfig(max_batch_size=4, **sizes))
    arguments: dict[str, Any] = {"tolerance": 1e-5, "seed": 1, "request_id": 6,
                                 "num_samples": num_samples}
    sampling = dataclasses.replace(task.SETTINGS["sampling"], max_new_tokens=6)
    assert first_difference(engine, policy, LONG_PROMPT, sampling, **arguments) == NOWHERE
    monkeypatch.setattr(state, method, faulty)
    assert first_difference(engine, policy, LONG_PROMPT, sampling, **arguments) == expected


def test_a_fault_of_shared_prompts_is_named_in_the_warning(
    task: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = PackedAttention.__call__

    def faulty(self: Any, layer: int, *args: Any, **kwargs: Any) -> torch.Tensor:
        out = real(self, layer, *args, **kwargs)
        return out if self.prefixes is None or layer != 2 else out * 1.01

    monkeypatch.setattr(PackedAttention, "__call__", faulty)
    trainer = task.make_trainer(deep_model(), num_samples_per_prompt=4)
    with caplog.at_level(logging.WARNING, logger="fastrl"):
        assert trainer.step()["logprob/num_recomputed"] == 1
    assert "first in: layer 2 attention, with a prompt that others share. " in caplog.text


def test_a_tolerance_of_0_accepts_the_same_bits_only() -> None:
    assert PPOConfig().logprob_tolerance == 1e-5
    assert PPOConfig(logprob_tolerance=0.0).logprob_tolerance == 0
    with pytest.raises(ConfigError, match="logprob_tolerance: expected a number of at least 0"):
        PPOConfig(logprob_tolerance=-1e-5)


@pytest.mark.parametrize("max_tokens", [1, 7, 20, 8192])
def test_recomputed_logprobs_are_the_rollouts_under_any_microbatch(
    task: SimpleNamespace, max_tokens: int
) -> None:
    trainer = task.make_trainer(deep_model(), max_tokens_per_microbatch=max_tokens)
    rollout = task.catch_batch(trainer).rollout
    again = update_logprobs(trainer.policy, rollout, trainer.config)
    assert not again.requires_grad and (again[~rollout.response_mask] == 0).all()
    torch.testing.assert_close(again, rollout.rollout_logprobs, rtol=0, atol=1e-5)


def test_the_response_that_is_drawn_again_is_the_one_with_the_gap(
    task: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, asked = task.make_trainer(num_logprob_checks=8), list[dict[str, Any]]()

    def note(engine: Engine, model: CausalLM, prompt: list[int], sampling: Any, *,
             tolerance: float, **request: Any) -> str:
        again = engine.generate([prompt], sampling, seed=request["seed"],
                                first_request_id=request["request_id"])
        asked.append({"again": again.sequence(0), "row": request["request_id"]})
        return "somewhere"

    monkeypatch.setattr(old_logprobs, "first_difference", note)
    rollouts, generate = list[Any](), trainer.engine.generate

    def spoiled(*args: Any, **kwargs: Any) -> Any:
        rollout = generate(*args, **kwargs)
        if not rollouts:
            rollout.rollout_logprobs[5, 0] += 1
        rollouts.append(rollout)
        return rollout

    monkeypatch.setattr(trainer.engine, "generate", spoiled)
    assert trainer.step()["logprob/num_recomputed"] == 1
    assert asked == [{"again": rollouts[0].sequence(5), "row": 5}]


@pytest.mark.parametrize("exact", [True, False])
def test_start_up_sweeps_where_exact_mode_is_on(
    task: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    exact: bool,
) -> None:
    monkeypatch.setattr(sweep_module, "least_rows", lambda product, dtype, device: None)
    with caplog.at_level(logging.WARNING, logger="fastrl"):
        task.make_trainer(engine=EngineConfig(exact=exact))
    assert ("exact mode: product" in caplog.text) == exact


def test_nan_is_a_gap(task: SimpleNamespace) -> None:
    trainer = task.make_trainer()
    rollout = task.catch_batch(trainer).rollout
    rollout.rollout_logprobs[3, 0] = torch.nan
    gap, row = largest_gap(trainer.policy, rollout, trainer.config, 0)
    assert gap != gap and row == 3


@pytest.mark.parametrize("exact", [True, False])
def test_the_update_is_inside_exact_mode_where_it_is_on(task: SimpleNamespace, exact: bool) -> None:
    trainer, seen = task.make_trainer(engine=EngineConfig(exact=exact)), list[str]()

    def note(*_: object) -> None:
        if torch.is_grad_enabled():
            seen.append(torch.get_float32_matmul_precision())

    trainer.policy.backbone.embed.register_forward_hook(note)
    torch.set_float32_matmul_precision("high")
    try:
        trainer.step()
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert set(seen) == {"highest" if exact else "high"}

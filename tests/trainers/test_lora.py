"""Training with LoRA: what learns, what stands still, and a reference that takes no memory."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from fastrl.config import DPOConfig, PPOConfig, RewardConfig, SFTConfig
from fastrl.errors import ConfigError
from fastrl.models import load_causal_lm, load_scalar_model, save_causal_lm, save_scalar_model
from fastrl.models.lora import sharing_copy, trained_parameters, without_adapters
from fastrl.presets import GRPOConfig
from fastrl.rewards import RewardModelScorer
from fastrl.trainers.dpo import DPOTrainer
from fastrl.trainers.ppo import PPOTrainer
from fastrl.trainers.ppo_trunks import initial_critic
from fastrl.trainers.reward import RewardTrainer
from fastrl.trainers.sft import SFTTrainer
from fastrl.types import Comparison, TokenExample

LORA: dict[str, Any] = {"lora_rank": 3, "lora_alpha": 6.0}
STEPS: dict[str, Any] = LORA | {"learning_rate": 1e-2, "lr_schedule": "constant"}
EXAMPLES = [TokenExample((2 + i, 4, 6, 8, 10, 1), (False, *[True] * 5)) for i in range(4)]
RANKINGS = [Comparison((2 + i, 3), ((4, 6, 1), (5, 7, 1), (5, 1)), (0, 1, 1)) for i in range(4)]


def adapters(model: Any) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if ".lora_" in name}


def base(model: Any) -> dict[str, torch.Tensor]:
    """Copies of every weight that is no adapter and no scalar head."""
    return {name: p.detach().clone() for name, p in model.named_parameters()
            if ".lora_" not in name and not name.startswith("head.")}


def check_only_adapters_learned(model: Any, before: Any, optimizer: Any, head: int = 0) -> None:
    """Frozen weights have the same bits, no gradient and no place in the optimiser."""
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    assert not any(after[name].requires_grad or after[name].grad is not None for name in before)
    own = adapters(model)
    assert own and all(p.requires_grad for p in own.values())
    assert all(p.abs().max() > 0 for name, p in own.items() if ".lora_b." in name)
    assert sum(p.numel() for p in optimizer.parameters) == head + sum(
        p.numel() for p in own.values())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_sft_trains_adapters_alone(task: Any, checkpointing: bool) -> None:
    model = task.tiny_model()
    before = base(model)
    trainer = SFTTrainer(SFTConfig(batch_size=4, max_steps=20, select_by="last", **STEPS,
                                   residual_dropout=0.0, activation_checkpointing=checkpointing),
                         model, EXAMPLES)
    losses = [trainer.step()["loss/train"] for _ in range(20)]
    assert losses[-1] < 0.5 * losses[0]
    check_only_adapters_learned(model, before, trainer.optimizer)


def test_sft_keeps_the_best_adapters(task: Any) -> None:
    model = task.tiny_model()
    trainer = SFTTrainer(SFTConfig(batch_size=4, max_steps=4, eval_steps=1, select_by="loss",
                                   residual_dropout=0.0, **(STEPS | {"learning_rate": 0.05})),
                         model, EXAMPLES, eval=EXAMPLES)
    seen: list[Any] = []
    step = trainer.step

    def remember() -> dict[str, float]:
        metrics = step()
        seen.append(task.weights_of(model))
        return metrics

    trainer._eval_loss = lambda: [5.0, 1.0, 2.0, 3.0][len(seen) - 1]
    trainer.step = remember  # type: ignore[method-assign]
    trainer.train()
    assert trainer.selected_step == 2 and task.equal(task.weights_of(model), seen[1])
    assert not task.equal(seen[1], seen[3])


def test_reward_and_dpo_train_adapters_alone(task: Any) -> None:
    model = task.tiny_critic(task.tiny_model())
    before = base(model)
    head = model.head.weight.detach().clone()
    trainer = RewardTrainer(RewardConfig(batch_size=4, max_steps=8, **STEPS), model, RANKINGS)
    trainer.train()
    check_only_adapters_learned(model, before, trainer.optimizer, head=model.spec.hidden_size)
    assert not torch.equal(head, model.head.weight)

    policy = task.tiny_model()
    before = base(policy)
    dpo = DPOTrainer(DPOConfig(batch_size=4, max_steps=8, **STEPS), policy, RANKINGS)
    first, *_, last = [dpo.step() for _ in range(8)]
    assert first["reward/margin_mean"] == pytest.approx(0, abs=1e-5)  # B is 0: the reference
    assert last["loss/dpo"] < first["loss/dpo"]
    check_only_adapters_learned(policy, before, dpo.optimizer)


def ppo(task: Any, reference: str, **settings: Any) -> PPOTrainer:
    policy = task.tiny_model()
    return PPOTrainer(
        PPOConfig(**(task.SETTINGS | LORA | {"learning_rate": 1e-2, "reference": reference}
                     | settings)),
        policy, copy.deepcopy(policy) if reference == "copy" else None, task.tiny_critic(policy),
        task.score_even, task.PROMPTS, eval_prompts=task.PROMPTS)


def test_adapters_off_is_a_frozen_copy_to_the_bit(task: Any) -> None:
    off, copied = (ppo(task, reference, kl_coef=0.5, eval_steps=2)
                   for reference in ("adapters_off", "copy"))
    before = base(off.policy)
    for iteration in range(3):
        one, other = ({name: value for name, value in trainer.step().items()
                       if not name.startswith(("time/", "memory/", "throughput/"))}
                      for trainer in (off, copied))
        assert one == other
        # B starts at 0, so that the first policy is the reference.
        assert (abs(one["kl/policy_ref"]) < 1e-6) == (iteration == 0)
        assert one["ratio/first_minibatch_max_error"] < 1e-5
        assert one["logprob/gap_max"] < 1e-5 and one["logprob/num_recomputed"] == 0
    assert task.equal(task.weights_of(off.policy), task.weights_of(copied.policy))
    check_only_adapters_learned(off.policy, before, off.policy_learner.optimizer)
    held = {p.data_ptr() for p in off.policy.parameters()}
    assert off.reference is not None
    assert {p.data_ptr() for p in off.reference.parameters()} <= held


def test_the_plan_has_no_reference_with_adapters_off(task: Any) -> None:
    off, copied = (ppo(task, reference).memory.plan for reference in ("adapters_off", "copy"))
    names = [{row.name for row in plan.residents} for plan in (off, copied)]
    assert names[1] - names[0] == {"reference"}


@pytest.mark.parametrize(("init", "trunk"), [
    ("reward", "own"), ("policy", "own"), ("reward", "reward"), ("policy", "policy")])
@pytest.mark.parametrize("parking", ["off", "on"])
def test_critics_lie_on_frozen_trunks(
    task: Any, init: str, trunk: str, parking: str, tmp_path: Path
) -> None:
    policy, reward_model = task.tiny_model(), task.tiny_critic(task.tiny_model(), seed=3)
    expected = [base(policy), base(reward_model)]
    config = PPOConfig(**(task.SETTINGS | LORA | {
        "learning_rate": 1e-2, "critic_learning_rate": 1e-2, "reference": "adapters_off",
        "critic_init": init, "critic_trunk": trunk, "parking": parking, "ema_decay": 0.5}))
    critic = initial_critic(config, policy, reward_model)
    trainer = PPOTrainer(config, policy, None, critic, RewardModelScorer(reward_model, 512),
                         task.PROMPTS, run=None)
    head = critic.head.weight.detach().clone()
    first = trainer.step()
    trainer.step()
    trainer.residents.fetch_all()
    for model, before in zip((policy, reward_model), expected, strict=True):
        after = dict(model.named_parameters())
        assert all(torch.equal(after[name], weight) for name, weight in before.items())
    assert not torch.equal(critic.head.weight, head)
    owner = policy if init == "policy" else reward_model
    pointers = {p.data_ptr() for p in owner.parameters()}
    own = [name for name, p in critic.named_parameters() if p.data_ptr() not in pointers]
    assert all(".lora_" in name or name.startswith("head.") for name in own)
    assert any(".lora_" in name for name in own) == (trunk == "own")
    assert first["logprob/num_recomputed"] == 0
    assert [a.shape for a in trainer.weights.averages()] == [
        p.shape for p in trained_parameters(policy)]


def test_views_share_weights_and_nothing_else(task: Any) -> None:
    model = task.tiny_model()
    view = sharing_copy(model)
    assert all(a is b for a, b in zip(model.parameters(), view.parameters(), strict=True))
    assert not any(a is b for a, b in zip(model.modules(), view.modules(), strict=True))
    assert without_adapters(model).adapters is None


def test_stages_save_adapters_that_load(task: Any, tmp_path: Path) -> None:
    save_causal_lm(task.tiny_model(), tmp_path / "base")
    policy = load_causal_lm(tmp_path / "base")
    SFTTrainer(SFTConfig(batch_size=4, max_steps=3, select_by="last", residual_dropout=0.0,
                         **STEPS), policy, EXAMPLES).train()
    save_causal_lm(policy, tmp_path / "adapters")
    loaded = load_causal_lm(tmp_path / "adapters")
    task_inputs = [e.token_ids for e in EXAMPLES]
    from fastrl.trainers.common import packed_forward

    with torch.no_grad():
        ours, theirs = (packed_forward(m, task_inputs)[0] for m in (policy, loaded))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    # Adapters on adapters: the base of a reward model may be an adapter folder.
    reward_model = task.tiny_critic(loaded)
    reward_model.folder = str(tmp_path / "adapters")
    trainer = RewardTrainer(RewardConfig(batch_size=4, max_steps=3, **STEPS), reward_model,
                            RANKINGS)
    trainer.train()
    save_scalar_model(reward_model, tmp_path / "reward")
    again = load_scalar_model(tmp_path / "reward")
    assert float(again.head.bias) == float(reward_model.head.bias) != 0
    with torch.no_grad():
        ours, theirs = (packed_forward(m, task_inputs)[0] for m in (reward_model, again))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("changes", "message"), [
    ({"reference": "adapters_off", "lora_rank": 0}, "because lora_rank is 0"),
    ({"lora_rank": 0, "lora_targets": ("q_proj",)}, "lora_targets: expected null, because"),
    ({"lora_rank": -1}, "lora_rank: expected a number of at least 0"),
    ({"lora_rank": 4, "lora_alpha": 0.0}, "lora_alpha: expected a number above 0"),
])
def test_settings_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PPOConfig(**changes)


def test_models_through_transformers_learn_by_adapters(task: Any, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="needs peft for models through transformers")
    import transformers

    config = transformers.OPTConfig(
        vocab_size=task.VOCABULARY, hidden_size=16, ffn_dim=24, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=32, word_embed_proj_dim=16, init_std=0.4,
        bos_token_id=0, eos_token_id=task.EOS, pad_token_id=0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    trainers = []
    for reference in ("adapters_off", "copy"):
        policy = load_causal_lm(tmp_path / "base")
        settings = PPOConfig(**(task.SETTINGS | LORA | {
            "learning_rate": 1e-2, "reference": reference, "critic_init": "policy"}))
        frozen = load_causal_lm(tmp_path / "base") if reference == "copy" else None
        critic = initial_critic(settings, policy, None)
        before = base(policy)
        trainers.append(PPOTrainer(settings, policy, frozen, critic, task.score_even,
                                   task.PROMPTS))
    for _ in range(2):
        one, other = (trainer.step() for trainer in trainers)
        assert one["kl/policy_ref"] == other["kl/policy_ref"]
        assert one["loss/policy"] == other["loss/policy"]
    assert abs(one["kl/policy_ref"]) > 1e-6
    own = dict(policy.named_parameters())
    assert adapters(policy) and {name.replace(".base_layer.", "."): True for name in own
                                 if ".lora_" not in name}.keys() == before.keys()
    assert all(torch.equal(p, before[name.replace(".base_layer.", ".")])
               for name, p in own.items() if ".lora_" not in name)
    save_causal_lm(policy, tmp_path / "adapters")
    again = load_causal_lm(tmp_path / "adapters")
    from fastrl.trainers.common import packed_forward

    with torch.no_grad():
        ours, theirs = (packed_forward(m, [[3, 4, 5]])[0] for m in (policy, again))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("vocab_size", [13, 256])  # the engine cuts the head of one into tiles
def test_an_adapted_head_samples_what_the_update_computes(task: Any, vocab_size: int) -> None:
    policy = task.tiny_model(vocab_size=vocab_size)
    before = base(policy)
    config = PPOConfig(**(task.SETTINGS | LORA | {
        "learning_rate": 1e-2, "reference": "adapters_off", "critic_init": "policy",
        "lora_targets": ("lm_head", "v_proj")}))
    critic = initial_critic(config, policy, None)
    assert {name.split(".")[-3] for name in adapters(critic) if ".lora_a." in name} == {"qkv"}
    trainer = PPOTrainer(config, policy, None, critic, task.score_even, task.PROMPTS)
    for _ in range(3):
        metrics = trainer.step()
        assert metrics["logprob/gap_max"] < 1e-5 and metrics["logprob/num_recomputed"] == 0
    assert abs(metrics["kl/policy_ref"]) > 1e-5
    check_only_adapters_learned(policy, before, trainer.policy_learner.optimizer)
    assert {name for name in adapters(policy) if name.startswith("lm_head.")} == {
        "lm_head.lora_a.weight", "lm_head.lora_b.weight"}


def test_groups_in_place_of_a_critic_learn_by_adapters(task: Any) -> None:
    policy = task.tiny_model()
    before = base(policy)
    settings = {name: value for name, value in task.SETTINGS.items()
                if name != "critic_learning_rate"}
    trainer = PPOTrainer(GRPOConfig(**(settings | LORA | {
        "learning_rate": 1e-2, "reference": "adapters_off", "num_samples_per_prompt": 4,
        "kl_coef": 0.1})), policy, None, None, task.score_even, task.PROMPTS)
    metrics = [trainer.step() for _ in range(2)]
    assert abs(metrics[0]["kl/policy_ref"]) < 1e-6 < abs(metrics[1]["kl/policy_ref"])
    assert metrics[1]["ratio/first_minibatch_max_error"] < 1e-5
    check_only_adapters_learned(policy, before, trainer.policy_learner.optimizer)

"""PPO on the recipe's own rollouts, with and without the pass that recomputes old log-probs."""

import copy
import dataclasses
import io
from pathlib import Path

import pytest
from torch import Tensor

from fastrl.console import Console
from fastrl.data import load_encoder, load_prompts
from fastrl.labelers import Response, find_labeler
from fastrl.models.weights import load_causal_lm
from fastrl.recipe import load_recipe, resolve_stage
from fastrl.rewards import decode_response
from fastrl.runs import PPORun
from fastrl.stages import run_stage
from fastrl.trainers.ppo import PPOTrainer
from fastrl.trainers.ppo_trunks import initial_critic
from fastrl.types import Rollout

RECIPE = Path(__file__).resolve().parents[2] / "recipes/stories.yaml"
LOSSES = {"loss/policy": 1e-6, "loss/value": 1e-6, "kl/approx": 1e-6, "kl/policy_ref": 1e-5,
          "clip/fraction": 1e-3}
"""Metric -> largest accepted difference; KL is a sum over 64 tokens, and a token at the edge of the
clip range may fall on either side."""


@pytest.mark.parametrize("short", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_losses_are_the_same_without_the_pass_that_recomputes(
    required_shared: Path, tmp_path: Path, short: bool
) -> None:
    recipe = load_recipe(RECIPE, ["ppo.eval_steps=null", "ppo.gold_rewards=null",
                                  "ppo.critic_init=policy", "ppo.warmup_steps=0"], short=short)
    stages = {stage.name: resolve_stage(stage, tmp_path, required_shared)
              for stage in recipe.stages}
    run_stage("prompts", stages["prompts"], console=Console(file=io.StringIO()))
    run = stages["ppo"]
    assert isinstance(run, PPORun)
    encoder = load_encoder(run.model_name_or_path)
    prompts, _ = load_prompts(run.prompts, encoder, run.max_prompt_tokens)
    gold = find_labeler("lexicon")

    def score(rollout: Rollout) -> Tensor:
        return Tensor([
            gold(Response(prompt=prompts[0], text=decode_response(rollout, i, encoder),
                          has_stopped=False, max_new_tokens=run.sampling.max_new_tokens))
            for i in range(rollout.batch_size)])

    model = load_causal_lm(run.model_name_or_path, "float32", "cpu")
    kept, recomputed = (
        PPOTrainer(config, policy, copy.deepcopy(model), initial_critic(config, policy, None),
                   score, prompts)
        for config, policy in ((run, copy.deepcopy(model)),
                               (_always_recomputing(run), copy.deepcopy(model))))
    generate, recorded = kept.engine.generate, list[Rollout]()

    def record(*args: object, **kwargs: object) -> Rollout:
        recorded.append(generate(*args, **kwargs))  # type: ignore[arg-type]
        return recorded[-1]

    kept.engine.generate = record  # type: ignore[method-assign]
    recomputed.engine.generate = lambda *args, **kwargs: recorded[-1]  # type: ignore
    losses = []
    for number in range(3):
        ours, theirs = kept.step(), recomputed.step()
        print(number, ours["logprob/gap_max"], *(
            f"{name} {ours[name]:.7g} {theirs[name]:.7g}" for name in LOSSES), sep="  ")
        assert ours["logprob/num_recomputed"] == 0
        assert theirs["logprob/num_recomputed"] == number + 1
        for name, tolerance in LOSSES.items():
            assert ours[name] == pytest.approx(theirs[name], rel=0, abs=tolerance), name
        losses.append(abs(ours["loss/policy"]))
    assert max(losses) > 3e-4  # far above what is accepted


def _always_recomputing(run: PPORun) -> PPORun:
    return dataclasses.replace(run, logprob_tolerance=0.0)

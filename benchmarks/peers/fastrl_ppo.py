"""PPO by fastrl on a workload file; as the peers' scripts, so that all are run in the same way.

    python benchmarks/peers/fastrl_ppo.py --workload W.yaml --models DIR --out OUT.json
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
import transformers
from common import Clock, arguments, prompts, read_workload

import fastrl
from fastrl.config import PPOConfig, SamplingConfig
from fastrl.models import load_causal_lm, load_scalar_model
from fastrl.rewards import RewardModelScorer
from fastrl.trainers import PPOTrainer
from fastrl.types import Prompt


def config(workload: dict[str, Any], device: str) -> PPOConfig:
    """The settings that a workload file asks for."""
    batch = workload["num_prompts"]
    return PPOConfig(
        num_iterations=workload["num_iterations"], rollout_batch_size=batch,
        minibatch_size=batch // workload["num_minibatches"],
        num_inner_epochs=workload["num_inner_epochs"],
        sampling=SamplingConfig(temperature=workload["temperature"], stop_token_ids=(),
                                max_new_tokens=workload["response_tokens"]),
        learning_rate=workload["learning_rate"], critic_learning_rate=workload["learning_rate"],
        warmup_steps=0, kl_coef=workload["kl_coef"], value_coef=workload["value_coef"],
        clip_range=workload["clip_range"], value_clip_range=workload["value_clip_range"],
        gamma=workload["gamma"], lam=workload["lam"], missing_eos_penalty=None, ema_decay=None,
        eval_steps=None, seed=workload["seed"], device=device,
        dtype=workload.get("dtype", "float32"))


def main() -> None:
    """Train for the iterations of the workload."""
    options = arguments(__doc__)
    workload = read_workload(options.workload)
    torch.set_num_threads(options.threads)
    clock = Clock(options.device)
    place = workload.get("dtype", "float32"), options.device
    policy, reward = options.models / "policy", options.models / "reward"
    trainer = PPOTrainer(
        config(workload, options.device), load_causal_lm(policy, *place),
        load_causal_lm(policy, *place), load_scalar_model(reward, *place),
        RewardModelScorer(load_scalar_model(reward, *place)),
        [Prompt(tuple(ids), "") for ids in prompts(workload)])
    clock.start()
    phases: list[dict[str, float]] = []
    for _ in range(trainer.num_steps):
        metrics = trainer.step()
        clock.stop()
        phases.append({name.removeprefix("time/"): value for name, value in metrics.items()
                       if name.startswith("time/")})
    clock.write(options.out, "fastrl", {
        "fastrl": fastrl.__version__, "torch": torch.__version__,
        "transformers": transformers.__version__}, phases=phases)


if __name__ == "__main__":
    main()

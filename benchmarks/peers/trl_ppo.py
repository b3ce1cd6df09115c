"""PPO by TRL's trainer, as it is, on a workload file.

    peers/trl/bin/python benchmarks/peers/trl_ppo.py --workload W.yaml --models DIR --out OUT.json

Weights and moments in the workload's type, no gradient checkpointing (TRL's default would slow it
down), every optimiser step on one minibatch, logits of all responses at once, as its defaults have
it, or of `forward_rows` where the workload says so.
"""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import torch
import transformers
import trl
from common import Clock, arguments, prompts, read_workload
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer
from trl_common import Stopwatch, tokenizer


def save_first_rollout(path: Path) -> None:
    """Make the trainer's whitening save what is around it when it is first called."""
    whiten = ppo_trainer.masked_whiten

    def watched(values: torch.Tensor, mask: torch.Tensor, shift_mean: bool = True) -> torch.Tensor:
        if not path.exists():
            around = sys._getframe(1).f_locals
            names = ("query_responses", "logprobs", "ref_logprobs", "values", "scores", "kl",
                     "rewards", "returns")
            np.savez(path, advantages=values.cpu().numpy(), mask=mask.cpu().numpy(),
                     **{name: around[name].cpu().numpy() for name in names})
        return whiten(values, mask, shift_mean)

    ppo_trainer.masked_whiten = watched


def main() -> None:
    """Train for the iterations of the workload."""
    options = arguments(__doc__)
    workload = read_workload(options.workload)
    torch.set_num_threads(options.threads)
    clock = Clock(options.device)
    dtype = workload.get("dtype", "float32")
    policy = AutoModelForCausalLM.from_pretrained(options.models / "policy", dtype=dtype)
    reference = AutoModelForCausalLM.from_pretrained(options.models / "policy", dtype=dtype)
    reward, critic = (AutoModelForSequenceClassification.from_pretrained(
        options.models / "reward", dtype=dtype) for _ in range(2))
    data = Dataset.from_dict({"input_ids": prompts(workload)})
    if options.rollout is not None:
        save_first_rollout(options.rollout)
    with tempfile.TemporaryDirectory() as folder:
        config = PPOConfig(
            output_dir=folder, per_device_train_batch_size=workload["num_prompts"],
            gradient_accumulation_steps=1, num_mini_batches=workload["num_minibatches"],
            num_ppo_epochs=workload["num_inner_epochs"],
            total_episodes=workload["num_prompts"] * workload["num_iterations"],
            local_rollout_forward_batch_size=workload.get("forward_rows",
                                                          workload["num_prompts"]),
            response_length=workload["response_tokens"], stop_token=None,
            missing_eos_penalty=None, temperature=workload["temperature"],
            learning_rate=workload["learning_rate"], kl_coef=workload["kl_coef"],
            kl_estimator="k1", cliprange=workload["clip_range"],
            cliprange_value=workload["value_clip_range"], vf_coef=workload["value_coef"],
            gamma=workload["gamma"], lam=workload["lam"], whiten_rewards=False,
            num_sample_generations=0, use_cpu=options.device == "cpu", bf16=False,
            gradient_checkpointing=False, report_to="none", save_strategy="no",
            seed=workload["seed"], disable_tqdm=True)
        trainer = PPOTrainer(
            args=config, processing_class=tokenizer(), model=policy, ref_model=reference,
            reward_model=reward, value_model=critic, train_dataset=data, eval_dataset=data,
            callbacks=[Stopwatch(clock)])
        trainer.train()
    clock.write(options.out, "trl", {
        "trl": trl.__version__, "torch": torch.__version__,
        "transformers": transformers.__version__})


if __name__ == "__main__":
    main()

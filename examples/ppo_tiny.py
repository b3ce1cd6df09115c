"""PPO with a reward function and a loop of your own, in a few seconds on a CPU.

    python examples/ppo_tiny.py

The policy is a random little decoder that writes letters. The reward likes vowels and finished
words; KL keeps the policy near where it began. With a checkpoint of yours, replace `new_decoder` by
`load_causal_lm(path)` and `LetterCodec` by `load_encoder(path)`.
"""

import copy
from collections.abc import Sequence

import torch

from fastrl.config import PPOConfig, SamplingConfig
from fastrl.evaluation import compare_models
from fastrl.models import new_decoder, scalar_from_causal
from fastrl.models.families import decoder_config
from fastrl.rewards import FunctionScorer
from fastrl.trainers.ppo import PPOTrainer
from fastrl.types import Prompt

LETTERS = "abcdefghijklmnopqrstuvwxyz"
EOS = len(LETTERS)


class LetterCodec:
    """One token per letter, and one that ends a word."""

    eos_token_ids = (EOS,)

    def encode(self, text: str) -> tuple[int, ...]:
        return tuple(LETTERS.index(letter) for letter in text)

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(LETTERS[i] if i < EOS else "." for i in ids)


def share_of_vowels(prompts: list[str], completions: list[str]) -> list[float]:
    """The reward: any function of texts will do."""
    return [sum(letter in "aeiou" for letter in text) / max(len(text), 1) for text in completions]


def main() -> None:
    torch.set_num_threads(1)  # matrices this small are slower with more
    codec = LetterCodec()
    prompts = [Prompt(codec.encode(text), text) for text in ("fast", "tiny", "blue", "sky", "moss")]
    policy = new_decoder(decoder_config(
        "llama", vocab_size=len(LETTERS) + 1, hidden_size=32, num_layers=1, num_heads=2,
        max_positions=32, eos_token_ids=(EOS,)), seed=0)
    start = copy.deepcopy(policy)
    config = PPOConfig(
        num_iterations=20, rollout_batch_size=64, minibatch_size=16, learning_rate=3e-3,
        critic_learning_rate=1e-2, warmup_steps=2, kl_coef=0.05, missing_eos_penalty=0.0,
        sampling=SamplingConfig(max_new_tokens=12), eval_steps=None, ema_decay=None)
    scorer = FunctionScorer(share_of_vowels, codec, prompts)
    critic = scalar_from_causal(policy, seed=0, init="zero")
    trainer = PPOTrainer(config, policy, copy.deepcopy(policy), critic, scorer, prompts)

    for iteration in range(config.num_iterations):  # the loop is yours: stop when you like
        metrics = trainer.step()
        if iteration % 5 == 4:
            print(f"iteration {iteration + 1:2d}  reward {metrics['reward/used_score_mean']:.3f}  "
                  f"KL {metrics['kl/policy_ref']:5.2f}  "
                  f"ratio {metrics['ratio/first_minibatch_mean']:.6f}")

    result = compare_models(policy, start, [p.token_ids for p in prompts], scorer, config.sampling,
                            codec, num_samples_per_prompt=20)
    print(f"vowels {result.baseline_score_mean:.2f} -> {result.score_mean:.2f}, "
          f"finished {result.baseline_eos_rate:.2f} -> {result.eos_rate:.2f}, "
          f"wins {result.win.rate:.2f} over {result.win.num_prompts} prompts, "
          f"KL {result.kl.k1:.1f} nats")


if __name__ == "__main__":
    main()

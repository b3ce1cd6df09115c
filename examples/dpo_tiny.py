"""DPO from rankings, in a few seconds on a CPU: no reward model, no rollouts.

    python examples/dpo_tiny.py

A program plays the labeler: of two letters it prefers, more often than not, the later one in the
alphabet. The policy learns to write late letters, near where it started. With a checkpoint of
yours, replace `new_decoder` by `load_causal_lm(path)` and the rankings by
`load_comparisons(file, encoder, max_tokens)`.
"""

import torch

from fastrl.config import DPOConfig, SamplingConfig
from fastrl.engine import Engine
from fastrl.models import new_decoder
from fastrl.models.families import decoder_config
from fastrl.trainers import DPOTrainer
from fastrl.types import Comparison

NUM_LETTERS = 26
START = NUM_LETTERS
NUM_RANKINGS, LENGTH = 600, 3


def main() -> None:
    torch.set_num_threads(1)  # matrices this small are slower with more
    generator = torch.Generator().manual_seed(0)
    policy = new_decoder(decoder_config(
        "llama", vocab_size=NUM_LETTERS + 1, hidden_size=32, num_layers=1, num_heads=2,
        max_positions=16), seed=0)

    words = torch.randint(NUM_LETTERS, (NUM_RANKINGS, 2, LENGTH), generator=generator)
    difference = (words[:, 0] - words[:, 1]).double().mean(dim=1) / 5
    first_wins = torch.rand(NUM_RANKINGS, generator=generator) < difference.sigmoid()
    rankings = [Comparison((START,), tuple(tuple(word.tolist()) for word in pair),
                           (0, 1) if first else (1, 0))
                for pair, first in zip(words, first_wins, strict=True)]

    config = DPOConfig(batch_size=50, num_epochs=5, learning_rate=5e-3, dpo_beta=0.3)
    print(f"mean letter before: {mean_letter(policy):.1f} of {NUM_LETTERS - 1}")
    trainer = DPOTrainer(config, policy, rankings[50:], eval=rankings[:50])
    for step in range(trainer.num_steps):  # the loop is yours: stop when you like
        metrics = trainer.step()
        if step % 15 == 14:
            print(f"step {step + 1:3d}  loss {metrics['loss/dpo']:.3f}  "
                  f"accuracy {metrics['reward/accuracy']:.3f}")
    print(f"held-out accuracy {trainer.evaluate()['reward/accuracy_eval']:.3f}")
    print(f"mean letter after: {mean_letter(policy):.1f}")


def mean_letter(policy) -> float:
    """Mean place in the alphabet of 200 samples' letters."""
    rollout = Engine(policy).generate([[START]], SamplingConfig(max_new_tokens=LENGTH),
                                      num_samples_per_prompt=200)
    letters = rollout.response_ids[rollout.response_ids < NUM_LETTERS]
    return float(letters.double().mean())


if __name__ == "__main__":
    main()

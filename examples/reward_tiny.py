"""A reward model from rankings with ties and noise, in a few seconds on a CPU.

    python examples/reward_tiny.py

A program plays the labeler: it likes letters late in the alphabet, ranks four completions per
prompt, and errs on a quarter of the pairs. Nobody can predict its ranks better than the Bayes
limit. With a checkpoint of yours, replace `new_decoder` by `load_causal_lm(path)` and the rankings
by `load_comparisons(file, encoder, max_tokens)`.
"""

import torch

from fastrl.config import RewardConfig
from fastrl.labelers import fit_noise_scale, pair_agreement, rank_with_noise
from fastrl.models import new_decoder, scalar_from_causal
from fastrl.models.families import decoder_config
from fastrl.models.scoring import sequence_scores
from fastrl.trainers.reward import RewardTrainer
from fastrl.types import Comparison

NUM_LETTERS = 26
EOS = NUM_LETTERS
NUM_PROMPTS, NUM_HELD_OUT, K, LENGTH = 300, 100, 4, 5


def main() -> None:
    torch.set_num_threads(1)  # matrices this small are slower with more
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(NUM_LETTERS, (NUM_PROMPTS + NUM_HELD_OUT, K, LENGTH),
                          generator=generator)
    gold = words.double().mean(dim=-1)
    scale = fit_noise_scale(gold, target_agreement=0.75)
    ranks = rank_with_noise(gold, scale, seed=0)
    rankings = [
        Comparison(prompt_ids=(index % NUM_LETTERS,),
                   completions=tuple((*word.tolist(), EOS) for word in words[index]),
                   ranks=tuple(ranks[index].tolist()), num_characters=(LENGTH,) * K)
        for index in range(len(words))]

    model = scalar_from_causal(new_decoder(decoder_config(
        "llama", vocab_size=NUM_LETTERS + 1, hidden_size=32, num_layers=1, num_heads=2,
        max_positions=16, eos_token_ids=(EOS,)), seed=0), seed=0)
    config = RewardConfig(batch_size=10, num_epochs=4, learning_rate=5e-3)
    trainer = RewardTrainer(config, model, rankings[:NUM_PROMPTS])

    for step in range(trainer.num_steps):  # the loop is yours: stop when you like
        metrics = trainer.step()
        if step % 30 == 29:
            print(f"step {step + 1:3d}  loss {metrics['loss/ranking']:.3f}  "
                  f"accuracy {metrics['reward/accuracy']:.3f}")

    report = trainer.evaluate(rankings[NUM_PROMPTS:])
    limit = pair_agreement(gold[NUM_PROMPTS:], scale, count_ties=True)
    print(f"held-out accuracy {report.overall.accuracy:.3f}, Bayes limit {limit:.3f}, "
          f"length alone {report.overall.length_accuracy:.3f}")
    ends = [(0, *[letter] * LENGTH, EOS) for letter in (0, 13, 25)]
    scores = sequence_scores(model, ends, max_tokens=1024).tolist()
    print("scores of aaaaa, nnnnn, zzzzz:", ", ".join(f"{score:.2f}" for score in scores))


if __name__ == "__main__":
    main()

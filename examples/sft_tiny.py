"""Supervised fine-tuning with a loop of your own, in a few seconds on a CPU.

    python examples/sft_tiny.py

A random little decoder learns to count: "anna has two . one more makes three ." With a checkpoint
of yours, replace `new_decoder` by `load_causal_lm(path)` and the word tokenizer by
`load_encoder(path)`.
"""

import json
import tempfile
from pathlib import Path

from fastrl.config import SamplingConfig, SFTConfig
from fastrl.data import load_demonstrations, word_tokenizer
from fastrl.engine import Engine
from fastrl.models import new_decoder
from fastrl.models.families import decoder_config
from fastrl.trainers.sft import SFTTrainer

NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NAMES = ("anna", "ben", "lily", "max")


def demonstrations() -> list[dict[str, str]]:
    """Rows as they stand in a data file."""
    return [{"prompt": f"{name} has {have} . one more makes", "completion": f"{more} ."}
            for name in NAMES for have, more in zip(NUMBERS, NUMBERS[1:], strict=False)]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        encoder = word_tokenizer((*NUMBERS, *NAMES, "has", "one", "more", "makes", "."), folder)
        data = Path(folder) / "demonstrations.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in demonstrations()))
        train, report = load_demonstrations(data, encoder, max_tokens=32, loss_on="completion")
    print(report.summary())
    model = new_decoder(decoder_config(
        "llama", vocab_size=encoder.max_token_id + 1, hidden_size=32, num_layers=2, num_heads=2,
        max_positions=32, eos_token_ids=encoder.eos_token_ids), seed=0)
    config = SFTConfig(batch_size=12, num_epochs=40, learning_rate=2e-2, residual_dropout=0.0,
                       select_by="last")
    trainer = SFTTrainer(config, model, train)

    for step in range(trainer.num_steps):  # the loop is yours: stop when you like
        metrics = trainer.step()
        if step % 40 == 39:
            print(f"step {step + 1:3d}  loss {metrics['loss/train']:.3f}")

    questions = [f"max has {number} . one more makes" for number in ("two", "five", "nine")]
    rollout = Engine(model.eval()).generate(
        [encoder.encode_prompt(question) for question in questions],
        SamplingConfig(greedy=True, max_new_tokens=4))
    for row, question in enumerate(questions):
        print(question, "->", encoder.decode(rollout.response(row)))


if __name__ == "__main__":
    main()

"""A reward model by TRL's trainer, as it is, on a workload file.

    peers/trl/bin/python benchmarks/peers/trl_reward.py --workload W.yaml --models DIR --out O.json
"""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
import transformers
import trl
from common import Clock, arguments, read_rows, read_workload
from datasets import Dataset
from transformers import AutoModelForSequenceClassification
from trl import RewardConfig, RewardTrainer
from trl_common import Stopwatch, keep_losses, supervised, tokenizer


def main() -> None:
    """Train for the steps of the workload."""
    options = arguments(__doc__)
    workload = read_workload(options.workload)
    torch.set_num_threads(options.threads)
    clock = Clock()
    model = AutoModelForSequenceClassification.from_pretrained(options.models / "reward")
    rows = read_rows(options.models)
    data = Dataset.from_dict({f"{side}_ids": [row["prompt"] + row[side] for row in rows]
                              for side in ("chosen", "rejected")})
    with tempfile.TemporaryDirectory() as folder:
        trainer = RewardTrainer(model=model, args=RewardConfig(**supervised(workload, folder)),
                                train_dataset=data, processing_class=tokenizer(),
                                callbacks=[Stopwatch(clock)])
        losses = keep_losses(trainer)
        trainer.train()
    clock.write(options.out, "trl", {
        "trl": trl.__version__, "torch": torch.__version__,
        "transformers": transformers.__version__}, losses=losses)


if __name__ == "__main__":
    main()

"""SFT by fastrl on a workload file; as the peers' scripts, so that all are run in the same way."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
from common import Clock, arguments, read_rows, read_workload
from fastrl_common import in_order, settings, train

from fastrl.config import SFTConfig
from fastrl.models import load_causal_lm
from fastrl.trainers import SFTTrainer
from fastrl.types import TokenExample


def main() -> None:
    """Train for the steps of the workload."""
    options = arguments(__doc__)
    workload = read_workload(options.workload)
    torch.set_num_threads(options.threads)
    clock = Clock()
    examples = [TokenExample((*row["prompt"], *row["completion"]),
                             (False,) * len(row["prompt"]) + (True,) * len(row["completion"]))
                for row in read_rows(options.models)]
    trainer = SFTTrainer(
        SFTConfig(**settings(workload), residual_dropout=0.0, select_by="last"),
        load_causal_lm(options.models / "policy"), in_order(examples, workload["seed"]))
    train(trainer, clock, "loss/train", options)


if __name__ == "__main__":
    main()

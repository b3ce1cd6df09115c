"""A reward model by fastrl on a workload file; as the peers' scripts."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
from common import Clock, arguments, read_rows, read_workload
from fastrl_common import in_order, settings, train

from fastrl.config import RewardConfig
from fastrl.models import load_scalar_model
from fastrl.trainers import RewardTrainer
from fastrl.types import Comparison


def main() -> None:
    """Train for the steps of the workload."""
    options = arguments(__doc__)
    workload = read_workload(options.workload)
    torch.set_num_threads(options.threads)
    clock = Clock()
    comparisons = [Comparison(tuple(row["prompt"]), (tuple(row["chosen"]), tuple(row["rejected"])),
                              ranks=(0, 1)) for row in read_rows(options.models)]
    trainer = RewardTrainer(RewardConfig(**settings(workload)),
                            load_scalar_model(options.models / "reward"),
                            in_order(comparisons, workload["seed"]))
    train(trainer, clock, "loss/ranking", options)


if __name__ == "__main__":
    main()

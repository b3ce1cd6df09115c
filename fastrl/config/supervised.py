"""Settings of training on given texts: SFT, reward model, DPO."""

from dataclasses import dataclass
from typing import Literal

from fastrl.config.checks import check, check_not_negative, check_positive
from fastrl.config.train import TrainConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class SFTConfig(TrainConfig):
    """Supervised fine-tuning on demonstrations, and pretraining on plain text."""

    learning_rate: float = 9.65e-6
    """Peak learning rate; paper: 9.65e-6 for 1.3B and 6B."""
    batch_size: int = 32
    """Examples per optimiser step (packed rows when `packing` is on); paper: 32."""
    num_epochs: int = 16
    """Passes over the data; paper: 16 (2 for the model that PPO starts from)."""
    max_steps: int | None = None
    """Stop after this many steps; None follows num_epochs."""
    loss_on: Literal["completion", "all"] = "completion"
    """Tokens that count: the completion (in conversations: assistant turns), or all of them."""
    max_seq_tokens: int = 2048
    """Longest example; longer ones are dropped and counted; paper: 2048."""
    packing: bool = False
    """Fill rows of `max_seq_tokens` with whole examples, so that each step has equal tokens."""
    residual_dropout: float = 0.2
    """Dropout on the output of attention and MLP blocks; paper: 0.2."""
    ptx_ratio: float = 0.0
    """Pretraining windows per example in each step; paper: 0.1 for the model PPO starts from."""
    ptx_coef: float = 1.0
    """Weight of the pretraining loss beside the demonstration loss."""
    eval_steps: int | None = None
    """Evaluate every so many steps; None: at the end of each epoch."""
    select_by: Literal["last", "loss", "reward"] = "loss"
    """Checkpoint to keep: the last, lowest held-out loss, or highest reward-model score; paper:
    reward. Without a reward model yet, candidates are kept and selected after the reward stage."""
    num_candidates: int = 4
    """Checkpoints kept for selection by reward."""

    def __post_init__(self) -> None:
        TrainConfig.__post_init__(self)
        check_positive(self, ("batch_size", "num_epochs", "max_steps", "max_seq_tokens",
                              "eval_steps", "num_candidates"))
        check_not_negative(self, ("ptx_ratio", "ptx_coef"))
        check(0 <= self.residual_dropout < 1, "residual_dropout", "a number from 0 to below 1",
              self.residual_dropout)


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardConfig(TrainConfig):
    """Reward model from rankings."""

    learning_rate: float = 9e-6
    """Peak learning rate; paper: 9e-6."""
    batch_size: int = 64
    """Prompts per optimiser step, each with all of its pairs; paper: 64."""
    num_epochs: int = 1
    """Passes over the data; paper: 1, more overfit."""
    max_steps: int | None = None
    """Stop after this many steps; None follows num_epochs."""
    max_seq_tokens: int = 2048
    """Longest prompt + completion; longer ones lose the beginning of the prompt, counted."""
    ties: Literal["kept_pairs", "all_pairs"] = "kept_pairs"
    """Tied pairs are dropped; divide a prompt's loss by the pairs kept, or by all C(K,2)."""
    shift_to_demonstrations: bool = True
    """Set the bias so that demonstrations have mean reward 0; paper: on."""
    eval_steps: int | None = None
    """Evaluate every so many steps; None: only at the end."""

    def __post_init__(self) -> None:
        TrainConfig.__post_init__(self)
        check_positive(self, ("batch_size", "num_epochs", "max_steps", "max_seq_tokens",
                              "eval_steps"))


@dataclass(frozen=True, kw_only=True, slots=True)
class DPOConfig(TrainConfig):
    """Direct preference optimisation: a policy from rankings, without reward model and rollouts."""

    learning_rate: float = 1e-6
    """Peak learning rate."""
    lr_schedule: Literal["constant", "cosine", "linear"] = "linear"
    """Shape after warmup."""
    min_lr_ratio: float = 0.0
    """Last learning rate as a share of the peak."""
    batch_size: int = 64
    """Prompts per optimiser step, each with all of its pairs."""
    num_epochs: int = 1
    """Passes over the data."""
    max_steps: int | None = None
    """Stop after this many steps; None follows num_epochs."""
    max_seq_tokens: int = 2048
    """Longest prompt + completion; longer ones lose the beginning of the prompt, counted."""
    dpo_beta: float = 0.1
    """Strength of the pull towards the reference."""
    loss_type: Literal["sigmoid", "ipo"] = "sigmoid"
    """DPO's loss on sums of log-probs, or IPO's square on their means over tokens."""
    label_smoothing: float = 0.0
    """Share of the rankings taken to be wrong, from 0 to below 0.5; for sigmoid."""
    reference: Literal["copy", "none"] = "copy"
    """Measure log-probs against the reference's, or against nothing (reference-free)."""
    eval_steps: int | None = None
    """Evaluate every so many steps; None: only at the end."""

    def __post_init__(self) -> None:
        TrainConfig.__post_init__(self)
        check_positive(self, ("batch_size", "num_epochs", "max_steps", "max_seq_tokens", "dpo_beta",
                              "eval_steps"))
        check(0 <= self.label_smoothing < 0.5, "label_smoothing", "a share from 0 to below 0.5",
              self.label_smoothing)
        check(self.loss_type == "sigmoid" or self.label_smoothing == 0, "label_smoothing",
              "0 with loss_type ipo", self.label_smoothing)

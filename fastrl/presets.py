"""Settings of the PPO page under the names people know: other defaults, no other code.

    PPOTrainer(GRPOConfig(num_iterations=200), policy, reference, None, scorer, prompts)
"""

from dataclasses import dataclass, field
from typing import Literal

from fastrl.config import PPOConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class GRPOConfig(PPOConfig):
    """GRPO: responses of a group against their mean, KL in the loss, no critic."""

    advantage: Literal["grpo", "dr_grpo"] = "grpo"
    """Differences to the group's mean in units of its spread, or as they are (Dr. GRPO, with
    `loss_mean: constant`)."""
    num_samples_per_prompt: int = field(default=8, metadata={"aliases": ("num_generations",)})
    """Responses per prompt, the group; Shao et al.: 64."""
    learning_rate: float = 1e-6
    """Peak learning rate; Shao et al.: 1e-6."""
    kl_in: Literal["reward", "loss"] = "loss"
    """Where KL is: in the loss, or subtracted from the reward of each token."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of the KL; Shao et al.: k3."""
    kl_coef: float = field(default=0.04, metadata={"aliases": ("beta",)})
    """Weight of the KL, in units of scores divided by their spread; Shao et al.: 0.04. With
    `reference: none` set it to 0."""
    loss_mean: Literal["token", "sequence", "group", "constant"] = "sequence"
    """Divisor of a response's sum over tokens, see PPO; Shao et al.: sequence."""
    missing_eos_penalty: float | None = None
    """Score of a response that did not stop, in place of its own; None: its own."""
    ema_decay: float | None = None
    """Decay of a moving average of the weights per optimiser step; None: no average."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RLOOConfig(PPOConfig):
    """RLOO: responses of a group against the mean of the others, KL in the reward, no critic."""

    advantage: Literal["rloo"] = "rloo"
    """The score over the mean score of the other responses to the prompt."""
    num_samples_per_prompt: int = field(default=4, metadata={"aliases": ("num_generations",)})
    """Responses per prompt, the group; Ahmadian et al.: 2 and 4."""
    learning_rate: float = 1e-6
    """Peak learning rate; Ahmadian et al.: 1e-6."""
    kl_coef: float = field(default=0.05, metadata={"aliases": ("beta",)})
    """beta, weight of the per-token KL penalty, in units of the reward; TRL: 0.05."""
    missing_eos_penalty: float | None = None
    """Score of a response that did not stop, in place of its own; None: its own."""
    ema_decay: float | None = None
    """Decay of a moving average of the weights per optimiser step; None: no average."""

"""One page per stage: supervised fine-tuning, reward models, PPO."""

from fastrl.trainers.common import Progress, SilentProgress
from fastrl.trainers.ppo import PPOTrainer
from fastrl.trainers.reward import RewardTrainer
from fastrl.trainers.reward_report import RewardReport
from fastrl.trainers.sft import SFTTrainer, select_candidate

__all__ = ["PPOTrainer", "Progress", "RewardReport", "RewardTrainer", "SFTTrainer",
           "SilentProgress", "select_candidate"]

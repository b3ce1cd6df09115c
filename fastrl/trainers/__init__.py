"""One page per stage: supervised fine-tuning, reward models, PPO, DPO."""

from fastrl.trainers.common import Progress, SilentProgress
from fastrl.trainers.dpo import DPOTrainer
from fastrl.trainers.ppo import PPOTrainer
from fastrl.trainers.reward import RewardTrainer
from fastrl.trainers.reward_report import RewardReport
from fastrl.trainers.sft import SFTTrainer, select_candidate

__all__ = ["DPOTrainer", "PPOTrainer", "Progress", "RewardReport", "RewardTrainer", "SFTTrainer",
           "SilentProgress", "select_candidate"]

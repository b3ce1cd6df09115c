"""Settings of every stage: frozen dataclasses, a sentence under each field, checks on creation.

`SFTConfig`, `RewardConfig`, `DPOConfig` and `PPOConfig` are what the trainers take. The `*Run`
classes add the names (models, files, folders) that a command line or a recipe gives;
`fastrl.pipeline` turns the names into objects. Values marked *paper* are those of Ouyang et al.
2022 (arXiv 2203.02155).
"""

from fastrl.config.checks import check, read_bytes, to_dict
from fastrl.config.ppo import CRITIC_SETTINGS, GROUPED, Advantage, PPOConfig
from fastrl.config.sampling import EngineConfig, SamplingConfig
from fastrl.config.supervised import DPOConfig, RewardConfig, SFTConfig
from fastrl.config.train import TrainConfig

__all__ = ["CRITIC_SETTINGS", "GROUPED", "Advantage", "DPOConfig", "EngineConfig", "PPOConfig",
           "RewardConfig", "SFTConfig", "SamplingConfig", "TrainConfig", "check", "read_bytes",
           "to_dict"]

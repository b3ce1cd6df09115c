"""One dataclass per stage of a recipe: the trainer's settings plus the names of its inputs.

`fastrl.config` holds what a trainer takes; the classes here add models, files and folders, as a
command line or a recipe gives them. `fastrl.stages` turns the names into objects. Paths are
strings; a tuple of paths is read in order, as one data set.
"""

from fastrl.reward_settings import BestOfNRun
from fastrl.runs.between import EvaluateRun, PromptsRun, RankRun, SelectRun, WorldRun
from fastrl.runs.ppo import GRPORun, PPORun, RLOORun
from fastrl.runs.training import DPORun, PretrainRun, RewardRun, SFTRun

__all__ = ["PATH_FIELDS", "REWARD_FIELDS", "RUN_TYPES", "BestOfNRun", "DPORun", "EvaluateRun",
           "GRPORun", "PPORun", "PretrainRun", "PromptsRun", "RLOORun", "RankRun", "RewardRun",
           "SFTRun", "SelectRun", "StageRun", "WorldRun"]

StageRun = (PretrainRun | SFTRun | PromptsRun | RankRun | RewardRun | SelectRun | PPORun
            | DPORun | BestOfNRun | EvaluateRun | WorldRun)

RUN_TYPES: dict[str, type[StageRun]] = {
    "world": WorldRun,
    "pretrain": PretrainRun,
    "sft": SFTRun,
    "prompts": PromptsRun,
    "rank": RankRun,
    "reward": RewardRun,
    "select": SelectRun,
    "ppo": PPORun,
    "grpo": GRPORun,
    "rloo": RLOORun,
    "dpo": DPORun,
    "best_of_n": BestOfNRun,
    "evaluate": EvaluateRun,
}
"""Stage kinds of a recipe, and the settings of each."""

PATH_FIELDS = ("model_name_or_path", "tokenizer_name_or_path", "reference_model", "reward_model",
               "models", "data", "eval_data", "tokenizer_data", "ptx_data", "eval_ptx_data",
               "demonstrations", "prompts", "heldout_prompts", "eval_prompts",
               "sample_prompts", "text")
"""Settings that name files or folders, in every kind of stage that has them."""

REWARD_FIELDS = ("rewards", "gold_rewards")
"""Settings that hold rewards by name, each with a folder or a file."""

"""Stages that train on their own samples: PPO, GRPO, RLOO."""

from dataclasses import dataclass

from fastrl.config import PPOConfig, check
from fastrl.config.checks import check_positive
from fastrl.presets import GRPOConfig, RLOOConfig
from fastrl.reward_settings import RewardPart, WatchConfig, join_parts
from fastrl.runs.checks import check_files, check_fraction, check_weights


@dataclass(frozen=True, kw_only=True, slots=True)
class PPORun(PPOConfig):
    """PPO or PPO-ptx of a model folder against reward models, reward functions or both."""

    model_name_or_path: str
    """Folder of the model that PPO starts from."""
    output_dir: str
    """Folder of this run; it must not hold another run."""
    prompts: tuple[str, ...]
    """Prompts: rows with `prompt` or `messages`."""
    reward_model: str | None = None
    """Folder of the reward model, a sequence-classification checkpoint with one label."""
    reward_function: str | None = None
    """A function that scores: gsm8k, ifeval, or `path/to/file.py:name`, which is executed; its
    scores are added to the reward model's where there are both."""
    rewards: dict[str, RewardPart] | None = None
    """More rewards by name, each with settings of its own: {name: {model, function or labeler,
    arguments, weight, source_weights, timeout_s}} (docs/rewards.md)."""
    reference_model: str | None = None
    """Folder of the reference of the KL penalty; None: the model PPO starts from."""
    source_weights: dict[str, float] | None = None
    """Share of each `source` among the prompts drawn; None: every prompt once per pass."""
    eval_prompts: tuple[str, ...] = ()
    """Held-out prompts."""
    eval_fraction: float = 0.05
    """Share of `prompts` held out when `eval_prompts` is empty."""
    ptx_data: tuple[str, ...] = ()
    """Text files of the pretraining mix, for PPO-ptx."""
    eval_ptx_data: tuple[str, ...] = ()
    """Held-out text files; their loss is logged at every evaluation."""
    ptx_window_tokens: int = 256
    """Tokens of one pretraining window."""
    gold_rewards: dict[str, RewardPart] | None = None
    """What is wanted in truth, by name as `rewards`: scored at every evaluation, never optimised;
    the watch compares it with the score that is."""
    watch: WatchConfig = WatchConfig()
    """When the reward-hacking watch gives alarm; it looks at every evaluation."""
    best_of_n: int | None = 16
    """Before training, draw so many answers to each held-out prompt: what best-of-n of the first
    policy gains at which KL stands in the report beside the run; None: not measured."""
    sample_prompts: tuple[str, ...] = ()
    """Prompt files; the first prompts are answered on screen while the stage trains."""
    sample_steps: int | None = None
    """Answer them every so many steps, and at the first and the last; None: never."""

    def __post_init__(self) -> None:
        PPOConfig.__post_init__(self)
        check_files(self, "prompts")
        check_positive(self, ("sample_steps", "best_of_n"))
        check_fraction(self, "eval_fraction")
        check(self.ptx_window_tokens >= 2, "ptx_window_tokens", "at least 2",
              self.ptx_window_tokens)
        check(self.ptx_coef == 0 or bool(self.ptx_data), "ptx_data",
              "text files, because ptx_coef is above 0", self.ptx_data)
        check(self.reference == "copy" or self.reference_model is None, "reference_model",
              f"None, because reference is {self.reference!r}", self.reference_model)
        check_weights(self.source_weights)
        join_parts(self.reward_model, self.reward_function, self.rewards)
        join_parts(None, None, self.gold_rewards)
        check(not self.gold_rewards or self.eval_steps is not None, "eval_steps",
              "a number, because gold_rewards are scored at evaluations", self.eval_steps)


@dataclass(frozen=True, kw_only=True, slots=True)
class GRPORun(GRPOConfig, PPORun):
    """GRPO of a model folder against rewards: `PPORun` with the defaults of GRPO."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RLOORun(RLOOConfig, PPORun):
    """RLOO of a model folder against rewards: `PPORun` with the defaults of RLOO."""

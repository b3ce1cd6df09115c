"""Settings of rewards, as recipes and command lines give them; objects come from fastrl.stages."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fastrl.config import EngineConfig, SamplingConfig, check
from fastrl.errors import ConfigError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardPart:
    """One reward of a weighted sum: a reward model, a function or a labeler."""

    model: str | None = None
    """Folder of a reward model."""
    function: str | None = None
    """gsm8k, ifeval, length, format, or `path/to/file.py:name`; the file is executed."""
    labeler: str | None = None
    """Gold score of `fastrl.labelers`, for studies."""
    arguments: dict[str, Any] | None = None
    """Arguments of length (target, tolerance) and format (pattern)."""
    weight: float = 1.0
    """Factor of the scores; below 0 it is a penalty."""
    source_weights: dict[str, float] | None = None
    """Factor for prompts of a `source`, in place of `weight`; with 0 they are not scored."""
    timeout_s: float | None = 600.0
    """Seconds that a call of the function may take; None: as long as it likes, in the main
    thread."""

    def __post_init__(self) -> None:
        given = [name for name in ("model", "function", "labeler") if getattr(self, name)]
        check(len(given) == 1, "model", "exactly one of model, function and labeler",
              given or "none of them")
        check(self.arguments is None or self.function is not None, "arguments",
              "none without a function", self.arguments)
        check(self.timeout_s is None or self.timeout_s > 0, "timeout_s",
              "seconds above 0, or null", self.timeout_s)
        factors = [self.weight, *(self.source_weights or {}).values()]
        check(any(factors), "weight", "a weight other than 0, here or in source_weights", factors)


@dataclass(frozen=True, kw_only=True, slots=True)
class WatchConfig:
    """When the reward-hacking watch of a run gives alarm; null switches a sign off.

    Signs are compared with the first evaluation.
    """

    gold_drop: float | None = 0.05
    """Share of the gold score's gain that may be lost while the score that is optimised is no
    lower than at the gold score's best; with `gold_rewards`."""
    gold_stall: float | None = 0.5
    """Share of the gold score per optimised score gained so far that must still be gained over the
    last `stall_evaluations`; less is an alarm, before anything is lost."""
    stall_evaluations: int = 5
    """Evaluations that `gold_stall` looks back over."""
    num_std_errors: float = 2.0
    """What the gold score loses, or fails to gain, counts when it is more than so many standard
    errors, over prompts."""
    length_ratio: float | None = 2.0
    """Mean length may grow or shrink by this factor."""
    repetition_rise: float | None = 0.2
    """The share of repeated 4-grams may rise by so much."""
    distinct_ratio: float | None = 0.5
    """The share of distinct 2-grams may fall to this share of its first value."""
    entropy_ratio: float | None = 0.25
    """Entropy may fall to this share of its first value."""
    max_kl: float | None = None
    """Nats per response that KL may reach, in either direction."""
    stop: bool = False
    """End the run at the first alarm; else it is a warning and stands in the report."""

    def __post_init__(self) -> None:
        check(self.gold_drop is None or 0 <= self.gold_drop <= 1, "gold_drop",
              "a share from 0 to 1", self.gold_drop)
        check(self.gold_stall is None or 0 <= self.gold_stall < 1, "gold_stall",
              "a share from 0 to below 1", self.gold_stall)
        check(self.stall_evaluations >= 1, "stall_evaluations", "at least 1",
              self.stall_evaluations)
        check(self.num_std_errors >= 0, "num_std_errors", "a number of at least 0",
              self.num_std_errors)
        check(self.length_ratio is None or self.length_ratio > 1, "length_ratio",
              "a factor above 1", self.length_ratio)
        check(self.repetition_rise is None or 0 < self.repetition_rise < 1, "repetition_rise",
              "a share above 0 and below 1", self.repetition_rise)
        for name in ("distinct_ratio", "entropy_ratio"):
            value = getattr(self, name)
            check(value is None or 0 < value < 1, name, "a share above 0 and below 1", value)
        check(self.max_kl is None or self.max_kl > 0, "max_kl", "nats above 0", self.max_kl)


@dataclass(frozen=True, kw_only=True, slots=True)
class BestOfNRun:
    """Samples of a model, the best of them kept: best-of-n and rejection-sampling SFT.

    Writes `demonstrations.jsonl` (for an SFT stage) and `best_of_n.json`: mean score and KL of
    best-of-n at n = 1, 2, 4, ...
    """

    model_name_or_path: str
    """Folder of the model that is sampled."""
    prompts: tuple[str, ...]
    """Prompts: rows with `prompt` or `messages`; other fields stay in the demonstrations."""
    output_dir: str
    """Folder of this run; it must not hold another run."""
    reward_model: str | None = None
    """Folder of the reward model that says which completion is best."""
    reward_function: str | None = None
    """A function that says so: gsm8k, ifeval, or `path/to/file.py:name`, which is executed."""
    rewards: dict[str, RewardPart] | None = None
    """More rewards by name, each with settings of its own (docs/rewards.md)."""
    gold_rewards: dict[str, RewardPart] | None = None
    """What is wanted in truth, by name as `rewards`; the table has its mean over the best."""
    num_samples_per_prompt: int = 16
    """n, completions drawn for each prompt."""
    num_kept_per_prompt: int = 1
    """Completions kept of a prompt, at most, the best first."""
    threshold: float | None = None
    """Lowest score that is kept; None: any."""
    keep_unfinished: bool = False
    """Keep completions that ran into `max_new_tokens` too: SFT will teach that they end there."""
    num_prompts: int | None = None
    """Prompts used, the first of the files; None: all."""
    max_prompt_tokens: int = 1024
    """Longer prompts are dropped and counted."""
    max_tokens_per_microbatch: int = 8192
    """Token budget of one scoring pass."""
    sampling: SamplingConfig = SamplingConfig()
    """How completions are drawn."""
    engine: EngineConfig = EngineConfig()
    """Sizes of the rollout engine."""
    seed: int = 0
    """Seeds the samples."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    """Type of the weights; auto is float32 on a CPU and bfloat16 on a GPU."""

    def __post_init__(self) -> None:
        check(len(self.prompts) > 0, "prompts", "at least one file", self.prompts)
        for name in ("num_samples_per_prompt", "num_kept_per_prompt", "num_prompts",
                     "max_prompt_tokens", "max_tokens_per_microbatch"):
            value = getattr(self, name)
            check(value is None or value > 0, name, "a number above 0", value)
        check(self.num_kept_per_prompt <= self.num_samples_per_prompt, "num_kept_per_prompt",
              f"at most num_samples_per_prompt ({self.num_samples_per_prompt})",
              self.num_kept_per_prompt)
        check(not self.sampling.greedy or self.num_samples_per_prompt == 1, "sampling.greedy",
              "false, since greedy completions of a prompt are all the same", True)
        join_parts(self.reward_model, self.reward_function, self.rewards)
        join_parts(None, None, self.gold_rewards)


def split_function(name: str) -> tuple[str | None, str]:
    """(file, function) of `path/to/file.py:function`; (None, name) of a name without a file.

    Raises:
        ConfigError: when a file comes without the function's name.
    """
    path, colon, function = name.rpartition(":")
    if name.endswith(".py") or (path.endswith(".py") and not function):
        raise ConfigError(f"reward_function: expected path/to/file.py:name, got {name!r}, which "
                          "names no function; write its name after a colon")
    return (path, function) if colon and path.endswith(".py") else (None, name)


def join_parts(model: str | None, function: str | None, parts: Mapping[str, RewardPart] | None
               ) -> dict[str, RewardPart]:
    """All rewards of a stage by name: the shorthands `reward_model` and `reward_function` first.

    Raises:
        ConfigError: when a name is there twice, or cannot be part of a metric's name.
    """
    joined: list[tuple[str, RewardPart]] = []
    if model is not None:
        joined.append(("reward_model", RewardPart(model=model)))
    if function is not None:
        joined.append((split_function(function)[1], RewardPart(function=function)))
    joined += (parts or {}).items()
    names = [name for name, _ in joined]
    for name in names:
        check(_NAME.fullmatch(name) is not None, "rewards", "names of letters, digits, _ and -",
              name)
        if names.count(name) > 1:
            raise ConfigError(f"rewards: expected distinct names, got {name!r} twice (reward_model "
                              "and the name of reward_function count); rename it")
    return dict(joined)

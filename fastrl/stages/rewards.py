"""The rewards that a stage names, into one scorer."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from fastrl.data import TextEncoder
from fastrl.errors import ConfigError
from fastrl.labelers import LabelerScorer, find_labeler
from fastrl.report_files import read_json
from fastrl.reward_settings import BestOfNRun, RewardPart, join_parts
from fastrl.rewards import (
    FunctionScorer,
    RewardModelScorer,
    Scorer,
    WeightedScorer,
    WeightedScores,
    check_function,
    find_function,
)
from fastrl.runs import REWARD_FIELDS, PPORun
from fastrl.stages.inputs import Placement, load_reward_model
from fastrl.types import Prompt


def check_rewards(config: object) -> None:
    """Raise ConfigError where a stage names a reward that is not there; nothing is executed."""
    function = getattr(config, "reward_function", None)
    named = {} if function is None else {"": RewardPart(function=function)}
    for field in REWARD_FIELDS:
        named |= getattr(config, field, None) or {}
    for part in named.values():
        if part.function is not None:
            check_function(part.function, part.arguments or {})
        if part.labeler is not None:
            find_labeler(part.labeler)
    if isinstance(config, PPORun | BestOfNRun):
        _check_scored(config)


def _check_scored(run: PPORun | BestOfNRun) -> None:
    """Refuse a run without a reward, or one whose critic cannot start where it should."""
    parts = join_parts(run.reward_model, run.reward_function, run.rewards)
    if not parts:
        raise ConfigError("reward_model: expected reward_model, reward_function or rewards, got "
                          "none of them; name what scores the responses")
    has_model = any(part.model for part in parts.values())
    starts_from_reward = isinstance(run, PPORun) and run.has_critic and run.critic_init == "reward"
    if starts_from_reward and not has_model:
        raise ConfigError("critic_init: expected 'policy', because no reward is a reward model "
                          "that the critic could start from, got 'reward'; set critic_init")


def load_scorer(
    parts: Mapping[str, RewardPart], run: Placement, encoder: TextEncoder,
    prompts: Sequence[Prompt], *, max_tokens: int, max_new_tokens: int, share_prefix: bool = True,
) -> Scorer:
    """The scorer that settings describe: a weighted sum, or the only reward itself.

    Args:
        parts: By name; at least one.
        run: Says where models live.
        encoder: Decodes for functions and labelers.
        prompts: All that will be scored, with the fields of their rows and their sources.
        max_tokens: Token budget of one pass of a reward model.
        max_new_tokens: Tokens that a response may have, for labelers.
        share_prefix: See RewardModelScorer.
    Raises:
        ConfigError, RewardError, DataError, ModelError: a reward cannot be used.
    """
    def load(part: RewardPart) -> Scorer:
        if part.model is not None:
            return RewardModelScorer(load_reward_model(part.model, run, encoder), max_tokens,
                                     share_prefix=share_prefix)
        if part.labeler is not None:
            return LabelerScorer(find_labeler(part.labeler), encoder, prompts, max_new_tokens)
        assert part.function is not None  # RewardPart has one of the three
        function = find_function(part.function, part.arguments or {})
        seen = [p for p in prompts if (part.source_weights or {}).get(p.source, part.weight)]
        return FunctionScorer(function, encoder, seen, timeout_s=part.timeout_s)

    terms = [WeightedScores(name=name, scorer=load(part), weight=part.weight,
                            source_weights=part.source_weights) for name, part in parts.items()]
    if len(terms) == 1 and terms[0].weight == 1 and not terms[0].source_weights:
        return terms[0].scorer
    return WeightedScorer(terms, prompts)


def expected_scores(run: PPORun) -> tuple[float, float] | None:
    """Mean and standard deviation of a reward model's scores on its held-out rankings.

    From the report that its own stage left beside it. None where there is no report, or the score
    is not that of one reward model alone.
    """
    parts = list(join_parts(run.reward_model, run.reward_function, run.rewards).values())
    if len(parts) != 1 or parts[0].model is None or parts[0].weight != 1:
        return None
    report = read_json(Path(parts[0].model).parent / "reward_report.json")
    mean, std = report.get("score_mean"), report.get("score_std")
    return (float(mean), float(std)) if mean is not None and std else None

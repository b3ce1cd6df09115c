"""One score per response, from reward models, from functions, or from a weighted sum of both.

A scorer is anything that can be called as `scorer(rollout) -> [B] float32`.
"""

from fastrl.rewards.adjust import adjust_scores
from fastrl.rewards.functions import FunctionScorer
from fastrl.rewards.named import BUILT_IN, check_function, find_function
from fastrl.rewards.scorers import (
    RewardModelScorer,
    Scorer,
    WeightedScorer,
    WeightedScores,
    reward_models,
    score_metrics,
)
from fastrl.rewards.texts import TextDecoder, decode_continuation, decode_response

__all__ = ["BUILT_IN", "FunctionScorer", "RewardModelScorer", "Scorer", "TextDecoder",
           "WeightedScorer", "WeightedScores", "adjust_scores", "check_function",
           "decode_continuation", "decode_response", "find_function", "reward_models",
           "score_metrics"]

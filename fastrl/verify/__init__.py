"""Rewards that a program can check: answers of sums, and constraints on form.

`gsm8k_reward` and `ifeval_reward` are reward functions, `fn(prompts, completions, **columns) ->
scores`, for `FunctionScorer`; `length_reward` and `format_reward` make one from their settings.
"""

from fastrl.verify.answers import gsm8k_reward
from fastrl.verify.instructions import follows, ifeval_reward
from fastrl.verify.shaping import format_reward, length_reward

__all__ = ["follows", "format_reward", "gsm8k_reward", "ifeval_reward", "length_reward"]

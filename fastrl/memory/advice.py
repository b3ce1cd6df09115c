"""What to change when a plan does not fit: every line was planned before it is given."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fastrl.config import PPOConfig, TrainConfig
from fastrl.memory.plan import CONTEXT_BYTES, SLACK_SHARE, MemoryPlan, gib
from fastrl.memory.sizes import GIB

MIN_ROW_TOKENS = 16
"""Rows that are shorter are not advised."""


@dataclass(frozen=True, slots=True)
class Change:
    """A setting that saves memory."""

    name: str
    fields: dict[str, Any]
    is_mild: bool = True
    """The same models learn from the same loss."""


@dataclass(frozen=True, slots=True)
class Advisor:
    """Plans a stage again under other settings.

    Args:
        config: The settings asked for.
        solved: (changed settings, tokens of the longest row, budget in bytes) -> the plan; None
            for the last two: as asked for.
        has_reward_model: Of PPO: a model scores, so that its trunk can be shared.
        device_type: cuda or cpu.
    """

    config: TrainConfig
    solved: Callable[[dict[str, Any], int | None, int | None], MemoryPlan]
    has_reward_model: bool
    device_type: str

    def __call__(self, missing: int, row_tokens: int) -> list[str]:
        """Lines of advice.

        Args:
            missing: Bytes; 0: it fits, with smaller microbatches than the settings allow.
            row_tokens: Of the longest row.
        """
        changes = self._changes()
        if not missing:
            return self._larger_microbatches(changes)
        lines = [f"{gib(missing)} too much"]
        single = [change.name for change in changes if self._fits([change])]
        if single:
            return lines + [f"set {name}: it fits then" for name in single]
        enough = self._fewest(changes)
        if enough:
            return [*lines, f"set all of {_names(enough)}: it fits then"]
        return lines + self._what_is_left(changes, row_tokens)

    def _fits(self, changes: Sequence[Change]) -> bool:
        return self._plan(changes).fits

    def _plan(self, changes: Sequence[Change], row_tokens: int | None = None,
              budget: int | None = None) -> MemoryPlan:
        fields = {key: value for change in changes for key, value in change.fields.items()}
        return self.solved(fields, row_tokens, budget)

    def _changes(self) -> list[Change]:
        """Those that differ from the settings, in the order of least harm."""
        return [change for change in _all_changes(self.config, self.has_reward_model)
                if any(getattr(self.config, field) != value
                       for field, value in change.fields.items())]

    def _larger_microbatches(self, changes: Sequence[Change]) -> list[str]:
        now = self._plan([]).max_tokens_per_microbatch
        plans = ((change.name, self._plan([change])) for change in changes if change.is_mild)
        return [f"set {name}: microbatches of {plan.max_tokens_per_microbatch} tokens instead of "
                f"{now}" for name, plan in plans if plan.max_tokens_per_microbatch > now]

    def _fewest(self, changes: Sequence[Change]) -> list[Change]:
        """The least harmful changes that are enough together; empty when all are not."""
        count = next((n for n in range(2, len(changes) + 1) if self._fits(changes[:n])), 0)
        chosen = list(changes[:count])
        for change in reversed(chosen[:-1]):  # the last is needed, or fewer would be enough
            without = [other for other in chosen if other is not change]
            if self._fits(without):
                chosen = without
        return chosen

    def _what_is_left(self, changes: Sequence[Change], row_tokens: int) -> list[str]:
        """All changes, and what must be larger or smaller beside them."""
        plan = self._plan(changes)
        lines = [f"set {_names(changes)}"] if changes else []
        choices = ["take a smaller model"]
        needed = _budget_for(plan.peak_bytes, self.device_type)
        if self._plan(changes, budget=needed).fits:
            choices.append(f"a device with {gib(needed)}")
        shorter = next((n for n in _halves(row_tokens) if self._plan(changes, n).fits), None)
        if shorter is not None:
            choices.append(f"rows of at most {shorter} tokens instead of {row_tokens}")
        return [*lines, f"even so {plan.peak_phase} needs {gib(plan.peak_bytes)}: "
                        + " or ".join(choices)]


def _all_changes(config: TrainConfig, has_reward_model: bool) -> Iterator[Change]:
    """The same bits first; then the same models, rounded or averaged otherwise; then fewer."""
    if isinstance(config, PPOConfig) and config.parking == "off":
        yield Change("parking auto", {"parking": "auto"})
    yield Change("activation_checkpointing true", {"activation_checkpointing": True})
    yield Change("optimizer_moments 8bit", {"optimizer_moments": "8bit"})
    if not isinstance(config, PPOConfig):
        return
    yield Change("ema_decay null", {"ema_decay": None, "eval_with_ema": False})
    trunks = ("reward", "policy") if has_reward_model else ("policy",)
    for trunk in trunks if config.has_critic and config.critic_trunk == "own" else ():
        yield Change(f"critic_trunk {trunk}", {"critic_trunk": trunk, "critic_init": trunk},
                     is_mild=False)
    fields: dict[str, Any] = {"reference": "none", "kl_coef": 0.0, "kl_controller": "fixed",
                              "max_kl": None}
    if hasattr(config, "reference_model"):  # a stage's settings name the folder
        fields["reference_model"] = None
    if config.reference != "adapters_off":  # which takes nothing
        yield Change("reference none with kl_coef 0", fields, is_mild=False)


def _names(changes: Sequence[Change]) -> str:
    return ", ".join(change.name for change in changes)


def _budget_for(num_bytes: int, device_type: str) -> int:
    """Memory of a device on which `num_bytes` fit beside the reserve, in tenths of a GiB."""
    if device_type == "cuda":
        num_bytes = math.ceil((num_bytes + CONTEXT_BYTES) / (1 - SLACK_SHARE))
    return math.ceil(math.ceil(num_bytes * 10 / GIB) * GIB / 10)


def _halves(tokens: int) -> Iterator[int]:
    while (tokens := tokens // 2) >= MIN_ROW_TOKENS:
        yield tokens

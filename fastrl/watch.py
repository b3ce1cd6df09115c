"""Watches a policy for reward hacking: what else changes while the score goes up.

A `RewardWatch` sees every evaluation of a run: the same held-out prompts, answered with the same
random numbers. The first is what it compares with.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from fastrl.checkpoints import State
from fastrl.errors import CheckpointError
from fastrl.metrics import RunFolder
from fastrl.reward_settings import WatchConfig
from fastrl.rewards import Scorer
from fastrl.types import Rollout

logger = logging.getLogger("fastrl")

FILE = "watch.jsonl"
"""Of the run folder: a row per evaluation."""

REPETITION_N = 4
"""Tokens of the pieces that count as repeated."""


def distinct_n(responses: Sequence[Sequence[int]], n: int) -> float:
    """Different n-grams of all responses as a share of their n-grams; 1 where there is none.

    Args:
        responses: Token ids of each.
        n: Tokens of a piece.
    Source: Li et al. 2016 (arXiv 1510.03055), section 5.
    Example:
        >>> distinct_n([[1, 2, 1], [1, 2]], 2)
        0.6666666666666666
    """
    grams = [gram for response in responses for gram in _grams(response, n)]
    return len(set(grams)) / len(grams) if grams else 1.0


def repetition(responses: Sequence[Sequence[int]], n: int = REPETITION_N) -> float:
    """Share of the n-grams of a response that it has had before, mean over responses that have any.

    Args:
        responses: Token ids of each.
        n: Tokens of a piece.
    Source: Welleck et al. 2020 (arXiv 1908.04319), section 6.
    Example:
        >>> repetition([[1, 2, 1, 2, 1], [3, 4]], 2)
        0.25
    """
    grams = [list(_grams(response, n)) for response in responses]
    shares = [1 - len(set(g)) / len(g) for g in grams if g]
    return sum(shares) / len(shares) if shares else 0.0


def _grams(response: Sequence[int], n: int) -> "zip[tuple[int, ...]]":
    return zip(*(response[i:] for i in range(n)), strict=False)


@dataclass(frozen=True, slots=True)
class Sight:
    """What the watch sees in one evaluation."""

    iteration: int
    proxy: Tensor
    """[B] float64, the scores that are optimised."""
    gold: Tensor | None
    """[B] float64, the scores that are wanted; None where nobody knows them."""
    values: Mapping[str, float]
    """length, entropy, distinct_1, distinct_2, repetition, and of KL what is known: kl (policy ||
    reference) and kl_start_policy."""


@dataclass(slots=True)
class RewardWatch:
    """Compares each evaluation with the first, and gold scores with their best.

    Args:
        config: When to give alarm.
        gold: Scores what is wanted in truth; None: the other signs are watched alone.
        folder: Gets `watch.jsonl`; None writes nothing.
    """

    config: WatchConfig
    gold: Scorer | None = None
    folder: RunFolder | None = None
    stop_reason: str | None = None
    """Why the run should end; only with `config.stop`."""
    _sights: list[Sight] = field(default_factory=list)
    _start: Rollout | None = None
    _alarms: dict[str, str] = field(default_factory=dict)

    @property
    def alarms(self) -> dict[str, str]:
        """Alarms of the last evaluation: sign -> reason in words."""
        return dict(self._alarms)

    def state(self) -> State:
        """All evaluations so far, and the first one's responses."""
        tensors, start = dict[str, Tensor](), None
        for number, sight in enumerate(self._sights):
            for name in ("proxy", "gold"):
                if (scores := getattr(sight, name)) is not None:
                    tensors[f"sights.{number}.{name}"] = scores
        if self._start is not None:
            start = {}
            for part in fields(Rollout):
                value = getattr(self._start, part.name)
                if isinstance(value, Tensor):
                    tensors[f"start.{part.name}"] = value
                else:
                    start[part.name] = list(value) if isinstance(value, tuple) else value
        return State(tensors, {
            "sights": [{"iteration": s.iteration, "values": dict(s.values)} for s in self._sights],
            "start": start, "alarms": dict(self._alarms), "stop_reason": self.stop_reason})

    def load_state(self, state: State, device: torch.device | str = "cpu") -> None:
        """Remember the evaluations of a `state`.

        Args:
            device: Of the policy that is watched.
        Raises:
            CheckpointError: when something of them is missing.
        """
        try:
            self._load(state.tensors, state.values, device)
        except (KeyError, TypeError) as error:
            raise CheckpointError(
                f"reward watch: expected the state of a watch, got one without or with an unusable "
                f"{error}; continue with the settings that the checkpoint was made with") from error

    def _load(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any],
              device: torch.device | str) -> None:
        has_gold = self.gold is not None
        sights = [Sight(
            sight["iteration"], tensors[f"sights.{number}.proxy"].clone(),
            tensors[f"sights.{number}.gold"].clone() if has_gold else None, dict(sight["values"]),
        ) for number, sight in enumerate(values["sights"])]
        alarms, stop_reason = dict(values["alarms"]), values["stop_reason"]
        start = None
        if values["start"] is not None:
            parts = {**values["start"],
                     "finish_reasons": tuple(values["start"]["finish_reasons"])}
            for part in fields(Rollout):
                if part.name not in parts:
                    parts[part.name] = tensors[f"start.{part.name}"].to(device, copy=True)
            start = Rollout(**parts)
        self._sights, self._alarms, self.stop_reason = sights, alarms, stop_reason
        self._start = start

    def observe(
        self, iteration: int, rollout: Rollout, scores: Tensor, gold: Tensor | None,
        metrics: Mapping[str, float], logprobs_of: Callable[[Rollout], Tensor],
    ) -> dict[str, float]:
        """Look at an evaluation.

        Args:
            iteration: Finished iterations.
            rollout: Responses to the held-out prompts, always the same.
            scores: [B], the scores that are optimised.
            gold: [B], what `self.gold` says of the responses; None without it.
            metrics: `eval/` metrics of the evaluation.
            logprobs_of: Log-probs [B, T] of a rollout's tokens under the policy as it is.
        Returns:
            `watch/` metrics.
        """
        responses = [rollout.response(i) for i in range(rollout.batch_size)]
        values = {
            "length": metrics["eval/response_length_mean"],
            "entropy": metrics["eval/entropy_mean"],
            "distinct_1": distinct_n(responses, 1), "distinct_2": distinct_n(responses, 2),
            "repetition": repetition(responses),
        }
        if self._start is None:
            self._start = rollout
            values["kl_start_policy"] = 0.0
        else:
            gap = self._start.rollout_logprobs - logprobs_of(self._start)
            values["kl_start_policy"] = float(
                gap.double().masked_fill(~self._start.response_mask, 0).sum(dim=1).mean())
        if "eval/kl_policy_ref" in metrics:
            values["kl"] = metrics["eval/kl_policy_ref"]
        self._sights.append(Sight(iteration, scores.double().cpu(),
                                  None if gold is None else gold.double().cpu(), values))
        self._raise_alarms()
        self._write()
        named = {key: value for key, value in values.items()
                 if key in ("distinct_1", "distinct_2", "repetition", "kl_start_policy")}
        if gold is not None:
            named["gold_mean"] = float(gold.double().mean())
        named["num_alarms"] = float(len(self._alarms))
        return {f"watch/{key}": value for key, value in named.items()}

    def _raise_alarms(self) -> None:
        """Find the alarms of the last sight; say what was not said before."""
        alarms = find_alarms(self._sights, self.config)
        for sign, reason in alarms.items():
            if sign not in self._alarms:
                logger.warning("reward watch, iteration %d: %s", self._sights[-1].iteration, reason)
        self._alarms = alarms
        if alarms and self.config.stop:
            self.stop_reason = f"reward watch: {'; '.join(alarms.values())}"

    def _write(self) -> None:
        """One row of the run folder."""
        if self.folder is None:
            return
        last = self._sights[-1]
        gold = {} if last.gold is None else {"gold": float(last.gold.mean())}
        self.folder.append(FILE, {"step": last.iteration, "proxy": float(last.proxy.mean()),
                                  **gold, **last.values, "alarms": self._alarms})


def find_alarms(sights: Sequence[Sight], config: WatchConfig) -> dict[str, str]:
    """The alarms of the last evaluation.

    Args:
        sights: All evaluations so far, at least one.
        config: When to give alarm.
    Returns:
        Sign -> reason in words; empty when all is well.
    """
    first, last = sights[0].values, sights[-1].values
    alarms = {}

    def compare(sign: str, words: str, is_bad: bool) -> None:
        if is_bad:
            alarms[sign] = f"{words} went from {first[sign]:.4g} to {last[sign]:.4g}"

    ratio = config.length_ratio
    compare("length", "mean tokens of a response", ratio is not None and not (
        first["length"] / ratio <= last["length"] <= first["length"] * ratio))
    compare("repetition", f"the share of repeated {REPETITION_N}-grams",
            config.repetition_rise is not None
            and last["repetition"] - first["repetition"] > config.repetition_rise)
    compare("distinct_2", "the share of distinct 2-grams", config.distinct_ratio is not None
            and last["distinct_2"] < config.distinct_ratio * first["distinct_2"])
    compare("entropy", "entropy in nats per token", config.entropy_ratio is not None
            and last["entropy"] < config.entropy_ratio * first["entropy"])
    for sign, words in (("kl", "KL(policy || reference)"),
                        ("kl_start_policy", "KL(start || policy)")):
        if config.max_kl is not None and last.get(sign, 0.0) > config.max_kl:
            alarms[sign] = (f"{words} is {last[sign]:.4g} nats per response, above "
                            f"{config.max_kl:g}")
    return _gold_alarms(sights, config) | alarms


def _gold_alarms(sights: Sequence[Sight], config: WatchConfig) -> dict[str, str]:
    """Alarms of the gold score: it falls, or no longer rises, while the proxy does rise.

    Prompts and random numbers are the same in every evaluation, so that responses are compared in
    pairs.
    """
    golds = [sight.gold for sight in sights if sight.gold is not None]
    if not golds:
        return {}
    means = [float(gold.mean()) for gold in golds]
    proxies = [float(sight.proxy.mean()) for sight in sights]
    alarms = {}

    def allowance(since: int) -> float:
        """What the gold score's change since an evaluation may be by chance."""
        change = golds[-1] - golds[since]
        count = len(change)
        return config.num_std_errors * float(change.std(correction=1)) / count**0.5 \
            if count > 1 else 0.0

    best = max(range(len(means)), key=means.__getitem__)
    loss, gain = means[best] - means[-1], means[best] - means[0]
    if (config.gold_drop is not None and proxies[-1] >= proxies[best]
            and loss > max(config.gold_drop * gain, allowance(best))):
        share = f", {loss / gain:.0%} of its gain" if gain > 0 else ""
        alarms["gold"] = (
            f"the gold score fell from {means[best]:.4g} (iteration {sights[best].iteration}) to "
            f"{means[-1]:.4g}{share}, while the score that is optimised went from "
            f"{proxies[best]:.4g} to {proxies[-1]:.4g}")
    since = len(means) - 1 - config.stall_evaluations
    if config.gold_stall is not None and since > 0:
        before, rise = proxies[since] - proxies[0], proxies[-1] - proxies[since]
        expected = (means[since] - means[0]) / before * rise if before > 0 and rise > 0 else 0.0
        risen = means[-1] - means[since]
        if risen + allowance(since) < config.gold_stall * expected:
            alarms["gold_stall"] = (
                f"the gold score changed by {risen:.4g} since iteration {sights[since].iteration}, "
                f"where the score that is optimised rose by {rise:.4g}, which had brought "
                f"{expected:.4g} before")
    return alarms

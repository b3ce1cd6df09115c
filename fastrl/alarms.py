"""Named alarms: training that goes on, and goes wrong, in numbers that nobody looks at.

`find_alarms` is a function of one step's metrics and of what the steps before were like. It reads
nothing that a step does not compute anyway. Thresholds are far from what a healthy run does: an
alarm is to be believed.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeGuard


@dataclass(frozen=True, slots=True)
class Kind:
    """What an alarm says, whatever the numbers are."""

    meaning: str
    """One plain sentence."""
    advice: str
    """What to do."""


KINDS: dict[str, Kind] = {
    "nonfinite": Kind(
        "A NaN or an infinity came up and the step was skipped (`on_nonfinite: skip`).",
        "look at the sample and the module that the log names"),
    "data_dropped": Kind(
        "More than half of the training rows were dropped or cut, because they are too long or "
        "have nothing to learn from.",
        "raise max_prompt_tokens or max_seq_tokens, or shorten the rows"),
    "no_learning_rate": Kind(
        "The learning rate is 0 in the middle of a run.",
        "check warmup_steps, warmup_start_ratio and min_lr_ratio"),
    "no_gradient": Kind(
        "The whole gradient is exactly 0, so that nothing is learned.",
        "look for equal scores, frozen weights or an empty loss mask"),
    "gradient_explodes": Kind(
        "The gradient is 100 times as long as ever before.",
        "lower the learning rate, set max_grad_norm, and look at the samples of this step"),
    "loss_explodes": Kind(
        "The training loss is three times its highest so far, and one more at least.",
        "lower learning_rate, add warmup_steps, and look at the samples of this step"),
    "kl_explodes": Kind(
        "KL to the reference grew within one iteration by more than half a nat per token.",
        "lower learning_rate, raise kl_coef, set max_approx_kl and max_kl"),
    "kl_negative": Kind(
        "KL to the reference is clearly below 0, which no distribution can be: the reference does "
        "not judge the distribution that is sampled from.",
        "use the policy's own tokenizer and temperature for the reference"),
    "large_update": Kind(
        "The update moved the policy further than PPO's approximation holds: half of the tokens "
        "are clipped, or the mean squared log-ratio is above 1.",
        "lower learning_rate or num_inner_epochs, or set max_approx_kl"),
    "no_update": Kind(
        "The iteration took no optimiser step: approximate KL passed max_approx_kl at once.",
        "raise max_approx_kl; if it was fine before, rollout and update no longer agree"),
    "ratio_not_one": Kind(
        "Before the first step of an iteration new and old probabilities differ by a tenth, where "
        "they are those of the same weights.",
        "leave num_logprob_checks above 0, or set engine.exact"),
    "entropy_collapse": Kind(
        "The policy is all but certain of every token: a twentieth of its first entropy is left.",
        "lower learning_rate, raise kl_coef or entropy_coef, and read the samples"),
    "empty_responses": Kind(
        "More than half of the responses end at once, without a token of text.",
        "check the prompt format, stop_token_ids, and what the score says of an empty text"),
    "identical_responses": Kind(
        "More than nine tenths of the responses are one and the same.",
        "raise kl_coef or temperature, and check what the score says of this response"),
    "no_response_ended": Kind(
        "None of the responses ended by itself, so that each got missing_eos_penalty in place of "
        "its score, or none does any more where half did at first.",
        "raise sampling.max_new_tokens, set sampling.stop_token_ids, or set missing_eos_penalty to "
        "null"),
    "equal_scores": Kind(
        "All scores are equal: there is nothing to learn from.",
        "check the reward on a good and a bad response, or take easier prompts"),
    "equal_groups": Kind(
        "In every group of responses to one prompt all scores are equal: every advantage is 0.",
        "raise num_samples_per_prompt or the temperature, or take prompts that are neither too "
        "easy nor too hard"),
    "scores_out_of_range": Kind(
        "A score is far outside of what the reward model gave in its held-out report, or of what "
        "the run has seen.",
        "check the reward on this step's responses; set reward_clip"),
    "value_loss_explodes": Kind(
        "The value loss is ten times its highest so far, and ten times the variance of the "
        "returns.",
        "lower critic_learning_rate, set critic_max_grad_norm, and check the range of the scores"),
}
"""Every alarm by its name."""

REMEMBERED = frozenset({
    "grad/norm", "grad/policy_norm", "grad/critic_norm", "loss/train", "loss/ptx", "loss/ranking",
    "loss/dpo", "loss/value", "response/eos_rate", "entropy/mean", "kl/policy_ref",
    "reward/score_min", "reward/score_max", "update/num_skipped"})
"""Metrics whose course so far is looked at."""

MIN_RESPONSES = 8
"""Fewer responses may well be alike, or score alike, by chance."""
MIN_STEPS = 3
"""Earlier steps that tell what a loss or a gradient is like."""
SCORE_STDS = 10.0
"""Standard deviations that a score may be off a reward model's report."""
SCORE_RANGES = 10.0
"""Widths of the range so far that a score may be outside of it."""


@dataclass(frozen=True, slots=True)
class Alarm:
    """Something that went wrong in one step."""

    name: str
    reason: str
    """With the numbers."""

    @property
    def advice(self) -> str:
        """What to do."""
        return KINDS[self.name].advice

    def __str__(self) -> str:
        return f"alarm {self.name}: {self.reason}; {self.advice}"


@dataclass(frozen=True, slots=True)
class Past:
    """One metric over the steps before."""

    first: float
    last: float
    lowest: float
    highest: float
    count: int

    def __or__(self, value: float) -> "Past":
        """With one step more."""
        return Past(self.first, value, min(self.lowest, value), max(self.highest, value),
                    self.count + 1)

    @classmethod
    def of(cls, value: float) -> "Past":
        """Of one step."""
        return cls(value, value, value, value, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Circumstances:
    """What a metric has to be judged by."""

    num_steps: int
    """Of the run."""
    num_responses: int = 0
    """Of an iteration; 0 where none are sampled."""
    max_new_tokens: int = 0
    """Of a response."""
    penalises_unfinished: bool = False
    """Responses that did not end get a penalty in place of their score."""
    expected_scores: tuple[float, float] | None = None
    """Mean and standard deviation of the reward model's scores on held-out rankings."""


def find_alarms(
    step: int, metrics: Mapping[str, float], past: Mapping[str, Past], facts: Circumstances
) -> list[Alarm]:
    """The alarms of one step.

    Args:
        step: Finished steps, from 1.
        metrics: Of the step.
        past: Metric -> its course before this step.
        facts: Of the run.
    """
    rules = (*_any_training(step, metrics, past, facts), *_responses(metrics, past, facts),
             *_scores(metrics, past, facts), *_ppo_update(metrics, past))
    return [Alarm(name, reason) for name, reason in rules]


_Found = Iterator[tuple[str, str]]


def _any_training(
    step: int, metrics: Mapping[str, float], past: Mapping[str, Past], facts: Circumstances
) -> _Found:
    """What every trainer can suffer from."""
    if metrics.get("update/num_skipped", 0.0) > _last(past, "update/num_skipped"):
        yield "nonfinite", f"{metrics['update/num_skipped']:.0f} steps skipped so far"
    share = metrics.get("data/dropped_share", 0.0)
    if share > 0.5:
        yield "data_dropped", f"{share:.0%} of the rows were dropped or cut"
    for name in ("lr/model", "lr/policy", "lr/critic"):
        # The first and the last step of a schedule may be 0 by its settings.
        if metrics.get(name) == 0 and 1 < step < facts.num_steps:
            yield "no_learning_rate", f"{name} is 0 at step {step} of {facts.num_steps}"
    for name in ("grad/norm", "grad/policy_norm", "grad/critic_norm"):
        norm, before = metrics.get(name), past.get(name)
        if norm == 0:
            yield "no_gradient", f"{name} is 0"
        elif norm is not None and _is_known(before) and norm > 100 * before.highest > 0:
            yield "gradient_explodes", f"{name} is {norm:.4g}, up to {before.highest:.4g} before"
    for name in ("loss/train", "loss/ptx", "loss/ranking", "loss/dpo"):
        loss, before = metrics.get(name), past.get(name)
        if loss is not None and before is not None and loss > max(3 * before.highest,
                                                                  before.highest + 1):
            yield "loss_explodes", f"{name} is {loss:.4g}, up to {before.highest:.4g} before"


def _responses(
    metrics: Mapping[str, float], past: Mapping[str, Past], facts: Circumstances
) -> _Found:
    """What the sampled texts look like."""
    if "response/length_mean" not in metrics:
        return
    empty, common = metrics["response/empty_share"], metrics["response/most_common_share"]
    enough = facts.num_responses >= MIN_RESPONSES
    if empty > 0.5:
        yield "empty_responses", f"{empty:.0%} of {facts.num_responses} responses are empty"
    elif common > 0.9 and enough:
        yield "identical_responses", f"{common:.0%} of {facts.num_responses} responses are equal"
    ended, at_first = metrics["response/eos_rate"], past.get("response/eos_rate")
    if ended == 0 and (facts.penalises_unfinished
                       or (enough and at_first is not None and at_first.first >= 0.5)):
        yield "no_response_ended", (
            f"none of the {facts.num_responses} responses ended by itself within "
            f"{facts.max_new_tokens} tokens")
    entropy, before = metrics["entropy/mean"], past.get("entropy/mean")
    if entropy < 1e-4 or (before is not None and entropy < before.first / 20):
        start = "" if before is None else f", {before.first:.4g} at first"
        yield "entropy_collapse", f"entropy is {entropy:.4g} nats per token{start}"
    if "kl/policy_ref" not in metrics:
        return
    kl, length = metrics["kl/policy_ref"], metrics["response/length_mean"]
    growth = kl - _last(past, "kl/policy_ref", kl)
    if growth > 0.5 * length:
        yield "kl_explodes", (f"KL went from {kl - growth:.4g} to {kl:.4g} nats per response of "
                              f"{length:.4g} tokens in one iteration")
    if kl < -1:
        yield "kl_negative", f"KL(policy || reference) is {kl:.4g} nats per response"


def _scores(
    metrics: Mapping[str, float], past: Mapping[str, Past], facts: Circumstances
) -> _Found:
    """What the scores tell the policy apart by."""
    enough, unfinished = facts.num_responses >= MIN_RESPONSES, metrics.get("response/eos_rate") == 0
    if metrics.get("reward/score_std") == 0 and (enough or "reward/accuracy_eval" in metrics):
        yield "equal_scores", f"all scores are {metrics['reward/score_mean']:.4g}"
    elif metrics.get("reward/used_score_std") == 0 and enough and not (
            unfinished and facts.penalises_unfinished):
        yield "equal_scores", (
            f"all scores are {metrics['reward/used_score_mean']:.4g} once clipped and penalised")
    if metrics.get("reward/equal_group_share") == 1 and enough:
        yield "equal_groups", "the scores of every group are equal"
    if "reward/score_max" not in metrics:
        return
    low, high = metrics["reward/score_min"], metrics["reward/score_max"]
    if facts.expected_scores is not None:
        mean, std = facts.expected_scores
        bounds = (mean - SCORE_STDS * std, mean + SCORE_STDS * std)
        source = "the reward model's report"
    elif "reward/score_max" in past:
        lowest, highest = past["reward/score_min"].lowest, past["reward/score_max"].highest
        # A width of at least 1, for a function that has given one value only so far.
        room = SCORE_RANGES * max(highest - lowest, 1.0)
        bounds, source = (lowest - room, highest + room), "the iterations before"
    else:
        return
    if low < bounds[0] or high > bounds[1]:
        yield "scores_out_of_range", (f"scores are {low:.4g} to {high:.4g}, expected "
                                      f"{bounds[0]:.4g} to {bounds[1]:.4g} by {source}")


def _ppo_update(metrics: Mapping[str, float], past: Mapping[str, Past]) -> _Found:
    """What an update did to policy and critic."""
    clipped, moved = metrics.get("clip/fraction", 0.0), metrics.get("kl/approx", 0.0)
    if clipped > 0.5 or moved > 1:
        yield "large_update", (f"{clipped:.0%} of the tokens were clipped, approximate KL is "
                               f"{moved:.4g} nats per token")
    if metrics.get("update/num_minibatches") == 0:
        yield "no_update", f"approximate KL is {moved:.4g} before the first step"
    ratio = metrics.get("ratio/first_minibatch_mean", 1.0)
    if abs(ratio - 1) > 0.1:
        yield "ratio_not_one", f"the mean ratio is {ratio:.4g} before the first step"
    loss, before = metrics.get("loss/value"), past.get("loss/value")
    if loss is not None and before is not None:
        variance = metrics.get("value/return_std", 0.0) ** 2
        if loss > 10 * max(before.highest, variance):
            yield "value_loss_explodes", (
                f"the value loss is {loss:.4g}, up to {before.highest:.4g} before, and the "
                f"returns' variance {variance:.4g}")


def _is_known(past: Past | None) -> TypeGuard[Past]:
    return past is not None and past.count >= MIN_STEPS


def _last(past: Mapping[str, Past], name: str, otherwise: float = 0.0) -> float:
    return past[name].last if name in past else otherwise


def to_markdown() -> str:
    """The table of docs/alarms.md."""
    lines = ["| alarm | what it means | what to do |", "|---|---|---|"]
    lines += [f"| `{name}` | {kind.meaning} | {kind.advice} |" for name, kind in KINDS.items()]
    return "\n".join(lines) + "\n"

"""What every metric means, in one plain sentence, and what other systems call it."""

from dataclasses import dataclass

from fastrl.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Term:
    """One metric."""

    meaning: str
    """One plain sentence."""
    peers: tuple[str, ...] = ()
    """Names of the same quantity in other systems."""


GLOSSARY: dict[str, Term] = {
    # Supervised fine-tuning and pretraining
    "loss/train": Term(
        "Mean negative log-probability of the target tokens of this step's batch, in nats.",
        ("TRL: loss", "OpenRLHF: gpt_loss")),
    "loss/eval": Term(
        "Mean negative log-probability of the target tokens of the held-out examples, in nats.",
        ("TRL: eval_loss",)),
    "loss/ptx": Term(
        "Mean negative log-probability of the pretraining tokens mixed into this step, in nats; it "
        "rises when the model forgets.",
        ("OpenRLHF: ptx_loss", "DeepSpeed-Chat: unsup_loss")),
    "data/epoch": Term("Passes over the training data finished so far.", ("TRL: epoch",)),
    "data/target_tokens": Term("Tokens of this step that count in the loss."),
    "data/dropped_share": Term(
        "Share of the training rows that were dropped or cut as too long or useless; once per "
        "run."),
    "update/num_skipped": Term(
        "Steps skipped so far because of a NaN or an infinity (`on_nonfinite`); absent before the "
        "first."),
    "select/score": Term("Value that checkpoints are chosen by, at this checkpoint."),
    "grad/norm": Term(
        "Length of the whole gradient before clipping; a sudden jump announces trouble.",
        ("TRL: grad_norm",)),
    "lr/model": Term("Learning rate of this step.", ("TRL: learning_rate",)),
    # Reward model
    "loss/ranking": Term(
        "Mean over prompts of the mean over pairs of -log sigmoid(better score - worse score).",
        ("TRL: loss", "OpenRLHF: preference_loss")),
    "loss/ranking_eval": Term("The ranking loss of the held-out comparisons.",
                              ("TRL: eval_loss",)),
    "reward/accuracy": Term(
        "Share of this step's pairs in which the better completion scores higher; equal scores "
        "count one half.",
        ("TRL: accuracy", "OpenRLHF: acc_mean")),
    "reward/accuracy_eval": Term("The same share on the held-out comparisons.",
                                 ("TRL: eval_accuracy",)),
    "reward/margin_mean": Term("Mean of better score minus worse score over this step's pairs.",
                               ("TRL: margin",)),
    "reward/length_accuracy_eval": Term(
        "Accuracy on the held-out comparisons of a rule that looks at length alone (longer or "
        "shorter wins, whichever did in training); a reward model should beat it."),
    "reward/calibration_error": Term(
        "Mean distance between the predicted and the true share of wins on held-out pairs, over "
        "bins of the prediction."),
    "reward/bias": Term("The shift that gives demonstrations a mean reward of 0."),
    # DPO
    "loss/dpo": Term(
        "Mean over prompts of the mean over pairs of the DPO (or IPO) loss of this step.",
        ("TRL: loss", "OpenRLHF: loss")),
    "loss/dpo_eval": Term("The same loss on the held-out rankings.", ("TRL: eval_loss",)),
    "reward/chosen_mean": Term(
        "Mean implicit reward of the better completions of this step's pairs: beta times their "
        "log-prob over the reference's.",
        ("TRL: rewards/chosen", "OpenRLHF: chosen_reward")),
    "reward/rejected_mean": Term(
        "Mean implicit reward of the worse completions of this step's pairs.",
        ("TRL: rewards/rejected", "OpenRLHF: reject_reward")),
    "reward/margin_mean_eval": Term("Mean of better score minus worse score on the held-out pairs.",
                                    ("TRL: eval_rewards/margins",)),
    "reward/chosen_mean_eval": Term("Mean implicit reward of the better held-out completions."),
    "reward/rejected_mean_eval": Term("Mean implicit reward of the worse held-out completions."),
    "logprob/chosen_mean": Term(
        "Mean log-prob of the better completions, summed over their tokens (IPO: the mean over "
        "them); it may fall while the margin grows.",
        ("TRL: logps/chosen",)),
    "logprob/rejected_mean": Term("The same of the worse completions.", ("TRL: logps/rejected",)),
    "logprob/chosen_mean_eval": Term("The same of the better held-out completions."),
    "logprob/rejected_mean_eval": Term("The same of the worse held-out completions."),
    # PPO: responses
    "reward/score_mean": Term(
        "Mean score of this iteration's responses, as the reward model or function gave it.",
        ("TRL: objective/scores", "OpenRLHF: reward", "verl: critic/score/mean")),
    "reward/score_std": Term("Spread of those scores; 0 means there is nothing to learn from."),
    "reward/score_min": Term("Lowest of those scores.", ("verl: critic/score/min",)),
    "reward/score_max": Term("Highest of those scores.", ("verl: critic/score/max",)),
    "reward/used_score_mean": Term(
        "Mean score after clipping and after the penalty for responses that did not stop."),
    "reward/used_score_std": Term(
        "Spread of the scores after clipping and after that penalty; 0 means there is nothing to "
        "learn from."),
    "reward/total_mean": Term(
        "Mean over responses of their rewards: the used score minus beta times KL, where KL is in "
        "the reward.",
        ("TRL: objective/rlhf_reward", "OpenRLHF: return", "verl: critic/rewards/mean")),
    "reward/equal_group_share": Term(
        "Share of prompts whose responses all have the same score, from which a comparison of them "
        "learns nothing.",
        ("TRL: frac_reward_zero_std",)),
    "kl/policy_ref": Term(
        "How far the policy moved from the reference, in nats per response (k1, summed over "
        "tokens); it is 0 before the first step, and absent without a reference.",
        ("TRL: objective/kl", "OpenRLHF: kl")),
    "kl/policy_ref_k3": Term("The same distance by an estimator that is never negative (k3)."),
    "kl/coef": Term("The price of one nat of KL (beta), in units of the reward.",
                    ("TRL: kl_coef", "verl: actor/reward_kl_penalty_coeff")),
    "kl/coef_per_score_std": Term(
        "That price divided by the scores' spread in the first iteration: in a unit that "
        "can be compared between reward models."),
    "entropy/mean": Term(
        "Mean uncertainty of the policy per token, in nats; a fall towards 0 announces repetition.",
        ("TRL: objective/entropy", "verl: actor/entropy")),
    "response/length_mean": Term("Mean number of tokens of a response, end-of-text included.",
                                 ("OpenRLHF: response_length", "verl: response_length/mean")),
    "response/eos_rate": Term("Share of responses that stopped by themselves.",
                              ("TRL: val/num_eos_tokens",)),
    "response/empty_share": Term("Share of responses that end at once, without a token of text."),
    "response/most_common_share": Term(
        "Share of responses that are, token for token, the most frequent one."),
    # PPO: update
    "logprob/gap_max": Term(
        "Largest difference between the engine's and the update's log-probs of the same tokens, "
        "over the rows that were recomputed."),
    "logprob/num_recomputed": Term(
        "Iterations so far in which that difference was too large and all log-probs were "
        "recomputed."),
    "ratio/first_minibatch_mean": Term(
        "Mean of new over old probability before the first step of the iteration; it has to be 1.",
        ("TRL: val/ratio",)),
    "ratio/first_minibatch_max_error": Term(
        "Largest distance of that ratio from 1 over the tokens of the first minibatch."),
    "ratio/effective_share": Term(
        "Effective sample size of a minibatch under the ratios w of new to old probability, "
        "(sum w)^2 / sum w^2, as a share of its tokens: 1 while the policy has not moved, small "
        "when few tokens outweigh the rest."),
    "loss/policy": Term("The clipped policy loss, mean over the iteration's minibatches.",
                        ("TRL: loss/policy_avg", "OpenRLHF: policy_loss", "verl: actor/pg_loss")),
    "loss/value": Term("The clipped value loss, mean over the iteration's minibatches.",
                       ("TRL: loss/value_avg", "OpenRLHF: critic_loss", "verl: critic/vf_loss")),
    "clip/fraction": Term("Share of tokens whose probability ratio the clip cut off.",
                          ("TRL: policy/clipfrac_avg", "verl: actor/pg_clipfrac")),
    "clip/value_fraction": Term("Share of tokens whose value change the clip cut off.",
                                ("TRL: val/clipfrac_avg", "verl: critic/vf_clipfrac")),
    "kl/approx": Term(
        "How far the update moved the policy from the one that sampled: half the mean squared "
        "log-ratio per token.",
        ("TRL: policy/approxkl_avg", "verl: actor/ppo_kl")),
    "value/mean": Term("Mean of the critic's predictions.", ("verl: critic/values/mean",)),
    "value/return_mean": Term("Mean of what the critic should have predicted.",
                              ("verl: critic/returns/mean",)),
    "value/return_std": Term("Spread of what the critic should have predicted."),
    "value/explained_variance": Term(
        "Share of the returns' variance that the critic predicted: 1 is perfect, 0 no better than "
        "a constant, below 0 worse.",
        ("verl: critic/vf_explained_var",)),
    "advantage/std": Term("Spread of the advantages before whitening."),
    "grad/policy_norm": Term("Length of the policy's gradient before clipping.",
                             ("verl: actor/grad_norm",)),
    "grad/critic_norm": Term("Length of the critic's gradient before clipping.",
                             ("verl: critic/grad_norm",)),
    "lr/policy": Term("Learning rate of the policy.", ("TRL: lr", "verl: actor/lr")),
    "lr/critic": Term("Learning rate of the critic.", ("verl: critic/lr",)),
    "update/num_minibatches": Term(
        "Optimiser steps of the iteration; fewer than planned when approximate KL ended it early."),
    # PPO: held-out prompts
    "eval/objective": Term(
        "Mean held-out score as PPO uses it, minus beta times KL; the best weights are those with "
        "the highest."),
    "eval/reward_score_mean": Term("Mean score of the responses to held-out prompts."),
    "eval/reward_score_std": Term("Spread of the scores on held-out prompts."),
    "eval/reward_score_min": Term("Lowest score on held-out prompts."),
    "eval/reward_score_max": Term("Highest score on held-out prompts."),
    "eval/kl_policy_ref": Term("KL to the reference on held-out prompts, in nats per response."),
    "eval/kl_policy_ref_k3": Term("The same by the estimator k3."),
    "eval/entropy_mean": Term("Mean uncertainty per token on held-out prompts, in nats."),
    "eval/response_length_mean": Term("Mean tokens of a response to a held-out prompt."),
    "eval/response_eos_rate": Term("Share of held-out responses that stopped by themselves."),
    "eval/response_empty_share": Term("Share of held-out responses without a token of text."),
    "eval/response_most_common_share": Term(
        "Share of held-out responses that are the most frequent one."),
    "eval/ptx_loss": Term(
        "Mean negative log-probability of held-out pretraining text, in nats; it rises when the "
        "model forgets."),
    # PPO: the reward-hacking watch, on held-out prompts
    "watch/gold_mean": Term(
        "Mean of the score that is wanted in truth and never optimised; a fall while the optimised "
        "score rises is over-optimisation."),
    "watch/distinct_1": Term("Different tokens of all held-out responses as a share of them."),
    "watch/distinct_2": Term(
        "Different 2-grams of tokens of all held-out responses as a share of them; it falls when "
        "responses become alike."),
    "watch/repetition": Term(
        "Share of a response's 4-grams of tokens that it has had before, mean over responses."),
    "watch/kl_start_policy": Term(
        "KL from the policy that training started from to the policy as it is, in nats per "
        "response, on the first one's samples: the other direction."),
    "watch/num_alarms": Term("Signs of reward hacking that give alarm in this evaluation."),
    # Time, speed, memory
    "time/step_s": Term("Seconds of this step.", ("verl: timing_s/step",)),
    "time/eval_s": Term("Seconds of the evaluation after this step.", ("verl: timing_s/testing",)),
    "time/rollout_s": Term("Seconds spent sampling responses.", ("verl: timing_s/gen",)),
    "time/scoring_s": Term(
        "Seconds spent on the reference, the critic, the scores and the log-prob check.",
        ("verl: timing_s/ref + values + reward",)),
    "time/policy_update_s": Term("Seconds spent in the policy's minibatches.",
                                 ("verl: timing_s/update_actor",)),
    "time/critic_update_s": Term("Seconds spent in the critic's minibatches.",
                                 ("verl: timing_s/update_critic",)),
    "throughput/tokens_per_s": Term(
        "Tokens processed per second of this step; in PPO, response tokens.",
        ("verl: perf/throughput",)),
    "memory/max_tokens_per_microbatch": Term(
        "Tokens of a microbatch: the setting, or less after the update ran out of memory."),
    **{f"memory/{phase}_{kind}_gib": Term(text.format(phase.replace("_", " ")))
       for phase in ("update", "rollout", "scoring", "policy_update", "critic_update")
       for kind, text in (
           ("planned", "Memory that the plan has for the {} of a step, in GiB; once per run."),
           ("peak", "Most memory in the {} of the first step, in GiB: of PyTorch on a GPU, on a "
                    "CPU of the process above what it had beside the weights before."))},
    "memory/peak_gib": Term(
        "Most memory in GiB, of the process on a CPU, of PyTorch and arenas on a GPU, since the "
        "last measured phase of the first step began: measuring a phase starts the peak anew.",
        ("verl: perf/max_memory_allocated_gb",)),
}


FAMILIES: dict[str, Term] = {
    "alarm/": Term("Steps so far with the alarm of this name, from its first on; see "
                   "docs/alarms.md."),
    "reward/part_": Term("Mean score of one reward of a weighted sum, before its weight, over the "
                         "responses that it was asked about."),
    "eval/reward_part_": Term("The same on held-out prompts."),
}
"""Metrics whose names end with an alarm, or with what the user calls a reward."""


def explain(name: str) -> Term:
    """The entry of a metric.

    Raises:
        ConfigError: when no metric has this name.
    """
    for prefix, term in FAMILIES.items():
        if name.startswith(prefix):
            return term
    if name not in GLOSSARY:
        raise ConfigError(f"glossary: expected the name of a metric, got {name!r}; add it to "
                          "fastrl/glossary.py")
    return GLOSSARY[name]


def to_markdown() -> str:
    """The page docs/metrics.md."""
    lines = ["# Metrics", "",
             "Every number that a run writes to `metrics.jsonl` or `timing.jsonl`, and the names",
             "that other systems have for it. Made from `fastrl/glossary.py`.", "",
             "| metric | meaning | elsewhere |", "|---|---|---|"]
    lines += [f"| `{name}` | {term.meaning} | {'; '.join(term.peers)} |"
              for name, term in sorted((GLOSSARY | {f"{prefix}*": term for prefix, term
                                                    in FAMILIES.items()}).items())]
    return "\n".join(lines) + "\n"

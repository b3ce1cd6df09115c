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
    "select/score": Term("Value that checkpoints are chosen by, at this checkpoint."),
    "grad/norm": Term(
        "Length of the whole gradient before clipping; a sudden jump announces trouble.",
        ("TRL: grad_norm",)),
    "lr": Term("Learning rate of this step.", ("TRL: learning_rate",)),
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
    "reward/calibration_error": Term(
        "Mean distance between the predicted and the true share of wins on held-out pairs, over "
        "bins of the prediction."),
    "reward/bias": Term("The shift that gives demonstrations a mean reward of 0."),
    # Time, speed, memory
    "time/step_s": Term("Seconds of this step.", ("verl: timing_s/step",)),
    "time/eval_s": Term("Seconds of the evaluation after this step.", ("verl: timing_s/testing",)),
    "throughput/tokens_per_s": Term("Tokens processed per second of this step.",
                                    ("verl: perf/throughput",)),
    "memory/peak_gib": Term(
        "Most memory used so far, in GiB: of the process on a CPU, of PyTorch on a GPU.",
        ("verl: perf/max_memory_allocated_gb",)),
}


def explain(name: str) -> Term:
    """The entry of a metric.

    Raises:
        ConfigError: when no metric has this name.
    """
    if name not in GLOSSARY:
        raise ConfigError(f"glossary: expected the name of a metric, got {name!r}; add it to "
                          "fastrl/glossary.py")
    return GLOSSARY[name]


def to_markdown() -> str:
    """The table of docs/metrics.md."""
    lines = ["| metric | meaning | elsewhere |", "|---|---|---|"]
    lines += [f"| `{name}` | {term.meaning} | {'; '.join(term.peers)} |"
              for name, term in sorted(GLOSSARY.items())]
    return "\n".join(lines) + "\n"

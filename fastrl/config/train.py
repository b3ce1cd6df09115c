"""Settings that all trainers have."""

from dataclasses import dataclass
from typing import Literal

from fastrl.alarms import KINDS
from fastrl.config.checks import check, check_not_negative, check_positive, read_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """What every trainer needs."""

    seed: int = 0
    """Seeds data order, dropout, new heads and sampling."""
    learning_rate: float = 1e-5
    """Peak learning rate of AdamW."""
    adam_beta1: float = 0.9
    """Decay of the first moment; paper: 0.9."""
    adam_beta2: float = 0.95
    """Decay of the second moment; paper: 0.95."""
    adam_epsilon: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices."""
    optimizer_moments: Literal["float32", "8bit"] = "float32"
    """AdamW's two moments: float32 (8 bytes per weight), or 8bit (2 bytes, rounded each step)."""
    max_grad_norm: float | None = 1.0
    """Gradients are scaled down to this global norm; None never clips."""
    lr_schedule: Literal["constant", "cosine", "linear"] = "cosine"
    """Shape after warmup: constant, cosine to `min_lr_ratio`, or linear to `min_lr_ratio`."""
    min_lr_ratio: float = 0.1
    """Last learning rate as a share of the peak; paper: 0.1 for SFT and reward models."""
    warmup_steps: int = 0
    """Steps of linear warmup; paper: 0 for SFT, 10 iterations for PPO."""
    warmup_start_ratio: float = 0.1
    """First learning rate of the warmup as a share of the peak; paper: 0.1."""
    max_tokens_per_microbatch: int = 8192
    """Token budget of one forward and backward pass; never changes the result."""
    share_prefix: bool = True
    """Completions of one prompt in one pass hold the prompt once: fewer tokens, the same result."""
    activation_checkpointing: bool = False
    """Keep the inputs of each layer only and run it again in backward: a third more arithmetic, a
    fraction of the activations, the same gradients."""
    lora_rank: int = 0
    """Rank of LoRA adapters; the model's other weights are then frozen. 0: every weight is
    trained."""
    lora_alpha: float = 32.0
    """What adapters add is scaled by lora_alpha / lora_rank."""
    lora_targets: tuple[str, ...] | None = None
    """Projections with adapters as checkpoints spell them, such as q_proj or lm_head; None: every
    one of the layers."""
    gpu_memory: str | None = None
    """Plan for this much memory, such as 24GiB, 80GB or 900MiB; None: what the device has free."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N; auto takes a GPU when there is one."""
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    """Type of the weights; auto is float32 on a CPU and bfloat16 on a GPU."""
    logging_steps: int = 1
    """Write metrics every so many steps."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """At a NaN or an infinity in loss, gradient, score, value or log-prob: stop the run, or skip
    the step, with weights and optimiser as they were."""
    max_skipped_steps: int = 3
    """Steps that are skipped in a row before the run stops all the same."""
    stop_at_alarms: tuple[str, ...] = ()
    """Alarms that end the run, by name (docs/alarms.md); the others only warn."""
    save_steps: int | None = None
    """Save a checkpoint every so many steps; None: by time, see save_minutes."""
    save_minutes: float | None = 10.0
    """Save a checkpoint when the last one is so many minutes old; None without save_steps: only
    when the run is asked to stop."""
    save_total_limit: int = 2
    """How many checkpoints of a run stay on the disk."""
    report_to: tuple[str, ...] = ()
    """Extra metric sinks beside metrics.jsonl: tensorboard."""

    def __post_init__(self) -> None:
        check_positive(self, ("learning_rate", "adam_epsilon", "max_grad_norm",
                              "max_tokens_per_microbatch", "logging_steps", "lora_alpha"))
        check(self.lora_rank > 0 or self.lora_targets is None, "lora_targets",
              "null, because lora_rank is 0", self.lora_targets)
        if self.gpu_memory is not None:
            read_bytes(self.gpu_memory, "gpu_memory")
        check_not_negative(self, ("weight_decay", "warmup_steps", "seed", "lora_rank"))
        for name in ("adam_beta1", "adam_beta2"):
            check(0 <= getattr(self, name) < 1, name, "a number from 0 to below 1",
                  getattr(self, name))
        for name in ("min_lr_ratio", "warmup_start_ratio"):
            check(0 <= getattr(self, name) <= 1, name, "a number from 0 to 1", getattr(self, name))
        check(self.on_nonfinite in ("stop", "skip"), "on_nonfinite", "'stop' or 'skip'",
              self.on_nonfinite)
        check_positive(self, ("max_skipped_steps", "save_steps", "save_minutes",
                              "save_total_limit"))
        for alarm in self.stop_at_alarms:
            check(alarm in KINDS, "stop_at_alarms", f"names of alarms ({', '.join(KINDS)})", alarm)
        for sink in self.report_to:
            check(sink == "tensorboard", "report_to", "only 'tensorboard'", sink)

"""What the scripts of TRL's trainers share."""

from pathlib import Path
from typing import Any

from common import Clock
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, TrainerCallback


class Stopwatch(TrainerCallback):
    """Stops the clock after every step."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """The first step begins."""
        self.clock.start()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """A step is done."""
        self.clock.stop()


def tokenizer() -> PreTrainedTokenizerFast:
    """Special tokens are all that the trainers read of it."""
    words = Tokenizer(WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<s>",
                                   eos_token="</s>", padding_side="left")


def supervised(workload: dict[str, Any], folder: Path | str) -> dict[str, Any]:
    """Settings of SFT and reward training; AdamW without decay, every row as it comes.

    No gradient checkpointing: TRL's default would slow it down.
    """
    return {
        "output_dir": str(folder), "per_device_train_batch_size": workload["batch_size"],
        "max_steps": workload["num_steps"], "learning_rate": workload["learning_rate"],
        "lr_scheduler_type": "constant", "warmup_steps": 0, "weight_decay": 0.0,
        "adam_beta1": 0.9, "adam_beta2": 0.95, "max_grad_norm": 1.0,
        "max_length": workload["max_tokens"], "train_sampling_strategy": "sequential",
        "gradient_checkpointing": False, "bf16": False, "use_cpu": True, "report_to": "none",
        "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "seed": workload["seed"]}


def keep_losses(trainer: Any) -> list[float]:
    """The loss of every step of a trainer, from now on."""
    compute, losses = trainer.compute_loss, []

    def watched(*args: Any, **kwargs: Any) -> Any:
        result = compute(*args, **kwargs)
        losses.append(float(result[0] if isinstance(result, tuple) else result))
        return result

    trainer.compute_loss = watched
    return losses

"""Stages that train on given texts: pretraining, SFT, reward model, DPO."""

from dataclasses import dataclass
from typing import Literal

from fastrl.config import DPOConfig, RewardConfig, SFTConfig, check
from fastrl.config.checks import check_positive
from fastrl.runs.checks import check_files, check_fraction


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainRun(SFTConfig):
    """Train a tokenizer (unless one is given) and a small decoder from scratch on plain text."""

    output_dir: str
    """Folder of this run; it must not hold another run."""
    data: tuple[str, ...]
    """Text files (.txt, .txt.gz), paragraphs separated by blank lines."""
    eval_data: tuple[str, ...] = ()
    """Held-out text files."""
    tokenizer_name_or_path: str | None = None
    """Folder with a tokenizer; None trains a byte-level BPE tokenizer on `data`."""
    tokenizer_data: tuple[str, ...] = ()
    """More files (text or rows) that the tokenizer is trained on."""
    vocab_size: int = 4096
    """Entries of the trained tokenizer, special tokens included."""
    family: Literal["llama", "mistral", "qwen2", "qwen3", "gpt2", "gpt_neox"] = "llama"
    """Architecture of the new decoder."""
    hidden_size: int = 256
    """Width of the decoder."""
    num_layers: int = 4
    """Blocks of the decoder."""
    num_heads: int = 8
    """Query heads."""
    num_kv_heads: int | None = None
    """Key and value heads; None: as many as query heads."""
    intermediate_size: int | None = None
    """Width inside the MLP; None: 8/3 of `hidden_size`, rounded up to a multiple of 8."""
    max_positions: int = 1024
    """Longest sequence the decoder can read."""
    window_tokens: int = 256
    """Tokens of one training window."""
    sample_prompts: tuple[str, ...] = ()
    """Prompt files; the first prompts are answered on screen while the stage trains."""
    sample_steps: int | None = None
    """Answer them every so many steps, and at the first and the last; None: never."""
    learning_rate: float = 1e-3
    """Peak learning rate of AdamW."""
    num_epochs: int = 1
    """Passes over the text."""
    loss_on: Literal["completion", "all"] = "all"
    """Every token of a window is a target."""
    residual_dropout: float = 0.0
    """Dropout on the output of attention and MLP blocks."""
    select_by: Literal["last", "loss", "reward"] = "last"
    """Checkpoint to keep: the last, or the one with the lowest held-out loss."""

    def __post_init__(self) -> None:
        SFTConfig.__post_init__(self)
        check_files(self, "data")
        check_positive(self, ("sample_steps", "vocab_size", "hidden_size", "num_layers",
                              "num_heads", "num_kv_heads", "intermediate_size", "max_positions"))
        check(self.window_tokens >= 2, "window_tokens", "at least 2", self.window_tokens)
        check(self.window_tokens <= self.max_positions, "window_tokens",
              f"at most max_positions ({self.max_positions})", self.window_tokens)
        check(self.loss_on == "all", "loss_on", "'all' when pretraining", self.loss_on)
        check(self.select_by != "reward", "select_by", "'last' or 'loss' when pretraining",
              self.select_by)
        check(self.select_by == "last" or bool(self.eval_data), "eval_data",
              "held-out text, because select_by is 'loss'", self.eval_data)
        check(self.ptx_ratio == 0, "ptx_ratio", "0 when pretraining", self.ptx_ratio)


@dataclass(frozen=True, kw_only=True, slots=True)
class SFTRun(SFTConfig):
    """Supervised fine-tuning of a model folder on demonstration files."""

    model_name_or_path: str
    """Folder of the model to start from."""
    output_dir: str
    """Folder of this run; it must not hold another run."""
    data: tuple[str, ...]
    """Demonstrations: rows with `prompt` + `completion`, or `messages`."""
    eval_data: tuple[str, ...] = ()
    """Held-out demonstrations."""
    eval_fraction: float = 0.05
    """Share of the prompts held out when `eval_data` is empty; split by prompt, never by row."""
    ptx_data: tuple[str, ...] = ()
    """Text files for the pretraining mix."""
    ptx_window_tokens: int = 256
    """Tokens of one pretraining window."""
    reward_model: str | None = None
    """Reward model that selects the checkpoint when `select_by` is 'reward'; None: candidates are
    kept for a later `select` stage."""
    sample_prompts: tuple[str, ...] = ()
    """Prompt files; the first prompts are answered on screen while the stage trains."""
    sample_steps: int | None = None
    """Answer them every so many steps, and at the first and the last; None: never."""

    def __post_init__(self) -> None:
        SFTConfig.__post_init__(self)
        check_files(self, "data")
        check_positive(self, ("sample_steps",))
        check_fraction(self, "eval_fraction")
        check(self.ptx_window_tokens >= 2, "ptx_window_tokens", "at least 2",
              self.ptx_window_tokens)
        check(self.ptx_ratio == 0 or bool(self.ptx_data), "ptx_data",
              "text files, because ptx_ratio is above 0", self.ptx_data)


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardRun(RewardConfig):
    """A reward model from ranking files, started from a language model."""

    model_name_or_path: str
    """Folder of the language model whose trunk is copied."""
    output_dir: str
    """Folder of this run; it must not hold another run."""
    data: tuple[str, ...]
    """Rankings: rows with `chosen` + `rejected`, or `completions` with ranks."""
    eval_data: tuple[str, ...] = ()
    """Held-out rankings, added to those split off by `eval_fraction`."""
    eval_fraction: float | None = None
    """Share of the prompts of `data` held out; split by prompt, never by row. None: 0.05 where
    `eval_data` is empty, else 0."""
    demonstrations: tuple[str, ...] = ()
    """Demonstrations whose mean reward is shifted to 0; none: the training completions."""

    def __post_init__(self) -> None:
        RewardConfig.__post_init__(self)
        check_files(self, "data")
        check_fraction(self, "eval_fraction")


@dataclass(frozen=True, kw_only=True, slots=True)
class DPORun(DPOConfig):
    """DPO or IPO of a model folder on ranking files."""

    model_name_or_path: str
    """Folder of the model that DPO starts from."""
    output_dir: str
    """Folder of this run; it must not hold another run."""
    data: tuple[str, ...]
    """Rankings: rows with `chosen` + `rejected`, or `completions` with ranks."""
    eval_data: tuple[str, ...] = ()
    """Held-out rankings."""
    eval_fraction: float = 0.05
    """Share of the prompts held out when `eval_data` is empty; split by prompt, never by row."""
    reference_model: str | None = None
    """Folder of the reference; None: the model DPO starts from."""
    sample_prompts: tuple[str, ...] = ()
    """Prompt files; the first prompts are answered on screen while the stage trains."""
    sample_steps: int | None = None
    """Answer them every so many steps, and at the first and the last; None: never."""

    def __post_init__(self) -> None:
        DPOConfig.__post_init__(self)
        check_files(self, "data")
        check_positive(self, ("sample_steps",))
        check_fraction(self, "eval_fraction")
        check(self.reference == "copy" or self.reference_model is None, "reference_model",
              "none, because reference is 'none'", self.reference_model)

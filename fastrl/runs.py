"""One dataclass per stage of a recipe: the trainer's settings plus the names of its inputs.

`fastrl.config` holds what a trainer takes; the classes here add models, files and folders, as a
command line or a recipe gives them. `fastrl.stages` turns the names into objects. Paths are
strings; a tuple of paths is read in order, as one data set.
"""

from dataclasses import dataclass
from typing import Literal

from fastrl.config import (
    DPOConfig,
    EngineConfig,
    PPOConfig,
    RewardConfig,
    SamplingConfig,
    SFTConfig,
    check,
)
from fastrl.presets import GRPOConfig, RLOOConfig
from fastrl.reward_settings import BestOfNRun, RewardPart, WatchConfig, join_parts

Dtype = Literal["auto", "float32", "bfloat16", "float64"]


def _check_positive(run: object, *names: str) -> None:
    for name in names:
        value = getattr(run, name)
        check(value is None or value > 0, name, "a number above 0", value)


def _check_fraction(run: object, name: str) -> None:
    value = getattr(run, name)
    check(value is None or 0 <= value < 1, name, "a share from 0 to below 1", value)


def _check_files(run: object, *names: str) -> None:
    for name in names:
        value = getattr(run, name)
        check(len(value) > 0, name, "at least one file", value)


def _check_weights(weights: dict[str, float] | None) -> None:
    for source, weight in (weights or {}).items():
        check(weight >= 0, f"source_weights.{source}", "a number of at least 0", weight)
    check(weights is None or sum(weights.values()) > 0, "source_weights",
          "at least one weight above 0", weights)


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
        _check_files(self, "data")
        _check_positive(self, "sample_steps", "vocab_size", "hidden_size", "num_layers",
                        "num_heads", "num_kv_heads", "intermediate_size", "max_positions")
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
        _check_files(self, "data")
        _check_positive(self, "sample_steps")
        _check_fraction(self, "eval_fraction")
        check(self.ptx_window_tokens >= 2, "ptx_window_tokens", "at least 2",
              self.ptx_window_tokens)
        check(self.ptx_ratio == 0 or bool(self.ptx_data), "ptx_data",
              "text files, because ptx_ratio is above 0", self.ptx_data)


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptsRun:
    """Prompts in three disjoint files, from files or from the beginnings of a model's own samples.

    Writes `train.jsonl`, `heldout.jsonl` (for the reward model) and `eval.jsonl` (for policies).
    """

    model_name_or_path: str
    """Folder of the model: its tokenizer counts tokens, and without `data` it is sampled from."""
    output_dir: str
    """Folder of this run; it must not hold another run."""
    data: tuple[str, ...] = ()
    """Prompt files; none: the first tokens of the model's own samples, begun with its BOS token."""
    source_weights: dict[str, float] | None = None
    """Share of each `source` in all three files; None: as the rows come. A source that runs out
    gives what it has."""
    num_train: int = 1500
    """Prompts for rankings and PPO."""
    num_heldout: int = 300
    """Prompts for held-out rankings, and for choosing checkpoints."""
    num_eval: int = 384
    """Prompts for comparing policies."""
    min_tokens: int = 5
    """Shortest prompt, without the beginning-of-text token."""
    max_tokens: int = 15
    """Longest prompt, without the beginning-of-text token."""
    seed: int = 0
    """Seeds the samples and their lengths, or the order of the rows."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    dtype: Dtype = "auto"
    """Type of the weights; auto is float32 on a CPU and bfloat16 on a GPU."""

    def __post_init__(self) -> None:
        _check_positive(self, "num_train", "num_heldout", "num_eval", "min_tokens")
        check(self.min_tokens <= self.max_tokens, "min_tokens",
              f"at most max_tokens ({self.max_tokens})", self.min_tokens)
        _check_weights(self.source_weights)
        check(self.source_weights is None or bool(self.data), "data",
              "prompt files, because source_weights is set", self.data)


@dataclass(frozen=True, kw_only=True, slots=True)
class RankRun:
    """Samples of a model, ranked by a programmatic labeler with noise.

    Writes `rankings.jsonl`, `heldout.jsonl` and `labels.json` (agreement and the Bayes limit).
    """

    model_name_or_path: str
    """Folder of the model whose samples are ranked."""
    prompts: str
    """Prompts of the training rankings."""
    output_dir: str
    """Folder of this run; it must not hold another run."""
    heldout_prompts: str | None = None
    """Prompts of the held-out rankings; None writes none."""
    labeler: str = "lexicon"
    """Name of the labeler, see `fastrl.labelers`."""
    num_samples_per_prompt: int = 6
    """K, completions ranked per prompt; paper: 4 to 9."""
    sampling: SamplingConfig = SamplingConfig(max_new_tokens=64)
    """How completions are drawn."""
    engine: EngineConfig = EngineConfig()
    """Sizes of the rollout engine."""
    target_agreement: float | None = 0.75
    """Share of pairs with different gold scores that the noise leaves in order; the noise scale
    is searched for. Paper: labelers agree with each other on 73% of pairs."""
    noise_scale: float | None = None
    """Scale of the Gumbel noise in units of the gold score; set it with target_agreement null."""
    seed: int = 0
    """Seeds samples and noise."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    dtype: Dtype = "auto"
    """Type of the weights; auto is float32 on a CPU and bfloat16 on a GPU."""

    def __post_init__(self) -> None:
        check(self.num_samples_per_prompt >= 2, "num_samples_per_prompt", "at least 2",
              self.num_samples_per_prompt)
        check((self.target_agreement is None) != (self.noise_scale is None), "noise_scale",
              "exactly one of noise_scale and target_agreement, the other null",
              self.noise_scale)
        check(self.target_agreement is None or 0.5 < self.target_agreement <= 1,
              "target_agreement", "a share above 0.5 and at most 1", self.target_agreement)
        check(self.noise_scale is None or self.noise_scale >= 0, "noise_scale",
              "a number of at least 0", self.noise_scale)


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
        _check_files(self, "data")
        _check_fraction(self, "eval_fraction")


@dataclass(frozen=True, kw_only=True, slots=True)
class SelectRun:
    """Choose among the checkpoints that an SFT stage kept, by mean score of their responses.

    For an SFT stage with `select_by: reward` that ran before there was a reward model.
    """

    model_name_or_path: str
    """Model folder of the SFT stage; the candidates lie beside it."""
    reward_model: str
    """Folder of the reward model that judges."""
    prompts: tuple[str, ...]
    """Prompts that are answered."""
    output_dir: str
    """Folder of this run; it must not hold another run."""
    num_prompts: int = 128
    """Prompts used, the first of the files."""
    max_prompt_tokens: int = 1024
    """Longer prompts are dropped and counted."""
    max_tokens_per_microbatch: int = 8192
    """Token budget of one scoring pass."""
    sampling: SamplingConfig = SamplingConfig()
    """How responses are drawn."""
    engine: EngineConfig = EngineConfig()
    """Sizes of the rollout engine."""
    seed: int = 0
    """Seeds the samples."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    dtype: Dtype = "auto"
    """Type of the weights; auto is float32 on a CPU and bfloat16 on a GPU."""

    def __post_init__(self) -> None:
        _check_files(self, "prompts")
        _check_positive(self, "num_prompts", "max_prompt_tokens", "max_tokens_per_microbatch")


@dataclass(frozen=True, kw_only=True, slots=True)
class PPORun(PPOConfig):
    """PPO or PPO-ptx of a model folder against reward models, reward functions or both."""

    model_name_or_path: str
    """Folder of the model that PPO starts from."""
    output_dir: str
    """Folder of this run; it must not hold another run."""
    prompts: tuple[str, ...]
    """Prompts: rows with `prompt` or `messages`."""
    reward_model: str | None = None
    """Folder of the reward model, a sequence-classification checkpoint with one label."""
    reward_function: str | None = None
    """A function that scores: gsm8k, ifeval, or `path/to/file.py:name`, which is executed; its
    scores are added to the reward model's where there are both."""
    rewards: dict[str, RewardPart] | None = None
    """More rewards by name, each with settings of its own: {name: {model, function or labeler,
    arguments, weight, source_weights, timeout_s}} (docs/rewards.md)."""
    reference_model: str | None = None
    """Folder of the reference of the KL penalty; None: the model PPO starts from."""
    source_weights: dict[str, float] | None = None
    """Share of each `source` among the prompts drawn; None: every prompt once per pass."""
    eval_prompts: tuple[str, ...] = ()
    """Held-out prompts."""
    eval_fraction: float = 0.05
    """Share of `prompts` held out when `eval_prompts` is empty."""
    ptx_data: tuple[str, ...] = ()
    """Text files of the pretraining mix, for PPO-ptx."""
    eval_ptx_data: tuple[str, ...] = ()
    """Held-out text files; their loss is logged at every evaluation."""
    ptx_window_tokens: int = 256
    """Tokens of one pretraining window."""
    gold_rewards: dict[str, RewardPart] | None = None
    """What is wanted in truth, by name as `rewards`: scored at every evaluation, never optimised;
    the watch compares it with the score that is."""
    watch: WatchConfig = WatchConfig()
    """When the reward-hacking watch gives alarm; it looks at every evaluation."""
    best_of_n: int | None = 16
    """Before training, draw so many answers to each held-out prompt: what best-of-n of the first
    policy gains at which KL stands in the report beside the run; None: not measured."""
    sample_prompts: tuple[str, ...] = ()
    """Prompt files; the first prompts are answered on screen while the stage trains."""
    sample_steps: int | None = None
    """Answer them every so many steps, and at the first and the last; None: never."""

    def __post_init__(self) -> None:
        PPOConfig.__post_init__(self)
        _check_files(self, "prompts")
        _check_positive(self, "sample_steps", "best_of_n")
        _check_fraction(self, "eval_fraction")
        check(self.ptx_window_tokens >= 2, "ptx_window_tokens", "at least 2",
              self.ptx_window_tokens)
        check(self.ptx_coef == 0 or bool(self.ptx_data), "ptx_data",
              "text files, because ptx_coef is above 0", self.ptx_data)
        check(self.reference == "copy" or self.reference_model is None, "reference_model",
              f"None, because reference is {self.reference!r}", self.reference_model)
        _check_weights(self.source_weights)
        join_parts(self.reward_model, self.reward_function, self.rewards)
        join_parts(None, None, self.gold_rewards)
        check(not self.gold_rewards or self.eval_steps is not None, "eval_steps",
              "a number, because gold_rewards are scored at evaluations", self.eval_steps)


@dataclass(frozen=True, kw_only=True, slots=True)
class GRPORun(GRPOConfig, PPORun):
    """GRPO of a model folder against rewards: `PPORun` with the defaults of GRPO."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RLOORun(RLOOConfig, PPORun):
    """RLOO of a model folder against rewards: `PPORun` with the defaults of RLOO."""


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
        _check_files(self, "data")
        _check_positive(self, "sample_steps")
        _check_fraction(self, "eval_fraction")
        check(self.reference == "copy" or self.reference_model is None, "reference_model",
              "none, because reference is 'none'", self.reference_model)


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateRun:
    """Compare models on held-out prompts; writes `evaluation.json`, samples included."""

    models: dict[str, str]
    """Folder of each model, by the name it has in the tables."""
    reference: str
    """Which of `models` is the original: KL and log-likelihoods are taken under it."""
    prompts: tuple[str, ...]
    """Held-out prompts."""
    output_dir: str
    """Folder of this run; it must not hold another run."""
    pairs: tuple[tuple[str, str], ...] = ()
    """Win rates to report, (challenger, opponent); none: every model against the reference."""
    labeler: str | None = None
    """Gold score that decides who wins, see `fastrl.labelers`."""
    reward_model: str | None = None
    """Reward model that is reported, and decides who wins where there is no labeler."""
    reward_function: str | None = None
    """A function in its place or added to it: gsm8k, ifeval, or `path/to/file.py:name`."""
    rewards: dict[str, RewardPart] | None = None
    """More rewards by name, each with settings of its own (docs/rewards.md)."""
    best_of_n: int | None = None
    """Compare the best of so many samples of `reference` too, chosen by the rewards; null: no."""
    text: tuple[str, ...] = ()
    """Held-out text files for the language-model loss."""
    window_tokens: int = 256
    """Tokens of one window of that text."""
    max_windows: int = 64
    """Windows of that text that are scored."""
    num_prompts: int = 384
    """Prompts used, the first of the files."""
    num_table_rows: int = 8
    """Prompts shown side by side in the sample table."""
    max_prompt_tokens: int = 1024
    """Longer prompts are dropped and counted."""
    max_tokens_per_microbatch: int = 8192
    """Token budget of one scoring pass."""
    sampling: SamplingConfig = SamplingConfig(max_new_tokens=64)
    """How responses are drawn."""
    engine: EngineConfig = EngineConfig()
    """Sizes of the rollout engine."""
    seed: int = 0
    """Seeds the samples."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    dtype: Dtype = "auto"
    """Type of the weights; auto is float32 on a CPU and bfloat16 on a GPU."""

    def __post_init__(self) -> None:
        _check_files(self, "models", "prompts")
        _check_positive(self, "num_prompts", "num_table_rows", "max_windows",
                        "max_prompt_tokens", "max_tokens_per_microbatch")
        check(self.window_tokens >= 2, "window_tokens", "at least 2", self.window_tokens)
        parts = join_parts(self.reward_model, self.reward_function, self.rewards)
        check(self.labeler is not None or bool(parts), "labeler",
              "a labeler or a reward_model to decide who wins", None)
        _check_positive(self, "best_of_n")
        check(self.best_of_n is None or bool(parts), "reward_model",
              "a reward to choose the best of n with", None)
        check(not self.sampling.is_truncated or self.sampling.logprobs == "raw", "sampling",
              "plain sampling, or logprobs: raw, since KL needs log-probs of the whole "
              "distribution", self.sampling)
        names = ", ".join(self.models)
        best = f"best-of-{self.best_of_n}"
        check(best not in self.models, "models", f"no model called {best}", names)
        known = {*self.models} | ({best} if self.best_of_n is not None else set())
        for name in (self.reference, *[name for pair in self.pairs for name in pair]):
            check(name in known, "models", f"an entry for {name!r}", names)


StageRun = (PretrainRun | SFTRun | PromptsRun | RankRun | RewardRun | SelectRun | PPORun
            | DPORun | BestOfNRun | EvaluateRun)

RUN_TYPES: dict[str, type[StageRun]] = {
    "pretrain": PretrainRun,
    "sft": SFTRun,
    "prompts": PromptsRun,
    "rank": RankRun,
    "reward": RewardRun,
    "select": SelectRun,
    "ppo": PPORun,
    "grpo": GRPORun,
    "rloo": RLOORun,
    "dpo": DPORun,
    "best_of_n": BestOfNRun,
    "evaluate": EvaluateRun,
}
"""Stage kinds of a recipe, and the settings of each."""

PATH_FIELDS = ("model_name_or_path", "tokenizer_name_or_path", "reference_model", "reward_model",
               "models", "data", "eval_data", "tokenizer_data", "ptx_data", "eval_ptx_data",
               "demonstrations", "prompts", "heldout_prompts", "eval_prompts",
               "sample_prompts", "text")
"""Settings that name files or folders, in every kind of stage that has them."""

REWARD_FIELDS = ("rewards", "gold_rewards")
"""Settings that hold rewards by name, each with a folder or a file."""

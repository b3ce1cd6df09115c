"""Stages that train nothing: data, prompts, ranking, selection, evaluation."""

from dataclasses import dataclass

from fastrl.config import EngineConfig, SamplingConfig, check
from fastrl.config.checks import check_positive
from fastrl.reward_settings import RewardPart, join_parts
from fastrl.runs.checks import Dtype, check_files, check_weights


@dataclass(frozen=True, kw_only=True, slots=True)
class WorldRun:
    """The world of `fastrl demo`: text, demonstrations, prompts and a tokenizer, made on the spot.

    Its gold score is the labeler `world`.
    """

    output_dir: str
    """Folder of this run; it must not hold another run."""
    seed: int = 0
    """Seeds texts and demonstrations, and which prompts are held out."""


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
        check_positive(self, ("num_train", "num_heldout", "num_eval", "min_tokens"))
        check(self.min_tokens <= self.max_tokens, "min_tokens",
              f"at most max_tokens ({self.max_tokens})", self.min_tokens)
        check_weights(self.source_weights)
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
class SelectRun:
    """Choose among the checkpoints that an SFT stage kept, by mean score of their responses.

    For an SFT stage with `select_by: reward` that ran before there was a reward model, or whose
    judge is a function.
    """

    model_name_or_path: str
    """Model folder of the SFT stage; the candidates lie beside it."""
    prompts: tuple[str, ...]
    """Prompts that are answered."""
    output_dir: str
    """Folder of this run; it must not hold another run."""
    reward_model: str | None = None
    """Folder of the reward model that judges."""
    reward_function: str | None = None
    """A function in its place or added to it: gsm8k, ifeval, or `path/to/file.py:name`."""
    rewards: dict[str, RewardPart] | None = None
    """More rewards by name, each with settings of its own (docs/rewards.md)."""
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
        check_files(self, "prompts")
        check(bool(join_parts(self.reward_model, self.reward_function, self.rewards)),
              "reward_model", "reward_model, reward_function or rewards to judge with", None)
        check_positive(self, ("num_prompts", "max_prompt_tokens", "max_tokens_per_microbatch"))


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
        check_files(self, "models", "prompts")
        check_positive(self, ("num_prompts", "num_table_rows", "max_windows", "max_prompt_tokens",
                              "max_tokens_per_microbatch"))
        check(self.window_tokens >= 2, "window_tokens", "at least 2", self.window_tokens)
        parts = join_parts(self.reward_model, self.reward_function, self.rewards)
        check(self.labeler is not None or bool(parts), "labeler",
              "a labeler or a reward_model to decide who wins", None)
        check_positive(self, ("best_of_n",))
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

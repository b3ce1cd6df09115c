"""Settings of every stage: frozen dataclasses, a sentence under each field, checks on creation.

`SFTConfig`, `RewardConfig`, `DPOConfig` and `PPOConfig` are what the trainers take. The `*Run`
classes add the names (models, files, folders) that a command line or a recipe gives;
`fastrl.pipeline` turns the names into objects. Values marked *paper* are those of Ouyang et al.
2022 (arXiv 2203.02155).
"""

import dataclasses
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from fastrl.errors import ConfigError
from fastrl.field_types import described, fits


def check(condition: bool, field: str, expected: str, value: object) -> None:
    """Raise ConfigError when a field's value is out of bounds."""
    if not condition:
        raise ConfigError(f"{field}: expected {expected}, got {value!r}; change {field}")


def _typed(config: object, cls: type[Any]) -> None:
    """Raise ConfigError where a value is not of the type that its field has in `cls`."""
    for setting in dataclasses.fields(cls):
        value = getattr(config, setting.name)
        check(fits(setting.type, value), setting.name, described(setting.type), value)


def _positive(config: object, names: Iterable[str]) -> None:
    for name in names:
        value = getattr(config, name)
        check(value is None or value > 0, name, "a number above 0", value)


def _not_negative(config: object, names: Iterable[str]) -> None:
    for name in names:
        value = getattr(config, name)
        check(value is None or value >= 0, name, "a number of at least 0", value)


UNITS = {"GiB": 2**30, "MiB": 2**20, "GB": 10**9, "MB": 10**6}


def read_bytes(text: str, field: str) -> int:
    """Bytes of a number with its unit, such as 24GiB.

    Raises:
        ConfigError: when the unit is missing or another, or the number is not above 0.
    """
    found = re.fullmatch(rf"\s*(\d+(?:\.\d+)?)\s*({'|'.join(UNITS)})\s*", text)
    num_bytes = int(float(found[1]) * UNITS[found[2]]) if found else 0
    check(num_bytes > 0, field, f"a number above 0 and a unit ({', '.join(UNITS)}), such as 24GiB",
          text)
    return num_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingConfig:
    """How the engine draws tokens."""

    temperature: float = 1.0
    """Divides the logits before sampling; paper: 1."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens with at least this probability; 1 keeps all."""
    min_p: float = 0.0
    """Drop tokens less likely than this share of the most likely one; 0 keeps all."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens seen before; 1 is off."""
    greedy: bool = False
    """Take the most likely token instead of sampling."""
    max_new_tokens: int = 128
    """Longest response, in tokens."""
    min_new_tokens: int = 0
    """No stop token before this many tokens."""
    stop_token_ids: tuple[int, ...] | None = None
    """Tokens that end a response; None takes the model's own end-of-text tokens."""
    stop_strings: tuple[str, ...] = ()
    """Texts that end a response; the text itself is kept in the tokens."""
    logprobs: Literal["processed", "raw"] = "processed"
    """Log-probs of the distribution drawn from, or of the model's own (temperature only)."""

    def __post_init__(self) -> None:
        _typed(self, SamplingConfig)
        _positive(self, ("temperature", "max_new_tokens", "repetition_penalty"))
        _not_negative(self, ("top_k", "min_new_tokens"))
        check(1e-6 <= self.temperature <= 1e6, "temperature",
              "at least 1e-6 (set greedy to take the most likely token) and at most 1e6",
              self.temperature)
        check(1e-6 <= self.repetition_penalty <= 1e6, "repetition_penalty",
              "a number from 1e-6 to 1e6", self.repetition_penalty)
        check(all(self.stop_strings), "stop_strings", "texts, none of them empty",
              self.stop_strings)
        check(all(token >= 0 for token in self.stop_token_ids or ()), "stop_token_ids",
              "token ids of at least 0", self.stop_token_ids)
        check(0 < self.top_p <= 1, "top_p", "a number above 0 and at most 1", self.top_p)
        check(0 <= self.min_p < 1, "min_p", "a number from 0 to below 1", self.min_p)
        check(self.min_new_tokens <= self.max_new_tokens, "min_new_tokens",
              f"at most max_new_tokens ({self.max_new_tokens})", self.min_new_tokens)

    @property
    def is_truncated(self) -> bool:
        """True when some tokens can never be drawn, or logits depend on earlier tokens."""
        return (self.greedy or self.top_k > 0 or self.top_p < 1 or self.min_p > 0
                or self.repetition_penalty != 1 or self.min_new_tokens > 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """The rollout engine's sizes."""

    page_size: int | None = None
    """Tokens per page of the KV cache; None: 16, or on a CPU where `num_pages` is None as many as
    the longest sequence of the request has, because attention there reads whole sequences."""
    num_pages: int | None = None
    """Pages of the KV cache; None makes room for `max_batch_size` sequences of the request."""
    max_batch_size: int = 256
    """Sequences decoded together."""
    max_prefill_tokens: int | None = None
    """Prompt tokens processed in one forward pass; None: 8192, or 2048 on a CPU, whose caches hold
    more of what a layer passes to the next. A longer prompt is processed alone."""
    order: Literal["given", "longest_first"] = "given"
    """Which requests start first where not all fit: those given first, or those with the largest
    `max_new_tokens`, so that none of these runs alone at the end. Never changes a response."""
    share_prefix: bool = True
    """Samples of one prompt share the pages of the prompt."""
    sync_every: int | None = None
    """Decode steps between two looks at which responses have ended; None: 8 on a GPU, which then
    never waits for the host, or 1 on a CPU. With stop strings and in a stream always 1. Never
    changes a response."""
    cuda_graphs: Literal["auto", "on", "off"] = "auto"
    """Decode steps on a GPU are captured once for each size of the batch and then replayed: auto
    where all of a step can be captured, with a warning that says why not; on fails where not. The
    pages then keep their memory between calls. Never changes a response."""
    exact: bool = True
    """A response has the same bits whatever runs beside it, and log-probs that are the update's:
    the settings of fastrl/exactness/settings.py, and passes padded to rows that kernels treat
    alike. False pads nothing and leaves torch's defaults."""

    def __post_init__(self) -> None:
        _typed(self, EngineConfig)
        _positive(self, ("page_size", "num_pages", "max_batch_size", "max_prefill_tokens",
                         "sync_every"))


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
    report_to: tuple[str, ...] = ()
    """Extra metric sinks beside metrics.jsonl: tensorboard."""

    def __post_init__(self) -> None:
        _positive(self, ("learning_rate", "adam_epsilon", "max_grad_norm",
                         "max_tokens_per_microbatch", "logging_steps", "lora_alpha"))
        check(self.lora_rank > 0 or self.lora_targets is None, "lora_targets",
              "null, because lora_rank is 0", self.lora_targets)
        if self.gpu_memory is not None:
            read_bytes(self.gpu_memory, "gpu_memory")
        _not_negative(self, ("weight_decay", "warmup_steps", "seed", "lora_rank"))
        for name in ("adam_beta1", "adam_beta2"):
            check(0 <= getattr(self, name) < 1, name, "a number from 0 to below 1",
                  getattr(self, name))
        for name in ("min_lr_ratio", "warmup_start_ratio"):
            check(0 <= getattr(self, name) <= 1, name, "a number from 0 to 1", getattr(self, name))
        for sink in self.report_to:
            check(sink == "tensorboard", "report_to", "only 'tensorboard'", sink)


@dataclass(frozen=True, kw_only=True, slots=True)
class SFTConfig(TrainConfig):
    """Supervised fine-tuning on demonstrations, and pretraining on plain text."""

    learning_rate: float = 9.65e-6
    """Peak learning rate; paper: 9.65e-6 for 1.3B and 6B."""
    batch_size: int = 32
    """Examples per optimiser step (packed rows when `packing` is on); paper: 32."""
    num_epochs: int = 16
    """Passes over the data; paper: 16 (2 for the model that PPO starts from)."""
    max_steps: int | None = None
    """Stop after this many steps; None follows num_epochs."""
    loss_on: Literal["completion", "all"] = "completion"
    """Tokens that count: the completion (in conversations: assistant turns), or all of them."""
    max_seq_tokens: int = 2048
    """Longest example; longer ones are dropped and counted; paper: 2048."""
    packing: bool = False
    """Fill rows of `max_seq_tokens` with whole examples, so that each step has equal tokens."""
    residual_dropout: float = 0.2
    """Dropout on the output of attention and MLP blocks; paper: 0.2."""
    ptx_ratio: float = 0.0
    """Pretraining windows per example in each step; paper: 0.1 for the model PPO starts from."""
    ptx_coef: float = 1.0
    """Weight of the pretraining loss beside the demonstration loss."""
    eval_steps: int | None = None
    """Evaluate every so many steps; None: at the end of each epoch."""
    select_by: Literal["last", "loss", "reward"] = "loss"
    """Checkpoint to keep: the last, lowest held-out loss, or highest reward-model score; paper:
    reward. Without a reward model yet, candidates are kept and selected after the reward stage."""
    num_candidates: int = 4
    """Checkpoints kept for selection by reward."""

    def __post_init__(self) -> None:
        TrainConfig.__post_init__(self)
        _positive(self, ("batch_size", "num_epochs", "max_steps", "max_seq_tokens", "eval_steps",
                         "num_candidates"))
        _not_negative(self, ("ptx_ratio", "ptx_coef"))
        check(0 <= self.residual_dropout < 1, "residual_dropout", "a number from 0 to below 1",
              self.residual_dropout)


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardConfig(TrainConfig):
    """Reward model from rankings."""

    learning_rate: float = 9e-6
    """Peak learning rate; paper: 9e-6."""
    batch_size: int = 64
    """Prompts per optimiser step, each with all of its pairs; paper: 64."""
    num_epochs: int = 1
    """Passes over the data; paper: 1, more overfit."""
    max_steps: int | None = None
    """Stop after this many steps; None follows num_epochs."""
    max_seq_tokens: int = 2048
    """Longest prompt + completion; longer ones lose the beginning of the prompt, counted."""
    ties: Literal["kept_pairs", "all_pairs"] = "kept_pairs"
    """Tied pairs are dropped; divide a prompt's loss by the pairs kept, or by all C(K,2)."""
    shift_to_demonstrations: bool = True
    """Set the bias so that demonstrations have mean reward 0; paper: on."""
    eval_steps: int | None = None
    """Evaluate every so many steps; None: only at the end."""

    def __post_init__(self) -> None:
        TrainConfig.__post_init__(self)
        _positive(self, ("batch_size", "num_epochs", "max_steps", "max_seq_tokens", "eval_steps"))


@dataclass(frozen=True, kw_only=True, slots=True)
class DPOConfig(TrainConfig):
    """Direct preference optimisation: a policy from rankings, without reward model and rollouts."""

    learning_rate: float = 1e-6
    """Peak learning rate."""
    lr_schedule: Literal["constant", "cosine", "linear"] = "linear"
    """Shape after warmup."""
    min_lr_ratio: float = 0.0
    """Last learning rate as a share of the peak."""
    batch_size: int = 64
    """Prompts per optimiser step, each with all of its pairs."""
    num_epochs: int = 1
    """Passes over the data."""
    max_steps: int | None = None
    """Stop after this many steps; None follows num_epochs."""
    max_seq_tokens: int = 2048
    """Longest prompt + completion; longer ones lose the beginning of the prompt, counted."""
    dpo_beta: float = 0.1
    """Strength of the pull towards the reference."""
    loss_type: Literal["sigmoid", "ipo"] = "sigmoid"
    """DPO's loss on sums of log-probs, or IPO's square on their means over tokens."""
    label_smoothing: float = 0.0
    """Share of the rankings taken to be wrong, from 0 to below 0.5; for sigmoid."""
    reference: Literal["copy", "none"] = "copy"
    """Measure log-probs against the reference's, or against nothing (reference-free)."""
    eval_steps: int | None = None
    """Evaluate every so many steps; None: only at the end."""

    def __post_init__(self) -> None:
        TrainConfig.__post_init__(self)
        _positive(self, ("batch_size", "num_epochs", "max_steps", "max_seq_tokens", "dpo_beta",
                         "eval_steps"))
        check(0 <= self.label_smoothing < 0.5, "label_smoothing", "a share from 0 to below 0.5",
              self.label_smoothing)
        check(self.loss_type == "sigmoid" or self.label_smoothing == 0, "label_smoothing",
              "0 with loss_type ipo", self.label_smoothing)


Advantage = Literal["gae", "grpo", "dr_grpo", "rloo", "reinforce_plus_plus",
                    "reinforce_plus_plus_baseline", "remax"]
GROUPED = ("grpo", "dr_grpo", "rloo", "reinforce_plus_plus_baseline")
"""Advantages that compare the responses to one prompt."""
CRITIC_SETTINGS = ("critic_learning_rate", "critic_max_grad_norm", "value_clip_range", "value_coef",
                   "critic_init", "critic_trunk", "num_critic_warmup_iterations", "lam",
                   "whiten_rewards")
"""Settings of PPOConfig that mean nothing without a critic."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PPOConfig(TrainConfig):
    """PPO and PPO-ptx against a scorer, with a KL penalty to a reference, and its relatives."""

    learning_rate: float = 2.55e-6
    """Peak learning rate of the policy; paper: a scan of 2.55e-6 to 2.55e-5."""
    critic_learning_rate: float = 9e-6
    """Peak learning rate of the critic; paper: 9e-6. With `critic_trunk: policy` it is used in the
    critic's warmup iterations only: the joint step has the policy's."""
    adam_epsilon: float = 1e-5
    """Added to the root of the second moment; 1e-5 in RL code of this family."""
    lr_schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Shape after warmup; paper: constant."""
    warmup_steps: int = 10
    """*Iterations* of linear warmup from `warmup_start_ratio`; paper: 10."""
    max_grad_norm: float | None = 1.0
    """Clip norm of the policy's gradient."""
    critic_max_grad_norm: float | None = 1.0
    """Clip norm of the critic's gradient, in the steps that have `critic_learning_rate`."""
    num_iterations: int = 500
    """Rollouts to make; paper: 256k episodes / 512 = 500."""
    rollout_batch_size: int = 512
    """Responses per iteration; paper: 512."""
    minibatch_size: int = 64
    """Responses per optimiser step; paper: 64."""
    num_inner_epochs: int = 1
    """Passes over each rollout; paper: 1."""
    num_samples_per_prompt: int = 1
    """Responses per prompt in one rollout; paper: 1."""
    sampling: SamplingConfig = SamplingConfig()
    """How responses are drawn; paper: temperature 1, nothing truncated."""
    engine: EngineConfig = EngineConfig()
    """Sizes of the rollout engine."""
    max_prompt_tokens: int = 1024
    """Longer prompts are dropped and counted; paper: 1024."""
    reference: Literal["copy", "none", "adapters_off"] = "copy"
    """KL is measured against a frozen copy; adapters_off: against the policy without its adapters,
    with `lora_rank` above 0, in no memory; none: no reference is loaded and nothing is measured,
    with `kl_coef` 0."""
    kl_coef: float = 0.02
    """beta, weight of the per-token KL penalty, in units of the reward; paper: 0.02."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """Estimator of the KL that is subtracted from the reward or added to the loss; paper: k1."""
    kl_controller: Literal["fixed", "adaptive"] = "fixed"
    """Keep beta, or steer KL to `kl_target` (Ziegler et al. 2019); paper: fixed."""
    kl_target: float = 6.0
    """Target of the adaptive controller, nats per response."""
    kl_horizon: float = 10000.0
    """Time constant of the adaptive controller, in episodes."""
    kl_in: Literal["reward", "loss"] = "reward"
    """Where KL is: subtracted from the reward of each token as a number, or added to the loss of
    each token and differentiated (k1 with the gradient of k2)."""
    advantage: Advantage = "gae"
    """Against what a response is measured: gae: a critic; grpo, dr_grpo, rloo and
    reinforce_plus_plus_baseline: the other responses to its prompt (`num_samples_per_prompt`);
    reinforce_plus_plus: the batch; remax: the greedy response. Only gae has a critic."""
    gamma: float = 1.0
    """Discount; paper: 1."""
    lam: float = 0.95
    """Trace decay of GAE; 0.95 in Ziegler et al. and Stiennon et al., the paper is silent."""
    clip_range: float = 0.2
    """Clip range of the probability ratio; paper: 0.2."""
    clip_range_high: float | None = None
    """Clip range of ratios above 1 ("clip higher"); None: `clip_range`."""
    dual_clip: float | None = None
    """Bound of the loss of a token with a negative advantage, in units of that advantage, above 1,
    such as 3; None: no bound."""
    loss_mean: Literal["token", "sequence", "group", "constant"] = "token"
    """The policy loss is the mean over responses of their tokens' sum divided by: token: the mean
    length in the minibatch; sequence: the response's length; group: the mean length of the
    responses to its prompt; constant: `sampling.max_new_tokens`."""
    value_clip_range: float | None = 0.2
    """Clip range of the value change; None: no clipping."""
    value_coef: float = 1.0
    """Weight of the value loss. A critic with an optimiser of its own is only scaled by it; with
    `critic_trunk: policy` it weighs the value loss against the policy loss."""
    entropy_coef: float = 0.0
    """Weight of an entropy bonus in the policy loss; 0: none."""
    whiten_rewards: bool = False
    """Whiten shaped rewards over the batch, mean kept."""
    whiten_advantages: bool | None = None
    """Whiten advantages over the batch; None: with gae and both forms of reinforce_plus_plus."""
    reward_clip: float | None = None
    """Scores are clipped to [-reward_clip, reward_clip] before shaping; None: not clipped."""
    missing_eos_penalty: float | None = -1.0
    """Score of a response that did not stop, in place of the model's; None: off."""
    critic_init: Literal["reward", "policy"] = "reward"
    """The critic starts from the reward model, or from the policy with a zero head."""
    critic_trunk: Literal["own", "reward", "policy"] = "own"
    """What is under the value head: own: a copy of what `critic_init` names, trained whole; reward:
    the reward model's frozen trunk, shared, and the head alone is trained; policy: the policy's
    trunk, shared, and one step trains both (with `critic_init: policy`)."""
    num_critic_warmup_iterations: int = 0
    """First iterations that train the critic only; of a critic on a shared trunk the head."""
    max_approx_kl: float | None = None
    """Skip the rest of an iteration's update once approximate KL passes this; None: never."""
    max_kl: float | None = None
    """Stop the run when KL to the reference passes this, nats per response; None: never."""
    ema_decay: float | None = 0.992
    """Decay of the moving average of policy weights per optimiser step; None: off; paper: 0.992."""
    ptx_coef: float = 0.0
    """Weight of the pretraining loss (mean over tokens); 0 is PPO; paper: 27.8 for PPO-ptx."""
    ptx_ratio: float = 8.0
    """Pretraining windows per response; paper: 8."""
    eval_steps: int | None = 50
    """Evaluate on held-out prompts every so many iterations; None: never."""
    num_eval_prompts: int = 128
    """Held-out prompts of an evaluation."""
    eval_with_ema: bool = True
    """Evaluate and save the moving average of the weights, where there is one; the last weights are
    then saved beside it (else the average beside them)."""
    keep_best: bool = True
    """Keep the checkpoint with the best held-out score minus beta times KL."""
    logprob_tolerance: float = 1e-5
    """Largest accepted difference between rollout and update log-probs of sampled rows; above it
    the iteration recomputes old log-probs and warns. Two sums over a vocabulary differ by 1e-6; one
    other bit of a 16-bit state moves a log-prob by 1e-3 and more. 0 accepts the same bits only."""
    num_logprob_checks: int = 8
    """Responses of each iteration recomputed with the update's forward for that test."""
    parking: Literal["auto", "on", "off"] = "auto"
    """What a phase does not need waits on the host: for a GPU in pinned memory, for a CPU in a file
    of the run's folder. on: everything, off: nothing, auto: what the memory plan says has to
    (docs/memory.md). Never changes a number."""

    def __post_init__(self) -> None:
        TrainConfig.__post_init__(self)
        _positive(self, ("critic_learning_rate", "critic_max_grad_norm", "num_iterations",
                         "rollout_batch_size", "minibatch_size", "num_inner_epochs",
                         "num_samples_per_prompt", "max_prompt_tokens", "kl_target", "kl_horizon",
                         "clip_range", "value_clip_range", "reward_clip", "max_approx_kl",
                         "max_kl", "eval_steps", "num_eval_prompts", "clip_range_high"))
        _not_negative(self, ("kl_coef", "value_coef", "entropy_coef", "ptx_coef", "ptx_ratio",
                             "num_critic_warmup_iterations", "num_logprob_checks",
                             "logprob_tolerance"))
        for name in ("gamma", "lam"):
            check(0 <= getattr(self, name) <= 1, name, "a number from 0 to 1", getattr(self, name))
        check(self.ema_decay is None or 0 <= self.ema_decay < 1, "ema_decay",
              "None or a number from 0 to below 1", self.ema_decay)
        check(self.rollout_batch_size % self.minibatch_size == 0, "minibatch_size",
              f"a divisor of rollout_batch_size ({self.rollout_batch_size})", self.minibatch_size)
        check(self.rollout_batch_size % self.num_samples_per_prompt == 0,
              "num_samples_per_prompt",
              f"a divisor of rollout_batch_size ({self.rollout_batch_size})",
              self.num_samples_per_prompt)
        check(self.reference in ("copy", "none", "adapters_off"), "reference",
              "'copy', 'none' or 'adapters_off'", self.reference)
        check(self.reference != "adapters_off" or self.lora_rank > 0, "reference",
              "'copy' or 'none', because lora_rank is 0", self.reference)
        check(self.critic_trunk in ("own", "reward", "policy"), "critic_trunk",
              "'own', 'reward' or 'policy'", self.critic_trunk)
        if self.reference == "none":
            check(self.kl_coef == 0, "kl_coef", "0, because reference is 'none'", self.kl_coef)
            check(self.kl_controller == "fixed", "kl_controller",
                  "'fixed', because reference is 'none'", self.kl_controller)
            check(self.max_kl is None, "max_kl", "None, because reference is 'none'", self.max_kl)
        self._check_advantage()
        check(self.critic_trunk in ("own", self.critic_init), "critic_init",
              f"{self.critic_trunk!r}, because critic_trunk is {self.critic_trunk!r}: the critic "
              f"cannot start from other weights than those it shares", self.critic_init)
        check(not self.sampling.is_truncated or self.sampling.logprobs == "raw", "sampling",
              "plain sampling (no top_k, top_p, min_p, penalty, min_new_tokens or greedy): "
              "truncated samples cannot have ratio 1 in the update; to use them all the same set "
              "sampling.logprobs to raw", self.sampling)

    def _check_advantage(self) -> None:
        """Refuse settings that contradict the advantage or the place of the KL."""
        # That of the class: a preset allows fewer.
        known = get_args(next(field.type for field in dataclasses.fields(self)
                              if field.name == "advantage"))
        check(self.advantage in known, "advantage", f"one of {', '.join(known)}", self.advantage)
        for name, choices in (("kl_in", ("reward", "loss")),
                              ("loss_mean", ("token", "sequence", "group", "constant"))):
            check(getattr(self, name) in choices, name, f"one of {', '.join(choices)}",
                  getattr(self, name))
        because = f"because advantage is {self.advantage!r}"
        if self.advantage in GROUPED:
            check(self.num_samples_per_prompt > 1, "num_samples_per_prompt",
                  f"at least 2, {because}, which compares the responses to one prompt",
                  self.num_samples_per_prompt)
        if self.advantage in GROUPED[:3]:
            check(self.gamma == 1, "gamma", f"1, {because}, which has one number per response",
                  self.gamma)
        if not self.has_critic:
            defaults = {field.name: field.default for field in dataclasses.fields(PPOConfig)}
            for name in CRITIC_SETTINGS:
                check(getattr(self, name) == defaults[name], name,
                      f"its default ({defaults[name]!r}), {because}, which has no critic",
                      getattr(self, name))
        check(self.dual_clip is None or self.dual_clip > 1, "dual_clip",
              "None or a number above 1, such as 3", self.dual_clip)

    @property
    def has_critic(self) -> bool:
        """True where values are learned: no other advantage asks for them."""
        return self.advantage == "gae"

    @property
    def whitens_advantages(self) -> bool:
        """`whiten_advantages`, or what the advantage has by its source."""
        if self.whiten_advantages is not None:
            return self.whiten_advantages
        return self.advantage in ("gae", "reinforce_plus_plus", "reinforce_plus_plus_baseline")


def to_dict(config: Any) -> dict[str, Any]:
    """A config dataclass as plain nested values, ready for YAML or JSON."""
    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        return value

    result: dict[str, Any] = plain(dataclasses.asdict(config))
    return result

"""Settings of PPO and of every advantage that its page takes."""

import dataclasses
from dataclasses import dataclass
from typing import Literal, get_args

from fastrl.config.checks import check, check_not_negative, check_positive
from fastrl.config.sampling import EngineConfig, SamplingConfig
from fastrl.config.train import TrainConfig

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
        check_positive(self, ("critic_learning_rate", "critic_max_grad_norm", "num_iterations",
                              "rollout_batch_size", "minibatch_size", "num_inner_epochs",
                              "num_samples_per_prompt", "max_prompt_tokens", "kl_target",
                              "kl_horizon", "clip_range", "value_clip_range", "reward_clip",
                              "max_approx_kl", "max_kl", "eval_steps", "num_eval_prompts",
                              "clip_range_high"))
        check_not_negative(self, ("kl_coef", "value_coef", "entropy_coef", "ptx_coef", "ptx_ratio",
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

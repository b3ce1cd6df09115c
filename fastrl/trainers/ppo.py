"""PPO and PPO-ptx against a scorer, with a per-token KL penalty to a frozen reference.

One iteration, top to bottom, is `PPOTrainer.step`:

    prompt -> rollout -> evaluate -> reward -> advantages -> update -> publish

Source: Ouyang et al. 2022 (arXiv 2203.02155), section 3.5 and appendix C.4. Departures from the
paper, with reasons, are in docs/algorithms.md.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TypeVar, cast

from torch import Tensor, nn

from fastrl.alarms import Circumstances
from fastrl.checkpoints import State
from fastrl.checkpoints.saver import Saver
from fastrl.config import PPOConfig
from fastrl.engine import Engine
from fastrl.engine.engine import Progress as EngineProgress
from fastrl.exactness import choose_products, exact_math
from fastrl.exactness.sweep import warn_of_failures
from fastrl.kl_control import make_kl_controller
from fastrl.memory.measure import MemoryWatch
from fastrl.memory.residents import Residents, tensors_of
from fastrl.metrics import PhaseTimer, RunFolder
from fastrl.models.causal_lm import CausalLM, ScalarModel
from fastrl.models.lora import adapt, without_adapters
from fastrl.models.scoring import response_values
from fastrl.ops import shape_rewards, whiten
from fastrl.out_of_memory import PassBudget, call_again
from fastrl.rewards import Scorer, TextDecoder, reward_models, score_metrics
from fastrl.trainers.alarm_log import AlarmLog
from fastrl.trainers.budget import TokenBudget
from fastrl.trainers.common import (
    Progress,
    SilentProgress,
    derive_seed,
    prepare_backbone,
    stream_indices,
)
from fastrl.trainers.nonfinite import StepGuard, trace
from fastrl.trainers.old_logprobs import (
    largest_gap,
    update_logprobs,
    warn_of_gap,
)
from fastrl.trainers.ppo_advantages import compute_advantages, greedy_sampling
from fastrl.trainers.ppo_checks import (
    NonFinite,
    check_models,
    check_rollout_finite,
    check_settings,
    fit_prompts,
)
from fastrl.trainers.ppo_evaluation import Evaluation
from fastrl.trainers.ppo_learners import CriticLearner, PolicyLearner, minibatches
from fastrl.trainers.ppo_plan import plan_trainer
from fastrl.trainers.ppo_state import load_trainer_state, trainer_state
from fastrl.trainers.ppo_trunks import (
    SCORING_PARTS,
    check_trunk,
    critic_weights,
    read_critic,
    reference_part,
    resident_parts,
)
from fastrl.trainers.ppo_update import PPOBatch, batch_metrics, unpack_sequences, used_scores
from fastrl.trainers.ppo_weights import KeptWeights
from fastrl.types import Prompt, Rollout, TokenExample
from fastrl.watch import RewardWatch

logger = logging.getLogger("fastrl")

Result = TypeVar("Result")


class PPOTrainer:
    """Trains a policy to raise a score while it stays close to a reference.

    `step()` is one iteration; `train()` is the loop over it and leaves the chosen weights in
    `policy`. All models are put into eval mode: there is no dropout in RL.

    Args:
        config: Settings; the paper's values are the defaults.
        policy: Trained in place; the engine samples from these same weights.
        reference: Frozen; KL is measured against it. It must not share weights with the policy.
            None where `config.reference` is "none" or "adapters_off".
        critic: Trained in place; see `fastrl.trainers.ppo_trunks.initial_critic`. None where
            `config.advantage` asks for none.
        scorer: `scorer(rollout) -> [B]`, one score per response.
        prompts: Drawn by seeded permutations, each prompt once per pass.
        eval_prompts: Held-out prompts; none: no evaluation and no best weights.
        ptx: Pretraining windows for PPO-ptx.
        eval_ptx: Held-out windows; every evaluation logs their loss.
        run: Where metrics and samples are written; None writes nothing.
        encoder: Turns samples into text, and serves stop strings.
        watch: Looks at every evaluation for signs of reward hacking, and may end the run.
        expected_scores: Mean and standard deviation of the scores on held-out rankings, for the
            alarm of scores out of range.
    Raises:
        ModelError: when the models read different tokens.
        DataError: when no prompt fits `max_prompt_tokens`.
        ConfigError: when settings, models and data do not fit together.
    """

    def __init__(
        self,
        config: PPOConfig,
        policy: CausalLM,
        reference: CausalLM | None,
        critic: ScalarModel | None,
        scorer: Scorer,
        prompts: Sequence[Prompt],
        *,
        eval_prompts: Sequence[Prompt] = (),
        ptx: Sequence[TokenExample] = (),
        eval_ptx: Sequence[TokenExample] = (),
        run: RunFolder | None = None,
        encoder: TextDecoder | None = None,
        watch: RewardWatch | None = None,
        expected_scores: tuple[float, float] | None = None,
    ) -> None:
        adapt(policy, config)
        models: dict[str, CausalLM | ScalarModel] = {"policy": policy}
        if critic is not None:
            models["critic"] = critic.eval()
        if reference is not None:
            models["reference"] = reference.eval().requires_grad_(False)
        models |= reward_models(scorer, None if watch is None else watch.gold)
        check_settings(config, policy, reference, critic, ptx)
        check_trunk(config, policy, critic, scorer)
        check_models(models, critic_weights(config, critic))
        self.prompts = fit_prompts(prompts, config, models, "prompts")
        self.num_dropped_prompts = len(prompts) - len(self.prompts)
        held_out = fit_prompts(eval_prompts, config, models, "eval_prompts") if eval_prompts else []
        self.eval_prompts = held_out[:config.num_eval_prompts]
        plan, config = plan_trainer(config, models, self.prompts + self.eval_prompts)
        weights = [weight for model in models.values() for weight in tensors_of(model)]
        self.memory = MemoryWatch(plan, policy.lm_head.weight.device, weights, run)
        self.config, self.scorer, self.run = config, scorer, run
        self.policy, self.critic = policy.eval(), critic
        self.reference = (without_adapters(policy) if config.reference == "adapters_off"
                          else reference)
        for name in ("policy", "critic"):
            if name in models:
                prepare_backbone(models[name], config)
        self.budget = TokenBudget(config)
        self.guard, self.encoder = StepGuard(config), encoder
        self.passes = PassBudget(config.max_tokens_per_microbatch)
        self.engine = Engine(policy, config.engine, encoder=encoder)
        if config.engine.exact:
            warn_of_failures(policy)
            if self.reference is not None:
                with exact_math(policy.lm_head.weight.device.type):
                    choose_products(self.reference)
        self.residents = Residents(
            resident_parts(config, models),
            plan.parks, policy.lm_head.weight.device, folder=None if run is None else run.path,
            # A CPU's parked files are read from its own memory: nothing to gain by reading ahead.
            spare_bytes=plan.spare() if weights[0].is_cuda else None)
        with self.residents.phase("policy_update"):
            self.weights = KeptWeights(policy, config)
            self.policy_learner = PolicyLearner(
                config, policy, self.weights, self.budget, ptx=ptx,
                decode=None if encoder is None else encoder.decode,
                value_head=critic.head if critic and config.critic_trunk == "policy" else None)
        self.residents.parts |= {
            "policy_optimizer": lambda: self.policy_learner.optimizer.state_dict().values(),
            "ema": self.weights.averages, "swapped": self.weights.swapped}
        self.critic_learner = None if critic is None else self._critic_learner(config, critic)
        self.evaluation = Evaluation(
            config, self.engine, policy, self.reference, scorer, self.weights, self.residents,
            self.eval_prompts, eval_ptx, run, encoder, self.passes, watch)
        self.kl_controller = make_kl_controller(config.kl_controller, config.kl_coef,
                                                config.kl_target, config.kl_horizon)
        self.alarms = AlarmLog(config, Circumstances(
            num_steps=config.num_iterations, num_responses=config.rollout_batch_size,
            max_new_tokens=config.sampling.max_new_tokens,
            penalises_unfinished=config.missing_eos_penalty is not None,
            expected_scores=expected_scores), run)
        self.iteration = 0
        self.num_recomputed = 0
        self.score_std: float | None = None
        self.stop_reason: str | None = None
        self._on_progress: EngineProgress | None = None

    def _critic_learner(self, config: PPOConfig, critic: ScalarModel) -> CriticLearner:
        """The critic's steps, their optimiser among the residents."""
        with self.residents.phase("critic_update"):
            learner = CriticLearner(config, critic, critic_weights(config, critic), self.budget,
                                    None if self.encoder is None else self.encoder.decode)
        self.residents.parts["critic_optimizer"] = lambda: learner.optimizer.state_dict().values()
        return learner

    @property
    def num_steps(self) -> int:
        """Iterations of the run."""
        return self.config.num_iterations

    def state(self) -> State:
        """Everything that the next iterations depend on, see `fastrl.trainers.ppo_state`."""
        return trainer_state(self)

    def load_state(self, state: State) -> None:
        """Continue where a trainer of the same models, settings and data was, bit for bit.

        Raises:
            CheckpointError: when the state is not that of such a trainer.
        """
        load_trainer_state(self, state)

    @property
    def guards(self) -> list[StepGuard]:
        """Those of rollouts, of the policy's steps and, where there is one, of the critic's."""
        learners = (self.policy_learner, self.critic_learner)
        return [self.guard, *(learner.guard for learner in learners if learner is not None)]

    def train(self, progress: Progress | None = None) -> str:
        """Run to the end, or to the KL ceiling, and put the chosen weights into the policy.

        With a run folder and a moving average, the side that is not chosen (the last weights, or
        the average) is saved in the folder.

        Returns:
            Why training ended, in words.
        """
        progress = progress or SilentProgress()
        with Saver(self.config, self.run, self.state) as saver:
            self._on_progress = saver.in_rollout
            while self.iteration < self.num_steps and self.stop_reason is None:
                metrics = self.step()
                progress.update(self.iteration, metrics)
                if self.iteration > 0:  # a watch may end the run before
                    saver.after_step(self.iteration)
        with self.residents.phase("evaluation", "policy", "ema"):
            if self.run is not None:
                self.weights.save_other(self.run.path)
            chosen = self.weights.load_chosen()
        self.engine.weights_changed()
        reason = self.stop_reason or f"all {self.num_steps} iterations done"
        logger.info("training ended: %s; weights kept: %s", reason, chosen)
        return reason

    def step(self) -> dict[str, float]:
        """One iteration: sample, score, learn, publish.

        Returns:
            The metrics of the iteration; every name is explained in `fastrl.glossary`.
        Raises:
            NumericsError: at the first NaN or infinity, before it reaches the weights.
        """
        with exact_math(self.policy.lm_head.weight.device.type,
                        is_exact=self.config.engine.exact):
            return self._step()

    def _step(self) -> dict[str, float]:
        """The iteration, under the settings that make its forward passes agree."""
        config, timer = self.config, PhaseTimer()
        compute = partial(self._compute, timer)
        if self.iteration == 0 and config.eval_steps is not None:
            metrics = self.evaluate()
            self._log(metrics)
            if self.stop_reason is not None:  # the watch has seen enough
                return metrics

        # prompt
        num_prompts = config.rollout_batch_size // config.num_samples_per_prompt
        drawn = stream_indices(len(self.prompts), derive_seed(config.seed, "prompts"),
                               self.iteration * num_prompts, num_prompts)
        prompts = [self.prompts[i].token_ids for i in drawn]

        # rollout
        rollout = compute(lambda: self.engine.generate(
            prompts, config.sampling,
            seed=derive_seed(config.seed, "rollout", self.iteration),
            num_samples_per_prompt=config.num_samples_per_prompt,
            on_progress=self._on_progress,
        ), "rollout")
        greedy = None if config.advantage != "remax" else compute(
            lambda: self.engine.generate(prompts, greedy_sampling(config), seed=config.seed),
            "rollout")
        self.engine.release_memory()

        # evaluate
        old_logprobs, gap_metrics = compute(lambda: self._old_logprobs(rollout),
                                            "scoring", "policy")
        ref_logprobs = None
        if self.reference is not None:
            ref_logprobs = compute(partial(update_logprobs, self.reference, rollout, config,
                                           self.passes), "scoring", reference_part(config))
        values = raw_scores = critic_states = greedy_scores = None
        if self.critic is not None:
            values, raw_scores, critic_states = compute(partial(
                read_critic, config, self.critic, self.scorer, rollout, self.passes,
                trunk_stands_still=not self._trains_jointly,
            ), "scoring", *SCORING_PARTS[config.critic_trunk])
        if greedy is not None:
            greedy_scores = compute(partial(self._greedy_scores, greedy), "scoring",
                                    "reward_model")
        if raw_scores is None:
            raw_scores = compute(partial(self.scorer, rollout), "scoring", "reward_model")

        # reward, advantages
        try:
            batch, metrics = call_again(lambda: self._judge(
                rollout, old_logprobs, ref_logprobs, values, raw_scores, greedy_scores,
                critic_states), *self._sizes("rewards and advantages"))
        except NonFinite as error:
            return self._skip(error, rollout, timer)
        self.guard.passed()
        metrics |= gap_metrics

        # update
        kl = metrics.get("kl/policy_ref", 0.0)  # without a reference nothing follows from it
        if not self._is_past_kl_ceiling(kl):
            metrics |= self._update(batch, timer)
            if self._trains_policy:
                self.kl_controller.update(kl, rollout.batch_size)

        # publish
        with self.residents.phase("rollout"):
            self.engine.weights_changed()
        return self._finish(metrics, timer, rollout)

    def _skip(self, error: NonFinite, rollout: Rollout, timer: PhaseTimer) -> dict[str, float]:
        """End an iteration whose rollout has a NaN or an infinity: without an update."""
        parts = {"old_logprobs": ("policy",), "ref_logprobs": (reference_part(self.config),),
                 "values": SCORING_PARTS[self.config.critic_trunk]}
        where = self._compute(timer, partial(self._find, error, rollout), "scoring",
                              *parts.get(error.quantity, ("reward_model",)))
        self.guard.refuse(f"{error.reason}; {where}")
        return self._finish({}, timer, rollout)

    def _find(self, error: NonFinite, rollout: Rollout) -> str:
        """Which module gives a response of a rollout its NaN, in words."""
        one, config, name = rollout.select([error.row]), self.config, error.quantity
        works: dict[str, tuple[object, Callable[[int], object]]] = {
            "old_logprobs": (self.policy, lambda _: update_logprobs(self.policy, one, config)),
            "ref_logprobs": (self.reference, lambda _: update_logprobs(
                cast(CausalLM, self.reference), one, config)),
            "values": (self.critic, lambda _: response_values(
                cast(ScalarModel, self.critic), one, self.passes))}
        model, work = works.get(name, (next(iter(reward_models(self.scorer).values()), None),
                                       lambda _: self.scorer(one)))
        if not isinstance(model, nn.Module):
            return f"no model is behind these {name}"
        return trace(model, [one.sequence(0)], work, None if self.encoder is None
                     else self.encoder.decode)

    def _finish(
        self, metrics: dict[str, float], timer: PhaseTimer, rollout: Rollout
    ) -> dict[str, float]:
        """Count the iteration, look at it, evaluate and log."""
        self.iteration += 1
        if self.iteration == 1:
            dropped = self.num_dropped_prompts
            metrics["data/dropped_share"] = dropped / (dropped + len(self.prompts))
        if num_skipped := sum(guard.num_skipped for guard in self.guards):
            metrics["update/num_skipped"] = float(num_skipped)
        metrics |= self.alarms.look(self.iteration, metrics)
        if self._is_evaluation_due():
            with timer.phase("eval"):
                metrics |= self.evaluate()
        metrics |= timer.metrics(sum(map(sum, rollout.response_mask.tolist())))
        if "loss/policy" in metrics:  # not in the critic's own iterations
            metrics |= self.memory.metrics()
        self._log(metrics)
        self.alarms.stop_if_asked(self.iteration)
        return metrics

    def _judge(
        self, rollout: Rollout, old_logprobs: Tensor, ref_logprobs: Tensor | None,
        values: Tensor | None, raw_scores: Tensor, greedy_scores: Tensor | None,
        critic_states: list[Tensor] | None,
    ) -> tuple[PPOBatch, dict[str, float]]:
        """What is learned from, and what is known of it before."""
        config = self.config
        check_rollout_finite(self.iteration, rollout, scores=raw_scores, old_logprobs=old_logprobs,
                             ref_logprobs=ref_logprobs, values=values)

        # reward
        scores, kl_coef = used_scores(raw_scores, rollout, config), self.kl_controller.kl_coef
        rewards, kl_estimates = shape_rewards(
            scores, old_logprobs, old_logprobs if ref_logprobs is None else ref_logprobs,
            rollout.response_mask, kl_coef=kl_coef if config.kl_in == "reward" else 0.0,
            estimator=config.kl_estimator, return_estimates=True)

        # advantages
        raw_advantages, returns = compute_advantages(
            config, rewards, scores, rollout.response_mask, values=values,
            greedy_scores=greedy_scores)
        advantages = raw_advantages
        if config.whitens_advantages:
            advantages = whiten(raw_advantages, rollout.response_mask)
        batch = PPOBatch(
            rollout=rollout, sequences=unpack_sequences(rollout), old_logprobs=old_logprobs,
            ref_logprobs=ref_logprobs, kl_estimates=None if ref_logprobs is None else kl_estimates,
            values=values, raw_scores=raw_scores, scores=scores, rewards=rewards,
            raw_advantages=raw_advantages, advantages=advantages, returns=returns,
            kl_coef=kl_coef, critic_states=critic_states,
        )
        return batch, (batch_metrics(batch, config) | score_metrics(self.scorer)
                       | self._coefficient_metrics(raw_scores))

    def _compute(
        self, timer: PhaseTimer, work: Callable[[], Result], name: str, *parts: str
    ) -> Result:
        """What `work` returns in a phase. It changes nothing, so it may be done again."""
        return call_again(work, *self._sizes(" ".join((name, *parts))),
                          inside=partial(self._phase, timer, name, *parts))

    def _sizes(self, work: str) -> tuple[str, str]:
        """Some work with its sizes, and how to make those smaller."""
        config = self.config
        return (f"{work} of iteration {self.iteration}, {config.rollout_batch_size} responses of "
                f"up to {config.max_prompt_tokens} + {config.sampling.max_new_tokens} tokens",
                "lower rollout_batch_size, max_prompt_tokens or max_new_tokens")

    @contextmanager
    def _phase(self, timer: PhaseTimer, name: str, *parts: str) -> Iterator[None]:
        """A phase, or a part of it, with its clock running and what it needs in memory."""
        with timer.phase(name), self.residents.phase(name, *parts), self.memory.phase(name):
            yield

    @property
    def _trains_policy(self) -> bool:
        """False in the first iterations, which are the critic's."""
        return self.iteration >= self.config.num_critic_warmup_iterations

    @property
    def _trains_jointly(self) -> bool:
        """True when the policy's steps are also the critic's: a value head on the same trunk."""
        return self.config.critic_trunk == "policy" and self._trains_policy

    def _old_logprobs(self, rollout: Rollout) -> tuple[Tensor, dict[str, float]]:
        """The rollout's own log-probs [B, T] while recomputed rows agree, else all recomputed."""
        config, old_logprobs = self.config, rollout.rollout_logprobs
        if config.num_logprob_checks == 0:
            return old_logprobs, {}
        gap, row = largest_gap(self.policy, rollout, config, self.iteration, self.passes)
        if not gap <= config.logprob_tolerance:
            warn_of_gap(self.engine, self.policy, rollout, config, self.iteration, gap, row)
            old_logprobs = update_logprobs(self.policy, rollout, config, self.passes)
            self.num_recomputed += 1
        return old_logprobs, {"logprob/gap_max": gap,
                              "logprob/num_recomputed": float(self.num_recomputed)}

    def _greedy_scores(self, greedy: Rollout) -> Tensor:
        """[P], as they are used, of the greedy responses."""
        scores = self.scorer(greedy)
        check_rollout_finite(self.iteration, greedy, scores=scores)
        return used_scores(scores, greedy, self.config)

    def _coefficient_metrics(self, raw_scores: Tensor) -> dict[str, float]:
        """beta, also in units of the scores' std under the policy that training started from."""
        if self.reference is None:
            return {}
        if self.score_std is None:
            self.score_std = float(raw_scores.std(correction=0))
        kl_coef = self.kl_controller.kl_coef
        metrics = {"kl/coef": kl_coef}
        if self.score_std > 0:  # equal scores have no unit to divide by
            metrics["kl/coef_per_score_std"] = kl_coef / self.score_std
        return metrics

    def _is_past_kl_ceiling(self, kl: float) -> bool:
        """True when KL passed `max_kl`; training then ends after this iteration, unchanged."""
        max_kl = self.config.max_kl
        if max_kl is None or kl <= max_kl:
            return False
        self.stop_reason = (f"KL to the reference reached {kl:.2f} nats per response at iteration "
                            f"{self.iteration}, above max_kl {max_kl}")
        logger.warning("PPO stops: %s", self.stop_reason)
        return True

    def _update(self, batch: PPOBatch, timer: PhaseTimer) -> dict[str, float]:
        """Inner epochs x minibatches, one optimiser step each: the policy's, then the critic's.

        The two models share nothing that both train, so the numbers are those of steps in turns;
        but only one of them is needed at a time. The critic sees as many minibatches as the policy
        learned from. A critic on the policy's trunk learns in the policy's steps.
        """
        order = list(minibatches(self.config, batch.rollout.batch_size, self.iteration))
        metrics: dict[str, float] = {}
        with self._phase(timer, "policy_update"):
            if self._trains_policy:
                metrics, num_steps = self.policy_learner.learn(batch, order, self.iteration)
                order = order[:num_steps]
        if self.critic_learner is not None and not self._trains_jointly:
            with self._phase(timer, "critic_update"):
                metrics |= self.critic_learner.learn(batch, order, self.iteration)
        return metrics | self.budget.metrics() | {"update/num_minibatches": float(len(order))}

    def _is_evaluation_due(self) -> bool:
        """At every multiple of `eval_steps`, and after the last iteration."""
        steps = self.config.eval_steps
        is_last = self.iteration >= self.num_steps or self.stop_reason is not None
        return steps is not None and (self.iteration % steps == 0 or is_last)

    def evaluate(self) -> dict[str, float]:
        """Answer the held-out prompts with the weights that would be saved: `eval/` metrics."""
        metrics, watch = self.evaluation.run(self.iteration), self.evaluation.watch
        if watch is not None and watch.stop_reason is not None and self.stop_reason is None:
            self.stop_reason = watch.stop_reason
            logger.warning("PPO stops: %s", self.stop_reason)
        return metrics

    def _log(self, metrics: dict[str, float]) -> None:
        """Write metrics every `logging_steps`, at every evaluation and at the end."""
        is_due = (self.iteration % self.config.logging_steps == 0 or "eval/objective" in metrics
                  or self.iteration >= self.num_steps or self.stop_reason is not None)
        if self.run is not None and is_due and metrics:
            self.run.log(self.iteration, metrics)

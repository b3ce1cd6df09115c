"""The two learners of an iteration: what a policy and a critic do with the minibatches of a batch.

Each has its optimiser, its schedule and its clip norm, and checks every step before it takes it.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

from torch import Tensor, nn

from fastrl.config import PPOConfig
from fastrl.models.causal_lm import CausalLM, ScalarModel
from fastrl.models.heads import ScalarHead
from fastrl.optim import AdamW, Schedule, clip_scale
from fastrl.trainers.budget import TokenBudget
from fastrl.trainers.common import (
    backward_token_loss,
    derive_seed,
    epoch_permutation,
    stream_indices,
)
from fastrl.trainers.nonfinite import StepGuard, first_nonfinite, trace
from fastrl.trainers.ppo_update import PPOBatch, backward_critic, backward_policy, mean_by_name
from fastrl.trainers.ppo_weights import KeptWeights
from fastrl.types import TokenExample


def minibatches(config: PPOConfig, batch_size: int, iteration: int) -> Iterator[list[int]]:
    """Rows of each minibatch of an iteration, in seeded order, every row once per epoch."""
    seed = derive_seed(config.seed, "minibatches", iteration)
    for epoch in range(config.num_inner_epochs):
        order = epoch_permutation(batch_size, seed, epoch)
        for begin in range(0, batch_size, config.minibatch_size):
            yield order[begin:begin + config.minibatch_size]


class PolicyLearner:
    """Steps of the policy, with the pretraining mix, and of a value head on its trunk.

    Args:
        config: Settings of the run.
        policy: Trained in place.
        weights: Follows every step.
        budget: Of the microbatches.
        value_head: Trained in the same steps; None where the critic has steps of its own.
        ptx: Pretraining windows for PPO-ptx.
        decode: Makes text of tokens, for errors.
    """

    def __init__(
        self, config: PPOConfig, policy: CausalLM, weights: KeptWeights,
        budget: TokenBudget[PPOConfig], *, value_head: ScalarHead | None = None,
        ptx: Sequence[TokenExample] = (),
        decode: Callable[[list[int]], str] | None = None,
    ) -> None:
        self.config, self.policy, self.weights, self.budget = config, policy, weights, budget
        self.value_head, self.ptx = value_head, ptx
        also = () if value_head is None else value_head.parameters()
        self.optimizer = AdamW.from_config((*policy.parameters(), *also), config)
        self.schedule = Schedule.from_config(config, max(
            1, config.num_iterations - config.num_critic_warmup_iterations))
        self.num_ptx_windows = 0
        self.guard, self.decode = StepGuard(config), decode

    def learn(
        self, batch: PPOBatch, minibatches: Sequence[list[int]], iteration: int
    ) -> tuple[dict[str, float], int]:
        """Steps until approximate KL is too large.

        Args:
            minibatches: Rows of each.
        Returns:
            Mean metrics, and how many steps there were.
        """
        max_approx_kl, done = self.config.max_approx_kl, list[dict[str, float]]()
        for number, rows in enumerate(minibatches):
            windows = self.ptx_windows(len(rows))
            lengths = [len(batch.sequences[i]) for i in rows] + [len(w.token_ids) for w in windows]
            metrics, scale = self.budget.run(
                partial(self.gradients, batch, rows, windows, number == 0),
                self.optimizer, lengths)
            if max_approx_kl is not None and metrics["kl/approx"] > max_approx_kl:
                self.optimizer.zero_grad()
                done.append({"kl/approx": metrics["kl/approx"]})
                return mean_by_name(done), number
            self.num_ptx_windows += len(windows)
            if (bad := first_nonfinite(metrics)) is None:
                done.append(metrics | self.step(scale, iteration))
            else:
                self._refuse(batch, rows, windows, bad, iteration)
        return mean_by_name(done), len(minibatches)

    def _refuse(
        self, batch: PPOBatch, rows: list[int], windows: Sequence[TokenExample], bad: str,
        iteration: int,
    ) -> None:
        """Skip the step of a minibatch, or end the run, and say where its NaN comes from."""
        sequences = [*(batch.sequences[i] for i in rows), *(w.token_ids for w in windows)]

        def alone(i: int) -> dict[str, float]:
            if i < len(rows):
                return self.gradients(batch, rows[i:i + 1], (), False, self.budget.config)[0]
            window = windows[i - len(rows)]
            return {"loss/ptx": backward_token_loss(
                self.policy, [window], self.budget.config.max_tokens_per_microbatch)}

        where = trace(self.policy, sequences, alone, self.decode)
        self.optimizer.zero_grad()
        self.guard.refuse(f"iteration {iteration}: expected finite metrics of the policy's update, "
                          f"got {bad} in the minibatch of responses {rows}; {where}")

    def ptx_windows(self, num_rows: int) -> list[TokenExample]:
        """The pretraining windows beside `num_rows` responses."""
        if self.config.ptx_coef == 0:
            return []
        return [self.ptx[i] for i in stream_indices(
            len(self.ptx), derive_seed(self.config.seed, "ptx"), self.num_ptx_windows,
            round(self.config.ptx_ratio * num_rows))]

    def gradients(
        self, batch: PPOBatch, rows: list[int], windows: Sequence[TokenExample],
        measures_ratio: bool, config: PPOConfig,
    ) -> tuple[dict[str, float], Tensor | None]:
        """Gradients of policy loss and pretraining in the same buffers: metrics, clipping scale."""
        metrics = backward_policy(self.policy, batch, rows, config, measures_ratio=measures_ratio,
                                  value_head=self.value_head)
        if config.max_approx_kl is not None and metrics["kl/approx"] > config.max_approx_kl:
            return metrics, None
        if windows:
            metrics["loss/ptx"] = backward_token_loss(
                self.policy, windows, config.max_tokens_per_microbatch, weight=config.ptx_coef)
        metrics["grad/policy_norm"], scale = clip_scale(self.optimizer.parameters,
                                                        config.max_grad_norm)
        return metrics, scale

    def step(self, scale: Tensor | None, iteration: int) -> dict[str, float]:
        """One step with the gradients that are there; follow with the average."""
        # The policy's warmup begins when the policy does, after the critic's own iterations.
        learning_rate = self.schedule(iteration - self.config.num_critic_warmup_iterations)
        self.optimizer.step(learning_rate, scale)
        self.optimizer.zero_grad()
        self.weights.follow()
        self.guard.passed()
        return {"lr/policy": learning_rate}


class CriticLearner:
    """Steps of the critic: its own gradient, clip norm and learning rate.

    Args:
        config: Settings of the run.
        critic: Trained in place.
        weights: Those of the critic that are trained.
        budget: Of the microbatches.
        decode: Makes text of tokens, for errors.
    """

    def __init__(
        self, config: PPOConfig, critic: ScalarModel, weights: Sequence[nn.Parameter],
        budget: TokenBudget[PPOConfig], decode: Callable[[list[int]], str] | None = None,
    ) -> None:
        self.critic, self.budget = critic, budget
        self.guard, self.decode = StepGuard(config), decode
        self.optimizer = AdamW.from_config(weights, config)
        self.schedule = Schedule.from_config(config, config.num_iterations,
                                             config.critic_learning_rate)

    def learn(
        self, batch: PPOBatch, minibatches: Sequence[list[int]], iteration: int
    ) -> dict[str, float]:
        """One step per minibatch; mean metrics."""
        return mean_by_name([self.step(batch, rows, iteration) for rows in minibatches])

    def step(self, batch: PPOBatch, rows: list[int], iteration: int) -> dict[str, float]:
        """One optimiser step; metrics of the state before it."""
        metrics, scale = self.budget.run(
            partial(self._gradients, batch, rows), self.optimizer,
            [len(batch.sequences[i]) for i in rows])
        if (bad := first_nonfinite(metrics)) is not None:
            where = trace(
                self.critic, [batch.sequences[i] for i in rows],
                lambda i: self._gradients(batch, rows[i:i + 1], self.budget.config)[0], self.decode)
            self.optimizer.zero_grad()
            self.guard.refuse(f"iteration {iteration}: expected finite metrics of the critic's "
                              f"update, got {bad} in the minibatch of responses {rows}; {where}")
            return {}
        learning_rate = self.schedule(iteration)
        self.optimizer.step(learning_rate, scale)
        self.optimizer.zero_grad()
        self.guard.passed()
        return metrics | {"lr/critic": learning_rate}

    def _gradients(
        self, batch: PPOBatch, rows: list[int], config: PPOConfig
    ) -> tuple[dict[str, float], Tensor | None]:
        """Gradients of the value loss of a minibatch: metrics, clipping scale."""
        metrics = backward_critic(self.critic, batch, rows, config)
        metrics["grad/critic_norm"], scale = clip_scale(self.optimizer.parameters,
                                                        config.critic_max_grad_norm)
        return metrics, scale

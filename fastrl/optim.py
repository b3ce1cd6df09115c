"""AdamW with exact float32 masters, gradient clipping, learning-rate schedules and weight averages.

Everything that changes during training is a tensor in `state_dict()`, under a flat name, so that a
checkpoint needs no pickle.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from fastrl.config import TrainConfig
from fastrl.errors import ConfigError, ShapeError

_WIDE = (torch.float32, torch.float64)


def split_master(master: Tensor) -> tuple[Tensor, Tensor]:
    """Split float32 values into a bf16 weight and the 16 bits that it drops.

    The weight is the nearest bf16 (halves go away from zero), the remainder is the signed distance
    of the bit patterns: together they are the float32 value exactly, in 4 bytes.

    Args:
        master: any shape, float32, finite.
    Returns:
        weight: bfloat16, remainder: int16, same shape.
    """
    bits = master.view(torch.int32)
    high = (bits + 0x8000) >> 16
    remainder = bits - (high << 16)
    return high.to(torch.int16).view(torch.bfloat16), remainder.to(torch.int16)


def join_master(weight: Tensor, remainder: Tensor) -> Tensor:
    """The float32 values that `split_master` split, bit for bit."""
    high = weight.view(torch.int16).to(torch.int32) << 16
    return (high + remainder.to(torch.int32)).view(torch.float32)


class AdamW:
    """Adam with decoupled weight decay of matrices.

        m <- b1 m + (1 - b1) g;   v <- b2 v + (1 - b2) g^2
        w <- w (1 - lr wd) - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + epsilon)

    All arithmetic is float32 (float64 for float64 weights). bf16 weights keep the 16 bits they drop
    beside them, so that small updates are never lost.

    Args:
        parameters: float32, float64 or bfloat16 tensors; those without `requires_grad` are ignored.
        betas: Decays of the two moments.
        epsilon: Added to the root of the bias-corrected second moment.
        weight_decay: Applies to tensors of two or more dimensions only.
    Raises:
        ConfigError: when no parameter can be trained, or one has another dtype.
    Source: Loshchilov and Hutter 2019 (arXiv 1711.05101), algorithm 2.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        epsilon: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        self.parameters = [p for p in parameters if p.requires_grad]
        self.betas, self.epsilon, self.weight_decay = betas, epsilon, weight_decay
        self.num_steps = 0
        if not self.parameters:
            raise ConfigError("AdamW: expected parameters to train, got none that requires a "
                              "gradient; unfreeze the model first")
        for p in self.parameters:
            if p.dtype not in (*_WIDE, torch.bfloat16):
                raise ConfigError(f"AdamW: expected float32, float64 or bfloat16 weights, got "
                                  f"{p.dtype}; load the model with one of these dtypes")
        wide = [torch.float64 if p.dtype == torch.float64 else torch.float32
                for p in self.parameters]
        zeros = [torch.zeros_like(p, dtype=d, requires_grad=False)
                 for p, d in zip(self.parameters, wide, strict=True)]
        self._first, self._second = zeros, [torch.zeros_like(z) for z in zeros]
        self._remainders = {i: torch.zeros_like(p, dtype=torch.int16, requires_grad=False)
                            for i, p in enumerate(self.parameters) if p.dtype == torch.bfloat16}

    @classmethod
    def from_config(cls, parameters: Iterable[Tensor], config: TrainConfig) -> "AdamW":
        """The optimiser that a trainer's config describes."""
        return cls(parameters, betas=(config.adam_beta1, config.adam_beta2),
                   epsilon=config.adam_epsilon, weight_decay=config.weight_decay)

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for p in self.parameters:
            p.grad = None

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Update every parameter that has a gradient; the others stay as they are."""
        self.num_steps += 1
        active = [i for i, p in enumerate(self.parameters) if p.grad is not None]
        if not active:
            return
        masters = [self._master(i) for i in active]
        gradients = [self.parameters[i].grad.to(m.dtype)  # type: ignore[union-attr]
                     for i, m in zip(active, masters, strict=True)]
        first, second = [self._first[i] for i in active], [self._second[i] for i in active]
        beta1, beta2 = self.betas
        torch._foreach_lerp_(first, gradients, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, gradients, gradients, 1 - beta2)
        scale = torch._foreach_sqrt(second)
        torch._foreach_div_(scale, math.sqrt(1 - beta2**self.num_steps))
        torch._foreach_add_(scale, self.epsilon)
        matrices = [m for m in masters if m.ndim >= 2]
        if self.weight_decay and matrices:
            torch._foreach_mul_(matrices, 1 - learning_rate * self.weight_decay)
        torch._foreach_addcdiv_(masters, first, scale,
                                -learning_rate / (1 - beta1**self.num_steps))
        for i, master in zip(active, masters, strict=True):
            if i in self._remainders:
                weight, remainder = split_master(master)
                self.parameters[i].copy_(weight)
                self._remainders[i].copy_(remainder)

    def _master(self, index: int) -> Tensor:
        """The exact weight: the parameter itself, or its float32 master."""
        parameter = self.parameters[index].detach()
        if index in self._remainders:
            return join_master(parameter, self._remainders[index])
        return parameter

    def state_dict(self) -> dict[str, Tensor]:
        """Step count, moments and bf16 remainders under flat names; the tensors are not copied."""
        state = {"num_steps": torch.tensor(self.num_steps, dtype=torch.int64)}
        for i, (first, second) in enumerate(zip(self._first, self._second, strict=True)):
            state[f"first.{i}"], state[f"second.{i}"] = first, second
        for i, remainder in self._remainders.items():
            state[f"remainder.{i}"] = remainder
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy a `state_dict` of the same model into this optimiser.

        Raises:
            ShapeError: when names or shapes are not those of this optimiser.
        """
        own = self.state_dict()
        _copy_state("AdamW", own, state)
        self.num_steps = int(state["num_steps"])


def _copy_state(owner: str, own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Copy `state` into `own`, name by name."""
    if own.keys() != state.keys():
        difference = sorted(own.keys() ^ state.keys())[:4]
        raise ShapeError(f"{owner}: expected {len(own)} tensors, got {len(state)}; the sets differ "
                         f"in {difference}: load the state of the same model and settings")
    for name, tensor in own.items():
        if tensor.shape != state[name].shape:
            raise ShapeError(f"{owner}: expected {name} of shape {tuple(tensor.shape)}, got "
                             f"{tuple(state[name].shape)}; load the state of the same model")
        tensor.copy_(state[name])


@torch.no_grad()
def clip_grad_norm(parameters: Iterable[Tensor], max_norm: float | None) -> float:
    """Scale all gradients together so that their global L2 norm is at most `max_norm`.

    Args:
        parameters: Tensors whose `.grad` is scaled in place; those without one are skipped.
        max_norm: None never clips.
    Returns:
        The norm before clipping, computed in float32 or wider. NaN or infinity when a gradient has
        one; nothing is scaled then.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return 0.0
    norms = [torch.linalg.vector_norm(g, dtype=g.dtype if g.dtype in _WIDE else torch.float32)
             for g in gradients]
    norm = float(torch.linalg.vector_norm(torch.stack([n.double() for n in norms])))
    if max_norm is not None and max_norm < norm < math.inf:
        torch._foreach_mul_(gradients, max_norm / norm)
    return norm


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """Learning rate of each step: linear warmup, then constant, cosine or linear decay.

    Steps count from 0. With w warmup steps and n steps in all, step 0 uses
    `peak * warmup_start_ratio` (when w > 0), step w uses the peak, and the last step, n - 1, uses
    `peak * min_ratio` (cosine and linear). It has no state: the rate is a function of the step.

    Source: Ouyang et al. 2022 (arXiv 2203.02155), appendix C: cosine to 10%.
    """

    peak: float
    """Highest learning rate."""
    num_steps: int
    """n, steps of the run; later steps keep the last rate."""
    shape: str = "cosine"
    """constant, cosine or linear."""
    min_ratio: float = 0.1
    """Last rate as a share of the peak."""
    warmup_steps: int = 0
    """w, steps before the peak."""
    warmup_start_ratio: float = 0.1
    """First rate of the warmup as a share of the peak."""

    @classmethod
    def from_config(cls, config: TrainConfig, num_steps: int, peak: float | None = None
                    ) -> "Schedule":
        """The schedule a config describes; `peak` replaces its learning rate (critics)."""
        return cls(peak=config.learning_rate if peak is None else peak, num_steps=num_steps,
                   shape=config.lr_schedule, min_ratio=config.min_lr_ratio,
                   warmup_steps=config.warmup_steps,
                   warmup_start_ratio=config.warmup_start_ratio)

    def __post_init__(self) -> None:
        if self.shape not in ("constant", "cosine", "linear"):
            raise ConfigError(f"lr_schedule: expected constant, cosine or linear, got "
                              f"{self.shape!r}; change lr_schedule")

    def __call__(self, step: int) -> float:
        """The learning rate of step `step` (from 0)."""
        if step < self.warmup_steps:
            start = self.warmup_start_ratio
            return self.peak * (start + (1 - start) * step / self.warmup_steps)
        if self.shape == "constant":
            return self.peak
        decay_steps = max(1, self.num_steps - 1 - self.warmup_steps)
        progress = min(1.0, (step - self.warmup_steps) / decay_steps)
        share = 1 - progress if self.shape == "linear" else (1 + math.cos(math.pi * progress)) / 2
        return self.peak * (self.min_ratio + (1 - self.min_ratio) * share)


class EMA:
    """Moving average of weights: `average <- decay * average + (1 - decay) * weight`.

    It starts as a copy of the weights and has no bias correction. Averages are float32 (float64 for
    float64 weights) whatever the weights are.

    Args:
        parameters: The weights to follow.
        decay: Share of the old average kept by an update, in [0, 1).
    Source: Ouyang et al. 2022 (arXiv 2203.02155), appendix C.4: 0.992 per optimiser step.
    """

    def __init__(self, parameters: Iterable[Tensor], decay: float) -> None:
        if not 0 <= decay < 1:
            raise ConfigError(f"ema_decay: expected a number from 0 to below 1, got {decay}; "
                              "change ema_decay")
        self.parameters: Sequence[Tensor] = list(parameters)
        self.decay = decay
        self.averages = [p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True)
                         for p in self.parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Move the averages towards the present weights."""
        for average, p in zip(self.averages, self.parameters, strict=True):
            average.lerp_(p.detach().to(average.dtype), 1 - self.decay)

    @torch.no_grad()
    def copy_to(self) -> None:
        """Put the averages into the weights for good (at the end of training)."""
        for average, p in zip(self.averages, self.parameters, strict=True):
            p.copy_(average)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Inside the block the weights are the averages; afterwards every bit is back."""
        kept = [p.detach().clone() for p in self.parameters]
        self.copy_to()
        try:
            yield
        finally:
            with torch.no_grad():
                for p, weight in zip(self.parameters, kept, strict=True):
                    p.copy_(weight)

    def state_dict(self) -> dict[str, Tensor]:
        """The averages under flat names; the tensors are not copied."""
        return {f"average.{i}": average for i, average in enumerate(self.averages)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy a `state_dict` of the same model into these averages.

        Raises:
            ShapeError: when names or shapes are not those of these averages.
        """
        _copy_state("EMA", self.state_dict(), state)

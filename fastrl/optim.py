"""AdamW with exact float32 masters, gradient clipping, learning-rate schedules and weight averages.

Everything that changes during training is a tensor in `state_dict()`, under a flat name, so that a
checkpoint needs no pickle.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fastrl.checks import check_resident, wide_dtype
from fastrl.config import TrainConfig
from fastrl.errors import ConfigError, ShapeError
from fastrl.ops import grad_norm
from fastrl.ops.adamw import Update, prepare_adamw_step
from fastrl.ops.grad_norm import clip_coefficient
from fastrl.out_of_memory import call_again
from fastrl.state_formats import code_dtype, num_blocks


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
        moments: "float32", or "8bit": a quarter of their memory, see
            `fastrl.state_formats.encode_moment`.
    Raises:
        ConfigError: when no parameter can be trained, or one has a dtype that does not fit.
    Source: Loshchilov and Hutter 2019 (arXiv 1711.05101), algorithm 2.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        epsilon: float = 1e-8,
        weight_decay: float = 0.0,
        moments: str = "float32",
    ) -> None:
        self.parameters = [p for p in parameters if p.requires_grad]
        self.betas, self.epsilon, self.weight_decay = betas, epsilon, weight_decay
        self.moments = moments
        self._check()
        self.num_steps = torch.zeros((), dtype=torch.int64, device=self.parameters[0].device)
        is_8bit = moments == "8bit"
        self._first = [_zeros(p, code_dtype(True) if is_8bit else wide_dtype(p.dtype))
                       for p in self.parameters]
        self._second = [_zeros(p, code_dtype(False) if is_8bit else wide_dtype(p.dtype))
                        for p in self.parameters]
        self._scales = [(_scales(p), _scales(p)) for p in self.parameters] if is_8bit else []
        self._remainders = {i: _zeros(p, torch.int16) for i, p in enumerate(self.parameters)
                            if p.dtype == torch.bfloat16}

    @classmethod
    def from_config(cls, parameters: Iterable[Tensor], config: TrainConfig) -> "AdamW":
        """The optimiser that a trainer's config describes."""
        return cls(parameters, betas=(config.adam_beta1, config.adam_beta2),
                   epsilon=config.adam_epsilon, weight_decay=config.weight_decay,
                   moments=config.optimizer_moments)

    def _check(self) -> None:
        if self.moments not in ("float32", "8bit"):
            raise ConfigError(f"AdamW: expected moments float32 or 8bit, got {self.moments!r}")
        if not self.parameters:
            raise ConfigError("AdamW: expected parameters to train, got none that requires a "
                              "gradient; unfreeze the model first")
        for p in self.parameters:
            if p.dtype not in (torch.float32, torch.float64, torch.bfloat16):
                raise ConfigError(f"AdamW: expected float32, float64 or bfloat16 weights, got "
                                  f"{p.dtype}; load the model with one of these dtypes")
            if p.dtype == torch.float64 and self.moments == "8bit":
                raise ConfigError("AdamW: expected float32 or bfloat16 weights with 8-bit moments, "
                                  "got float64; set optimizer_moments to float32")

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for p in self.parameters:
            p.grad = None

    @torch.no_grad()
    def step(self, learning_rate: float, scale: Tensor | None = None) -> None:
        """Update every parameter that has a gradient; the others stay as they are.

        Args:
            learning_rate: Of this step.
            scale: Multiplies the gradients on the way, see `clip_scale`; None: 1.
        Raises:
            DeviceMemoryError: when there is no memory for its temporaries, in a second attempt
                neither; nothing has changed then.
        """
        check_resident("AdamW", self._first[0])
        step, updates = call_again(partial(self._prepare, learning_rate, scale), "optimizer step")
        for update in updates:
            update()
        self.num_steps.copy_(step)

    def _prepare(
        self, learning_rate: float, scale: Tensor | None
    ) -> tuple[Tensor, list[Update]]:
        """Takes all memory of a step: its number, and what updates the weights of each dtype."""
        step = self.num_steps + 1
        active = [i for i, p in enumerate(self.parameters) if p.grad is not None]
        updates = []
        for dtype in dict.fromkeys(self.parameters[i].dtype for i in active):
            group = [i for i in active if self.parameters[i].dtype == dtype]
            parameters = [self.parameters[i] for i in group]
            updates.append(prepare_adamw_step(
                parameters, [p.grad for p in parameters],  # type: ignore[misc]
                [self._first[i] for i in group], [self._second[i] for i in group],
                [self._remainders[i] for i in group if i in self._remainders],
                step=step, learning_rate=learning_rate, betas=self.betas,
                epsilon=self.epsilon, weight_decay=self.weight_decay,
                decayed=[p.ndim >= 2 for p in parameters], scale=scale,
                moment_scales=[self._scales[i] for i in group] if self._scales else ()))
        return step, updates

    def state_dict(self) -> dict[str, Tensor]:
        """Step count, moments and bf16 remainders under flat names; the tensors are not copied."""
        state = {"num_steps": self.num_steps}
        for i, (first, second) in enumerate(zip(self._first, self._second, strict=True)):
            state[f"first.{i}"], state[f"second.{i}"] = first, second
        for i, (first, second) in enumerate(self._scales):
            state[f"first_scale.{i}"], state[f"second_scale.{i}"] = first, second
        for i, remainder in self._remainders.items():
            state[f"remainder.{i}"] = remainder
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy a `state_dict` of the same model into this optimiser.

        Raises:
            ConfigError: when the state's moments are of the other kind.
            ShapeError: when names or shapes are not those of this optimiser.
        """
        kind = "8bit" if "first_scale.0" in state else "float32"
        if "first.0" in state and kind != self.moments:
            raise ConfigError(f"AdamW: expected a state with {self.moments} moments, got {kind}; "
                              f"set optimizer_moments to {kind}, or start without this state")
        _copy_state("AdamW", self.state_dict(), state)


def _zeros(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """Contiguous zeros of the parameter's shape on its device."""
    return torch.zeros(parameter.shape, dtype=dtype, device=parameter.device)


def _scales(parameter: Tensor) -> Tensor:
    """The scales of a moment in 8 bits that is 0."""
    return torch.zeros(num_blocks(parameter.numel()), device=parameter.device)


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
def clip_scale(
    parameters: Iterable[Tensor], max_norm: float | None
) -> tuple[float, Tensor | None]:
    """The global L2 norm of the gradients, and the scale that bounds it at `max_norm`.

    Nothing is changed: `AdamW.step` multiplies by the scale while it reads the gradients.

    Args:
        parameters: Tensors whose `.grad` counts; those without one are skipped.
        max_norm: None never clips.
    Returns:
        norm: Of the unscaled gradients; NaN or infinity when a gradient has one.
        scale: Scalar on the device, 1 where nothing is to be clipped or the norm is not finite;
            None without `max_norm` or without gradients.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return 0.0, None
    norm = grad_norm(gradients)
    scale = None if max_norm is None else clip_coefficient(norm, max_norm)
    return float(norm), scale


@torch.no_grad()
def clip_grad_norm(parameters: Iterable[Tensor], max_norm: float | None) -> float:
    """Scale all gradients together so that their global L2 norm is at most `max_norm`.

    For loops that look at the clipped gradients; `clip_scale` saves this pass over them.

    Args:
        parameters: Tensors whose `.grad` is scaled in place; those without one are skipped.
        max_norm: None never clips.
    Returns:
        The norm before clipping, computed in float32 or wider. NaN or infinity when a gradient has
        one; nothing is scaled then.
    """
    parameters = list(parameters)
    norm, scale = clip_scale(parameters, max_norm)
    if scale is not None:
        for p in parameters:
            if p.grad is not None:
                p.grad.mul_(scale)
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
        call_again(self._update, "moving average")

    def _update(self) -> None:
        sizes = dict[torch.dtype, int]()  # of the largest weight of each dtype that is converted
        for average, p in zip(self.averages, self.parameters, strict=True):
            if average.dtype != p.dtype:
                sizes[p.dtype] = max(sizes.get(p.dtype, 0), p.numel())
        scratch = {dtype: torch.empty(size, dtype=torch.promote_types(dtype, torch.float32),
                                      device=self.averages[0].device)
                   for dtype, size in sizes.items()}
        for average, p in zip(self.averages, self.parameters, strict=True):
            weight = p.detach()
            if p.dtype in scratch:
                weight = scratch[p.dtype][:p.numel()].view(p.shape).copy_(weight)
            average.lerp_(weight, 1 - self.decay)

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

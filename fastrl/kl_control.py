"""The coefficient beta of the KL penalty: fixed, or steered towards a target.

Both classes have `kl_coef`, `update(kl, num_episodes)`, `state_dict()` and
`load_state_dict(state)`.
"""

from typing import Literal

from fastrl.errors import ConfigError, NumericsError

MAX_ERROR = 0.2
"""The proportional error is clipped to this on both sides (Ziegler et al. 2019)."""


class FixedKL:
    """A coefficient that stays where it is.

    Args:
        kl_coef: beta, in units of the reward per nat.
    Raises:
        ConfigError: when `kl_coef` is negative.
    """

    def __init__(self, kl_coef: float) -> None:
        if not kl_coef >= 0:
            raise ConfigError(
                f"kl_coef: expected a number of at least 0, got {kl_coef}; change kl_coef"
            )
        self.kl_coef = kl_coef

    def update(self, kl: float, num_episodes: int) -> None:
        """Take note of one iteration; a fixed coefficient does not react."""

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint needs: `kl_coef`."""
        return {"kl_coef": self.kl_coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue from `state_dict()`."""
        self.kl_coef = state["kl_coef"]


class AdaptiveKL(FixedKL):
    """A coefficient that grows while KL is above its target and shrinks while it is below.

        e = clip(KL / target - 1, -0.2, 0.2);  beta <- beta * (1 + e * num_episodes / horizon)

    Args:
        kl_coef: First beta, above 0 (from 0 it could never grow).
        target: KL to hold, nats per response (summed over tokens, mean over responses).
        horizon: Time constant in episodes.
    Raises:
        ConfigError: when one of the three is not above 0.
    Source: Ziegler et al. 2019 (arXiv 1909.08593), section 2.2.
    """

    def __init__(self, kl_coef: float, target: float, horizon: float) -> None:
        super().__init__(kl_coef)
        for name, value in (("kl_coef", kl_coef), ("kl_target", target), ("kl_horizon", horizon)):
            if not value > 0:
                raise ConfigError(
                    f"{name}: the adaptive KL controller expected a number above 0, got {value}; "
                    f"change {name}, or set kl_controller to fixed"
                )
        self.target = target
        self.horizon = horizon

    def update(self, kl: float, num_episodes: int) -> None:
        """Move beta after one iteration.

        Args:
            kl: Measured KL(policy || reference), nats per response.
            num_episodes: Responses of the iteration.
        Raises:
            NumericsError: when `kl` is not finite.
        """
        if not abs(kl) < float("inf"):
            raise NumericsError(
                f"adaptive KL controller: expected a finite KL, got {kl}; the policy or the "
                f"reference gave a NaN or infinite log-probability"
            )
        error = min(max(kl / self.target - 1, -MAX_ERROR), MAX_ERROR)
        self.kl_coef *= 1 + error * num_episodes / self.horizon


def make_kl_controller(
    kind: Literal["fixed", "adaptive"], kl_coef: float, target: float, horizon: float
) -> FixedKL:
    """The controller that a PPOConfig names in `kl_controller`."""
    if kind == "adaptive":
        return AdaptiveKL(kl_coef, target, horizon)
    if kind == "fixed":
        return FixedKL(kl_coef)
    raise ConfigError(f"kl_controller: expected fixed or adaptive, got {kind!r}")

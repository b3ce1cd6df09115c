"""The KL controllers, against literal values of Ziegler et al.'s rule."""

import pytest

from fastrl.errors import ConfigError, NumericsError
from fastrl.kl_control import AdaptiveKL, FixedKL, make_kl_controller


@pytest.mark.parametrize(
    ("kl", "expected"), [(12.0, 0.151536), (6.6, 0.150768), (5.0, 0.14872), (0.0, 0.148464)]
)
def test_adaptive_moves_towards_the_target(kl: float, expected: float) -> None:
    controller = AdaptiveKL(0.15, target=6.0, horizon=10_000)
    controller.update(kl, 512)
    assert controller.kl_coef == pytest.approx(expected, abs=1e-9)


def test_fixed_never_moves() -> None:
    controller = FixedKL(0.15)
    controller.update(100.0, 512)
    assert controller.kl_coef == 0.15


def test_state_dict_continues_where_it_stopped() -> None:
    controller = AdaptiveKL(0.15, target=6.0, horizon=10_000)
    controller.update(12.0, 512)
    other = AdaptiveKL(0.15, target=6.0, horizon=10_000)
    other.load_state_dict(controller.state_dict())
    controller.update(3.0, 64)
    other.update(3.0, 64)
    assert other.kl_coef == controller.kl_coef


def test_factory_follows_the_config() -> None:
    adaptive = make_kl_controller("adaptive", 0.1, 6.0, 100.0)
    adaptive.update(12.0, 10)
    assert adaptive.kl_coef == pytest.approx(0.102)
    fixed = make_kl_controller("fixed", 0.1, 6.0, 100.0)
    fixed.update(12.0, 10)
    assert fixed.kl_coef == 0.1


def test_a_coefficient_that_could_never_grow_is_refused() -> None:
    with pytest.raises(ConfigError, match="kl_coef.*above 0.*fixed"):
        AdaptiveKL(0.0, target=6.0, horizon=10_000)
    with pytest.raises(ConfigError, match="kl_horizon"):
        AdaptiveKL(0.1, target=6.0, horizon=0)
    with pytest.raises(ConfigError, match="at least 0"):
        FixedKL(-0.1)
    with pytest.raises(ConfigError, match="fixed or adaptive"):
        make_kl_controller("other", 0.1, 6.0, 100.0)  # type: ignore[arg-type]


def test_nan_kl_is_named() -> None:
    with pytest.raises(NumericsError, match="finite KL, got nan"):
        AdaptiveKL(0.1, target=6.0, horizon=100).update(float("nan"), 8)

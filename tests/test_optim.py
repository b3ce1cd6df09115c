"""AdamW against torch's, exact bf16 masters, clipping, schedules and weight averages."""

import math

import pytest
import torch

from fastrl.config import SFTConfig
from fastrl.errors import ConfigError, ShapeError
from fastrl.optim import EMA, AdamW, Schedule, clip_grad_norm, clip_scale

BETAS = (0.9, 0.95)


def make_weights(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(7, 5), (5,), (3, 2, 4), ()]
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]


def set_gradients(weights, step):
    generator = torch.Generator().manual_seed(1000 + step)
    for w in weights:
        w.grad = torch.randn(w.shape, generator=generator).to(w.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_equals_torch_over_100_steps(dtype, weight_decay):
    ours, theirs = make_weights(dtype), make_weights(dtype)
    optimizer = AdamW(ours, betas=BETAS, epsilon=1e-8, weight_decay=weight_decay)
    groups = [{"params": [w for w in theirs if w.ndim >= 2], "weight_decay": weight_decay},
              {"params": [w for w in theirs if w.ndim < 2], "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=1e-2, betas=BETAS, eps=1e-8)
    for step in range(100):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        optimizer.step(1e-2)
        reference.step()
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() < 1e-6


def test_weight_decay_of_matrices_only():
    weights = make_weights()
    before = [w.detach().clone() for w in weights]
    for w in weights:
        w.grad = torch.zeros_like(w)
    AdamW(weights, weight_decay=0.5).step(0.1)
    torch.testing.assert_close(weights[0].detach(), before[0] * 0.95)
    assert torch.equal(weights[1], before[1]) and torch.equal(weights[3], before[3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_8bit_moments_train_to_the_same_loss(dtype):
    """A small regression: the loss falls 80-fold, and 8 bits end within 1% of 32."""
    def train(moments):
        generator = torch.Generator().manual_seed(0)

        def random(*shape):
            return torch.randn(*shape, generator=generator)

        inputs, teacher = random(512, 16), (random(16, 64) / 4, random(64, 4) / 8)
        targets = (inputs @ teacher[0]).tanh() @ teacher[1]
        weights = [torch.nn.Parameter(w.to(dtype)) for w in (random(16, 96) / 4, random(96, 4) / 10,
                                                            torch.zeros(96))]

        def loss_of(rows):
            hidden = (inputs[rows].to(dtype) @ weights[0] + weights[2]).tanh()
            return ((hidden @ weights[1]).float() - targets[rows]).square().mean()

        optimizer, first = AdamW(weights, betas=BETAS, moments=moments), loss_of(slice(None))
        for step in range(600):
            optimizer.zero_grad()
            loss_of(torch.randint(512, (64,), generator=generator)).backward()
            optimizer.step(3e-3 * (1 - step / 600))
        return first.item(), loss_of(slice(None)).item()

    (first, wide), (_, narrow) = train("float32"), train("8bit")
    assert wide < first / 80
    assert narrow == pytest.approx(wide, rel=0.01)


@pytest.mark.parametrize("dtype, moments, expected", [
    (torch.float32, "float32", 8), (torch.bfloat16, "float32", 10),
    (torch.float32, "8bit", 2), (torch.bfloat16, "8bit", 4)])
def test_bytes_of_the_state(dtype, moments, expected):
    weight = torch.nn.Parameter(torch.zeros(64, 256, dtype=dtype))
    state = AdamW([weight], moments=moments).state_dict()
    num_bytes = sum(t.numel() * t.element_size() for t in state.values())
    # 8-bit: two float32 scales for 256 values besides; the step count takes 8 bytes.
    scales = 8 * 64 if moments == "8bit" else 0
    assert num_bytes == expected * weight.numel() + scales + 8


def test_frozen_and_gradient_free_parameters_stay():
    weights = make_weights()
    weights[1].requires_grad_(False)
    before = [w.detach().clone() for w in weights]
    optimizer = AdamW(weights)
    weights[0].grad = torch.ones_like(weights[0])
    optimizer.step(0.1)
    assert len(optimizer.parameters) == 3
    assert not torch.equal(weights[0], before[0])
    assert all(torch.equal(w, b) for w, b in zip(weights[1:], before[1:], strict=True))
    optimizer.zero_grad()
    assert weights[0].grad is None


@pytest.mark.parametrize("moments", ["float32", "8bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adamw_state_continues_bit_for_bit(dtype, moments):
    straight, resumed = make_weights(dtype), make_weights(dtype)
    first, second = AdamW(straight, moments=moments), AdamW(resumed, moments=moments)
    for step in range(6):
        set_gradients(straight, step)
        first.step(1e-2)
        if step == 2:
            second.load_state_dict({k: v.clone() for k, v in first.state_dict().items()})
            for a, b in zip(resumed, straight, strict=True):
                a.data.copy_(b.data)
        if step > 2:
            set_gradients(resumed, step)
            second.step(1e-2)
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))
    assert all(isinstance(v, torch.Tensor) for v in first.state_dict().values())


def test_adamw_refuses_foreign_state_dtypes_and_nothing():
    optimizer = AdamW(make_weights())
    state = optimizer.state_dict()
    with pytest.raises(ShapeError, match="the sets differ in"):
        optimizer.load_state_dict({k: v for k, v in state.items() if k != "first.0"})
    with pytest.raises(ShapeError, match="expected first.0 of shape"):
        optimizer.load_state_dict({**state, "first.0": torch.zeros(2)})
    with pytest.raises(ConfigError, match="expected float32, float64 or bfloat16"):
        AdamW([torch.nn.Parameter(torch.zeros(2, dtype=torch.float16))])
    with pytest.raises(ConfigError, match="requires a gradient"):
        AdamW([torch.zeros(2)])
    with pytest.raises(ConfigError, match="moments float32 or 8bit, got 'fp8'"):
        AdamW(make_weights(), moments="fp8")
    with pytest.raises(ConfigError, match="with 8-bit moments, got float64; set optimizer_moments"):
        AdamW(make_weights(torch.float64), moments="8bit")


@pytest.mark.parametrize("own, other", [("float32", "8bit"), ("8bit", "float32")])
def test_a_state_of_the_other_kind_is_refused(own, other):
    state = AdamW(make_weights(), moments=other).state_dict()
    with pytest.raises(ConfigError, match=f"a state with {own} moments, got {other}; set "
                                          f"optimizer_moments to {other}"):
        AdamW(make_weights(), moments=own).load_state_dict(state)


def test_weights_of_several_dtypes_and_a_step_count_on_the_device():
    weights = [torch.nn.Parameter(torch.ones(3).to(d))
               for d in (torch.float32, torch.bfloat16, torch.float64)]
    optimizer = AdamW(weights)
    for w in weights:
        w.grad = torch.ones_like(w)
    optimizer.step(0.5)
    assert all(w.tolist() == pytest.approx([0.5] * 3, rel=1e-6) for w in weights)
    assert optimizer.num_steps.dtype == torch.int64 and optimizer.num_steps.item() == 1


def test_from_config_takes_the_moments():
    config = SFTConfig(optimizer_moments="8bit")
    assert AdamW.from_config(make_weights(), config).moments == "8bit"
    assert AdamW.from_config(make_weights(), SFTConfig()).moments == "float32"


def test_clip_scale_changes_nothing_and_equals_clipping_in_place():
    ours, theirs = make_weights(), make_weights()
    set_gradients(ours, 0)
    set_gradients(theirs, 0)
    norm, scale = clip_scale(ours, 1.0)
    assert norm == clip_grad_norm(theirs, 1.0) > 1
    set_gradients(weights := make_weights(), 0)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(ours, weights, strict=True))
    AdamW(ours).step(0.1, scale)
    AdamW(theirs).step(0.1)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert clip_scale(ours, None)[1] is None and clip_scale([torch.zeros(1)], 1.0) == (0.0, None)


def test_clip_grad_norm():
    weights = [torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(1))]
    weights[0].grad, weights[1].grad = torch.tensor([3.0, 0.0]), torch.tensor([4.0])
    assert clip_grad_norm(weights, None) == 5.0
    assert weights[1].grad.item() == 4.0
    assert clip_grad_norm(weights, 10.0) == 5.0
    assert weights[1].grad.item() == 4.0
    assert clip_grad_norm(weights, 1.0) == 5.0
    torch.testing.assert_close(weights[0].grad, torch.tensor([0.6, 0.0]))
    torch.testing.assert_close(weights[1].grad, torch.tensor([0.8]))
    weights[1].grad = torch.tensor([float("nan")])
    assert math.isnan(clip_grad_norm(weights, 1.0))
    assert weights[0].grad[0].item() == pytest.approx(0.6)
    assert clip_grad_norm([torch.zeros(1)], 1.0) == 0.0


def test_clip_grad_norm_is_wide_for_bf16():
    weight = torch.nn.Parameter(torch.zeros(100_000, dtype=torch.bfloat16))
    weight.grad = torch.ones_like(weight)
    assert clip_grad_norm([weight], None) == pytest.approx(316.227766, rel=1e-6)


def test_cosine_golden_values():
    # Spec, section 13: cosine to 10% at 25, 50 and 75% of the run; step 100 of 101 is the last.
    schedule = Schedule(peak=1.0, num_steps=101, shape="cosine", min_ratio=0.1)
    values = [schedule(s) for s in (0, 25, 50, 75, 100, 500)]
    assert values == pytest.approx([1.0, 0.868198, 0.55, 0.231802, 0.1, 0.1], abs=1e-6)


def test_linear_and_constant():
    linear = Schedule(peak=2.0, num_steps=11, shape="linear", min_ratio=0.5)
    assert [linear(s) for s in (0, 5, 10)] == pytest.approx([2.0, 1.5, 1.0])
    constant = Schedule(peak=2.0, num_steps=11, shape="constant", min_ratio=0.5)
    assert [constant(s) for s in (0, 5, 10)] == [2.0, 2.0, 2.0]


def test_warmup_from_a_tenth_then_decay_to_the_last_step():
    schedule = Schedule(peak=1.0, num_steps=111, shape="cosine", min_ratio=0.1, warmup_steps=10,
                        warmup_start_ratio=0.1)
    values = [schedule(s) for s in (0, 5, 10, 60, 110)]
    assert values == pytest.approx([0.1, 0.55, 1.0, 0.55, 0.1])


def test_schedule_edges_and_errors():
    assert Schedule(peak=1.0, num_steps=1)(0) == 1.0
    config = SFTConfig(learning_rate=3e-4, lr_schedule="linear", warmup_steps=2)
    schedule = Schedule.from_config(config, 9)
    assert (schedule.peak, schedule.shape, schedule.warmup_steps) == (3e-4, "linear", 2)
    assert Schedule.from_config(config, 9, peak=0.5).peak == 0.5
    with pytest.raises(ConfigError, match="constant, cosine or linear"):
        Schedule(peak=1.0, num_steps=1, shape="step")


def test_ema_literal_values():
    weight = torch.nn.Parameter(torch.tensor([1.0]))
    ema = EMA([weight], 0.75)
    weight.data.fill_(3.0)
    ema.update()
    assert ema.averages[0].item() == 1.5
    ema.update()
    assert ema.averages[0].item() == 1.875


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_ema_swap_restores_bits_even_after_an_error(dtype):
    weights = make_weights(dtype)
    ema = EMA(weights, 0.9)
    set_gradients(weights, 0)
    AdamW(weights).step(0.1)
    ema.update()
    before = [w.detach().clone() for w in weights]
    with pytest.raises(ZeroDivisionError), ema.swapped():
        assert torch.equal(weights[0], ema.averages[0].to(dtype))
        assert not torch.equal(weights[0], before[0])
        raise ZeroDivisionError
    assert all(torch.equal(w, b) for w, b in zip(weights, before, strict=True))
    ema.copy_to()
    assert torch.equal(weights[0], ema.averages[0].to(dtype))


def test_ema_state_and_errors():
    weights = make_weights()
    ema, other = EMA(weights, 0.9), EMA(make_weights(seed=1), 0.9)
    other.load_state_dict(ema.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ema.averages, other.averages, strict=True))
    with pytest.raises(ShapeError, match="EMA"):
        other.load_state_dict({})
    with pytest.raises(ConfigError, match="ema_decay"):
        EMA(weights, 1.0)

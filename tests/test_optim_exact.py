"""bf16 weights with remainders are the float32 weights, over 1,000 steps and a checkpoint."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastrl.optim import AdamW
from fastrl.state_formats import join_master

SHAPES = ((7, 5), (13,), (3, 1, 2), (), (257,))
SETTINGS = {"betas": (0.9, 0.95), "epsilon": 1e-8, "weight_decay": 0.1}
NUM_STEPS = 1000


def start() -> list[torch.Tensor]:
    """bf16 weights: normal, subnormal, large, zeros of both signs."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=generator) for shape in SHAPES]
    weights[1][:6] = torch.tensor([1e-40, -3e-39, 0.0, -0.0, 1e30, -2e20])
    return [weight.bfloat16() for weight in weights]


def gradients(step: int) -> list[torch.Tensor]:
    """bf16 gradients over forty orders of magnitude; now and then none, all zero or huge."""
    generator = torch.Generator().manual_seed(1000 + step)
    result = []
    for i, shape in enumerate(SHAPES):
        powers = torch.randint(-6, 3, shape, generator=generator).float()
        gradient = torch.randn(shape, generator=generator) * 10.0 ** powers
        if (step + i) % 50 == 7:
            gradient = gradient * 1e15
        elif (step + i) % 50 == 21:
            gradient = gradient * 1e-37  # subnormal, most of them
        elif (step + i) % 50 == 33:
            gradient = gradient * 0.0
        result.append(gradient.bfloat16())
    return result


def trained(weights: Sequence[torch.Tensor]) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(weight.clone()) for weight in weights]


def set_gradients(weights: Sequence[torch.Tensor], step: int, *, skips: bool = True) -> None:
    for i, (weight, gradient) in enumerate(zip(weights, gradients(step), strict=True)):
        weight.grad = None if skips and (step + i) % 50 == 49 else gradient.to(weight.dtype)


def masters(weights: Sequence[torch.Tensor], optimizer: AdamW) -> list[torch.Tensor]:
    state = optimizer.state_dict()
    return [join_master(weight.detach(), state[f"remainder.{i}"])
            for i, weight in enumerate(weights)]


def bits(tensors: Sequence[torch.Tensor]) -> list[list[int]]:
    return [tensor.detach().view(torch.int32).flatten().tolist() for tensor in tensors]


@pytest.mark.parametrize(("moments", "num_steps"), [("float32", NUM_STEPS), ("8bit", 200)])
def test_remainders_make_float32_bit_for_bit(
    tmp_path: Path, moments: str, num_steps: int
) -> None:
    wide = trained([weight.float() for weight in start()])
    narrow = trained(start())
    wide_optimizer = AdamW(wide, moments=moments, **SETTINGS)
    optimizer = AdamW(narrow, moments=moments, **SETTINGS)
    num_different = 0
    for step in range(num_steps):
        set_gradients(wide, step)
        set_gradients(narrow, step)
        scale = torch.tensor(0.37) if step % 3 == 0 else None  # clipped
        learning_rate = 1e-3 * (1 + step % 5)
        wide_optimizer.step(learning_rate, scale)
        optimizer.step(learning_rate, scale)
        if step % 100 == 0 or step == num_steps - 1:
            assert bits(masters(narrow, optimizer)) == bits(wide), f"step {step}"
        num_different += sum(int((a.detach().float() != b.detach()).sum())
                             for a, b in zip(narrow, wide, strict=True))
        if step == num_steps // 2:
            path = tmp_path / "state.safetensors"
            save_file({**optimizer.state_dict(),
                       **{f"weight.{i}": w.detach() for i, w in enumerate(narrow)}}, path)
            saved = load_file(path)
            narrow = trained([saved.pop(f"weight.{i}") for i in range(len(SHAPES))])
            optimizer = AdamW(narrow, moments=moments, **SETTINGS)
            optimizer.load_state_dict(saved)
    assert all(weight.isfinite().all() for weight in wide)
    assert num_different > 100 * num_steps  # bf16 alone would be far away
    first, second = wide_optimizer.state_dict(), optimizer.state_dict()
    assert first.keys() == {name for name in second if not name.startswith("remainder")}
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_it_is_torchs_adamw_to_1e_6_over_1000_steps() -> None:
    """With a gradient at every step: where one is absent torch counts steps by tensor, not ours."""
    narrow, theirs = trained(start()), trained([weight.float() for weight in start()])
    optimizer = AdamW(narrow, **SETTINGS)
    groups = [{"params": [weight], "weight_decay": 0.1 if weight.ndim >= 2 else 0.0}
              for weight in theirs]
    reference = torch.optim.AdamW(groups, betas=SETTINGS["betas"], eps=SETTINGS["epsilon"])
    for step in range(NUM_STEPS):
        set_gradients(narrow, step, skips=False)
        set_gradients(theirs, step, skips=False)
        for group in reference.param_groups:
            group["lr"] = 1e-3 * (1 + step % 5)
        optimizer.step(1e-3 * (1 + step % 5))
        reference.step()
    for ours, weight in zip(masters(narrow, optimizer), theirs, strict=True):
        error = (ours - weight.detach()).abs().max()
        assert error <= 1e-6 * max(1.0, float(weight.detach().abs().max()))

"""ranking_loss' Triton kernel against the float64 reference; run by test_triton.py."""

from dataclasses import fields

import pytest
import torch

from fastrl.errors import BackendUnavailableError
from fastrl.ops import ranking_loss
from fastrl.ops.ranking_loss import ranking_loss_reference

# An empty group, a single completion, every K to 16, one more than a tile, three tiles, a pair.
SIZES = torch.tensor([*range(18), 33, 2])


@pytest.mark.parametrize("ties", ["kept_pairs", "all_pairs"])
@pytest.mark.parametrize("denominator", [None, 7.0])
@pytest.mark.parametrize("spread", [1.0, 60.0])
def test_loss_gradient_and_statistics(ties: str, denominator: float | None, spread: float) -> None:
    cu_groups = torch.cat([torch.zeros(1, dtype=torch.int64), SIZES.cumsum(0)])
    R = int(SIZES.sum())
    base = spread * torch.randn(2 * R)
    base[4] = base[6]
    ranks = torch.randint(0, 5, (R, 2))[:, 0]
    ranks[-2:] = 3  # a prompt where nothing is compared
    ours, plain = base.clone().requires_grad_(), base.clone().requires_grad_()
    wide = base.double().requires_grad_()
    settings = {"ties": ties, "denominator": denominator}
    loss, stats = ranking_loss(ours[::2], ranks, cu_groups, backend="triton", **settings)
    torch_loss, _ = ranking_loss_reference(plain[::2], ranks, cu_groups, **settings)
    truth, expected = ranking_loss_reference(wide[::2], ranks, cu_groups, **settings)
    for result in (loss, torch_loss, truth):
        (3 * result).backward()
    assert loss.dtype == torch.float32
    floor = 1e-6 * (1 + truth.abs())
    assert (loss - truth).abs() <= 2 * (torch_loss - truth).abs() + floor
    error, torch_error = ((x.grad - wide.grad).abs().max() for x in (ours, plain))
    assert error <= 2 * torch_error + 1e-6
    for field in fields(expected):
        torch.testing.assert_close(getattr(stats, field.name), getattr(expected, field.name),
                                   rtol=1e-5, atol=1e-4)


def test_all_groups_in_one_launch(launches: list[str]) -> None:
    scores = torch.randn(40, requires_grad=True)
    loss, _ = ranking_loss(scores, torch.arange(40), torch.tensor([0, 2, 5, 21, 40]),
                           backend="triton")
    loss.backward()
    assert launches == ["_ranking_loss_fwd_kernel"]


def test_nothing_compared() -> None:
    scores = torch.randn(3, requires_grad=True)
    loss, stats = ranking_loss(scores, torch.zeros(3, dtype=torch.int64), torch.tensor([0, 3]),
                               backend="triton")
    loss.backward()
    assert loss.item() == 0.0 and stats.prompts.item() == 0.0
    assert scores.grad is not None and (scores.grad == 0).all()


def test_registered_op() -> None:
    ranks, cu_groups = torch.tensor([0, 1, 2, 0, 0]), torch.tensor([0, 3, 5])
    for denominator in (None, 4.0):
        torch.library.opcheck(torch.ops.fastrl_kernels.ranking_loss,
                              (torch.randn(5).half(), ranks, cu_groups, True, denominator))


def test_compiles_to_one_graph() -> None:
    ranks, cu_groups = torch.tensor([0, 1, 2, 0, 1]), torch.tensor([0, 3, 5])
    scores, results = torch.randn(5), []
    for function in (ranking_loss, torch.compile(ranking_loss, fullgraph=True,
                                                 backend="aot_eager")):
        leaf = scores.clone().requires_grad_()
        loss, stats = function(leaf, ranks, cu_groups, backend="triton")
        (3 * loss).backward()
        results.append([loss, leaf.grad, stats.margin])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_float64_is_refused() -> None:
    with pytest.raises(BackendUnavailableError, match="it computes in float32"):
        ranking_loss(torch.randn(2, dtype=torch.float64), torch.arange(2), torch.tensor([0, 2]),
                     backend="triton")

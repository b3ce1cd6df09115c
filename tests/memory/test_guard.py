"""Parked tensors refuse every use of their content, which would end the process."""

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastrl.errors import ConfigError
from fastrl.memory.parking import ParkingPlace
from fastrl.memory.residents import Residents, tensors_of

CPU = torch.device("cpu")

READERS: dict[str, Callable[[Tensor], Any]] = {
    "print": str, "sum": torch.sum, "method": lambda t: t.mean(), "number": float,
    "list": lambda t: t.tolist(), "numpy": lambda t: t.detach().numpy(), "index": lambda t: t[0],
    "data": lambda t: t.data, "detach": lambda t: t.detach(), "clone": lambda t: t.clone(),
    "address": lambda t: t.data_ptr(), "operator": lambda t: t + 1, "reverse": lambda t: 1 - t,
    "argument": lambda t: torch.ones(3, 3).copy_(t), "in a list": lambda t: torch.stack([t]),
    "many": lambda t: torch._foreach_norm([t]), "write": lambda t: t.zero_(),
    "keyword": lambda t: F.linear(torch.ones(3), weight=t), "item": lambda t: t.view(-1)[0].item(),
    "assignment": lambda t: t.__setitem__(0, 1), "move": lambda t: t.to(torch.float64),
    "deepcopy": copy.deepcopy, "pickle": pickle.dumps,
    "save": lambda t: torch.save({"t": t}, io.BytesIO()),
    "loop": list, "operation": lambda t: torch.ops.aten.sum(t)}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("kind", [nn.Parameter, Tensor])
def test_reading_a_parked_tensor_names_its_group_and_phases(
    name: str, kind: type[Tensor], tmp_path: Path
) -> None:
    values = torch.arange(9.0).view(3, 3)
    tensor = nn.Parameter(values.clone(), requires_grad=False) if kind is nn.Parameter else (
        values.clone())
    place = ParkingPlace("critic", CPU, tmp_path, phases=("scoring", "critic_update"))
    place.park([tensor, tensor])
    with pytest.raises(ConfigError, match=r"critic: .* outside of scoring, critic_update; .*"
                                          r"phase\('scoring'\)"):
        READERS[name](tensor)
    place.fetch()
    assert type(tensor) is kind and torch.equal(tensor, values)


def test_shapes_types_and_gradients_of_parked_tensors_can_be_asked_for(tmp_path: Path) -> None:
    layer = nn.Linear(3, 2)
    layer.weight.grad = torch.ones(2, 3)
    place = ParkingPlace("policy", CPU, tmp_path)
    place.park(tensors_of(layer))
    weight = layer.weight
    assert isinstance(weight, nn.Parameter) and weight.shape == weight.size() == (2, 3)
    assert (weight.dtype, weight.device, weight.ndim) == (torch.float32, CPU, 2)
    assert (weight.numel(), weight.nbytes, weight.requires_grad) == (6, 24, True)
    assert sum(p.numel() for p in layer.parameters()) == 8 and {weight}
    assert torch.equal(weight.grad, torch.ones(2, 3))
    assert type(torch.zeros_like(weight)) is Tensor and not torch.zeros_like(weight).any()
    assert torch.empty_like(weight, device="meta").shape == (2, 3)
    weight.grad = None
    layer.requires_grad_(False)
    with pytest.raises(ConfigError, match="policy: expected it in memory"):
        layer(torch.ones(3))
    place.fetch()
    assert not weight.requires_grad and weight.grad is None
    assert layer(torch.ones(3)).shape == (2,)


def test_a_group_names_the_phases_that_need_it(tmp_path: Path) -> None:
    reference, shared = torch.ones(5), torch.ones(7)
    residents = Residents(
        {"reference": lambda: [reference], "critic": lambda: [shared],
         "reward_model": lambda: [shared]}, {"reference", "critic", "reward_model"}, CPU,
        folder=tmp_path)
    with residents.phase("rollout"):
        with pytest.raises(ConfigError, match="reference: .* outside of scoring, evaluation;"):
            print(reference)
        with pytest.raises(ConfigError, match="critic and reward_model: .* outside of scoring, "
                                              "critic_update, evaluation;"):
            shared.sum()
    residents.fetch_all()
    assert float(reference.sum() + shared.sum()) == 12

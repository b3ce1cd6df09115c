"""Parked tensors that come back to the addresses that they had."""

import gc
import os
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

from fastrl.checks import check_resident
from fastrl.errors import ConfigError
from fastrl.memory import parking
from fastrl.memory.arena import Arena, arena_of, gpu_peak_bytes, mapped_bytes
from fastrl.memory.parking import ParkingPlace
from fastrl.memory.residents import Residents, tensors_of
from fastrl.optim import AdamW

CPU = torch.device("cpu")
MIB = 2**20


def resident_bytes() -> int:
    """Of this process, in memory now."""
    path = Path("/proc/self/statm")
    if not path.exists():
        pytest.skip("needs /proc")
    return int(path.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(autouse=True)
def no_arenas_of_other_tests() -> None:
    """Caches of engines that wait for the garbage collector have memory until it comes."""
    gc.collect()


@pytest.fixture
def place(tmp_path: Path) -> ParkingPlace:
    return ParkingPlace("policy", CPU, tmp_path, keeps_addresses=True)


def addresses(tensors: list[torch.Tensor]) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


@pytest.mark.parametrize("ahead", [False, True])
def test_every_bit_comes_back_to_its_address(place: ParkingPlace, ahead: bool) -> None:
    payload = torch.tensor([0x7FC00001, 0x7F800123, 1], dtype=torch.int32).view(torch.float32)
    whole = torch.randn(40, 3)
    tensors = [payload, torch.randn(7, 5).bfloat16(), torch.tensor(3), torch.zeros(0),
               torch.tensor([True, False]), whole, whole[4:9, 1:], whole.t()]
    seen = []
    for _ in range(3):
        before = [tensor.clone() for tensor in tensors]
        place.park(tensors)
        assert place.is_parked and place.num_bytes == 12 + 70 + 8 + 2 + 480
        assert all(tensor.untyped_storage().nbytes() == 0 for tensor in tensors)
        assert [tensor.shape for tensor in tensors] == [value.shape for value in before]
        with ThreadPoolExecutor(1) as pool:
            if ahead:
                place.start_fetch(pool)
            place.fetch()
        assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(
            (t.contiguous().view(-1) for t in tensors), (t.contiguous().view(-1) for t in before),
            strict=True))
        seen.append(addresses(tensors))
        assert not any(t.data_ptr() % t.element_size() for t in tensors)
        whole.add_(1)  # what changes in between is not what the file had
        assert torch.equal(tensors[6], whole[4:9, 1:]) and torch.equal(tensors[7], whole.t())
    assert seen[0] == seen[1] == seen[2]
    assert arena_of(whole.untyped_storage()) is not None


def test_parameters_ties_gradients_and_the_optimiser_stay(place: ParkingPlace) -> None:
    embedding, head = nn.Embedding(11, 4), nn.Linear(4, 11, bias=False)
    head.weight = embedding.weight
    embedding.weight.grad = torch.ones_like(embedding.weight)
    optimizer = AdamW(embedding.parameters())
    for _ in range(2):
        expected = embedding.weight.detach().clone()
        place.park(tensors_of(embedding))
        assert torch.equal(embedding.weight.grad, torch.ones(11, 4))
        with pytest.raises(ConfigError, match="engine: expected weights in memory, got parked"):
            check_resident("engine", head.weight)
        place.fetch()
        check_resident("engine", head.weight)
        assert head.weight is embedding.weight and torch.equal(embedding.weight, expected)
        optimizer.step(0.1)
        assert not torch.equal(embedding.weight, expected)
        head(torch.ones(2, 4)).sum().backward()
        embedding.weight.grad.fill_(1)


def test_memory_is_given_back_and_taken_again(place: ParkingPlace) -> None:
    tensors = [torch.randn(MIB) for _ in range(16)]
    total, mapped = 64 * MIB, mapped_bytes(CPU)
    place.park(tensors)
    place.fetch()
    with_them = resident_bytes()
    assert mapped_bytes(CPU) - mapped == total
    for _ in range(2):
        place.park(tensors)
        assert with_them - resident_bytes() > 0.8 * total and mapped_bytes(CPU) == mapped
        place.fetch()
        assert abs(resident_bytes() - with_them) < 0.5 * total


def test_the_arena_goes_with_the_last_tensor_and_no_earlier(place: ParkingPlace) -> None:
    weight = nn.Parameter(torch.randn(1000))
    expected = weight.detach().clone()
    place.park([weight])
    place.fetch()
    view, arena = weight.detach()[10:], weakref.ref(arena_of(weight.untyped_storage()))
    del place, weight
    gc.collect()
    assert arena() is not None and torch.equal(view, expected[10:])
    del view
    gc.collect()
    assert arena() is None


def test_another_place_takes_an_arena_over(place: ParkingPlace, tmp_path: Path) -> None:
    """As a second trainer of the same policy does, or one whose frozen reference it has become."""
    tensors = [torch.randn(1000), torch.randn(5)]
    expected = [tensor.clone() for tensor in tensors]
    place.park(tensors)
    place.fetch()
    where, mapped = addresses(tensors), mapped_bytes(CPU)
    for keeps_addresses in (True, False):
        second = ParkingPlace("again", CPU, tmp_path, keeps_addresses=keeps_addresses)
        second.park(tensors)
        assert mapped_bytes(CPU) < mapped
        second.fetch()
        assert addresses(tensors) == where and mapped_bytes(CPU) == mapped
        assert all(map(torch.equal, tensors, expected))


def test_part_of_an_arena_leaves_the_rest_where_it_is(place: ParkingPlace, tmp_path: Path) -> None:
    tensors = [torch.randn(1000), torch.randn(5)]
    expected = [tensor.clone() for tensor in tensors]
    place.park(tensors)
    place.fetch()
    second, where = ParkingPlace("part", CPU, tmp_path), tensors[1].data_ptr()
    second.park(tensors[:1])
    assert torch.equal(tensors[1], expected[1])
    second.fetch()
    assert all(map(torch.equal, tensors, expected)) and tensors[1].data_ptr() == where
    place.park(tensors)
    place.fetch()
    assert all(map(torch.equal, tensors, expected))


def test_without_memory_they_stay_parked(
    place: ParkingPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensor = torch.randn(1000)
    expected = tensor.clone()
    place.park([tensor])
    place.fetch()
    where, real = tensor.data_ptr(), Arena.map

    def refuse(arena: Arena, num_bytes: int | None = None) -> None:
        raise torch.OutOfMemoryError("no memory")

    place.park([tensor])
    monkeypatch.setattr(Arena, "map", refuse)
    with pytest.raises(torch.OutOfMemoryError, match="no memory"):
        place.fetch()
    assert place.is_parked and tensor.untyped_storage().nbytes() == 0
    monkeypatch.setattr(Arena, "map", real)
    place.fetch()
    assert torch.equal(tensor, expected) and tensor.data_ptr() == where


def test_a_device_without_virtual_memory_has_the_same_interface(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parking, "can_keep_addresses", lambda device: False)
    place, tensor = ParkingPlace("policy", CPU, tmp_path, keeps_addresses=True), torch.randn(1000)
    expected = tensor.clone()
    for _ in range(2):
        place.park([tensor])
        assert tensor.untyped_storage().nbytes() == 0
        place.fetch()
        assert torch.equal(tensor, expected) and arena_of(tensor.untyped_storage()) is None


def iterate(residents: Residents) -> Iterator[str]:
    for phase in ("critic_update", "rollout", "critic_update", "rollout"):
        with residents.phase(phase):
            yield phase


def test_the_policy_comes_back_to_its_addresses_and_others_anywhere() -> None:
    policy, critic, trunk = nn.Linear(50, 60), nn.Linear(50, 60), torch.randn(80)
    view = trunk[70:]
    residents = Residents(
        {"policy": lambda: [*tensors_of(policy), view, trunk],
         "critic": lambda: tensors_of(critic)}, {"policy", "critic"}, CPU)
    expected = [tensor.detach().clone() for tensor in (*policy.parameters(), trunk)]
    seen = []
    for phase in iterate(residents):
        if phase == "critic_update":
            assert residents.parked == {"policy"}
            continue
        seen.append(addresses([*policy.parameters(), trunk]))
        assert all(map(torch.equal, (*policy.parameters(), trunk), expected))
    residents.fetch_all()
    assert seen[0] == seen[1] and torch.equal(view, expected[-1][70:])
    arena = arena_of(trunk.untyped_storage())
    assert arena is not None and arena_of(policy.weight.untyped_storage()) is arena
    assert arena_of(critic.weight.untyped_storage()) is None


def test_what_arenas_hold_is_part_of_a_gpus_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 1000)
    held, arena = mapped_bytes(CPU), Arena(4096, CPU)
    assert gpu_peak_bytes("cpu") == 1000 + held
    arena.map(1024)
    assert gpu_peak_bytes("cpu") == 1000 + held + 1024
    arena.close()
    assert gpu_peak_bytes("cpu") == 1000 + held


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    device = torch.device("cuda")
    tensors = [torch.randn(64 * MIB, device=device), torch.randn(1000, device=device).bfloat16()]
    expected, place = [t.cpu() for t in tensors], ParkingPlace("policy", device,
                                                             keeps_addresses=True)
    if not place._keeps_addresses:
        pytest.skip("needs the extension and virtual memory management")
    place.park(tensors)
    free = torch.cuda.mem_get_info()[0]
    place.fetch()
    where = addresses(tensors)
    for _ in range(2):
        place.park(tensors)
        assert torch.cuda.mem_get_info()[0] >= free - 16 * MIB
        place.fetch()
        assert addresses(tensors) == where
        assert all(torch.equal(t.cpu(), value) for t, value in zip(tensors, expected, strict=True))

"""Residents: phases bring and park, shared tensors, fetching ahead within the room there is."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastrl.errors import ConfigError
from fastrl.memory.parking import ParkingPlace
from fastrl.memory.residents import Residents

CPU = torch.device("cpu")


@pytest.fixture
def tensors() -> dict[str, list[torch.Tensor]]:
    return {name: [torch.full((1000,), float(number))] for number, name in enumerate(
        ("policy", "reference", "critic", "reward_model"))}


def residents_of(tensors: dict[str, list[torch.Tensor]], parks: set[str],
                 **settings: object) -> Residents:
    return Residents({name: (lambda name=name: tensors[name]) for name in tensors},
                     frozenset(parks), CPU, **settings)


def test_only_what_may_move_moves(tensors: dict[str, list[torch.Tensor]]) -> None:
    residents = residents_of(tensors, {"reference", "critic"})
    with residents.phase("rollout"):
        assert residents.parked == {"reference", "critic"}
    with residents.phase("scoring", "reference"):
        assert residents.parked == {"critic"} and tensors["reference"][0].tolist() == [1.0] * 1000
    with residents.phase("scoring"):
        assert residents.parked == frozenset()
    with residents.phase("rollout"):
        pass
    residents.fetch_all()
    assert [t[0][0].item() for t in tensors.values()] == [0, 1, 2, 3]


def test_a_shared_trunk_stays_while_one_of_its_models_is_needed(
    tensors: dict[str, list[torch.Tensor]]
) -> None:
    trunk = torch.full((500,), 7.0)
    tensors["critic"].append(trunk)
    tensors["reward_model"].append(trunk[100:])  # another tensor on the same memory
    residents = residents_of(tensors, {"critic", "reward_model"})
    for phase, part, other in (("scoring", "critic", "reward_model"),
                               ("scoring", "reward_model", "critic")):
        with residents.phase(phase, part):
            assert trunk.tolist() == [7.0] * 500
            assert tensors[other][0].untyped_storage().nbytes() == 0
    with residents.phase("rollout"):
        assert trunk.untyped_storage().nbytes() == 0
    # Where one of its models has to stay, so does the trunk.
    residents.fetch_all()
    residents = residents_of(tensors, {"critic"})
    with residents.phase("rollout"):
        assert trunk.tolist() == [7.0] * 500 and residents.parked == {"critic"}


def test_what_the_next_phase_needs_is_fetched_ahead_where_it_fits(
    tensors: dict[str, list[torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[str] = []
    start_fetch = ParkingPlace.start_fetch

    def note(place: ParkingPlace, *arguments: object) -> None:
        begun.append(place.name)
        start_fetch(place, *arguments)

    monkeypatch.setattr(ParkingPlace, "start_fetch", note)

    def iterate(spare_bytes: dict[str, int]) -> Iterator[list[str]]:
        residents = residents_of(tensors, set(tensors), spare_bytes=spare_bytes)
        for _ in range(3):
            begun.clear()
            for phase, part in (("rollout", "policy"), ("scoring", "reference"),
                                ("scoring", "critic")):
                with residents.phase(phase, part):
                    assert tensors[part][0].tolist() == [float(list(tensors).index(part))] * 1000
            yield list(begun)
        with residents.phase("scoring", "reward_model"):  # not what followed before
            assert residents.parked == {"policy", "reference", "critic"}
        residents.fetch_all()

    # Nothing is known of the first iteration; 4000 bytes are one part.
    assert list(iterate({"rollout": 4000, "scoring": 4000})) == [
        [], ["reference", "critic", "policy"], ["reference", "critic", "policy"]]
    assert list(iterate({"rollout": 3999})) == [[], [], []]
    assert [t[0][0].item() for t in tensors.values()] == [0, 1, 2, 3]


def test_no_room_on_the_host_loses_nothing(
    tensors: dict[str, list[torch.Tensor]], tmp_path: Path
) -> None:
    residents = residents_of(tensors, {"reference", "critic"}, folder=tmp_path / "gone")
    with pytest.raises(ConfigError, match="parking: .*gone, got No such file"), \
            residents.phase("rollout"):
        pass
    (tmp_path / "gone").mkdir()
    with residents.phase("rollout"):
        assert residents.parked == {"reference", "critic"}
    residents.fetch_all()
    assert [t[0][0].item() for t in tensors.values()] == [0, 1, 2, 3]


def test_a_part_can_be_kept_from_now_on(tensors: dict[str, list[torch.Tensor]]) -> None:
    residents = residents_of(tensors, {"reference", "critic"})
    with residents.phase("rollout"):
        residents.keep("critic")
        assert residents.parked == {"reference"} and tensors["critic"][0].tolist() == [2.0] * 1000
    with residents.phase("scoring", "reference"):
        assert residents.parked == frozenset()


def test_names_are_checked(tensors: dict[str, list[torch.Tensor]]) -> None:
    with pytest.raises(ConfigError, match=r"parks: expected names out of .*got \['actor'\]"):
        residents_of(tensors, {"actor"})
    residents = residents_of(tensors, set())
    for arguments in (("generate",), ("rollout", "critic")):
        with pytest.raises(ConfigError, match="phase: expected one of"), \
                residents.phase(*arguments):
            pass

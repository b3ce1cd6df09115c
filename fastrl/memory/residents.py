"""What is in the device's memory in each phase of training; the rest waits on the host."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from fastrl.errors import ConfigError
from fastrl.memory.parking import ParkingPlace
from fastrl.out_of_memory import call_again

NEEDS: dict[str, tuple[str, ...]] = {
    "rollout": ("policy", "kv_cache"),
    "scoring": ("policy", "reference", "critic", "reward_model"),
    "policy_update": ("policy", "policy_gradients", "policy_optimizer", "ema", "activations",
                      "logits"),
    "critic_update": ("critic", "critic_gradients", "critic_optimizer", "activations"),
    "evaluation": ("policy", "ema", "swapped", "kv_cache", "reference", "reward_model"),
}
"""Phase of PPO -> residents that it needs, all or, where it says so, one after the other."""

SWAP = ("policy", "ema", "swapped")
"""Parts of an evaluation that are needed while the average takes the place of the weights."""

PARKABLE = frozenset({"policy", "policy_optimizer", "ema", "swapped", "reference", "critic",
                      "critic_optimizer", "reward_model"})
"""Residents whose content outlives the phases, or parts of them, that need it."""

CONSTANT = frozenset({"reference", "reward_model"})
"""Residents that training never writes: parked again, they need no copy."""

FIXED = frozenset({"policy"})
"""Residents whose addresses captured graphs know: they come back to where they were."""


def tensors_of(model: nn.Module) -> list[Tensor]:
    """Parameters and buffers."""
    return [*model.parameters(), *model.buffers()]


ListTensors = Callable[[], Iterable[Tensor]]
Owners = frozenset[str]


class Residents:
    """Brings what a phase needs into the device's memory and parks what it does not.

    A tensor that several parts list (a trunk that two models share) stays while one of them is
    needed, and moves only if all of them may.

    Args:
        parts: Name -> function that lists the tensors now. More can be added later.
        parks: Parts that move; the others stay where they are.
        device: Where the tensors live.
        folder: On a CPU, where parked tensors go; see `ParkingPlace`.
        spare_bytes: Phase -> bytes that its plan leaves free. What the next phase needs is fetched
            while this one computes, as far as it fits there.
    Raises:
        ConfigError: when parks names what is no resident, or does not outlive its phase.
    Example:
        >>> weights = torch.ones(1000)
        >>> residents = Residents({"critic": lambda: [weights]}, {"critic"}, torch.device("cpu"))
        >>> with residents.phase("rollout"):
        ...     residents.parked
        frozenset({'critic'})
        >>> with residents.phase("critic_update"):
        ...     float(weights.sum())
        1000.0
    """

    def __init__(
        self, parts: Mapping[str, ListTensors], parks: Set[str], device: torch.device,
        *, folder: Path | None = None, spare_bytes: Mapping[str, int] | None = None,
    ) -> None:
        if not parks <= PARKABLE:
            raise ConfigError(f"parks: expected names out of {sorted(PARKABLE)}, got "
                              f"{sorted(parks - PARKABLE)}; use these names")
        self.parts, self.parks, self.device = dict(parts), frozenset(parks), device
        self._folder, self._spare_bytes = folder, dict(spare_bytes or {})
        self._places: dict[Owners, ParkingPlace] = {}
        self._pool = ThreadPoolExecutor(1, "fetch")
        self._step: tuple[str, ...] = ()
        self._next: dict[tuple[str, ...], frozenset[str]] = {}
        """Step -> what the step that followed it last time needed."""

    @property
    def parked(self) -> frozenset[str]:
        """Parts that have tensors on the host now."""
        return frozenset(name for owners, place in self._places.items() if place.is_parked
                         for name in owners)

    @contextmanager
    def phase(self, name: str, *parts: str) -> Iterator[None]:
        """Inside the block what the phase needs is there; afterwards too, until the next phase.

        Args:
            name: A key of `NEEDS`.
            parts: Those that this part of the phase needs; none: all of the phase's.
        Raises:
            ConfigError: when the phase does not exist or does not need such a part, or the host
                has no room for what has to leave; nothing is lost then.
        """
        if name not in NEEDS or not set(parts) <= set(NEEDS[name]):
            raise ConfigError(f"phase: expected one of {NEEDS}, got {name!r} with parts {parts}; "
                              "use these names")
        call_again(partial(self._move, frozenset(parts or NEEDS[name])), f"residents of {name}")
        step = (name, *parts)
        self._next[self._step] = frozenset(parts or NEEDS[name])
        self._step = step
        self._fetch_ahead(self._next.get(step, frozenset()), self._spare_bytes.get(name, 0))
        yield

    def fetch_all(self) -> None:
        """Bring everything back, for a device that has room for it."""
        for place in self._places.values():
            place.fetch()

    def keep(self, name: str) -> None:
        """From now on a part stays where it is; its host memory is given back."""
        self.parks -= {name}
        for owners, place in self._places.items():
            if name in owners:
                place.fetch()
                place.close()

    def _move(self, needed: frozenset[str]) -> None:
        """First make room, then fill it."""
        for owners, tensors in self._groups().items():
            place = self._place(owners)
            if owners <= self.parks and not owners & needed:
                if place.is_fetching:  # it was expected here
                    place.fetch()
                if not place.is_parked:
                    place.park(tensors)
        for owners, place in self._places.items():
            if owners & needed:
                place.fetch()

    def _fetch_ahead(self, needed: frozenset[str], spare_bytes: int) -> None:
        for owners, place in self._places.items():
            if owners & needed and place.is_parked and place.num_bytes <= spare_bytes:
                spare_bytes -= place.num_bytes
                place.start_fetch(self._pool)

    def _groups(self) -> dict[Owners, list[Tensor]]:
        """Tensors by the set of parts that list their memory."""
        owners: dict[int, set[str]] = {}
        tensors: dict[int, dict[int, Tensor]] = {}
        for name, list_tensors in self.parts.items():
            for tensor in list_tensors():
                key = tensor.untyped_storage()._cdata
                owners.setdefault(key, set()).add(name)
                tensors.setdefault(key, {})[id(tensor)] = tensor
        groups: dict[Owners, list[Tensor]] = {}
        for key, names in owners.items():
            groups.setdefault(frozenset(names), []).extend(tensors[key].values())
        return groups

    def _place(self, owners: Owners) -> ParkingPlace:
        if owners not in self._places:
            self._places[owners] = ParkingPlace(
                " and ".join(sorted(owners)), self.device, self._folder,
                is_constant=owners <= CONSTANT, keeps_addresses=not owners.isdisjoint(FIXED),
                phases=[phase for phase, needs in NEEDS.items() if not owners.isdisjoint(needs)])
        return self._places[owners]

"""What a run will keep in memory, phase by phase, and what therefore fits.

A phase is a list of moments; at each moment some residents are needed and something passes through
(activations, logits, scratch). The bytes of a phase are those of its largest moment. Everything
here is a function of settings, shapes and a budget: no tensor is made. docs/memory.md explains it.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fastrl.memory.sizes import GIB

CONTEXT_BYTES = 768 * 2**20
"""Kept free on a GPU for the CUDA context, libraries and compiled kernels; not yet measured."""
SLACK_SHARE = 0.03
"""Of a GPU's memory, kept free for what the allocator cannot join; not yet measured."""
PARK_ORDER = ("swapped", "reward_model", "reference", "policy_optimizer", "critic_optimizer",
              "critic", "ema", "policy")
"""What is parked first: the fewest bytes moved per iteration. What evaluations swap out does not
travel in others, frozen weights one way, state that changes both ways, the policy before and after
everything."""
MIN_SEQUENCES = 32
"""Sequences that rollout should decode together before anything is left unparked for speed."""

Parking = Literal["auto", "on", "off"]


@dataclass(frozen=True, slots=True)
class Moment:
    """A part of a phase in which the same things are in memory."""

    phase: str
    needs: tuple[str, ...]
    """Residents that have to be on the device."""
    passing: Mapping[str, int]
    """Bytes that exist during this moment, by name; what waits on the host among them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resident:
    """One thing that takes memory."""

    name: str
    num_bytes: int
    phases: tuple[str, ...]
    """Phases that need it on the device."""
    is_parked: bool
    """True: it waits on the host in the other phases."""
    is_kept: bool
    """False: it exists only while it is needed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Bytes of a run, and what fits."""

    residents: tuple[Resident, ...]
    phases: Mapping[str, Mapping[str, int]]
    """Phase -> bytes by name at its largest moment."""
    budget_bytes: int
    """What the device has for this process."""
    reserve_bytes: int
    """The part of it that the plan leaves free."""
    parks: frozenset[str]
    page_size: int
    num_pages: int
    """Pages of the KV cache; 0 where nothing is generated."""
    max_tokens_per_microbatch: int
    fits: bool
    advice: tuple[str, ...]
    """What to change, in plain words; empty when all that was asked for fits."""

    def total(self, phase: str) -> int:
        """Bytes of a phase."""
        return sum(self.phases[phase].values())

    def spare(self) -> dict[str, int]:
        """Phase -> bytes that it leaves free, the reserve not among them."""
        room = self.budget_bytes - self.reserve_bytes
        return {phase: max(0, room - self.total(phase)) for phase in self.phases}

    @property
    def peak_phase(self) -> str:
        """The phase that takes most."""
        return max(self.phases, key=self.total)

    @property
    def peak_bytes(self) -> int:
        """Bytes of the largest phase, the reserve left out."""
        return self.total(self.peak_phase)

    @property
    def parked_bytes(self) -> int:
        """Bytes of host memory that parked residents take."""
        return sum(r.num_bytes for r in self.residents if r.is_parked)

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain values, for plan.json."""
        return dataclasses.asdict(self) | {
            "parks": sorted(self.parks), "advice": list(self.advice),
            "residents": [dataclasses.asdict(r) for r in self.residents],
            "totals": {phase: self.total(phase) for phase in self.phases}}


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What a stage asks for; `solve` finds what of it fits."""

    kept: Mapping[str, int]
    """Bytes of each resident that lives from step to step."""
    moments: Callable[[int, int], Sequence[Moment]]
    """(tokens per microbatch, pages) -> the moments of a step."""
    max_tokens: int
    """Tokens per microbatch that the settings allow."""
    min_tokens: int
    """Tokens of the longest row, which is never split."""
    page_size: int = 0
    page_bytes: int = 0
    max_pages: int = 0
    """Pages that all sequences together could fill."""
    min_pages: int = 0
    """Pages of the longest sequence: below, nothing can be generated."""
    parking: Parking = "off"


def reserve_for(budget_bytes: int, device_type: str) -> int:
    """Bytes of a device that a plan leaves free."""
    if device_type != "cuda":
        return 0
    return CONTEXT_BYTES + int(SLACK_SHARE * budget_bytes)


def solve(
    demand: Demand, budget_bytes: int, device_type: str, advice: Callable[[int], Sequence[str]]
) -> MemoryPlan:
    """The largest microbatch and cache, and the fewest parked residents, that a budget allows.

    First what has to be parked for the smallest useful sizes; then tokens; then pages.

    Args:
        budget_bytes: What the device has for this process.
        advice: Called with the bytes that are missing when nothing fits, 0 when less fits than the
            settings allow.
    """
    reserve = reserve_for(budget_bytes, device_type)
    room = budget_bytes - reserve
    parks = _parks(demand, room)
    tokens = next((t for t in _token_choices(demand)
                   if _peak(demand, parks, t, demand.min_pages) <= room), demand.min_tokens)
    pages = _pages(demand, parks, tokens, room)
    peak = _peak(demand, parks, tokens, pages)
    missing = max(0, peak - room)
    is_less = tokens < _token_choices(demand)[0]
    moments = demand.moments(tokens, pages)
    phases: dict[str, Mapping[str, int]] = {}
    for moment in moments:
        present = _present(demand, parks, moment)
        if sum(present.values()) > sum(phases.get(moment.phase, {}).values()):
            phases[moment.phase] = present
    return MemoryPlan(
        residents=_residents(demand, parks, moments), phases=phases, budget_bytes=budget_bytes,
        reserve_bytes=reserve, parks=parks, page_size=demand.page_size, num_pages=pages,
        max_tokens_per_microbatch=tokens, fits=missing == 0,
        advice=tuple(advice(missing)) if missing or is_less else ())


def _residents(
    demand: Demand, parks: frozenset[str], moments: Sequence[Moment]
) -> tuple[Resident, ...]:
    """Everything kept, then everything that passes with its largest size."""
    sizes = dict(demand.kept)
    phases: dict[str, list[str]] = {name: [] for name in sizes}
    for moment in moments:
        for name, num_bytes in moment.passing.items():
            sizes[name] = max(num_bytes, sizes.get(name, 0))
        for name in (*moment.needs, *moment.passing):
            if moment.phase not in phases.setdefault(name, []):
                phases[name].append(moment.phase)
    return tuple(Resident(name=name, num_bytes=sizes[name], phases=tuple(phases[name]),
                          is_parked=name in parks, is_kept=name in demand.kept)
                 for name in sizes)


def _present(demand: Demand, parks: frozenset[str], moment: Moment) -> dict[str, int]:
    """Bytes on the device at a moment, by name."""
    return {name: num_bytes for name, num_bytes in {**demand.kept, **moment.passing}.items()
            if name in moment.needs or name not in parks}


def _peak(demand: Demand, parks: frozenset[str], tokens: int, pages: int) -> int:
    return max(sum(_present(demand, parks, moment).values())
               for moment in demand.moments(tokens, pages))


def _token_choices(demand: Demand) -> list[int]:
    """Budgets that are tried, largest first: the settings' own, halves of it, the longest row."""
    choices = [max(demand.max_tokens, demand.min_tokens)]
    while choices[-1] > demand.min_tokens:
        choices.append(max(choices[-1] // 2, demand.min_tokens))
    return choices


def _parks(demand: Demand, room: int) -> frozenset[str]:
    """What waits on the host: nothing without need, everything with "on"."""
    moments = demand.moments(demand.min_tokens, demand.min_pages)
    present = set(demand.kept).union(*(moment.passing for moment in moments))
    candidates = [name for name in PARK_ORDER if name in present
                  and any(name not in moment.needs for moment in moments)]
    if demand.parking != "auto":
        return frozenset(candidates if demand.parking == "on" else ())
    pages = min(demand.max_pages, MIN_SEQUENCES * demand.min_pages)

    def fits(parks: Sequence[str]) -> bool:
        return _peak(demand, frozenset(parks), demand.min_tokens, pages) <= room

    chosen: list[str] = []
    for name in candidates:
        if fits(chosen):
            break
        chosen.append(name)
    for name in list(reversed(chosen)):  # what came early may not be needed after what came late
        without = [other for other in chosen if other != name]
        if fits(without):
            chosen = without
    return frozenset(chosen)


def _pages(demand: Demand, parks: frozenset[str], tokens: int, room: int) -> int:
    """The most pages that fit, at least those of one sequence."""
    if not demand.page_bytes:
        return 0
    low, high = demand.min_pages, demand.max_pages
    while low < high:
        middle = (low + high + 1) // 2
        if _peak(demand, parks, tokens, middle) <= room:
            low = middle
        else:
            high = middle - 1
    return low


def gib(num_bytes: int) -> str:
    """Bytes as people read them."""
    return f"{num_bytes / GIB:.1f} GiB" if num_bytes >= GIB else f"{num_bytes / 2**20:.0f} MiB"

"""A recipe for several seeds: every stage once for each, so that a comparison knows its chance.

    seeds: [1, 2, 3]

makes of stages `sft` and `ppo` the stages `sft-1`, `ppo-1`, `sft-2`, ..., and of `"@sft"` in the
settings of `ppo-1` the path `"@sft-1"`. The stages of a seed get the seeds that they would have in
a recipe with `seed` alone.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fastrl.errors import ConfigError


def stage_seed(seed: int, name: str) -> int:
    """The seed of a stage that does not set its own: a function of recipe seed and stage name."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def read_seeds(values: Mapping[str, Any], where: str) -> tuple[int, ...]:
    """The seeds of a recipe: those of `seeds`, else `seed` alone, else 0.

    Raises:
        ConfigError: both are there, or one is not what it should be.
    """
    seed, seeds = values.get("seed", 0), values.get("seeds")
    if seeds is None:
        if not _is_seed(seed):
            raise ConfigError(f"{where}: seed: expected a whole number of at least 0, got {seed!r}")
        return (seed,)
    if "seed" in values:
        raise ConfigError(f"{where}: expected seed or seeds, got both; remove one of them")
    if not isinstance(seeds, list) or not seeds or not all(map(_is_seed, seeds)) \
            or len({*seeds}) < len(seeds):
        raise ConfigError(f"{where}: seeds: expected a list of different whole numbers of at least "
                          f"0, got {seeds!r}")
    return tuple(seeds)


def _is_seed(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def stages_of_seeds(tables: Mapping[str, Mapping[str, Any]], seeds: Sequence[int], *,
                    is_repeated: bool) -> Iterator[dict[str, Any]]:
    """The settings of every stage that runs, in order, each with a seed.

    Args:
        tables: Settings of the stages by name, as the recipe has them.
        seeds: See `read_seeds`.
        is_repeated: Name stages after their seed, and what they refer to.
    """
    for seed in seeds:
        for name, table in tables.items():
            seeded = {"seed": stage_seed(seed, name), **table}
            yield _named_after(seeded, seed, tables) if is_repeated else seeded


def _named_after(table: Mapping[str, Any], seed: int, names: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a stage with its own name, and those of other stages, ending in the seed."""
    def renamed(value: Any) -> Any:
        if isinstance(value, str) and value.startswith("@"):
            stage, slash, file = value[1:].partition("/")
            return f"@{stage}-{seed}{slash}{file}" if stage in names else value
        if isinstance(value, Mapping):
            return {key: renamed(item) for key, item in value.items()}
        return [renamed(item) for item in value] if isinstance(value, list) else value

    return {**renamed(table), "name": f"{table['name']}-{seed}"}

"""A recipe: a YAML file that names the stages of a run in order.

    name: stories
    seed: 1                       # or seeds: [1, 2, 3], see fastrl.recipe_seeds
    short:                        # optional: settings of the short form
      ppo.num_iterations: 2
    stages:
      - {name: prompts, kind: prompts, model_name_or_path: models/stories260k}
      - {name: ppo, kind: ppo, prompts: ["@prompts/train.jsonl"], ...}

A path that begins with `@` names an earlier stage: `@sft` is the model it saves,
`@prompts/train.jsonl` a file it writes. Every other relative path is looked up in the data root,
so that a recipe holds no path of a machine.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastrl.data.rows import DATASETS_PREFIX
from fastrl.errors import ConfigError
from fastrl.parsing import parse_config
from fastrl.recipe_seeds import read_seeds, stages_of_seeds
from fastrl.reward_settings import BestOfNRun, RewardPart, split_function
from fastrl.runs import (
    PATH_FIELDS,
    REWARD_FIELDS,
    RUN_TYPES,
    EvaluateRun,
    PromptsRun,
    RankRun,
    SelectRun,
    SFTRun,
    StageRun,
    WorldRun,
)
from fastrl.world import WORLD_FILES
from fastrl.yaml_file import check_keys, load_yaml, parse_yaml, unknown_key

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage of a recipe."""

    name: str
    kind: str
    config: StageRun
    """Settings with paths as the recipe names them; `output_dir` is the stage's name."""

    @property
    def references(self) -> list[str]:
        """Every local path among the settings, as the recipe names it, each once."""
        return list(dict.fromkeys(reference for _, reference in local_paths(self.config)))


@dataclass(frozen=True, slots=True)
class Recipe:
    """A checked recipe."""

    name: str
    seeds: tuple[int, ...]
    """One, or those for which every stage is there, under a name that ends in the seed."""
    stages: tuple[Stage, ...]
    where: str
    """The file, for error messages."""


def load_recipe(path: Path | str, overrides: Sequence[str] = (), *, short: bool = False) -> Recipe:
    """Read and check a recipe; nothing is looked up on disk but the recipe itself.

    Args:
        path: YAML file.
        overrides: `stage.field=value` (or `seed=value`, `seeds=[...]`), applied last; values are
            YAML.
        short: Apply the recipe's `short` settings.
    Raises:
        ConfigError: names file, stage, field, what was expected and what came.
    """
    where = Path(path).name
    values = load_yaml(path)
    check_keys(values, ("name", "seed", "seeds", "short", "stages"), where)
    values = {"short": {}, **values}
    tables = _stage_tables(values.get("stages"), where)
    if not isinstance(values["short"], Mapping) or (short and not values["short"]):
        raise ConfigError(f"{where}: short: expected settings, one `stage.field: value` per line, "
                          f"got {values['short']!r}; add them or run the whole recipe")
    changes = dict(values["short"]) if short else {}
    changes |= dict(_parse_override(text) for text in overrides)
    for target, value in changes.items():
        _apply(values, tables, target, value, where)
    name, seeds = values.get("name"), read_seeds(values, where)
    if not isinstance(name, str) or not name:
        raise ConfigError(f"{where}: name: expected text, got {name!r}")
    stages = tuple(_parse_stage(table, where) for table in stages_of_seeds(
        tables, seeds, is_repeated="seeds" in values))
    _check_references(stages, where)
    _check_selections(stages, where)
    return Recipe(name=name, seeds=seeds, stages=stages, where=where)


def local_paths(config: StageRun) -> Iterator[tuple[str, str]]:
    """(field, path) of every local file or folder that the settings of a stage name."""
    for name in PATH_FIELDS:
        value = getattr(config, name, None)
        if value is None:
            continue
        paths = [value] if isinstance(value, str) else value
        for path in paths.values() if isinstance(paths, Mapping) else paths:
            if not path.startswith(DATASETS_PREFIX):
                yield name, path
    function = getattr(config, "reward_function", None)
    parts = [*_reward_parts(config), *([RewardPart(function=function)] if function else [])]
    for part in parts:
        file = split_function(part.function)[0] if part.function is not None else None
        yield from [("reward_model", part.model)] if part.model is not None else []
        yield from [("reward_function", file)] if file is not None else []


def _reward_parts(config: StageRun) -> Iterator[RewardPart]:
    """Every reward that a stage names in a mapping."""
    for name in REWARD_FIELDS:
        yield from (getattr(config, name, None) or {}).values()


def resolve_path(reference: str, output_dir: Path, data_root: Path) -> Path:
    """Where a path of a recipe is: `@stage[/file]` in the output folder, else in the data root."""
    if not reference.startswith("@"):
        return data_root / reference
    stage, _, file = reference[1:].partition("/")
    return output_dir / stage / (file or "model")


def resolve_stage(stage: Stage, output_dir: Path, data_root: Path) -> StageRun:
    """The settings of a stage with every path, and its own folder, as they are on this disk."""
    def resolved(value: Any) -> Any:
        if isinstance(value, str):
            is_local = not value.startswith(DATASETS_PREFIX)
            return str(resolve_path(value, output_dir, data_root)) if is_local else value
        if isinstance(value, Mapping):
            return {key: resolved(item) for key, item in value.items()}
        return None if value is None else tuple(resolved(item) for item in value)

    def resolved_function(name: str | None) -> str | None:
        path, function = split_function(name or "")
        return name if path is None else f"{resolved(path)}:{function}"

    changes = {name: resolved(getattr(stage.config, name)) for name in PATH_FIELDS
               if hasattr(stage.config, name)}
    if hasattr(stage.config, "reward_function"):
        changes["reward_function"] = resolved_function(stage.config.reward_function)
    for field in REWARD_FIELDS:
        parts: Mapping[str, RewardPart] | None = getattr(stage.config, field, None)
        if parts is not None:
            changes[field] = {name: dataclasses.replace(
                part, model=resolved(part.model), function=resolved_function(part.function)
            ) for name, part in parts.items()}
    return dataclasses.replace(stage.config, **changes, output_dir=str(output_dir / stage.name))


def _stage_tables(stages: object, where: str) -> dict[str, dict[str, Any]]:
    """The settings of each stage by its name, in order."""
    if not isinstance(stages, list) or not stages:
        raise ConfigError(f"{where}: stages: expected a list of stages, each with a name and a "
                          f"kind, got {stages!r}")
    tables: dict[str, dict[str, Any]] = {}
    for index, table in enumerate(stages):
        name = table.get("name") if isinstance(table, Mapping) else None
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ConfigError(f"{where}: stages[{index}]: expected settings with a name of "
                              f"letters, digits, _ and -, got {table!r}")
        if name in tables:
            raise ConfigError(f"{where}: stage {name!r} is there twice; rename one of them")
        tables[name] = dict(table)
    return tables


def _parse_override(text: str) -> tuple[str, Any]:
    """`stage.field=value` as (dotted name, value)."""
    target, equals, value = text.partition("=")
    if not equals or not target.strip():
        raise ConfigError(f"override: expected stage.field=value, got {text!r}")
    return target.strip(), parse_yaml(value, f"override {target.strip()}")


def _apply(values: dict[str, Any], tables: dict[str, dict[str, Any]], target: str, value: Any,
           where: str) -> None:
    """Set one dotted name; field names are checked later, with the rest of the stage."""
    if target in ("seed", "seeds"):  # either takes the place of both
        values.pop("seed", None)
        values.pop("seeds", None)
        values[target] = value
        return
    stage, *fields = target.split(".")
    if stage not in tables:
        raise ConfigError(unknown_key(stage, tables, f"{where}: {target}"))
    if not fields or fields[0] in ("name", "kind"):
        raise ConfigError(f"{where}: {target}: expected stage.field, and neither name nor kind")
    table = tables[stage]
    for field in fields[:-1]:
        inner = table.get(field, {})
        if not isinstance(inner, Mapping):
            raise ConfigError(f"{where}: {target}: {field} of stage {stage!r} has no settings "
                              f"inside, it is {inner!r}")
        table[field] = dict(inner)
        table = table[field]
    table[fields[-1]] = value


def _parse_stage(table: Mapping[str, Any], where: str) -> Stage:
    """One stage, its settings checked by its dataclass."""
    name, kind = table["name"], table.get("kind")
    where = f"{where}, stage {name!r}"
    if not isinstance(kind, str) or kind not in RUN_TYPES:
        raise ConfigError(unknown_key(str(kind), RUN_TYPES, f"{where}: kind"))
    settings = {key: value for key, value in table.items() if key not in ("name", "kind")}
    if "output_dir" in settings:
        raise ConfigError(f"{where}: output_dir: a stage's folder is its name inside the output "
                          "folder of the recipe; remove this line")
    settings["output_dir"] = name
    run_type: type[StageRun] = RUN_TYPES[kind]
    return Stage(name=name, kind=kind, config=parse_config(run_type, settings, where))


def _check_references(stages: Sequence[Stage], where: str) -> None:
    """Raise ConfigError for an `@stage` that is not an earlier stage, or makes no such thing."""
    earlier: dict[str, Stage] = {}
    for stage in stages:
        for field, reference in local_paths(stage.config):
            name, _, file = reference[1:].partition("/")
            if not reference.startswith("@"):
                continue
            place = f"{where}, stage {stage.name!r}: {field}: {reference!r}"
            if name not in earlier:
                raise ConfigError(unknown_key(
                    name, earlier or ["(none: this is the first stage)"],
                    f"{place} must name an earlier stage"))
            files = _data_files(earlier[name])
            if files is not None and file not in files:
                made = ", ".join(f"'@{name}/{made}'" for made in files)
                raise ConfigError(f"{place}: expected something that stage {name!r} makes: {made}")
        earlier[stage.name] = stage


def _data_files(stage: Stage) -> tuple[str, ...] | None:
    """The data files of a stage that makes no model; None for a stage that makes one."""
    match stage.config:
        case WorldRun():
            return WORLD_FILES
        case PromptsRun():
            return ("train.jsonl", "heldout.jsonl", "eval.jsonl")
        case RankRun(heldout_prompts=heldout):
            return ("rankings.jsonl",) if heldout is None else ("rankings.jsonl", "heldout.jsonl")
        case BestOfNRun():
            return ("demonstrations.jsonl", "best_of_n.json")
        case EvaluateRun():
            return ("evaluation.json", "samples.jsonl")
    return None


def _check_selections(stages: Sequence[Stage], where: str) -> None:
    """Raise ConfigError when candidates are kept for a reward model and nothing chooses one."""
    selected = {stage.config.model_name_or_path for stage in stages
                if isinstance(stage.config, SelectRun)}
    for stage in stages:
        config = stage.config
        if (isinstance(config, SFTRun) and config.select_by == "reward"
                and config.reward_model is None and f"@{stage.name}" not in selected):
            raise ConfigError(
                f"{where}, stage {stage.name!r}: select_by: expected a reward_model, or a later "
                f"stage of kind select with model_name_or_path '@{stage.name}', got neither; "
                "without one the last checkpoint would be used")

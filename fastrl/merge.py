"""`fastrl merge`: adapters and their base model as one plain checkpoint."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fastrl.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from fastrl.console import Console


@dataclass(frozen=True, kw_only=True, slots=True)
class MergeRun:
    """The settings of `fastrl merge`."""

    model_name_or_path: str = field(metadata={"aliases": ("model",)})
    """Folder of adapters, of a language model or a reward model."""
    output_dir: str
    """Folder of the merged model, which must not exist."""
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    """Type of the merged weights; auto: as the base model's are stored."""


def merge(config: MergeRun, console: "Console") -> None:
    """Write the model that adapters make of their base: W + scale B A, rounded once.

    Tokenizer files are copied, from the adapters' folder or else from the base's.

    Raises:
        ConfigError: the output folder exists.
        ModelError: the folder holds no adapters, they do not fit their base, or it is not there.
    """
    from fastrl.models.folder import TOKENIZER_FILES, is_adapter_folder, model_folder
    from fastrl.models.weights import (
        is_scalar_adapter,
        load_causal_lm,
        load_scalar_model,
        save_causal_lm,
        save_scalar_model,
    )

    source, target = Path(config.model_name_or_path), Path(config.output_dir)
    if target.exists():
        raise ConfigError(f"output_dir: expected a new folder, got {target}, which exists; choose "
                          "another name or delete it")
    if not source.is_dir():
        raise ModelError(f"{source}: expected a folder of adapters, found none there; check the "
                         "path")
    if not is_adapter_folder(source):
        raise ModelError(f"{source}: expected a folder of adapters (adapter_config.json without "
                         "config.json), found none; a model that is no adapter needs no merging")
    base = model_folder(source)
    dtype = _stored_dtype(base) if config.dtype == "auto" else config.dtype
    tokenizer = next((folder for folder in (source, base)
                      if any((folder / name).is_file() for name in TOKENIZER_FILES)), None)
    if is_scalar_adapter(source):
        save_scalar_model(load_scalar_model(source, dtype), target, tokenizer)
    else:
        save_causal_lm(load_causal_lm(source, dtype), target, tokenizer)
    console.result(f"model   {target}")


def _stored_dtype(base: Path) -> str:
    """The dtype that config.json names, where fastrl runs models in it, else float32."""
    from fastrl.models.folder import DTYPES, read_raw_config

    raw = read_raw_config(base)
    name = raw.get("dtype", raw.get("torch_dtype"))
    return name if name in DTYPES else "float32"

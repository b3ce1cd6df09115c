"""Hugging Face folders as files: config.json, safetensors (one file or shards), tokenizer files."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fastrl.errors import ModelError
from fastrl.json_file import load_json

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "tokenizer.model", "spiece.model", "chat_template.jinja",
    "chat_template.json",
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


class SavesTokenizer(Protocol):
    """An encoder: anything that writes its tokenizer files into a folder."""

    def save(self, path: str | Path) -> None:
        """Write the tokenizer files."""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ModelError: when the file is missing or is not a JSON object.
    """
    if not path.exists():
        raise ModelError(f"{path.parent}: expected a model folder with {path.name}, found none; "
                         "give the folder that holds config.json and the weights")
    return load_json(path, ModelError)


def read_raw_config(path: str | Path) -> dict[str, Any]:
    """config.json of a folder, end-of-text ids of generation_config.json in place of its own.

    Raises:
        ModelError: when there is no such folder or file, or the weights are quantised.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ModelError(f"{folder}: expected a model folder, found none; give a local folder "
                         "(download a model first, for example with `hf download`)")
    raw = read_json(folder / "config.json")
    if raw.get("quantization_config") is not None:
        raise ModelError(f"{folder}: expected plain weights, got a quantised checkpoint; use the "
                         "unquantised one")
    if (folder / "generation_config.json").is_file():
        generation = read_json(folder / "generation_config.json")
        if generation.get("eos_token_id") is not None:
            raw["eos_token_id"] = generation["eos_token_id"]
    return raw


def is_adapter_folder(path: str | Path) -> bool:
    """True for a folder of adapters, which names its base model and holds none."""
    folder = Path(path)
    return (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file()


def base_folder(path: str | Path) -> Path:
    """The folder that the adapters in `path` were trained on, which may hold adapters too.

    Raises:
        ModelError: when it is not on this disk.
    """
    name = read_json(Path(path) / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not isinstance(name, str) or not Path(name).is_dir():
        raise ModelError(f"{path}: expected base_model_name_or_path in {ADAPTER_CONFIG} to be a "
                         f"local folder, got {name!r}; write there where the base model is now")
    return Path(name)


def model_folder(path: str | Path) -> Path:
    """The folder that holds config.json and weights: `path`, or the base of the adapters in it.

    Raises:
        ModelError: when a base is not on this disk, or adapters are each other's base.
    """
    folder, seen = Path(path), set[Path]()
    while is_adapter_folder(folder):
        seen.add(folder.resolve())
        folder = base_folder(folder)
        if folder.resolve() in seen:
            raise ModelError(f"{path}: expected a base model, got adapters whose base is "
                             f"themselves; correct base_model_name_or_path in {ADAPTER_CONFIG}")
    return folder


def dtype_named(name: str) -> torch.dtype:
    """The torch dtype of a name.

    Raises:
        ModelError: for a dtype that fastrl does not run models in.
    """
    if name not in DTYPES:
        raise ModelError(f"dtype: expected one of {', '.join(DTYPES)}, got {name!r}; change dtype")
    return DTYPES[name]


class WeightFiles:
    """The tensors of a folder, read one at a time.

    Args:
        path: Folder with model.safetensors, or shards and their index.
    Raises:
        ModelError: when there are no weights, only pickled ones, or damaged files.
    """

    def __init__(self, path: str | Path) -> None:
        self.folder = Path(path)
        if (self.folder / SINGLE_NAME).is_file():
            self.files = dict.fromkeys(self._open(SINGLE_NAME).keys(), SINGLE_NAME)
        elif (self.folder / INDEX_NAME).is_file():
            self.files = self._read_index()
        else:
            raise ModelError(self._nothing_found())
        self._handles: dict[str, Any] = {}

    def _nothing_found(self) -> str:
        pickled = sorted(p.name for p in self.folder.iterdir()
                         if p.suffix in (".bin", ".pt", ".pth"))
        if pickled:
            return (f"{self.folder}: expected safetensors weights, got {', '.join(pickled[:3])}; "
                    "such files can run code when they are read. Convert them where you trust "
                    "them: load the folder with transformers and call save_pretrained on a new "
                    "folder")
        return (f"{self.folder}: expected weights ({SINGLE_NAME}, or shards and {INDEX_NAME}), "
                "found none; the download may be incomplete")

    def _read_index(self) -> dict[str, str]:
        weight_map = read_json(self.folder / INDEX_NAME).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ModelError(f"{self.folder / INDEX_NAME}: expected the key weight_map, found "
                             "none; get the file anew")
        if not all(isinstance(name, str) for name in weight_map.values()):
            raise ModelError(f"{self.folder / INDEX_NAME}: expected the name of a file for each "
                             "tensor in weight_map, got another value; get the file anew")
        for name in set(weight_map.values()):
            if Path(str(name)).name != name or not (self.folder / name).is_file():
                raise ModelError(f"{self.folder}: {INDEX_NAME} names the shard {name!r}, which is "
                                 "not in the folder; the download may be incomplete")
        return weight_map

    def _open(self, file: str) -> Any:
        from safetensors import SafetensorError, safe_open

        try:
            return safe_open(self.folder / file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{self.folder / file}: expected a safetensors file, got {error}; "
                             "get the file anew") from error

    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self.files)

    def _handle(self, name: str) -> Any:
        file = self.files[name]
        if file not in self._handles:
            self._handles[file] = self._open(file)
        handle = self._handles[file]
        if name not in handle.keys():
            raise ModelError(f"{self.folder / file}: expected the tensor {name} that {INDEX_NAME} "
                             "promises, found none; get the files anew")
        return handle

    def shape(self, name: str) -> list[int]:
        """Shape of a tensor, without reading it."""
        return list(self._handle(name).get_slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        """A tensor, as stored, on the CPU."""
        tensor: Tensor = self._handle(name).get_tensor(name)
        return tensor


def write_weights(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], max_shard_bytes: int
) -> None:
    """Write tensors in the Hugging Face layout: one file, or shards with an index.

    Args:
        folder: Exists. Weights of an earlier save in it are removed.
        tensors: Name and tensor, in the order of the shards.
        max_shard_bytes: A file grows to at most this size, or holds a single tensor.
    """
    from safetensors.torch import save_file

    shards: list[dict[str, Tensor]] = [{}]
    size = total = 0
    for name, tensor in tensors:
        num_bytes = tensor.numel() * tensor.element_size()
        if shards[-1] and size + num_bytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor.detach().to("cpu").contiguous()
        size += num_bytes
        total += num_bytes
    remove_adapter_files(folder)
    for stale in [*folder.glob("model*.safetensors"), folder / INDEX_NAME]:
        stale.unlink(missing_ok=True)
    files = [SINGLE_NAME] if len(shards) == 1 else [
        f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    for file, shard in zip(files, shards, strict=True):
        save_file(shard, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        weight_map = {name: file for file, shard in zip(files, shards, strict=True)
                      for name in shard}
        write_json(folder / INDEX_NAME, {"metadata": {"total_size": total},
                                         "weight_map": weight_map})


def remove_adapter_files(folder: Path) -> None:
    """Remove adapters of an earlier save: transformers would add them to the weights beside them.
    """
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        (folder / name).unlink(missing_ok=True)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON object, keys in alphabetical order."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_tokenizer(folder: Path, tokenizer_from: str | Path | SavesTokenizer | None) -> None:
    """Copy tokenizer files byte by byte from a folder, or let an encoder save its own.

    Raises:
        ModelError: when the folder holds no tokenizer file.
    """
    if tokenizer_from is None:
        return
    if not isinstance(tokenizer_from, (str, Path)):
        tokenizer_from.save(folder)
        return
    present = [name for name in TOKENIZER_FILES if (Path(tokenizer_from) / name).is_file()]
    if not present:
        raise ModelError(f"{tokenizer_from}: expected tokenizer files such as tokenizer.json, "
                         "found none; give the folder of the model the tokenizer belongs to")
    for name in present:
        if (Path(tokenizer_from) / name).resolve() != (folder / name).resolve():
            shutil.copyfile(Path(tokenizer_from) / name, folder / name)


def padding_id(present: int | None, eos_token_ids: tuple[int, ...], bos: int | None) -> int:
    """The checkpoint's padding token, or the first token that neither begins nor ends texts."""
    if present is not None and present not in eos_token_ids:
        return present
    taken = {*eos_token_ids, bos}
    return next(i for i in range(len(taken) + 1) if i not in taken)

"""One checkpoint on disk: a folder whose manifest, written last, says what has to be in it.

    state.safetensors   the tensors
    state.json          step, is_best, facts and values
    manifest.json       format_version, and bytes and SHA-256 of the two

Nothing is used before all of it agrees, and nothing of it is ever executed.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastrl.checkpoints.files import Files, read_file, sync_folder, write_all
from fastrl.checkpoints.state import State, decode_values, encode_values
from fastrl.checkpoints.tensors import safetensors_pieces
from fastrl.errors import CheckpointError

FORMAT_VERSION = 1
"""Raised when a checkpoint's files change; others are refused by their number."""

TENSORS, VALUES, MANIFEST = "state.safetensors", "state.json", "manifest.json"
_MAX_MANIFEST_BYTES = 1 << 16
_NAME = re.compile(r"step-(\d{8,})")
_REMEDY = "use another checkpoint of the run, or start it anew"


def folder_name(step: int) -> str:
    """The name of the checkpoint of a step."""
    return f"step-{step:08}"


def step_of(name: str) -> int | None:
    """The step of a folder's name; None where it is not the name of a finished checkpoint."""
    found = _NAME.fullmatch(name)
    return int(found[1]) if found and name == folder_name(int(found[1])) else None


class Checkpoint:
    """A checkpoint whose files are all there and unchanged.

    Args:
        path: Its folder.
    Raises:
        CheckpointError: when it is not there, half-written, damaged or of another format version.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        step = step_of(self.path.resolve().name)
        if step is None or self.path.is_symlink() or not self.path.is_dir():
            raise CheckpointError(f"{self.path}: expected the folder of a checkpoint itself, named "
                                  f"as {folder_name(12)}, found none; check the path")
        try:
            self._verify(step)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.path}: expected a whole checkpoint, got "
                                  f"{_reason(error)}; {_REMEDY}") from error

    def _verify(self, step: int) -> None:
        expected = _read_manifest(self.path / MANIFEST)
        kept = dict[str, bytes]()
        for name, (size, digest) in expected.items():
            found, pieces, found_size = hashlib.sha256(), list[bytes](), 0
            for piece in read_file(self.path / name):
                found.update(piece)
                found_size += len(piece)
                if found_size > size:
                    break
                if name == VALUES:
                    pieces.append(piece)
            if found_size != size:
                raise ValueError(f"{name} of {'more than ' * (found_size > size)}"
                                 f"{min(found_size, size)} bytes where the manifest says {size}")
            if found.hexdigest() != digest:
                raise ValueError(f"{name} whose SHA-256 is {found.hexdigest()[:12]}... where the "
                                 f"manifest says {digest[:12]}...")
            kept[name] = b"".join(pieces)
        self._values = decode_values(kept[VALUES])
        kinds = {"step": int, "is_best": bool, "facts": dict, "values": dict}
        if {name: type(value) for name, value in self._values.items()} != kinds:
            raise ValueError(f"{VALUES} without step, is_best, facts and values")
        self.step: int = self._values["step"]
        """Finished steps or iterations."""
        self.is_best: bool = self._values["is_best"]
        """True when it was the best so far."""
        self.facts: dict[str, Any] = self._values["facts"]
        """What was given to `save` beside the state: lineage, settings."""
        if self.step != step:
            raise ValueError(f"{VALUES} of step {self.step}")

    def load(self) -> State:
        """All of its state; tensors on the CPU.

        Raises:
            CheckpointError: when its files have changed since they were looked at.
        """
        from safetensors import SafetensorError, safe_open

        file = self.path / TENSORS
        try:
            with safe_open(file, framework="pt") as handle:
                tensors = {name: handle.get_tensor(name) for name in handle.keys()}
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: expected tensors in the safetensors format, got "
                                  f"{error}; {_REMEDY}") from error
        return State(tensors, self._values["values"])


def write_checkpoint(files: Files, folder: Path, step: int, state: State,
                     facts: Mapping[str, Any], is_best: bool) -> None:
    """Fill a new folder with a checkpoint, its manifest last; durable when this returns.

    Args:
        state: `State.copied()`: contiguous CPU tensors that nobody changes.
    Raises:
        OSError: when the disk does not take it.
    """
    files.make_folder(folder)
    values = {"step": step, "is_best": is_best, "facts": facts, "values": state.values}
    written = {
        TENSORS: _write(files, folder / TENSORS, safetensors_pieces(state.tensors)),
        VALUES: _write(files, folder / VALUES, [memoryview(encode_values(values).encode())]),
    }
    _write(files, folder / MANIFEST, [memoryview(_manifest(written, FORMAT_VERSION))])
    sync_folder(files, folder)


def is_best_checkpoint(path: Path) -> bool:
    """True where a checkpoint says that it is the best; False where it cannot be read too."""
    try:
        return decode_values(b"".join(read_file(path / VALUES))).get("is_best") is True
    except (OSError, ValueError):
        return False


def _write(files: Files, path: Path, pieces: Any) -> tuple[int, str]:
    """Bytes and SHA-256 of a new file that is durable."""
    digest, size = hashlib.sha256(), 0
    descriptor = files.create(path)
    try:
        for piece in pieces:
            write_all(files, descriptor, piece)
            digest.update(piece)
            size += len(piece)
        files.fsync(descriptor)
    finally:
        files.close(descriptor)
    return size, digest.hexdigest()


def _manifest(written: Mapping[str, tuple[int, str]], version: int) -> bytes:
    entries = {name: {"bytes": size, "sha256": digest} for name, (size, digest) in written.items()}
    return (json.dumps({"format_version": version, "files": entries}, indent=2) + "\n").encode()


def _read_manifest(path: Path) -> dict[str, tuple[int, str]]:
    """Name -> bytes and SHA-256 of the files of a checkpoint.

    Raises:
        ValueError: when one byte of it is not as `_manifest` writes it.
    """
    text = b""
    for piece in read_file(path):
        text += piece
        if len(text) > _MAX_MANIFEST_BYTES:
            raise ValueError(f"{MANIFEST} of more than {_MAX_MANIFEST_BYTES} bytes")
    try:
        manifest = json.loads(text)
        version = manifest["format_version"]
        if version != FORMAT_VERSION:
            raise ValueError(f"{MANIFEST} of format version {version!r} where this fastrl reads "
                             f"{FORMAT_VERSION}: continue with the fastrl that wrote it")
        written = {name: (manifest["files"][name]["bytes"], manifest["files"][name]["sha256"])
                   for name in (TENSORS, VALUES)}
        # What is read again as it was written can have no change that goes unseen.
        is_whole = text == _manifest(written, FORMAT_VERSION) and all(
            type(size) is int and type(digest) is str for size, digest in written.values())
    except (KeyError, TypeError, RecursionError, json.JSONDecodeError, UnicodeDecodeError):
        is_whole = False
    if not is_whole:
        raise ValueError(f"{MANIFEST} that is damaged")
    return written


def _reason(error: OSError | ValueError) -> str:
    if isinstance(error, FileNotFoundError) and error.filename:
        return f"none with {Path(error.filename).name}: it is missing"
    return str(error)

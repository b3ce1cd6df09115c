"""What a disk may hold after a power loss, from the recorded operations of a program.

The model is strict: a file keeps what it held at its last fsync and any part of what was written
since, or zeros in its place; a folder keeps its entries of its last fsync and the first few of the
changes since.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from fastrl.checkpoints.files import Files

Operation = tuple[str, Path, bytes | Path | None]


class RecordingFiles(Files):
    """The disk, and a log of all that was done to it."""

    def __init__(self) -> None:
        self.log: list[Operation] = []
        self._paths: dict[int, Path] = {}

    def make_folder(self, path: Path) -> None:
        super().make_folder(path)
        self.log.append(("make_folder", path, None))

    def create(self, path: Path) -> int:
        descriptor = super().create(path)
        self._paths[descriptor] = path
        self.log.append(("create", path, None))
        return descriptor

    def write(self, descriptor: int, data: memoryview) -> int:
        count = super().write(descriptor, data)
        self.log.append(("write", self._paths[descriptor], bytes(data[:count])))
        return count

    def open_folder(self, path: Path) -> int:
        descriptor = super().open_folder(path)
        self._paths[descriptor] = path
        return descriptor

    def fsync(self, descriptor: int) -> None:
        super().fsync(descriptor)
        self.log.append(("fsync", self._paths[descriptor], None))

    def rename(self, old: Path, new: Path) -> None:
        super().rename(old, new)
        self.log.append(("rename", old, new))

    def unlink(self, path: Path) -> None:
        super().unlink(path)
        self.log.append(("remove", path, None))

    def remove_folder(self, path: Path) -> None:
        super().remove_folder(path)
        self.log.append(("remove", path, None))


@dataclass(eq=False, slots=True)
class _File:
    data: bytes = b""
    durable: bytes = b""


@dataclass(eq=False, slots=True)
class _Folder:
    entries: "dict[str, _File | _Folder]" = field(default_factory=dict)
    history: "list[dict[str, _File | _Folder]]" = field(default_factory=lambda: [{}])
    """Entries at the last fsync, then after each change since."""


class Disk:
    """A disk in memory that the operations of a log are done to.

    Args:
        root: Folder that all paths of the log are under; it is there from the start.
    """

    def __init__(self, root: Path) -> None:
        self.root, self._tree = root, _Folder()

    def do(self, operation: Operation) -> None:
        """One operation of the log."""
        kind, path, extra = operation
        if kind == "write":
            node = self._at(path)
            assert isinstance(node, _File) and isinstance(extra, bytes)
            node.data += extra
            return
        if kind == "fsync":
            node = self._at(path)
            if isinstance(node, _File):
                node.durable = node.data
            else:
                node.history = [dict(node.entries)]
            return
        folder = self._at(path.parent)
        assert isinstance(folder, _Folder)
        if kind == "make_folder":
            folder.entries[path.name] = _Folder()
        elif kind == "create":
            folder.entries[path.name] = _File()
        else:
            node = folder.entries.pop(path.name)
            if kind == "rename":
                assert isinstance(extra, Path) and extra.parent == path.parent
                folder.entries[extra.name] = node
        folder.history.append(dict(folder.entries))

    def leave(self, folder: Path, generator: random.Random) -> None:
        """Write into a new folder what one power loss now may leave."""
        self._leave(self._tree, folder, generator)

    def _leave(self, tree: _Folder, folder: Path, generator: random.Random) -> None:
        folder.mkdir()
        for name, node in generator.choice(tree.history).items():
            if isinstance(node, _Folder):
                self._leave(node, folder / name, generator)
            else:
                (folder / name).write_bytes(generator.choice(_LOSSES)(node, generator))

    def _at(self, path: Path) -> _File | _Folder:
        node: _File | _Folder = self._tree
        for name in path.relative_to(self.root).parts:
            assert isinstance(node, _Folder)
            node = node.entries[name]
        return node


_LOSSES: tuple[Callable[[_File, random.Random], bytes], ...] = (
    lambda file, _: file.durable,
    lambda file, _: file.data,
    lambda file, generator: file.data[:generator.randint(len(file.durable), len(file.data))],
    lambda file, _: file.durable + bytes(len(file.data) - len(file.durable)),
)

"""Disks that fail, lose power or rot: there is a whole checkpoint at every moment."""

import logging
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from fastrl.checkpoints import Checkpoint, CheckpointStore, State
from fastrl.errors import CheckpointError
from fastrl.selftest.faults import FAULTS, FaultyFiles, Killed
from fastrl.selftest.power_loss import Disk, RecordingFiles


def state_of(step: int) -> State:
    return State({"w": torch.arange(4) * step}, {"step": step})


def whole_step(folder: Path) -> int | None:
    """The step of the newest checkpoint, whose contents are those of that step."""
    found = CheckpointStore(folder).newest()
    if found is None:
        return None
    state = found.load()
    assert state.values == {"step": found.step}
    assert torch.equal(state.tensors["w"], torch.arange(4) * found.step)
    return found.step


@pytest.fixture
def quick_path(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: thousands of fsyncs of a disk take minutes."""
    memory = Path("/dev/shm")
    if not (memory.is_dir() and os.access(memory, os.W_OK)):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


@pytest.fixture
def crowded(quick_path: Path) -> Path:
    """A folder with all that a save can meet: what it removes, replaces and cleans."""
    folder = quick_path / "template"
    store = CheckpointStore(folder, keep=9, in_background=False)
    for step in (1, 2, 3):
        store.save(step, state_of(step))
    shutil.copytree(folder / "step-00000001", folder / "step-00000000.deleting")
    shutil.copytree(folder / "step-00000001", folder / "step-00000004.writing")
    (folder / "step-00000003" / "state.json").write_text("{}")
    return folder


def save(store: CheckpointStore) -> None:
    store.save(3, state_of(3))
    store.wait()


@pytest.mark.parametrize("is_persistent", [False, True], ids=["once", "persistent"])
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(("work", "steps"), [(save, {2, 3}), (lambda s: s.drop_after(1), {1, 2})],
                         ids=["save", "drop_after"])
def test_every_operation_may_fail(
    crowded: Path, fault: str, is_persistent: bool, work: Callable[[CheckpointStore], None],
    steps: set[int],
) -> None:
    number, done = 0, max(steps) if work is save else 1
    while True:
        number += 1
        folder = crowded.parent / f"run{number}"
        shutil.copytree(crowded, folder)
        files = FaultyFiles(number, fault, is_persistent=is_persistent)
        store = CheckpointStore(folder, keep=1, files=files)
        try:
            work(store)
            assert whole_step(folder) == done, f"operation {number}: said to be done"
        except CheckpointError as error:
            assert fault not in ("short", "kill"), f"operation {number}: {error}"
            assert "expected to" in str(error) and str(folder) in str(error)
        except Killed:
            assert fault == "kill"
        assert whole_step(folder) in steps, f"operation {number}"
        healthy = CheckpointStore(folder, keep=1, in_background=False)
        healthy.save(7, state_of(7))
        assert [path.name for path in folder.iterdir()] == ["step-00000007"], number
        shutil.rmtree(folder)
        if files.count < number:
            break
    assert number > (25 if work is save else 10)
    print(f"{number - 1} operations")


def power_losses(folder: Path, num_each: int) -> int:
    """Lose power after each operation of three saves; returns how many states were seen."""
    run, seen = folder / "run", 0
    run.mkdir()
    files = RecordingFiles()
    store = CheckpointStore(run / "checkpoints", keep=1, in_background=False, files=files)
    ends = [0]
    for step in (1, 2, 3):
        store.save(step, state_of(step))
        ends.append(len(files.log))
    disk, generator = Disk(run), random.Random(8)
    for number, operation in enumerate(files.log, 1):
        disk.do(operation)
        saved = max(i for i, end in enumerate(ends) if end <= number)
        for _ in range(num_each):
            left = folder / "left"
            disk.leave(left, generator)
            step = whole_step(left / "checkpoints")
            assert step in {saved or None, saved + 1}, f"{number} {operation[:2]}: {step}"
            for later in CheckpointStore(left / "checkpoints").steps():
                Checkpoint(left / "checkpoints" / f"step-{later:08}")
            shutil.rmtree(left)
            seen += 1
    return seen


def test_a_power_loss_leaves_the_old_or_the_new(quick_path: Path) -> None:
    seen = power_losses(quick_path, 36)
    print(f"{seen} states")
    assert seen >= 2000


def damages(folder: Path, count: int, caplog: pytest.LogCaptureFixture) -> None:
    """Damage the newest of two checkpoints in `count` ways, one at a time."""
    store = CheckpointStore(folder, in_background=False)
    for step in (1, 2):
        store.save(step, state_of(step))
    old, new = folder / "step-00000001", folder / "step-00000002"
    generator = random.Random(11)
    for number in range(count):
        file = generator.choice(sorted(new.iterdir()))
        data = file.read_bytes()
        kind = generator.choice(("flip", "flip", "flip", "byte", "cut", "more", "swap", "missing"))
        place = generator.randrange(len(data))
        if kind == "missing":
            file.unlink()
        elif kind == "swap":
            file.write_bytes((old / file.name).read_bytes())
        elif kind == "cut":
            file.write_bytes(data[:place])
        elif kind == "more":
            file.write_bytes(data + generator.randbytes(generator.randint(1, 9)))
        else:
            mask = 1 << generator.randrange(8) if kind == "flip" else generator.randint(1, 255)
            file.write_bytes(data[:place] + bytes([data[place] ^ mask]) + data[place + 1:])
        caplog.clear()
        assert whole_step(folder) == 1, f"{number}: {kind} of {file.name} at {place} unseen"
        assert str(new) in caplog.text, (number, kind)
        # A manifest of another checkpoint accuses the files that it does not fit.
        assert kind == "swap" or file.name in caplog.text or file.name == "manifest.json"
        file.write_bytes(data)
    assert whole_step(folder) == 2


def test_damage_is_seen(quick_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "fastrl"):
        damages(quick_path, 500, caplog)


@pytest.mark.exhaustive
def test_10000_damages_are_seen(quick_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "fastrl"):
        damages(quick_path, 10_000, caplog)

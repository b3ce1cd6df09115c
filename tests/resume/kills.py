"""Kills PPO runs and continues them, until they end: are they the runs that nobody killed?

    OMP_NUM_THREADS=1 PYTHONPATH=.:kernels python tests/resume/kills.py --kills 1000 --seed 0

The parent only imports, so that a child is there in milliseconds; forking after torch's threads
have run would hang. A child makes its trainer, loads the newest checkpoint and goes on; it is
killed at a random instant, or kills itself on entering a named boundary for the n-th time.
"""

import argparse
import json
import os
import random
import runpy
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file

from fastrl.checkpoints import CheckpointStore
from fastrl.checkpoints.files import Files
from fastrl.engine import Engine
from fastrl.metrics import is_timing, to_json, write_atomic
from fastrl.trainers.ppo import PPOTrainer
from fastrl.trainers.ppo_evaluation import Evaluation

TESTS = Path(__file__).parents[1] / "trainers"
TASK = SimpleNamespace(**runpy.run_path(str(TESTS / "ppo_task.py")))
STATES = runpy.run_path(str(TESTS / "test_ppo_state.py"))
RUNS: dict[str, dict[str, Any]] = {
    "ppo": {**STATES["EVERYTHING"]},
    "grpo": {**STATES["CASES"]["grpo"], "eval_steps": 2},
}
BOUNDARIES: dict[str, tuple[type, tuple[str, ...]]] = {
    "rollout": (Engine, ("generate",)),
    "scoring": (PPOTrainer, ("_old_logprobs", "_judge")),
    "update": (PPOTrainer, ("_update",)),
    "evaluation": (Evaluation, ("run",)),
    "checkpoint": (Files, tuple(n for n in vars(Files) if not n.startswith("_"))),
}
"""Name -> what is entered there."""


def go_on(name: str, folder: Path, forgets: str) -> None:
    """One process of a run: from its newest checkpoint to its end.

    Args:
        forgets: What it does not take from the checkpoint: a part of the state, "metrics" (what was
            written beyond it stays), or "" for nothing. A run that forgets has to be seen as lost.
    """
    torch.set_num_threads(1)
    trainer = STATES["make"](TASK, **RUNS[name])
    store, rows = CheckpointStore(folder / "checkpoints"), folder / "metrics.jsonl"
    newest = store.newest()
    if newest is not None:
        state, new = newest.load(), trainer.state()
        for theirs, own in ((state.tensors, new.tensors), (state.values, new.values)):
            theirs |= {k: v for k, v in own.items() if forgets and k.startswith(forgets)}
        trainer.load_state(state)
        if forgets != "metrics":
            os.truncate(rows, newest.facts["metrics_bytes"])
    elif rows.exists() and forgets != "metrics":
        os.truncate(rows, 0)
    while trainer.iteration < trainer.num_steps:
        metrics = {k: v for k, v in trainer.step().items() if not is_timing(k)}
        with rows.open("a") as file:
            file.write(to_json(metrics) + "\n")
        store.save(trainer.iteration, trainer.state(),
                   facts={"metrics_bytes": rows.stat().st_size})
    store.wait()
    trainer.train()
    tensors = {k: v.detach() for k, v in trainer.state().tensors.items()}
    save_file(tensors, folder / "weights.part")
    (folder / "weights.part").rename(folder / "weights.safetensors")
    write_atomic(folder / "finished", "")


def die_at(boundary: str, count: int) -> None:
    """Make this process kill itself on entering a boundary for the `count`-th time."""
    owner, names = BOUNDARIES[boundary]
    entered = [0]

    def dying(call: Callable[..., Any]) -> Callable[..., Any]:
        def entering(*args: Any, **kwargs: Any) -> Any:
            entered[0] += 1
            if entered[0] == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)
        return entering

    for name in names:
        setattr(owner, name, dying(getattr(owner, name)))


def child(name: str, folder: Path, forgets: str = "", *, after_s: float | None = None,
          boundary: tuple[str, int] | None = None) -> bool:
    """Run a process of a run; True when it was killed, False when it came to the end."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            if boundary is not None:
                die_at(*boundary)
            go_on(name, folder, forgets)
            status = 0
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            os._exit(status)
    if after_s is not None:
        time.sleep(after_s)
        os.kill(pid, signal.SIGKILL)  # of one that has ended and is not yet awaited: no effect
    status = os.waitpid(pid, 0)[1]
    if os.WIFEXITED(status):
        if os.WEXITSTATUS(status) != 0:
            raise SystemExit(f"{name}, {folder}: a process of the run failed")
        return False
    return True


def content(folder: Path) -> tuple[bytes, bytes]:
    return ((folder / "weights.safetensors").read_bytes(),
            (folder / "metrics.jsonl").read_bytes())


def kill_runs(
    name: str, num_kills: int, rng: random.Random, folder: Path, forgets: str
) -> dict[str, Any]:
    """Runs of one kind, killed until there are enough kills, each compared at its end."""
    whole = folder / "whole"
    whole.mkdir()
    begin = time.monotonic()
    child(name, whole)
    seconds, expected = time.monotonic() - begin, content(whole)
    counts = dict.fromkeys(("random", *BOUNDARIES), 0)
    num_runs = num_lost = 0
    while sum(counts.values()) < num_kills:
        run = folder / f"run-{num_runs}"
        run.mkdir()
        num_runs += 1
        while not (run / "finished").exists():
            kinds = [k for k in counts if counts[k] == min(counts.values())]
            kind = rng.choice(kinds) if sum(counts.values()) < num_kills else None
            if kind is None:
                child(name, run, forgets)
            elif kind == "random":
                counts[kind] += child(name, run, forgets, after_s=rng.uniform(0, seconds))
            else:
                most = 40 if kind == "checkpoint" else 4
                counts[kind] += child(name, run, forgets, boundary=(kind, rng.randint(1, most)))
        num_lost += content(run) != expected
    return {"run": name, "kills": sum(counts.values()), "by": counts, "runs": num_runs,
            "lost": num_lost}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--forgets", default="")
    options = parser.parse_args(arguments)
    lost = 0
    for name in options.runs:
        with tempfile.TemporaryDirectory() as folder:
            figures = kill_runs(name, options.kills // len(options.runs),
                                random.Random(f"{options.seed} {name}"), Path(folder),
                                options.forgets)
        lost += figures["lost"]
        print(json.dumps({"seed": options.seed, **figures}), flush=True)
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

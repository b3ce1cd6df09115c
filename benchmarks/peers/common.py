"""What every peer's script shares: the workload file, prompts, memory, and the JSON it prints.

Needs Python, PyYAML and torch; nothing of fastrl, so that it runs in an environment of the peer's.
"""

import argparse
import json
import random
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml


def arguments(description: str | None) -> argparse.Namespace:
    """The command line of a peer: workload, folder of checkpoints, output, threads."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--workload", type=Path, required=True, help="YAML file of the workload")
    parser.add_argument("--models", type=Path, required=True,
                        help="folder with policy/ and reward/, transformers checkpoints")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--rollout", type=Path, help="also save the first rollout here (.npz)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    return parser.parse_args()


def read_workload(path: Path) -> dict[str, Any]:
    """The workload as plain values."""
    workload: dict[str, Any] = yaml.safe_load(path.read_text("utf-8"))
    return workload


def prompts(workload: dict[str, Any]) -> list[list[int]]:
    """Token ids of the prompts, the same for every peer; ids 0 to 2 are special and not drawn."""
    rng = random.Random(workload["seed"])
    return [[rng.randrange(3, workload["model"]["vocab_size"])
             for _ in range(workload["prompt_tokens"])] for _ in range(workload["num_prompts"])]


def read_rows(models: Path) -> list[dict[str, list[int]]]:
    """Token ids of the demonstrations or comparisons, in the order in which they are trained on."""
    rows: list[dict[str, list[int]]] = json.loads((models / "rows.json").read_text("utf-8"))
    return rows


def peak_bytes(device: str = "cpu") -> int:
    """Most memory that the process has had in use; on a GPU most that its tensors have taken."""
    if device == "cuda":
        return int(torch.cuda.max_memory_allocated())
    status = Path("/proc/self/status")
    if status.exists():  # what getrusage says begins with the memory of the parent
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Clock:
    """Seconds and processor seconds of every iteration, and memory beyond that of the imports."""

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self.seconds: list[float] = []
        self.processor: list[float] = []
        self.base = peak_bytes(device)
        self.start()

    def start(self) -> None:
        """The next iteration begins."""
        self._begin = time.perf_counter(), time.process_time()

    def stop(self) -> None:
        """The iteration is done, and the next begins."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self._begin[0])
        self.processor.append(time.process_time() - self._begin[1])
        self.start()

    def write(self, path: Path, provider: str, versions: dict[str, str], **extra: Any) -> None:
        """Write what was measured."""
        path.write_text(json.dumps({
            "provider": provider, "versions": versions, "seconds": self.seconds,
            "processor_s": self.processor, "peak_bytes": peak_bytes(self.device),
            "peak_bytes_above_imports": peak_bytes(self.device) - self.base, **extra}), "utf-8")

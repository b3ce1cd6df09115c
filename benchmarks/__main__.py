"""The benchmarks of fastrl, `python -m benchmarks PART`: docs/benchmarks.md."""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.cases import load_cases
from benchmarks.compare import LOSSES, MIN_PAIRS, changes_table, compare_files
from benchmarks.engine import run_engine
from benchmarks.engine_providers import PROVIDERS
from benchmarks.kernels import DeviceInError, Settings, run_kernels
from benchmarks.pairs import run_pairs
from benchmarks.results import Row, file_name, table
from benchmarks.timing import MIN_ROUNDS
from fastrl.exactness import set_workspaces


def parser() -> argparse.ArgumentParser:
    """The command line."""
    root = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parts = root.add_subparsers(dest="part", required=True)
    kernels = parts.add_parser("kernels", help="every op by every provider")
    kernels.add_argument("--ops", nargs="*", default=[], help="by function or file; all")
    kernels.add_argument("--providers", nargs="*", default=[],
                         help="all; on a CPU all but compile")
    kernels.add_argument("--topic", default="kernels", help="first word of the file's name")
    kernels.add_argument("--check_only", action="store_true", help="compare, time nothing")
    kernels.add_argument("--rounds", type=int, default=MIN_ROUNDS, help="samples, at least")
    kernels.add_argument("--resume", action="store_true",
                         help="keep what today's file has, measure what it skipped")
    engine = parts.add_parser("engine", help="whole generations beside peers")
    engine.add_argument("--providers", nargs="*", default=[], choices=list(PROVIDERS),
                        help="all")
    exact = parts.add_parser("exact", help="log-probs of rollout and update, and the cost")
    big = parts.add_parser("big", help="one PPO iteration of four models of 8B")
    scaling = parts.add_parser("scaling", help="time and memory when one size doubles, on a CPU")
    scaling.add_argument("--rounds", type=int, default=5, help="samples of each size")
    scaling.add_argument("--small", action="store_true", help="sizes for trying the flow")
    scaling.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    model = parts.add_parser("model", help="seconds of a step from operations and bytes")
    model.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    model.add_argument("--model", help="shape of the iteration on several GPUs: llama-3.1-8b")
    for name in ("num_gpus", "num_prompts", "prompt_tokens", "response_tokens", "num_minibatches"):
        model.add_argument(f"--{name}", type=int)
    written = parts.add_parser("report", help="tables and plots of the documentation")
    written.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    written.add_argument("--root", type=Path, default=Path("."),
                         help="where README.md and docs are")
    compared = parts.add_parser("compare", help="what became slower between two result files")
    compared.add_argument("before", type=Path)
    compared.add_argument("after", type=Path)
    paired = parts.add_parser("pairs", help="a part in an older tree and in this one, in turns")
    paired.add_argument("--base", default="HEAD", help="revision beside which this tree is timed")
    paired.add_argument("--turns", type=int, default=11, help="pairs of processes")
    paired.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    paired.add_argument("run", nargs=argparse.REMAINDER, metavar="PART ...",
                        help="what to run, as in `python -m benchmarks PART ...`")
    for part, unit in ((kernels, "case"), (engine, "provider"), (exact, "row"), (big, None)):
        part.add_argument("--device", choices=("cuda", "cpu"),
                          default="cuda" if torch.cuda.is_available() else "cpu")
        part.add_argument("--out", type=Path, default=Path("benchmarks/results"))
        part.add_argument("--small", action="store_true", help="sizes for trying the flow")
        if unit is not None:
            part.add_argument("--budget", type=float, default=float("inf"), metavar="SECONDS",
                              help=f"begin no {unit} after so long")
    return root


def kernels(options: argparse.Namespace) -> int:
    """Run the op benches; 1 when something of fastrl's is wrong."""
    begin = time.monotonic()
    settings = Settings(device=options.device, small=options.small,
                        wanted=tuple(options.providers), check_only=options.check_only,
                        min_rounds=options.rounds,
                        deadline=begin + options.budget)
    path = options.out / file_name(options.topic, options.device)
    try:
        rows = run_kernels(settings, load_cases(options.ops), path, options.topic, options.resume)
    except DeviceInError as error:
        left = options.budget - (time.monotonic() - begin)
        print(f"the device is in error ({error}); a new process goes on", flush=True)
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks", *sys.argv[1:], "--resume",
                                  f"--budget={left}"])
    return report(rows, path)


def engine(options: argparse.Namespace) -> int:
    """Measure the engine; 1 when it is wrong."""
    deadline = time.monotonic() + options.budget
    path = options.out / file_name("engine", options.device)
    rows = run_engine(options.device, options.small, options.providers, path, deadline)
    return report(rows, path)


def exact(options: argparse.Namespace) -> int:
    """Compare rollout and update; 1 when something raised."""
    set_workspaces(options.device)  # before the name of the device is asked for
    deadline = time.monotonic() + options.budget
    from benchmarks.exact import run_exact  # needs what trainers need

    path = options.out / file_name("exact", options.device)
    rows = run_exact(options.device, options.small, path, deadline)
    return report(rows, path)


def big(options: argparse.Namespace) -> int:
    """Measure an iteration of large models; 1 when it did not come to its end."""
    from benchmarks.big import run_big  # needs what trainers need

    path = options.out / file_name("big", options.device)
    rows = run_big(options.device, options.small, path)
    return report(rows, path)


def report(rows: Sequence[Row], path: Path) -> int:
    """Print what was measured; 1 when something of fastrl's is wrong."""
    print(table(rows))
    failures = [row for row in rows if row.is_failure]
    print(f"{path}: {len(rows)} rows, {len(failures)} wrong")
    return 1 if failures else 0


def scaling(options: argparse.Namespace) -> int:
    """Double every size; 1 when a doubling costs more than it may."""
    from benchmarks.scaling import beyond_limit, run_scaling  # needs what trainers need

    path = options.out / file_name("scaling", "cpu")
    rows = run_scaling(options.small, options.rounds, path)
    beyond = beyond_limit(rows)
    print(*beyond, sep="\n", end="\n" if beyond else "")
    return max(report(rows, path), int(bool(beyond)))


def predicted(options: argparse.Namespace) -> int:
    """Print the model's errors, and its answer for an iteration on several GPUs."""
    from benchmarks.model import markdown, read_cluster  # needs what trainers need

    names = ("model", "num_gpus", "num_prompts", "prompt_tokens", "response_tokens",
             "num_minibatches")
    cluster = read_cluster({name: getattr(options, name) for name in names})
    print(markdown(options.results, cluster))
    return 0


def written(options: argparse.Namespace) -> int:
    """Write what the documentation shows of the results."""
    from benchmarks.report import run_report  # needs what trainers need

    for path in run_report(options.results, options.root):
        print(path)
    return 0


def compare(options: argparse.Namespace) -> int:
    """Compare two result files; 1 when something became slower or broke."""
    changes = compare_files(options.before, options.after)
    print(changes_table(changes))
    return int(any(change.verdict in LOSSES for change in changes))


def pairs(options: argparse.Namespace) -> int:
    """Run a part in two trees in turns, and compare."""
    if options.turns < MIN_PAIRS:
        raise SystemExit(f"--turns: expected at least {MIN_PAIRS}, got {options.turns}: fewer "
                         f"pairs give no interval")
    if not options.run or options.run[0] in ("compare", "pairs"):
        raise SystemExit("pairs: expected a part that measures, such as `kernels --ops gae`")
    options.before, options.after = run_pairs(options.base, options.run, options.turns, options.out)
    return compare(options)


PARTS = {"kernels": kernels, "engine": engine, "exact": exact, "big": big, "scaling": scaling,
         "model": predicted, "report": written, "compare": compare, "pairs": pairs}


def main() -> int:
    """Exit status of the command line."""
    options = parser().parse_args()
    return PARTS[options.part](options)


if __name__ == "__main__":
    sys.exit(main())

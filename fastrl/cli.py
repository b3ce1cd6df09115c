"""The command line: `fastrl demo | sft | reward | ppo | grpo | rloo | dpo | best_of_n | run |
generate | chat | merge | plan | doctor`.

Options come from the config dataclasses (`fastrl.options`). Nothing heavy is imported before the
command line is known to be right, so that help and mistakes answer at once.

Exit codes: 0 done, 1 a failed check of `doctor` or a plan that does not fit, 2 a mistake in
settings, data or models, 130 stopped by Ctrl-C, 143 by SIGTERM.
"""

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastrl import __version__
from fastrl.config import check
from fastrl.environment import checks_values, set_up_logging
from fastrl.errors import ConfigError, FastRLError
from fastrl.interrupt import EXIT_CODE, Terminated, terminated_by_signal
from fastrl.options import Parser, parse_all, read_options
from fastrl.runs import RUN_TYPES
from fastrl.yaml_file import nearest

COMMANDS: dict[str, str] = {
    "demo": "Watch a small language model being aligned: five minutes, no downloads",
    "sft": "Fine-tune a model on demonstrations",
    "reward": "Train a reward model on rankings",
    "ppo": "Optimise a model against a reward model, with PPO or PPO-ptx",
    "grpo": "Optimise a model with GRPO: groups of responses in place of a critic",
    "rloo": "Optimise a model with RLOO: each response against the others to its prompt",
    "dpo": "Optimise a model on rankings directly, with DPO or IPO",
    "best_of_n": "Sample n completions per prompt and keep the best, as demonstrations",
    "run": "Run the stages of a recipe, skipping those that are finished",
    "generate": "Sample completions, as rows ready to be ranked",
    "chat": "Talk to a model in the terminal",
    "merge": "Make one plain checkpoint of LoRA adapters and their base model",
    "plan": "Say what a stage will take in memory, and what to change when it does not fit",
    "doctor": "Say what this machine can run, and try it",
}

PLANNED = ("pretrain", "sft", "reward", "ppo", "grpo", "rloo", "dpo")
"""Stages that `fastrl plan` knows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoRun:
    """The settings of `fastrl demo`."""

    output_dir: str = "runs/demo"
    """Folder of the run; a second call continues where the first one stopped."""
    seed: int = 0
    """Seeds data, models and samples."""

    def __post_init__(self) -> None:
        check(self.seed >= 0, "seed", "a whole number of at least 0", self.seed)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        argv: Words after `fastrl`; None takes them from the command line.
    """
    _let_idle_threads_sleep()
    try:
        set_up_logging()
        checks_values()  # a value that cannot be read is an error now, not in the first op
        with terminated_by_signal():
            code = _dispatch(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return code
    except FastRLError as error:
        print(f"fastrl: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nfastrl: stopped", file=sys.stderr)
        return 130
    except Terminated:
        print("\nfastrl: stopped by SIGTERM", file=sys.stderr)
        return EXIT_CODE
    except BrokenPipeError:
        # The reader (head, less) has gone; a second failure at exit would print a traceback.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        where = "" if error.filename is None else f"{error.filename}: "
        print(f"fastrl: error: {where}expected a file or folder that can be read and written, got: "
              f"{error.strerror or error}; check permissions and free space", file=sys.stderr)
        return 2


def _let_idle_threads_sleep() -> None:
    """Before torch starts its threads: those that wait must not spin beside another busy process.

    Spinning threads made small models ten times slower there (docs/log.md); a value that the user
    has set stays.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "0")


def _dispatch(argv: list[str]) -> int:
    """Run the command that the first word names."""
    command, rest = (argv[0], argv[1:]) if argv else ("--help", [])
    if command in ("--help", "-h", "help"):
        print(_usage())
        return 0
    if command in ("--version", "-V"):
        print(f"fastrl {__version__}")
        return 0
    if command not in COMMANDS:
        meant = nearest(command, COMMANDS)
        advice = f"did you mean {meant!r}?" if meant else f"commands: {', '.join(COMMANDS)}"
        raise ConfigError(f"unknown command {command!r}; {advice}")
    parser = Parser(prog=f"fastrl {command}", description=COMMANDS[command] + ".",
                    allow_abbrev=False)
    handlers: dict[str, Callable[[Parser, list[str]], int]] = {
        "demo": _demo, "run": _run, "generate": _generate, "chat": _chat,
        "merge": _merge, "plan": _plan, "doctor": _doctor,
    }
    if command in handlers:
        return handlers[command](parser, rest)
    return _stage(command, parser, rest)


def _usage() -> str:
    """What `fastrl --help` prints."""
    width = max(map(len, COMMANDS))
    return "\n".join([
        "usage: fastrl COMMAND [--name value ...]",
        "",
        "Reinforcement learning from human feedback: SFT, reward model, PPO, PPO-ptx and DPO.",
        "",
        "commands:",
        *(f"  {name:<{width}}  {sentence}" for name, sentence in COMMANDS.items()),
        "",
        "`fastrl COMMAND --help` lists the options of a command, `fastrl --version` the version.",
        "Start with `fastrl demo`.",
    ])


def _stage(kind: str, parser: Parser, argv: list[str]) -> int:
    """`fastrl sft | reward | ppo | dpo | best_of_n`: one stage from its settings."""
    folder, argv = _resumed_folder(parser, argv) if kind in PLANNED else (None, argv)
    config, quiet = read_options(parser, RUN_TYPES[kind], argv)
    if folder is not None and Path(config.output_dir) != folder:
        raise ConfigError(f"output_dir: expected {folder}, which --resume names, got "
                          f"{config.output_dir}; leave output_dir out")

    from fastrl.console import Console
    from fastrl.continuation import find_checkpoint
    from fastrl.pipeline import run_stage
    from fastrl.report import write_report
    from fastrl.stages import stage_lineage

    console = Console(quiet=quiet)
    checkpoint = None if folder is None else find_checkpoint(folder, stage_lineage(kind, config))
    folder = run_stage(kind, config, console=console, checkpoint=checkpoint)
    made = {"data": folder / "demonstrations.jsonl", "model": folder / "model"}
    lines = [f"{name:<7} {path}" for name, path in made.items() if path.exists()]
    console.result("\n".join([*lines, f"report  {write_report(folder)}"]))
    return 0


def _resumed_folder(parser: Parser, argv: list[str]) -> tuple[Path | None, list[str]]:
    """The folder that `--resume` names, and the words that stand for it: the run's settings."""
    parser.add_argument("--resume", metavar="FOLDER", default=argparse.SUPPRESS,
                        help="continue the run in this folder, with its settings, from its newest "
                             "checkpoint")
    finder = Parser(prog=parser.prog, add_help=False, allow_abbrev=False)
    finder.add_argument("--resume", type=Path)
    given, rest = finder.parse_known_args(argv)
    folder: Path | None = given.resume
    if folder is None:
        return None, rest
    settings = folder / "config.yaml"
    if not settings.is_file():
        raise ConfigError(f"--resume: expected the folder of a run, found no {settings}; check the "
                          "path")
    return folder, ["--config", str(settings), "--output_dir", str(folder), *rest]


def _run(parser: Parser, argv: list[str]) -> int:
    """`fastrl run`: a recipe; settings of a stage are `--stage.name value`."""
    parser.add_argument("recipe", type=Path, help="YAML file of stages")
    parser.add_argument("--data_root", type=Path, default=Path("."), metavar="FOLDER",
                        help="where the relative paths of the recipe begin [.]")
    parser.add_argument("--output_dir", type=Path, metavar="FOLDER",
                        help="folder of the run [runs/NAME-OF-THE-FILE]")
    parser.add_argument("--short", action="store_true", help="the recipe's short form, for tests")
    parser.add_argument("--from_stage", metavar="STAGE",
                        help="run this stage and all later ones again; old folders are renamed")
    parser.add_argument("--from_scratch", action="store_true",
                        help="begin stages that were stopped anew; old folders are renamed")
    parser.add_argument("--quiet", action="store_true", help="print warnings and results only")
    parser.epilog = ("--STAGE.SETTING VALUE changes a setting of a stage, as in "
                     "--ppo.kl_coef 0.05; --seed VALUE the seed of the recipe.")
    overrides, rest = _overrides(parser, argv)
    given = parse_all(parser, rest)

    from fastrl.console import Console
    from fastrl.pipeline import run_recipe

    console = Console(quiet=given.quiet)
    report = run_recipe(
        given.recipe, data_root=given.data_root,
        output_dir=given.output_dir or Path("runs") / given.recipe.stem,
        overrides=overrides, short=given.short, from_stage=given.from_stage,
        from_scratch=given.from_scratch, console=console)
    console.result(f"report  {report}")
    return 0


def _overrides(parser: Parser, words: list[str]) -> tuple[list[str], list[str]]:
    """`--ppo.kl_coef 0.1` and `--ppo.kl_coef=0.1` as `ppo.kl_coef=0.1`, and all other words."""
    overrides, others = [], []
    remaining = iter(words)
    for word in remaining:
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or ("." not in name and name != "seed"):
            others.append(word)
            continue
        if not equals:
            value = next(remaining, "")
        if not value or not equals and value.startswith("--"):
            raise ConfigError(f"{parser.prog}: --{name}: expected a value, got {value or 'none'}")
        overrides.append(f"{name}={value}")
    return overrides, others


def _demo(parser: Parser, argv: list[str]) -> int:
    """`fastrl demo`."""
    config, quiet = read_options(parser, DemoRun, argv)

    from fastrl.console import Console
    from fastrl.demo.run import run_demo

    run_demo(config.output_dir, seed=config.seed, console=Console(quiet=quiet))
    return 0


def _generate(parser: Parser, argv: list[str]) -> int:
    """`fastrl generate`."""
    from fastrl.generate import GenerateRun, generate

    config, quiet = read_options(parser, GenerateRun, argv)

    from fastrl.console import Console

    # Rows may go to standard output, so that everything else goes beside it.
    generate(config, Console(quiet=quiet, file=sys.stderr))
    return 0


def _chat(parser: Parser, argv: list[str]) -> int:
    """`fastrl chat`."""
    from fastrl.chat import ChatRun, chat

    config, quiet = read_options(parser, ChatRun, argv)

    from fastrl.console import Console

    chat(config, Console(quiet=quiet))
    return 0


def _merge(parser: Parser, argv: list[str]) -> int:
    """`fastrl merge`."""
    from fastrl.merge import MergeRun, merge

    config, quiet = read_options(parser, MergeRun, argv)

    from fastrl.console import Console

    merge(config, Console(quiet=quiet))
    return 0


def _plan(parser: Parser, argv: list[str]) -> int:
    """`fastrl plan`: a stage, a recipe or the table; 0 when it fits, 1 when it does not."""
    argv = [re.sub("^--gpu-memory(?==|$)", "--gpu_memory", word) for word in argv]
    if argv and argv[0] in PLANNED:
        return _plan_stage(argv[0], parser, argv[1:])
    parser.add_argument("what", metavar="STAGE|RECIPE", nargs="?",
                        help=f"one of {', '.join(PLANNED)} with the settings of that stage "
                             f"(`{parser.prog} ppo --help`), or the YAML file of a recipe")
    parser.add_argument("--data_root", type=Path, default=Path("."), metavar="FOLDER",
                        help="where the relative paths of a recipe begin [.]")
    parser.add_argument("--gpu_memory", metavar="TEXT",
                        help="plan every stage of a recipe for this much, such as 24GiB")
    parser.add_argument("--table", action="store_true",
                        help="print the largest model of each stage and card, and end")
    parser.add_argument("--quiet", action="store_true", help="print the verdict only")
    parser.epilog = "--STAGE.SETTING VALUE changes a setting of a recipe's stage."
    overrides, rest = _overrides(parser, argv)
    given = parse_all(parser, rest)
    if given.what is None and not given.table:
        raise ConfigError(f"{parser.prog}: expected {', '.join(PLANNED)}, a recipe or --table, got "
                          f"nothing; `{parser.prog} --help` says more")
    if given.table and (given.what or given.gpu_memory or overrides):
        raise ConfigError(f"{parser.prog}: expected --table alone, because its cards, shapes and "
                          f"settings are fixed; leave the rest out, or plan a stage with --shape")

    from fastrl.console import Console
    from fastrl.planning import plan_recipe, table

    console = Console(quiet=given.quiet)
    if given.table:
        console.result(table())
        return 0
    fits = plan_recipe(Path(given.what), given.data_root, overrides, given.gpu_memory, console)
    return 0 if fits else 1


def _plan_stage(kind: str, parser: Parser, argv: list[str]) -> int:
    """`fastrl plan STAGE`: the settings of the stage; files and folders may lack."""
    parser.prog = f"{parser.prog} {kind}"
    outer = Parser(prog=parser.prog, add_help=False, allow_abbrev=False)
    for each in (outer, parser):  # the one that reads it, and the one that has the help
        each.add_argument("--shape", metavar="NAME", default=argparse.SUPPRESS,
                          help="plan for this public shape, such as llama-3.1-8b, in place of "
                               "every model folder")
    given, rest = outer.parse_known_args(argv)
    config, quiet = read_options(parser, RUN_TYPES[kind], rest, needs_all=False)

    from fastrl.console import Console
    from fastrl.planning import plan_stage

    fits = plan_stage(kind, config, getattr(given, "shape", None), Console(quiet=quiet))
    return 0 if fits else 1


def _doctor(parser: Parser, argv: list[str]) -> int:
    """`fastrl doctor`: 0 when the self check passes."""
    from fastrl.doctor import DoctorRun, examine

    config, quiet = read_options(parser, DoctorRun, argv)

    from fastrl.console import Console

    return 0 if examine(config, Console(quiet=quiet)) else 1

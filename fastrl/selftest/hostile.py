"""Hostile checkpoints, tokenizers, recipes and data sets, tried where nothing may execute.

`try_all` starts a Python of its own in which an audit hook ends the attempt when code from outside
of the installed packages is compiled or run, a process is started, a socket is made, a library is
loaded or a pickle is read. Each case must end in a FastRLError. A compiled chat template is the one
exception: it runs in Jinja's sandbox, see `fastrl.data.template_limits`.

    python -m fastrl.selftest.hostile
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fastrl.errors import FastRLError
from fastrl.selftest.hostile_cases import CASES, Case, good_model, good_tokenizer

FORBIDDEN = ("subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork",
             "os.startfile", "pty.", "socket.", "ctypes.dlopen", "pickle.find_class", "webbrowser.",
             "urllib.", "ftplib.", "smtplib.", "http.")
"""Beginnings of the audit events that none of the cases may cause."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one case."""

    name: str
    kind: str
    error: str
    """The class of the exception, or an empty text where none came."""
    message: str
    events: tuple[str, ...]
    """Forbidden events; none is expected."""

    @property
    def withstood(self) -> bool:
        """A FastRLError came, and nothing was executed."""
        return self.error != "" and not self.events


def try_all(folder: Path | None = None, timeout_s: float = 300) -> list[Outcome]:
    """Try every case in a Python of its own.

    Args:
        folder: Where the hostile files are written; None: a temporary folder.
        timeout_s: Of the whole attempt.
    Raises:
        subprocess.SubprocessError: when the process ends before the last case.
    """
    if folder is None:
        with tempfile.TemporaryDirectory() as made:
            return try_all(Path(made), timeout_s)
    done = subprocess.run([sys.executable, "-m", "fastrl.selftest.hostile", "--child", str(folder)],
                          env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
                          capture_output=True, text=True, timeout=timeout_s, check=True,
                          stdin=subprocess.DEVNULL)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return [Outcome(**{**row, "events": tuple(row["events"])}) for row in rows]


class Watch:
    """An audit hook that refuses what no loader needs; hooks cannot be removed."""

    def __init__(self, own: Path) -> None:
        """Watch from now on; `own` is the folder of the hostile files."""
        self.events: list[str] = []
        self._own = str(own.resolve())
        self._trusted = tuple(str(Path(path).resolve()) for path in sys.path
                              if path and not str(Path(path).resolve()).startswith(self._own))
        sys.addaudithook(self._audit)

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        where = ""
        if event == "exec":
            where = getattr(args[0], "co_filename", "?")
        elif event == "compile":
            where = str(args[1])
        elif event == "import":
            where = str(args[1] or "")
            if self._own not in where:
                return
        elif not event.startswith(FORBIDDEN):
            return
        if event in ("exec", "compile") and self._is_trusted(where):
            return
        self.events.append(f"{event} {where or args!r:.120}")
        raise PermissionError(f"{event}: nothing may be executed")

    def _is_trusted(self, where: str) -> bool:
        return (where == "<template>" or where.startswith("<frozen ")
                or where.startswith(self._trusted) and not where.startswith(self._own))


def _try(case: Case, folder: Path, watch: Watch) -> Outcome:
    watch.events.clear()
    error = message = ""
    try:
        case.open(case.write(folder))
    except FastRLError as caught:
        error, message = type(caught).__name__, str(caught)
    except Exception as caught:
        message = f"{type(caught).__name__}: {caught}"
    events = [*watch.events, *(["executed"] if list(folder.rglob("executed")) else [])]
    return Outcome(case.name, case.kind, error, message, tuple(events))


def _child(folder: Path) -> None:
    """Load a good model and tokenizer first, so that what they import is there; then the cases."""
    for name in ("good", "good_other"):
        good_model(folder / name, other=name == "good_other")
    good_tokenizer(folder / "tokenizer")
    import_module("fastrl.recipe")
    if find_spec("pyarrow") is not None:
        import_module("pyarrow.parquet")
    os.chdir(folder)  # what a pickle would leave behind is found here
    watch = Watch(folder)
    for case in CASES:
        place = folder / case.name
        place.mkdir(parents=True)
        outcome = _try(case, place, watch)
        row = {name: getattr(outcome, name) for name in outcome.__slots__}
        sys.stdout.write(json.dumps(row) + "\n")


def main(argv: list[str]) -> int:
    """Print a line per case; 1 when one did not end as it must."""
    if argv[:1] == ["--child"]:
        _child(Path(argv[1]))
        return 0
    outcomes = try_all()
    for outcome in outcomes:
        sys.stdout.write(f"{'ok  ' if outcome.withstood else 'FAIL'} {outcome.kind:9} "
                         f"{outcome.name}: {outcome.message:.150} {' '.join(outcome.events)}\n")
    sys.stdout.write(f"{sum(o.withstood for o in outcomes)} of {len(CASES)} withstood\n")
    return 0 if len(outcomes) == len(CASES) and all(o.withstood for o in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

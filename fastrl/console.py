"""What a person sees while stages run: headers, progress with the numbers that matter, samples.

On a terminal progress is a live bar; elsewhere it is a plain line every few seconds, so that logs
stay short. Text of models and data is shown with its control characters made visible: a sample
cannot move the cursor or colour the screen.
"""

import sys
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, TextIO

from rich import box
from rich.console import Console as RichConsole
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Task, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Table
from rich.text import Text

HEADLINES: tuple[tuple[str, str, str], ...] = (
    ("reward/score_mean", "reward", ".3f"),
    ("kl/policy_ref", "KL", ".2f"),
    ("loss/train", "loss", ".4f"),
    ("loss/ranking", "loss", ".4f"),
    ("reward/accuracy", "accuracy", ".3f"),
    ("entropy/mean", "entropy", ".2f"),
    ("response/length_mean", "length", ".0f"),
    ("throughput/tokens_per_s", "tokens/s", ",.0f"),
)
"""Metrics shown beside a progress bar, in this order, where a step has them."""

PLAIN_INTERVAL_S = 5.0
"""Seconds between two progress lines where there is no terminal."""

_VISIBLE = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160))
            if chr(code) not in "\n\t"}
# Bidirectional overrides and invisible separators can make a text read as another one.
_VISIBLE |= {code: f"\\u{code:04x}" for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))}


def printable(text: str) -> str:
    """Return `text` with control characters written as escapes; newlines and tabs stay."""
    return text.translate(_VISIBLE)


def format_seconds(seconds: float) -> str:
    """Return a duration as a person writes it: 4.2s, 1:05, 2:00:09."""
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def headline(metrics: Mapping[str, float]) -> str:
    """Return the numbers that matter of one step, as `reward 0.512  KL 1.20`."""
    parts = (f"{label} {format(metrics[name], spec)}" for name, label, spec in HEADLINES
             if name in metrics)
    return "  ".join(parts)


class Progress:
    """The progress of one stage; a context manager made by `Console.progress`."""

    def __init__(self, console: "Console", name: str, total: int) -> None:
        self._console, self._name, self._total = console, name, max(total, 1)
        self._begin = time.monotonic()
        self._last_line = self._begin
        self._last_tenth = 0
        self._live = _live_bar(console.rich, name, self._total) if console.is_live else None

    def __enter__(self) -> "Progress":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show that `step` of the total are done, with the last metrics."""
        if self._live is not None:
            task = self._live.task_ids[0]
            self._live.update(task, completed=step, numbers=headline(metrics))
        elif not self._console.quiet:
            self._plain_line(step, metrics)

    def _plain_line(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line every 5 s, or every tenth of the steps but not twice in a second; the last."""
        now, tenth = time.monotonic(), 10 * step // self._total
        is_last, waited = step >= self._total, now - self._last_line
        is_due = waited >= PLAIN_INTERVAL_S or (tenth > self._last_tenth and waited >= 1)
        if not is_due and not is_last:
            return
        self._last_line, self._last_tenth = now, tenth
        elapsed = now - self._begin
        clock = (f"took {format_seconds(elapsed)}" if is_last
                 else f"left {format_seconds(elapsed / max(step, 1) * (self._total - step))}")
        parts = (f"{self._name} {step}/{self._total}", headline(metrics), clock)
        self._console.print("  ".join(part for part in parts if part))


def _live_bar(console: RichConsole, name: str, total: int) -> RichProgress:
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(),
               TimeRemainingColumn(compact=True, elapsed_when_finished=True), _Numbers(""))
    bar = RichProgress(*columns, console=console, refresh_per_second=4)
    bar.add_task(name, total=total, numbers="")
    return bar


class _Numbers(TextColumn):
    """The headline numbers, dropped from the right where the terminal is narrow."""

    def render(self, task: Task) -> Text:
        return Text(str(task.fields["numbers"]), no_wrap=True, overflow="ellipsis")


class Console:
    """Everything fastrl prints goes through one of these.

    Args:
        quiet: Print nothing but warnings and results.
        file: Where to write; standard output unless told.
        live: Draw bars and colours; None: when `file` is a terminal.
        width: Columns; None asks the terminal (100 where there is none).
    """

    def __init__(self, *, quiet: bool = False, file: TextIO | None = None,
                 live: bool | None = None, width: int | None = None) -> None:
        file = file or sys.stdout
        is_terminal = file.isatty() if live is None else live
        self.quiet = quiet
        self.rich = RichConsole(file=file, force_terminal=is_terminal, markup=False,
                                highlight=False, emoji=False, soft_wrap=not is_terminal,
                                width=width or (None if is_terminal else 100))
        self.is_live = is_terminal and not quiet
        self._answers: dict[str, Sequence[str]] = {}
        self._prompts: Sequence[str] = ()

    def print(self, text: str = "") -> None:
        """Print one line for information; nothing in quiet mode."""
        if not self.quiet:
            self.rich.print(printable(text))

    def result(self, text: str) -> None:
        """Print a line that another program may read: also in quiet mode, never wrapped."""
        self.rich.print(text, soft_wrap=True)

    def piece(self, text: str) -> None:
        """Print a piece of a text that is still being made, at once and without a line end."""
        self.rich.file.write(printable(text))
        self.rich.file.flush()

    def warning(self, text: str) -> None:
        """Print a warning, also in quiet mode."""
        self.rich.print(Text(f"warning: {printable(text)}", style="yellow"))

    def stage(self, name: str, detail: str = "") -> None:
        """Print the header of a stage."""
        if self.is_live:
            self.rich.print()
            self.rich.rule(Text(name, style="bold"), align="left", style="dim")
            if detail:
                self.rich.print(Text(printable(detail), style="dim"))
        else:
            self.print(f"== {name}" + (f": {detail}" if detail else ""))

    def progress(self, name: str, total: int) -> Progress:
        """Return the progress of `total` steps: `with console.progress("sft", 100) as progress`."""
        return Progress(self, name, total)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Print a table; numbers are right-aligned and floats rounded to three places."""
        if self.quiet:
            return
        table = Table(title=title or None, box=box.SIMPLE_HEAD, title_justify="left")
        for index, name in enumerate(columns):
            is_number = all(isinstance(row[index], (int, float)) for row in rows)
            table.add_column(name, justify="right" if is_number else "left")
        for row in rows:
            table.add_row(*[Text(_cell(value)) for value in row])
        self.rich.print(table)

    def samples(self, title: str, prompts: Sequence[str],
                answers: Mapping[str, Sequence[str]]) -> None:
        """Print the answers of several models to the same prompts, side by side.

        Args:
            title: Shown above.
            prompts: One text per row.
            answers: Model name -> one answer per prompt.
        """
        if self.quiet:
            return
        if not self.is_live or self.rich.width < 30 * (len(answers) + 1):
            self._stacked_samples(title, prompts, answers)
            return
        table = Table(title=title, box=box.ROUNDED, show_lines=True, title_justify="left",
                      expand=True)
        for name in ("prompt", *answers):
            table.add_column(name, ratio=1, overflow="fold")
        for index, prompt in enumerate(prompts):
            texts = (prompt, *(column[index] for column in answers.values()))
            table.add_row(*[Text(printable(text)) for text in texts])
        self.rich.print(table)

    def answers(self, name: str, step: int, prompts: Sequence[str], answers: Sequence[str]) -> None:
        """Print what a model in training answers now, beside the last answers of earlier ones.

        Args:
            name: The model; its earlier answers are replaced.
            step: Steps it has trained.
            prompts: One text per row; other prompts than before start a new board.
            answers: One text per prompt.
        """
        if list(prompts) != list(self._prompts):
            self._prompts, self._answers = list(prompts), {}
        self._answers[name] = answers
        self.samples(f"{name} after {step} steps", prompts, self._answers)

    def _stacked_samples(self, title: str, prompts: Sequence[str],
                         answers: Mapping[str, Sequence[str]]) -> None:
        """The same without columns, for logs and narrow terminals."""
        width = max(map(len, ("prompt", *answers)))
        self.print(title)
        for index, prompt in enumerate(prompts):
            texts = {"prompt": prompt} | {name: column[index] for name, column in answers.items()}
            for name, text in texts.items():
                self.print(f"  {name:<{width}}  " + text.replace("\n", "\n" + " " * (width + 4)))
            self.print()

    def explain(self, names: Sequence[str]) -> None:
        """Print a small box that says what these metrics mean."""
        from fastrl.glossary import GLOSSARY

        if self.quiet:
            return
        lines = [f"{name}: {GLOSSARY[name].meaning}" for name in names if name in GLOSSARY]
        if self.is_live:
            self.rich.print(Panel("\n".join(lines), title="what the numbers mean",
                                  title_align="left", border_style="dim"))
        else:
            self.print("\n".join(["what the numbers mean", *(f"  {line}" for line in lines)]))


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    return printable(str(value))

"""How a command talks: results on stdout, everything else on stderr, colours only where they are wanted.

Native libraries print to file descriptor 1. While a command works, descriptor 1 therefore points at stderr,
and the result goes to the descriptor that was stdout (see `separated`).
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TextIO

from compress.errors import escape

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

WIDE = 10_000  # columns where no terminal wraps: what reads a pipe wants one row per line
JOURNAL = 200  # events kept for a crash log
LINE_SECONDS = 10.0  # plain progress: at least so far apart,
LINE_SHARE = 0.05  # and with so much more done,
LINE_PATIENCE = 60.0  # unless nothing was said for so long
SECONDS = re.compile(r"\d+(\.\d+)? s")  # a detail that only says how long it took, which has a column
STYLES = {
    "ok": "green",
    "pass": "bold green",
    "done": "green",
    "fail": "bold red",
    "error": "bold red",
    "missing": "red",
    "inconclusive": "bold yellow",
    "warning": "yellow",
    "low": "yellow",
    "stopped": "yellow",
    "off": "dim",
    "cached": "dim",
    "skipped": "dim",
}


@contextmanager
def separated() -> Iterator[TextIO]:
    """Yields the real stdout; inside, whatever prints to file descriptor 1 prints to stderr."""
    for descriptor in (0, 1, 2):  # a closed one would be given to the next file that is opened
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", errors="backslashreplace", closefd=False)
    _flush()
    real = os.fdopen(os.dup(1), "w", encoding="utf-8", errors="backslashreplace")
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield real
    finally:
        _flush()
        with suppress(BrokenPipeError):
            real.flush()
        os.dup2(real.fileno(), 1)
        with suppress(BrokenPipeError):
            real.close()


def _flush() -> None:
    """Empty Python's and C's buffers of stdout, which else would come out where stdout points next."""
    import ctypes

    with suppress(OSError, ValueError, AttributeError):
        sys.stdout.flush()
    with suppress(OSError, AttributeError, TypeError):  # no C library by that name on some systems
        ctypes.CDLL(None).fflush(None)


def wants_colour(stream: TextIO, env: Mapping[str, str], *, refused: bool = False) -> bool:
    """--no-color and NO_COLOR (no-color.org) say no, FORCE_COLOR yes, TERM=dumb no; else terminals get it."""
    if refused or env.get("NO_COLOR"):
        return False
    if env.get("FORCE_COLOR", "0") not in ("", "0"):
        return True
    return env.get("TERM") != "dumb" and _is_terminal(stream)


def wants_bars(stream: TextIO, env: Mapping[str, str]) -> bool:
    """Whether progress may redraw its line: on a terminal that can, and not in CI."""
    return _is_terminal(stream) and env.get("TERM") != "dumb" and env.get("CI", "") in ("", "0", "false")


def _is_terminal(stream: TextIO) -> bool:
    try:
        return stream.isatty()
    except ValueError:  # closed
        return False


def make_console(stream: TextIO, *, colour: bool) -> Console:
    """A console that prints text as it is: no markup, no guessing of colours, no wrapping in a pipe."""
    from rich.console import Console

    terminal = _is_terminal(stream)
    return Console(
        file=stream,
        color_system=("auto" if terminal else "standard") if colour else None,
        force_terminal=terminal or colour,
        width=None if terminal else WIDE,
        markup=False,
        highlight=False,
        emoji=False,
    )


def readable(text: str) -> str:
    """``text`` for a terminal: control characters escaped, no-break spaces as spaces that grep finds."""
    return escape(text.replace("\xa0", " "))


def print_table(
    console: Console,
    heads: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    right: Iterable[int] = (),
    fold: int | None = None,
) -> None:
    """Rows in columns without borders, nothing ever cut off. ``right``: columns of numbers; ``fold``: the one
    that breaks into lines on a narrow terminal. Control characters in cells are shown escaped."""
    from rich.table import Table
    from rich.text import Text

    cells = [[readable(str(cell)) for cell in row] for row in rows]
    numbers = set(right)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold", show_header=any(heads))
    for index, head in enumerate(heads):
        most = _room(console, heads, cells, index) if index == fold else None
        justify: Literal["left", "right"] = "right" if index in numbers else "left"
        table.add_column(head, justify=justify, no_wrap=index != fold, max_width=most)
    for row in cells:
        table.add_row(*(Text(cell, style=STYLES.get(cell.strip().lower(), "")) for cell in row))
    for segments in console.render_lines(table, console.options.update(width=WIDE), pad=False):
        line = Text.assemble(*((segment.text, segment.style or "") for segment in segments))
        line.rstrip()
        console.print(line, soft_wrap=True)


def _room(console: Console, heads: Sequence[str], rows: Sequence[Sequence[str]], fold: int) -> int:
    """Columns of the terminal that the others leave to column ``fold``, at least 30."""
    from rich.cells import cell_len

    taken = sum(
        2 + max(map(cell_len, column))
        for index, column in enumerate(zip(heads, *rows, strict=True))
        if index != fold
    )
    return max(30, console.width - taken)


@dataclass
class Screen:
    """One invocation's two consoles and what the common options said. ``verbosity``: 0, or -q / -v counts."""

    out: Console
    err: Console
    command: str
    json: bool = False
    verbosity: int = 0
    debug: bool = False
    bars: bool = False
    run: str | None = None  # the run folder, once known: crash logs go there
    journal: deque[str] | None = None

    def events(self, opening: str = "") -> Events:
        """Listens to a run: bars on a terminal, else lines. What it hears is kept for a crash log.

        ``opening``: what goes on before the first event, for who waits at a terminal.
        """
        made = (LiveEvents if self.bars else Events)(self.err, self.verbosity, opening=opening)
        self.journal = made.journal
        return made

    def warn(self, text: str) -> None:
        print_word(self.err, "warning", text)


def print_word(console: Console, word: str, text: str) -> None:
    """``word: text`` with the word, if any, in its colour; every line of ``text`` gets it."""
    from rich.text import Text

    for line in text.splitlines() or [""]:
        head = Text.assemble((f"{word}:", STYLES.get(word, "")), " ") if word else Text()
        console.print(head + readable(line), soft_wrap=True)


def duration(seconds: float) -> str:
    """0.4 s, 12 s, 3 min 05 s, 2 h 03 min."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


class Events:
    """What a run reports, as plain lines: stages, and progress seldom enough for a CI log.

    ``verbosity`` -1 leaves warnings only, -2 nothing. The last events are kept in ``journal``.
    """

    def __init__(
        self,
        console: Console,
        verbosity: int = 0,
        clock: Callable[[], float] = time.monotonic,
        opening: str = "",
    ) -> None:
        self.console, self.verbosity, self.clock, self.opening = console, verbosity, clock, opening
        self.journal: deque[str] = deque(maxlen=JOURNAL)
        self._started: dict[str, float] = {}
        self._said: dict[str, tuple[float, float]] = {}  # stage: when, and at what share

    def __enter__(self) -> Events:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def stage(self, name: str, status: str, detail: str = "") -> None:
        """A stage began or ended: status is start, done, cached, skipped or stopped."""
        now = self.clock()
        self._note(f"stage {name} {status} {detail}")
        if status == "start":
            self._started[name] = now
            self._said[name] = (now, 0.0)
            self._begin(name, detail)
            return
        took = duration(now - self._started.pop(name)) if name in self._started else ""
        self._end(name)
        if self.verbosity > -1:
            self._line(status, name, took, "" if took and SECONDS.fullmatch(detail) else detail)

    def progress(self, stage: str, done: float, total: float, text: str = "") -> None:
        """``done`` of ``total`` (any unit) of a stage; ``text`` is what to show beside it."""
        share = min(1.0, max(0.0, done / total)) if total > 0 else 0.0
        self._note(f"progress {stage} {share:.4f} {text}")
        if self.verbosity > -1:
            self._move(stage, share, text)

    def note(self, text: str) -> None:
        self._note(f"note {text}")
        if self.verbosity > -1:
            print_word(self.console, "note", text)

    def warn(self, text: str) -> None:
        self._note(f"warning {text}")
        if self.verbosity > -2:
            print_word(self.console, "warning", text)

    def _note(self, text: str) -> None:
        self.journal.append(f"{self.clock():.3f} {escape(text).rstrip()}")

    def _line(self, word: str, name: str, took: str, detail: str) -> None:
        from rich.text import Text

        rest = f"{name:<9} {took:>12}  {readable(detail)}".rstrip()
        styled = Text.assemble((f"{word:<8}", STYLES.get(word, "")), "  ", rest)
        self.console.print(styled, soft_wrap=True)

    def _begin(self, name: str, detail: str) -> None:
        if self.verbosity > -1:
            self._line("start", name, "", detail)

    def _move(self, stage: str, share: float, text: str) -> None:
        now = self.clock()
        when, last = self._said.setdefault(stage, (now, 0.0))
        waited = now - when
        steady = waited >= LINE_SECONDS and share - last >= LINE_SHARE
        if share >= 1 or not (steady or waited >= LINE_PATIENCE):
            return  # the end has a line of its own
        self._said[stage] = (now, share)
        left = self._left(stage, share)
        self._line("...", stage, f"{100 * share:.0f} %", f"{text}{left and f' ({left} left)'}".strip())

    def _left(self, stage: str, share: float) -> str:
        spent = self.clock() - self._started.get(stage, self.clock())
        return f"about {duration(spent * (1 - share) / share)}" if share >= 0.02 and spent > 0 else ""

    def _end(self, name: str) -> None:
        self._said.pop(name, None)

    def _close(self) -> None:
        """Nothing to take down: lines stay."""


class LiveEvents(Events):
    """The same with one bar, redrawn in place, for the stage that works now."""

    _bar: Progress | None = None
    _task: tuple[str, TaskID] | None = None

    def __enter__(self) -> Events:
        if self.opening and self.verbosity > -1:
            self._show("", self.opening, None)
        return self

    def _begin(self, name: str, detail: str) -> None:
        if self.verbosity > -1:
            self._show(name, detail)

    def _show(self, name: str, text: str, total: float | None = 1.0) -> Progress:
        if self._bar is None:
            self._bar = _make_bar(self.console)
            self._bar.start()
        if self._task is None or self._task[0] != name:
            self._end(name)
            self._task = (name, self._bar.add_task(name, total=total, text=readable(text)))
        return self._bar

    def _move(self, stage: str, share: float, text: str) -> None:
        bar = self._show(stage, text)
        if self._task is not None:
            bar.update(self._task[1], completed=share, text=readable(text))

    def _end(self, name: str) -> None:
        super()._end(name)
        if self._bar is not None and self._task is not None:
            self._bar.remove_task(self._task[1])
            self._bar.refresh()  # else the line that is printed next draws the old bar once more
            self._task = None

    def _close(self) -> None:
        self._end("")
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _make_bar(console: Console) -> Progress:
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description:<9}", markup=False),
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[text]}", markup=False),
        console=console,
        transient=True,
        redirect_stdout=False,  # stdout is for results
        redirect_stderr=True,
    )


def document(command: str, exit_code: int, result: Any, error: Mapping[str, Any] | None) -> str:
    """The one JSON document of ``--json``. ``status``: ok, failed (a verdict said no) or error."""
    from compress.files import dump_json

    status = "error" if error is not None else "ok" if exit_code == 0 else "failed"
    return dump_json(
        {
            "schema_version": 1,
            "command": command,
            "status": status,
            "exit_code": exit_code,
            "result": result,
            "error": error,
        }
    )

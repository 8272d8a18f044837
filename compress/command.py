"""What every command shares: the common options, stdout for the result alone, errors as one line."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TextIO

import click

from compress.console import (
    Screen,
    document,
    make_console,
    print_word,
    separated,
    wants_bars,
    wants_colour,
)
from compress.failures import Failure, explain
from compress.launch import launched
from compress.stages import STAGES

SILENT = -2  # the verbosity that says errors only


@dataclass(frozen=True)
class Answer:
    """What a command found: ``value`` for --json; ``show`` prints it for people, or ``text`` is printed."""

    value: Any
    show: Callable[[Screen], None] | None = None
    text: str = ""
    exit_code: int = 0


@dataclass(frozen=True)
class Common:
    """The options that every command has, given before or after its name."""

    json: bool = False
    verbose: int = 0
    quiet: int = 0
    no_color: bool = False
    debug: bool = False

    @staticmethod
    def take(given: dict[str, Any]) -> Common:
        """Takes them out of a command's options."""
        return Common(*(given.pop(name) for name in ("json_", "verbose", "quiet", "no_color", "debug")))

    def __or__(self, other: Common) -> Common:
        return Common(
            self.json or other.json,
            self.verbose + other.verbose,
            self.quiet + other.quiet,
            self.no_color or other.no_color,
            self.debug or other.debug,
        )


def common_options() -> list[click.Parameter]:
    """What every command has after its own options."""
    return [
        click.Option(["--json", "json_"], is_flag=True, help="Print one JSON document on stdout."),
        click.Option(["-v", "--verbose"], count=True, help="Say more."),
        click.Option(["-q", "--quiet"], count=True, help="Say less; -qq: errors and the result only."),
        click.Option(["--no-color"], is_flag=True, help="No colours (NO_COLOR does the same)."),
        click.Option(["--debug"], is_flag=True, help="Show the traceback of a failure."),
    ]


class Program(click.Group):
    """The group of all commands; its help lists them in ``sections``, in the order of need."""

    sections: Mapping[str, Sequence[str]]

    def __init__(self, *args: Any, sections: Mapping[str, Sequence[str]], **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.params += common_options()
        self.sections = sections

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the sections with one line for each command."""
        for title, names in self.sections.items():
            commands = [(name, self.get_command(ctx, name)) for name in names]
            with formatter.section(title):
                formatter.write_dl([(n, c.get_short_help_str(90)) for n, c in commands if c is not None])

    def answering(self, name: str, **settings: Any) -> Callable[[Callable[..., Answer]], click.Command]:
        """Register a command: its function gets a `Screen` and its own options, and gives an `Answer`."""

        def decorate(function: Callable[..., Answer]) -> click.Command:
            @functools.wraps(function)
            def callback(**given: Any) -> int:
                context = click.get_current_context()
                arguments, before = context.obj
                common = before | Common.take(given)
                return execute(name, common, arguments, functools.partial(function, **given))

            made = self.command(name, **settings)(callback)
            made.params += common_options()
            return made

        return decorate


def execute(name: str, common: Common, arguments: Sequence[str], body: Callable[[Screen], Answer]) -> int:
    """Run a command's body with stdout kept for its result; gives the exit code.

    Of the processes that torchrun started, all run a pipeline and the first talks; the first alone runs
    any other command.
    """
    at, together = launched(), name in ("run", *STAGES)
    if at.rank and not together:
        return 0
    with separated() as out:
        screen = _screen(name, common, out)
        _calm_libraries(screen.verbosity)
        try:
            with _processes() if at.several and together else nullcontext():
                answer = body(screen)
            if not at.rank:
                _print(screen, answer, out)
        except (click.ClickException, click.exceptions.Exit, SystemExit):
            raise  # usage, for `main`
        except BaseException as error:
            if at.several and together:
                return _fail_together(screen, error, arguments, out)
            return _fail(screen, explain(error, screen, arguments), error, out)
        return answer.exit_code


@contextmanager
def _processes() -> Iterator[None]:
    """Inside, the processes that torchrun started are a group."""
    from compress import distributed

    distributed.begin()
    yield
    distributed.end()


def _fail_together(screen: Screen, error: BaseException, arguments: Sequence[str], out: TextIO) -> int:
    """One of the processes says what went wrong; all end with its exit code."""
    from compress import distributed

    if not distributed.fails_first():
        return distributed.code_left(1)
    code = _fail(screen, explain(error, screen, arguments), error, out)
    out.flush()
    distributed.leave_code(code)
    return code


def _screen(name: str, common: Common, out: TextIO) -> Screen:
    colour = functools.partial(wants_colour, env=os.environ, refused=common.no_color)
    return Screen(
        out=make_console(out, colour=colour(out)),
        err=make_console(sys.stderr, colour=colour(sys.stderr)),
        command=name,
        json=common.json,
        verbosity=SILENT if launched().rank else common.verbose - common.quiet,
        debug=common.debug,
        bars=wants_bars(sys.stderr, os.environ) and not launched().rank,
    )


def _calm_libraries(verbosity: int) -> None:
    """Other libraries' warnings and logs are noise to a user, unless -v asks for them."""
    import logging
    import warnings

    logging.basicConfig(level=logging.ERROR if verbosity < 1 else logging.INFO)
    warnings.simplefilter("ignore" if verbosity < 1 else "default")


def _print(screen: Screen, answer: Answer, out: TextIO) -> None:
    """The result, to whoever reads stdout; a reader that went away (``| head``) is no failure."""
    try:
        if screen.json:
            out.write(document(screen.command, answer.exit_code, answer.value, None))
        elif answer.show is not None:
            answer.show(screen)
        else:
            out.write(answer.text)
        out.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())  # for what is still buffered


def _fail(screen: Screen, failure: Failure, error: BaseException, out: TextIO) -> int:
    for line in failure.lines:
        print_word(screen.err, failure.word, line)
    if screen.debug:
        import traceback

        screen.err.out("".join(traceback.format_exception(error)).rstrip(), highlight=False)
    if screen.json:
        out.write(document(screen.command, failure.exit_code, None, failure.error))
    return failure.exit_code

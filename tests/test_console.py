"""Streams, colours, tables, progress and signals of the command line."""

from __future__ import annotations

import ctypes
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import nn

from compress import console as talk
from compress.api import _task
from compress.console import Events, LiveEvents, Screen
from compress.errors import ConfigError, ConfigErrors, IntegrityError, Interrupted, ResourceError
from compress.failures import StopNow, Stopper, explain
from deploy.errors import RunnerError


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


class Clock:
    """A clock that is set by hand."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def plain(verbosity: int = 0) -> tuple[Events, io.StringIO, Clock]:
    stream, clock = io.StringIO(), Clock()
    return Events(talk.make_console(stream, colour=False), verbosity, clock), stream, clock


# -- streams --------------------------------------------------------------------------------------------


def test_what_native_code_prints_goes_to_stderr_and_the_result_to_stdout(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with talk.separated() as out:
        os.write(1, b"raw noise\n")
        ctypes.CDLL(None).puts(b"C noise")  # stays in C's buffer until it is flushed
        print("python noise")  # noqa: T201  # the noise that is tested
        out.write("result ü\n")
    print("after")  # noqa: T201  # stdout is back
    found = capfd.readouterr()
    assert found.out == "result ü\nafter\n"
    assert {"raw noise", "C noise"} <= set(found.err.splitlines())


def test_stdout_comes_back_after_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="inside"), talk.separated():
        raise ValueError("inside")
    os.write(1, b"back\n")
    assert capfd.readouterr().out == "back\n"


def test_lone_surrogates_of_odd_file_names_can_be_written(capfd: pytest.CaptureFixture[str]) -> None:
    with talk.separated() as out:
        out.write(talk.document("verify", 0, {"path": "a\udcff"}, None))
    assert json.loads(capfd.readouterr().out)["result"] == {"path": "a\udcff"}


def test_closed_standard_streams_are_no_failure() -> None:
    code = "from compress.cli import main; raise SystemExit(main(['schema']))"
    done = subprocess.run(["bash", "-c", f'"{sys.executable}" -c "{code}" >&- 2>&- <&-'], check=False)
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("env", "terminal", "refused", "expected"),
    [
        ({}, True, False, True),
        ({}, False, False, False),
        ({"NO_COLOR": "1"}, True, False, False),
        ({"NO_COLOR": ""}, True, False, True),
        ({"TERM": "dumb"}, True, False, False),
        ({"FORCE_COLOR": "1"}, False, False, True),
        ({"FORCE_COLOR": "0"}, False, False, False),
        ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, True, False, False),
        ({"FORCE_COLOR": "1"}, True, True, False),
    ],
)
def test_colour(env: dict[str, str], terminal: bool, refused: bool, expected: bool) -> None:
    stream = Terminal() if terminal else io.StringIO()
    assert talk.wants_colour(stream, env, refused=refused) is expected


@pytest.mark.parametrize(
    ("env", "terminal", "expected"),
    [
        ({}, True, True),
        ({}, False, False),
        ({"CI": "true"}, True, False),
        ({"CI": "false"}, True, True),
        ({"TERM": "dumb"}, True, False),
    ],
)
def test_bars_only_on_a_terminal_outside_ci(env: dict[str, str], terminal: bool, expected: bool) -> None:
    assert talk.wants_bars(Terminal() if terminal else io.StringIO(), env) is expected


def test_a_closed_stream_is_no_terminal() -> None:
    stream = io.StringIO()
    stream.close()
    assert not talk.wants_colour(stream, {})


# -- tables ---------------------------------------------------------------------------------------------


def table(console_width: int | None, *rows: tuple[object, ...], fold: int | None = None) -> str:
    stream = Terminal() if console_width else io.StringIO()
    console = talk.make_console(stream, colour=False)
    if console_width:
        console.width = console_width
    talk.print_table(console, ("name", "n"), rows, right=(1,), fold=fold)
    return stream.getvalue()


def test_a_table_has_no_borders_and_no_trailing_spaces() -> None:
    assert table(None, ("conv1", 64), ("a", 1000)) == "name      n\nconv1    64\na      1000\n"


def test_numbers_and_names_are_never_cut_on_a_narrow_terminal() -> None:
    assert "a" * 60 in table(40, ("a" * 60, 12345)).replace("\n", "")
    assert "12345" in table(40, ("a" * 60, 12345))


def test_the_folding_column_breaks_on_a_narrow_terminal_only() -> None:
    said = " ".join(["word"] * 20)
    assert len(table(60, (said, 1), fold=0).splitlines()) > 2
    assert len(table(None, (said, 1), fold=0).splitlines()) == 2


def test_cells_are_text_never_markup_or_control_codes() -> None:
    found = table(None, ("[red]x[/red] :smile:\x1b[2J\u202e", "1\xa0ms"))
    assert "[red]x[/red] :smile:\\x1b[2J\\u202e" in found
    assert "1 ms" in found
    assert "\x1b" not in found


def test_status_words_are_coloured_where_colour_is_wanted() -> None:
    stream = Terminal()
    talk.print_table(talk.make_console(stream, colour=True), ("", ""), [("PASS", "x")])
    assert "\x1b[1;32mPASS\x1b[0m" in stream.getvalue()


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.7, "1 min 00 s"),
        (185, "3 min 05 s"),
        (7380, "2 h 03 min"),
    ],
)
def test_duration(seconds: float, expected: str) -> None:
    assert talk.duration(seconds) == expected


# -- events ---------------------------------------------------------------------------------------------


def test_stages_are_lines_with_their_time() -> None:
    events, stream, clock = plain()
    events.stage("train", "cached")
    events.stage("prune", "start")
    clock.now = 12.3
    events.stage("prune", "done", "MACs 50 %")
    lines = stream.getvalue().splitlines()
    assert [line.split() for line in lines] == [
        ["cached", "train"],
        ["start", "prune"],
        ["done", "prune", "12", "s", "MACs", "50", "%"],
    ]


def test_a_detail_that_only_repeats_the_time_is_left_out() -> None:
    events, stream, clock = plain()
    events.stage("prune", "start")
    clock.now = 12.3
    events.stage("prune", "done", "12.3 s")
    assert stream.getvalue().splitlines()[-1].split() == ["done", "prune", "12", "s"]


def test_plain_progress_is_rare_and_says_how_long_is_left() -> None:
    events, stream, clock = plain()
    events.stage("train", "start")
    for step in range(1, 1001):  # 100 s in all
        clock.now = step / 10
        events.progress("train", step, 1000, f"step {step}")
    lines = [line for line in stream.getvalue().splitlines() if line.startswith("...")]
    assert 5 <= len(lines) <= 10
    assert " ".join(lines[0].split()) == "... train 10 % step 100 (about 1 min 30 s left)"


def test_slow_progress_still_gives_a_sign_of_life() -> None:
    events, stream, clock = plain()
    events.stage("train", "start")
    clock.now = 61
    events.progress("train", 1, 10_000, "step 1")
    assert "step 1" in stream.getvalue()


def test_progress_without_a_total_or_a_start_is_no_error() -> None:
    events, stream, _ = plain()
    events.progress("plan", 3, 0)
    events.progress("plan", float("nan"), 1)
    assert stream.getvalue() == ""


@pytest.mark.parametrize(
    ("verbosity", "expected"), [(0, {"start", "note:", "warning:"}), (-1, {"warning:"}), (-2, set())]
)
def test_quiet_leaves_warnings_and_twice_quiet_nothing(verbosity: int, expected: set[str]) -> None:
    events, stream, clock = plain(verbosity)
    events.stage("train", "start")
    clock.now = 100
    events.progress("train", 0, 1)
    events.note("n")
    events.warn("w")
    assert {line.split()[0] for line in stream.getvalue().splitlines()} - {"..."} == expected


def test_hostile_text_is_escaped_and_every_line_has_its_word() -> None:
    events, stream, _ = plain()
    events.warn("a\x1b[2Jb\nforged")
    assert stream.getvalue() == "warning: a\\x1b[2Jb\nwarning: forged\n"


def test_the_journal_keeps_the_last_events_even_when_quiet() -> None:
    events, _, _ = plain(-2)
    for number in range(500):
        events.note(f"event {number}")
    assert len(events.journal) == talk.JOURNAL
    assert events.journal[-1].endswith("event 499")


def test_live_events_show_a_bar_and_leave_one_line_for_each_stage() -> None:
    stream = Terminal()
    events = LiveEvents(talk.make_console(stream, colour=False), opening="loading")
    with events:
        events.stage("train", "start")
        events.progress("train", 1, 2, "[epoch] 1/2")
        assert events._bar is not None
        events._bar.refresh()  # which happens ten times a second anyway
        events.note("going on")
        events.stage("train", "done", "best 97 %")
        events.stage("prune", "cached")
    said = stream.getvalue()
    assert "loading" in said
    assert "[epoch] 1/2" in said
    assert "50%" in said
    assert "note: going on" in said
    assert "done      train" in said
    assert "cached    prune" in said
    assert said.rstrip().endswith("\x1b[?25h")  # the cursor is back


def test_live_events_are_silent_when_quiet() -> None:
    stream = Terminal()
    with LiveEvents(talk.make_console(stream, colour=False), -1, opening="loading") as events:
        events.stage("train", "start")
        events.progress("train", 1, 2)
        events.stage("train", "done")
    assert stream.getvalue() == ""


# -- errors ---------------------------------------------------------------------------------------------


@pytest.fixture
def screen(tmp_path: Path) -> Screen:
    console = talk.make_console(io.StringIO(), colour=False)
    return Screen(console, console, "run", run=str(tmp_path))


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ConfigError("bad", "a.yaml:1:2 x", "mend it"), 3, "a.yaml:1:2 x: bad; mend it"),
        (IntegrityError("changed", "f"), 8, "f: changed"),
        (RunnerError("no GPU", "torch_cuda"), 6, "torch_cuda: no GPU"),
        (OSError(28, "No space left on device", "/x/y"), 7, "/x/y: no space left on the disk; make room"),
        (PermissionError(13, "Permission denied", "/x"), 3, "/x: cannot be used: Permission denied"),
        (MemoryError(), 7, "memory ran out"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), 7, "memory ran out"),
        (RuntimeError("CUDA out of memory. Tried to allocate"), 7, "memory ran out"),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), 6, "torch: is not installed"),
        (KeyboardInterrupt(), 130, "stopped at once"),
        (StopNow(143), 143, "stopped at once"),
        (Interrupted("stopped", "train", "again"), 130, "train: stopped; again"),
        (ResourceError("full"), 7, "full"),
    ],
)
def test_known_failures_are_one_line_with_their_code(
    screen: Screen, tmp_path: Path, error: BaseException, code: int, said: str
) -> None:
    failure = explain(error, screen, ["run"])
    assert failure.exit_code == code
    assert len(failure.lines) == 1
    assert failure.lines[0].startswith(said)
    assert set(failure.error) == {"what", "where", "fix"}
    assert not list(tmp_path.iterdir())  # no crash log


def test_several_faults_are_a_line_each() -> None:
    console = talk.make_console(io.StringIO(), colour=False)
    error = ConfigErrors([ConfigError("one", "a"), ConfigError("two", "b", "fix")])
    failure = explain(error, Screen(console, console, "run"), [])
    assert failure.lines == ("a: one", "b: two; fix")
    assert failure.error["what"] == "one"
    assert failure.error["more"] == [{"what": "two", "where": "b", "fix": "fix"}]


def _bug() -> ValueError:
    try:
        raise ValueError("line one\nline two\x1b[2J")
    except ValueError as error:
        return error


def test_a_bug_is_one_line_and_a_crash_log_in_the_run(screen: Screen, tmp_path: Path) -> None:
    screen.events().note("the last event")
    failure = explain(_bug(), screen, ["run", "a b.yaml"])
    (log,) = tmp_path.glob("crash-*.log")
    assert failure.exit_code == 1
    assert failure.lines == (
        f"bug in compress: ValueError: line one line two\\x1b[2J; please report it with {log}",
    )
    text = log.read_text()
    assert "command: compress run 'a b.yaml'" in text
    assert "Traceback (most recent call last)" in text
    assert "in _bug" in text
    assert "the last event" in text
    assert "torch: " in text


def test_an_error_in_code_that_the_config_names_is_told_with_its_line(screen: Screen) -> None:
    def evaluate(net: nn.Module) -> float:
        scores: dict[str, float] = {}
        return scores["accuracy"]

    task = _task([0], lambda net, batch: net(batch), evaluate, "given")
    with pytest.raises(KeyError) as caught:
        task.evaluate(nn.Identity(), "test")
    failure = explain(caught.value, screen, [])
    assert failure.exit_code == 3
    (line,) = failure.lines
    assert line.startswith("test_console.py:")
    assert "return scores[\"accuracy\"]: code that the config names fails: KeyError: 'accuracy'" in line


def test_a_crash_log_goes_to_the_temporary_folder_without_a_run(
    screen: Screen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen.run = str(tmp_path / "not made yet")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    explain(_bug(), screen, [])
    assert len(list(tmp_path.glob("crash-*.log"))) == 1


# -- signals --------------------------------------------------------------------------------------------


@pytest.fixture
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    assert {number: signal.getsignal(number) for number in before} == before


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_signal_asks_and_the_second_stops(number: signal.Signals, code: int) -> None:
    said: list[str] = []
    with Stopper(said.append) as stopper:
        assert not stopper()
        os.kill(os.getpid(), number)
        assert stopper()
        assert said == ["stopping at the next safe point; press again to stop now"]
        with pytest.raises(StopNow) as caught:
            os.kill(os.getpid(), number)
        assert caught.value.code == code


@pytest.mark.usefixtures("handlers")
def test_an_interrupted_run_ends_with_its_signals_code() -> None:
    def stopped() -> None:
        with Stopper(lambda _: None):
            os.kill(os.getpid(), signal.SIGTERM)
            raise Interrupted("stopped", "train")

    with pytest.raises(Interrupted) as caught:
        stopped()
    assert caught.value.exit_code == 143


@pytest.mark.usefixtures("handlers")
def test_a_forked_child_is_not_asked_to_stop_and_says_nothing() -> None:
    said: list[str] = []
    with Stopper(said.append):
        child = os.fork()
        if child == 0:  # as a data loader's process, which gets the terminal's Ctrl-C too
            os.kill(os.getpid(), signal.SIGINT)
            os._exit(7 if not said else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 143

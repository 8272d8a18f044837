"""What ends a command early: an error becomes a line and an exit code, a bug a crash log, a signal a stop."""

from __future__ import annotations

import errno
import os
import platform
import re
import shlex
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from compress.errors import (
    CompressError,
    ConfigError,
    ConfigErrors,
    Interrupted,
    ResourceError,
    TargetError,
    escape,
)
from compress.launch import launched
from compress.names import first_line, users_line
from deploy.errors import DeployError

if TYPE_CHECKING:
    from compress.console import Screen

SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143}
ONE_PRESS_SECONDS = 2.0  # torchrun sends on to its processes what the terminal has sent them already
OUT_OF_MEMORY = re.compile(
    r"out of memory|not enough memory|can.t allocate memory|cannot allocate memory|bad_alloc|"
    r"failed to allocate memory",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Failure:
    """How a command ended: ``lines`` for people, ``word`` before each (if any), ``error`` for --json."""

    exit_code: int
    lines: tuple[str, ...]
    error: dict[str, Any]
    word: str = "error"


def explain(error: BaseException, screen: Screen, arguments: Sequence[str]) -> Failure:
    """The failure to report for any exception; writes a crash log when it is a bug."""
    known = named(error)
    if isinstance(known, CompressError | DeployError):
        return _reported(known)
    if isinstance(error, KeyboardInterrupt):
        code = error.code if isinstance(error, StopNow) else 130
        fix = "the same command goes on from the last safe point" if screen.run else ""
        return _reported(Interrupted("stopped at once", fix=fix, exit_code=code))
    return _bug(error, screen, arguments)


def named(error: BaseException) -> BaseException:
    """``error`` as an error with a cause that can be named, where there is one."""
    if isinstance(error, CompressError | DeployError):
        return error
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        place = str(error.filename or "")
        return ResourceError("no space left on the disk", place, "make room, then run the same command again")
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        fix = "choose files and folders that you may read and write"
        return ConfigError(f"cannot be used: {os.strerror(error.errno)}", str(error.filename or ""), fix)
    if isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError | OSError) and OUT_OF_MEMORY.search(str(error))
    ):
        fix = "use a smaller data.batch_size or bench.batches, or a machine with more memory"
        return ResourceError("memory ran out", fix=fix)
    if isinstance(error, ModuleNotFoundError) and error.name in _requirements():
        return TargetError("is not installed", error.name or "", "compress doctor tells what is missing")
    line = users_line(error) if isinstance(error, Exception) else ""
    if line:
        what = f"code that the config names fails: {first_line(error)}"
        return ConfigError(what, line, "--debug shows the whole traceback")
    return error


def _requirements() -> frozenset[str]:
    from compress.doctor import REQUIRED

    return frozenset(package.module for package in REQUIRED)


def _reported(error: CompressError | DeployError) -> Failure:
    facts = {"what": error.what, "where": error.where, "fix": error.fix}
    if isinstance(error, ConfigErrors):
        facts["more"] = [  # type: ignore[assignment]  # the one value that is a list
            {"what": fault.what, "where": fault.where, "fix": fault.fix} for fault in error.faults[1:]
        ]
    word = "" if error.exit_code in SIGNALS.values() else "error"
    return Failure(error.exit_code, tuple(str(error).splitlines()), facts, word)


def _bug(error: BaseException, screen: Screen, arguments: Sequence[str]) -> Failure:
    text = escape(" ".join(str(error).split()))[:500]
    what = f"bug in compress: {type(error).__name__}: {text}"
    try:
        fix = f"please report it with {_crash_log(error, screen, arguments)}"
    except (OSError, CompressError):
        fix = "please report it (the crash log could not be written; --debug shows the traceback)"
    return Failure(1, (f"{what}; {fix}",), {"what": what, "where": "", "fix": fix})


def _crash_log(error: BaseException, screen: Screen, arguments: Sequence[str]) -> Path:
    from compress.files import write_text

    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    folder = Path(screen.run) if screen.run and Path(screen.run).is_dir() else Path(tempfile.gettempdir())
    path = folder / f"crash-{stamp}-{os.getpid()}.log"
    parts = [
        f"command: {shlex.join(['compress', *arguments])}",
        f"python: {platform.python_version()} on {platform.system()} {platform.machine()}",
        *(f"{name}: {version}" for name, version in _versions().items()),
        "",
        "".join(traceback.format_exception(error)),
        "last events (seconds, what):",
        *(screen.journal or ["none"]),
    ]
    write_text(path, "\n".join(parts) + "\n")
    return path


def _versions() -> dict[str, str]:
    from compress.doctor import REQUIRED, version_of

    found = {package.name: version_of(package.name) for package in REQUIRED}
    return {"compress-release": version_of("compress-release"), **found}


class StopNow(KeyboardInterrupt):
    """The second signal: the user does not want to wait for a safe point."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class Stopper:
    """SIGINT and SIGTERM while a run works: the first asks it to stop at the next safe point (call the object
    to see whether it came), the second stops it at once, a third ends the process without clearing up.

    Use it as a context; the handlers before it come back at its end. ``code`` is the exit code of the signal
    that came, else None.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self.code: int | None = None
        self._count = 0
        self._at = 0.0
        self._pid = os.getpid()
        self._before: dict[signal.Signals, Any] = {}

    def __call__(self) -> bool:
        return self.code is not None

    def __enter__(self) -> Stopper:
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if isinstance(error, Interrupted) and self.code is not None:
            error.exit_code = self.code  # the run does not know which signal it was

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        code = SIGNALS[signal.Signals(number)]
        if os.getpid() != self._pid:  # a data loader's process, forked: the parent tells it when to end
            if number == signal.SIGTERM:
                os._exit(code)
            return
        now = time.monotonic()
        if launched().several and self.code is not None and now - self._at < ONE_PRESS_SECONDS:
            return
        self._at = now
        self._count += 1
        self.code = code
        if self._count == 1:
            self.say("stopping at the next safe point; press again to stop now")
        elif self._count == 2:
            raise StopNow(code)
        else:
            if sys.stderr is not None and sys.stderr.isatty():
                os.write(2, b"\x1b[?25h\n")  # a progress bar hides the cursor
            os._exit(code)

"""What a CI server reads beside the exit code: JUnit, OpenMetrics, a summary, faults marked at their lines.

Nothing here looks at a CI server's variables: which file goes where is said by the options of `compress run`
and `compress gate`, and the steps in action.yml and ci/gitlab.yml give them.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compress.errors import CompressError, ConfigErrors, escape
from compress.failures import named
from compress.files import write_json, write_text
from compress.launch import launched
from deploy.errors import DeployError

if TYPE_CHECKING:
    from compress.console import Screen

PLACE = re.compile(r"(?P<file>.+?):(?P<line>\d+)(?::(?P<column>\d+))?(?: (?P<key>.*))?")


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong; ``line`` and ``column`` count from 1, and are 0 where it is on no line."""

    what: str
    file: str = ""
    line: int = 0
    column: int = 0


@dataclass(frozen=True)
class Files:
    """What to write for a CI server: None for what was not asked for. ``annotate``: faults to stderr, as
    GitHub's commands; ``code_quality``: to a file, as GitLab's report."""

    junit: str | None = None
    metrics: str | None = None
    summary: str | None = None
    code_quality: str | None = None
    annotate: bool = False

    @contextmanager
    def telling(self, screen: Screen) -> Iterator[None]:
        """Around a command: what ends it early is in the files too."""
        try:
            yield
        except Exception as error:
            if not launched().rank:
                self.failed(screen, named(error))
            raise

    def failed(self, screen: Screen, error: BaseException) -> None:
        """Write the files for a command that an error ended."""
        from deploy import junit, summary

        lines, code, found = [f"bug in compress: {type(error).__name__}: {escape(str(error))}"], 1, []
        if isinstance(error, CompressError | DeployError):
            lines, code, found = str(error).splitlines(), error.exit_code, faults(error)
        if self.annotate:
            for fault in found or [Fault(lines[0])]:
                screen.err.print(github_command(fault), soft_wrap=True)
        self._write(junit.failed(lines, code), None, summary.failed(lines, code), found)

    def judged(self, results: Mapping[str, Any], stages: Sequence[tuple[str, str, float]]) -> None:
        """Write the files for a run that came to its end; without ``results`` where it was not judged."""
        from deploy import junit, openmetrics, summary

        if launched().rank:
            return
        said = ""
        if self.summary is not None:
            said = summary.render(results) if results else summary.unfinished([(n, s) for n, s, _ in stages])
        metrics = openmetrics.render(results) if results else None
        self._write(junit.render(results), metrics, said, [])

    def _write(self, junit: str, metrics: str | None, summary: str, found: Sequence[Fault]) -> None:
        for path, content in ((self.junit, junit), (self.metrics, metrics), (self.summary, summary)):
            if path is not None and content is not None:
                write_text(path, content)
        if self.code_quality is not None:
            write_json(self.code_quality, [code_quality(fault) for fault in found])


def faults(error: BaseException) -> list[Fault]:
    """Every fault of an error, at its line of the config where it has one."""
    each = error.faults if isinstance(error, ConfigErrors) else (error,)
    return [_fault(one) for one in each]


def _fault(error: Any) -> Fault:
    found = PLACE.fullmatch(error.where)
    if found is None:
        return Fault(str(error))
    said = f"{found['key']}: {error.what}" if found["key"] else error.what
    said = escape(f"{said}; {error.fix}" if error.fix else said)
    return Fault(said, escape(found["file"]), int(found["line"]), int(found["column"] or 1))


def github_command(fault: Fault) -> str:
    """``::error file=...,line=...,col=...::...``, with everything escaped that would end a part of it."""
    place = ""
    if fault.line:
        file = _data(fault.file).replace(":", "%3A").replace(",", "%2C")
        place = f" file={file},line={fault.line},col={fault.column}"
    return f"::error{place}::{_data(fault.what)}"


def _data(said: str) -> str:
    return said.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def code_quality(fault: Fault) -> dict[str, Any]:
    """One entry of GitLab's Code Quality report. What has no line of its own is put at the first."""
    place = {"path": fault.file or "compress.yaml", "lines": {"begin": fault.line or 1}}
    print_of = f"{place['path']}:{fault.line}:{fault.column}:{fault.what}"
    return {
        "description": fault.what,
        "check_name": "compress",
        "fingerprint": hashlib.sha256(print_of.encode("utf-8", "backslashreplace")).hexdigest(),
        "severity": "blocker",
        "location": place,
    }

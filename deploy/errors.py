"""Errors a user can cause while exporting or measuring: one line each, with an exit code.

A small twin of the pruning package's errors: `deploy` must work without it.
"""

from __future__ import annotations


def one_line(text: str) -> str:
    """`text` on one line; other control and invisible characters become escapes (`\\x1b`)."""
    joined = " ".join(part.strip() for part in text.splitlines() if part.strip())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in joined)


class DeployError(Exception):
    """What went wrong, where, and what to do about it.

    `str(error)` is `where: what; fix`, empty parts left out.
    """

    exit_code = 1

    def __init__(self, what: str, where: str = "", fix: str = "") -> None:
        super().__init__(what, where, fix)
        self.what, self.where, self.fix = one_line(what), one_line(where), one_line(fix)

    def __str__(self) -> str:
        head = f"{self.where}: {self.what}" if self.where else self.what
        return f"{head}; {self.fix}" if self.fix else head


class MeasureError(DeployError):
    """The request cannot be measured as written: target, shapes, repeats."""

    exit_code = 3


class ExportError(DeployError):
    """The model cannot be exported as asked."""

    exit_code = 4


class RunnerError(DeployError):
    """A runtime, provider or driver is missing, or would not do what was asked."""

    exit_code = 6


class ArtifactError(DeployError):
    """A file is missing, damaged, or not what it should be."""

    exit_code = 8

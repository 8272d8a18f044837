"""The errors a user can cause, each with what went wrong, where, how to fix it, and an exit code.

``str(error)`` is always one printable line (a `ConfigErrors` is one line per fault): control characters,
line breaks and bidirectional marks that came in with a name are shown escaped, so that a hostile file name
cannot paint the terminal or forge a second message.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def escape(text: str) -> str:
    """``text`` with every unprintable character written as its Python escape (``\\n``, ``\\x1b``)."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The fix for an unknown ``name``: the nearest of ``known``, else the first twelve of them."""
    import difflib  # only a failure needs it

    names = sorted(known)
    by_lower = {item.lower(): item for item in names}
    near = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.6)
    if not near and len(name) >= 3:
        near = [item for item in by_lower if item.startswith(name.lower())][:1]
    if near:
        return f"did you mean {by_lower[near[0]]}?"
    more = ", ..." if len(names) > 12 else ""
    return f"known: {', '.join(names[:12])}{more}" if names else ""


class CompressError(Exception):
    """A failure with a cause that can be named: what happened, where, and what to do about it.

    ``exit_code`` is what the process ends with. ``str()`` is ``where: what; fix``, empty parts left out.
    """

    exit_code: int = 1

    def __init__(self, what: str, where: str = "", fix: str = "") -> None:
        super().__init__(what, where, fix)  # all three in args, so that the error survives pickling
        self.what = what
        self.where = where
        self.fix = fix

    def __str__(self) -> str:
        head = f"{self.where}: {self.what}" if self.where else str(self.what)
        return escape(f"{head}; {self.fix}" if self.fix else head)


class ConfigError(CompressError):
    """The config, or something it names, is not valid (exit 3)."""

    exit_code = 3


class ConfigErrors(ConfigError):
    """Several faults of one config, found at once; ``faults`` keeps them in the order of the file."""

    def __init__(self, faults: Sequence[ConfigError]) -> None:
        if not faults:
            raise ValueError("ConfigErrors needs at least one fault")
        first = faults[0]
        super().__init__(first.what, first.where, first.fix)
        self.args = (tuple(faults),)
        self.faults = tuple(faults)

    def __str__(self) -> str:
        return "\n".join(str(fault) for fault in self.faults)


class DataError(ConfigError):
    """The data set cannot be read, or does not fit the model (exit 3)."""


class ModelError(CompressError):
    """The model cannot be handled as asked (exit 4)."""

    exit_code = 4


class VerdictError(CompressError):
    """A gate did not pass, and what was asked for needs a pass (exit 5)."""

    exit_code = 5


class TargetError(CompressError):
    """The benchmark's target, driver or library is missing here (exit 6)."""

    exit_code = 6


class ResourceError(CompressError):
    """Memory, disk space or time ran out (exit 7)."""

    exit_code = 7


class IntegrityError(CompressError):
    """A file is not what was written, or asks for something unsafe; it is refused (exit 8)."""

    exit_code = 8


class LockedError(CompressError):
    """Another run holds the directory (exit 9)."""

    exit_code = 9


class Interrupted(CompressError):
    """Stopped by a signal with the work so far saved: exit 130 (SIGINT) or 143 (SIGTERM)."""

    exit_code = 130

    def __init__(self, what: str, where: str = "", fix: str = "", exit_code: int = 130) -> None:
        super().__init__(what, where, fix)
        self.args = (what, where, fix, exit_code)
        self.exit_code = exit_code

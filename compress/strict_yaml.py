"""YAML without its surprises: plain data in, plain data out, and where each piece was written.

PyYAML does the scanning; the values are built here from its events, by the YAML 1.2 core schema: ``no``,
``on`` and ``12:30`` are text, ``010`` is ten, ``1e-3`` is a number. Refused: aliases and anchors (bombs),
tags (code), a key given twice (the last would win in silence), deep nesting, a second document.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

import yaml

MAX_DEPTH = 32
MAX_VALUES = 10_000

Path = tuple[str | int, ...]


@dataclass(frozen=True, order=True)
class Mark:
    """A position in the text; line and column count from 1."""

    line: int
    column: int


@dataclass(frozen=True)
class Fault:
    """One thing wrong with the text: where (position and key path), what, and how to fix it.

    ``lost`` says that the value at ``path`` could not be read (a duplicate key keeps its first value).
    """

    mark: Mark
    path: Path
    what: str
    fix: str = ""
    lost: bool = True


class Unreadable(Exception):
    """The text cannot be read any further; ``fault`` says why."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault)
        self.fault = fault


@dataclass(frozen=True)
class Document:
    """What was read. ``keys`` and ``values`` give the position of every key and value by its path.

    ``faults`` are those that reading could go on after; a value at fault reads as None. ``data`` is None for
    an empty text.
    """

    data: Any
    keys: dict[Path, Mark] = field(default_factory=dict)
    values: dict[Path, Mark] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)


def parse(text: str) -> Document:
    """Read one YAML document. Raises Unreadable where the text stops making sense."""
    try:
        loader = yaml.SafeLoader(text)
    except yaml.reader.ReaderError as error:
        raise Unreadable(_unprintable(text, error)) from error
    try:
        return _Builder(loader).document()
    except yaml.MarkedYAMLError as error:
        raise Unreadable(_plain(error)) from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # \U00110000 and %YAML 1.(huge)
        mark = loader.get_mark()
        fault = Fault(
            Mark(mark.line + 1, mark.column + 1), (), "not valid YAML", "check the escapes (\\) here"
        )
        raise Unreadable(fault) from error


class _Builder:
    """Turns the loader's events into data, noting positions and faults."""

    def __init__(self, loader: yaml.SafeLoader) -> None:
        self.loader = loader
        self.found = Document(None)
        self.count = 0

    def take(self) -> yaml.Event:
        event: yaml.Event = self.loader.get_event()  # type: ignore[no-untyped-call]  # its stub has no types
        return event

    def peek(self) -> yaml.Event:
        event: yaml.Event = self.loader.peek_event()  # type: ignore[no-untyped-call]  # its stub has no types
        return event

    def document(self) -> Document:
        self.take()  # the start of the stream
        if self.loader.check_event(yaml.StreamEndEvent):
            return self.found
        self.take()  # the start of the document
        data = self.node((), 1)
        self.take()  # its end
        if not self.loader.check_event(yaml.StreamEndEvent):
            mark = _mark(self.peek())
            raise Unreadable(Fault(mark, (), 'a second document starts here ("---")', "keep one"))
        return Document(data, self.found.keys, self.found.values, self.found.faults)

    def node(self, path: Path, depth: int) -> Any:
        event = self.take()
        self.found.values.setdefault(path, _mark(event))
        self.count += 1
        if self.count > MAX_VALUES:
            raise Unreadable(Fault(_mark(event), path, f"more than {MAX_VALUES} values"))
        if depth > MAX_DEPTH and not isinstance(event, yaml.ScalarEvent):
            raise Unreadable(Fault(_mark(event), path, f"nested more than {MAX_DEPTH} levels deep"))
        allowed = self.allowed(event, path)
        if isinstance(event, yaml.ScalarEvent):
            return self.scalar(event, path) if allowed else None
        if isinstance(event, yaml.MappingStartEvent):
            return self.mapping(path, depth)
        return self.sequence(path, depth) if isinstance(event, yaml.SequenceStartEvent) else None

    def allowed(self, event: yaml.Event, path: Path) -> bool:
        """Notes a fault for an alias, an anchor or a tag."""
        anchor, tag = getattr(event, "anchor", None), getattr(event, "tag", None)
        written = "write the value out where it is needed; quote text that starts with & or *"
        if isinstance(event, yaml.AliasEvent):
            self.fault(event, path, f"aliases (*{anchor}) are not allowed", written)
        elif anchor:
            self.fault(event, path, f"anchors (&{anchor}) are not allowed", written)
        elif tag:
            name = tag.replace("tag:yaml.org,2002:", "!!")
            self.fault(event, path, f"tags ({name}) are not allowed", "remove it; quote text starting with !")
        else:
            return True
        return False

    def fault(self, event: yaml.Event, path: Path, what: str, fix: str, lost: bool = True) -> None:
        self.found.faults.append(Fault(_mark(event), path, what, fix, lost))

    def scalar(self, event: yaml.ScalarEvent, path: Path) -> Any:
        text: str = event.value
        if not all(map(_is_unicode, text)):
            self.fault(event, path, "holds a character that is not allowed in text", "remove the \\ escape")
            return None
        try:
            return resolve(text) if event.implicit[0] else text
        except ValueError as error:
            self.fault(event, path, str(error), "")
            return None

    def sequence(self, path: Path, depth: int) -> list[Any]:
        items: list[Any] = []
        while not self.loader.check_event(yaml.SequenceEndEvent):
            items.append(self.node((*path, len(items)), depth + 1))
        self.take()
        return items

    def mapping(self, path: Path, depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        while not self.loader.check_event(yaml.MappingEndEvent):
            event = self.peek()
            key = self.key(event, path, depth)
            if key is None or key in found:
                self.node((*path, "?"), depth + 1)  # read past its value, under a path of its own
            else:
                self.found.keys[(*path, key)] = _mark(event)
                found[key] = self.node((*path, key), depth + 1)
        self.take()
        return found

    def key(self, event: yaml.Event, path: Path, depth: int) -> str | None:
        """The next key; None, with a fault noted, for one that cannot be one."""
        before = len(self.found.faults)
        value = self.node((*path, "?"), depth + 1)
        if not isinstance(value, str) or not value:
            if len(self.found.faults) == before:
                self.fault(
                    event, (*path, "?"), f"a key must be text, found {shown(value)}", "put it in quotes"
                )
            return None
        earlier = self.found.keys.get((*path, value))
        if earlier:
            what = f"duplicate key; it is already given on line {earlier.line}"
            self.fault(event, (*path, value), what, "keep one of the two", lost=False)
        return value


_NULL = {"", "~", "null", "Null", "NULL"}
_BOOL = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INT = re.compile(r"[-+]?[0-9]+")
_BASED = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_BEYOND = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


def resolve(text: str) -> Any:
    """The value of an unquoted scalar by the YAML 1.2 core schema.

    Raises ValueError for a number that is not finite or has more than 300 digits.
    """
    if text in _NULL:
        return None
    if text in _BOOL:
        return _BOOL[text]
    if _INT.fullmatch(text) and len(text) <= 300:
        return int(text)
    if _BASED.fullmatch(text) and len(text) <= 300:
        return int(text, 0)
    if _FLOAT.fullmatch(text) and len(text) <= 300 and math.isfinite(float(text)):
        return float(text)
    if any(pattern.fullmatch(text) for pattern in (_INT, _BASED, _FLOAT, _BEYOND)):
        raise ValueError(f"expected a finite number, found {text[:40]}")
    return text


def shown(value: Any) -> str:
    """``value`` for a message: short, on one line, text in quotes."""
    if isinstance(value, dict):
        return "a mapping" if value else "an empty mapping"
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    if value is None or isinstance(value, bool):
        return {None: "nothing (null)", True: "true", False: "false"}[value]
    text = str(value)
    text = text if len(text) <= 60 else text[:57] + "..."
    return f'"{text}"' if isinstance(value, str) else text


def _is_unicode(character: str) -> bool:
    return character != "\0" and not "\ud800" <= character <= "\udfff"


def _mark(event: yaml.Event) -> Mark:
    return _position(event.start_mark)


def _unprintable(text: str, error: yaml.reader.ReaderError) -> Fault:
    before = text[: error.position]
    mark = Mark(before.count("\n") + 1, len(before) - before.rfind("\n"))
    what = f"a control character (U+{ord(text[error.position]):04X}) is not allowed"
    return Fault(mark, (), what, "remove it")


# PyYAML's words (a part of them), ours, and what to do. The first that fits is used.
_EVENLY = "indent evenly, with spaces"
_QUOTE = "put the value in quotes"
_COLON = f'{_EVENLY}; quote text that holds ": "'
_PLAIN = (
    ("character '\\t'", "a tab is not allowed here", "use spaces"),
    ("character '@'", "unquoted text cannot start with @", _QUOTE),
    ("character '`'", "unquoted text cannot start with `", _QUOTE),
    ("character '%'", "unquoted text cannot start with %", _QUOTE),
    (
        "mapping values are not allowed",
        'a ":" is not expected here',
        f'{_EVENLY}; quote text that holds ": "',
    ),
    ("sequence entries are not allowed", "a list item (-) is not expected here", "start it on its own line"),
    ("could not find expected ':'", 'a ":" is missing', 'write each line as "key: value"'),
    ("unexpected end of stream", "this quote is never closed", "close it"),
    ("unknown escape character", "unknown \\ escape in double quotes", "use single quotes, or write \\\\"),
    ("expected ',' or ']'", "this list is never closed, or lacks a comma", "write it as [1, 2, 3]"),
    ("expected ',' or '}'", "this mapping is never closed, or lacks a comma", "write it as {a: 1, b: 2}"),
    ("expected <block end>", "this line does not line up with those above", _EVENLY),
    ("expected '<document start>'", "this line does not belong to what is above", _EVENLY),
)


def _plain(error: yaml.MarkedYAMLError) -> Fault:
    """PyYAML's complaint in plain words. What was opened and never closed is shown where it was opened."""
    problem = error.problem or "not valid YAML"
    for part, what, fix in _PLAIN:
        if part in problem:
            opened = "never closed" in what and error.context_mark is not None
            mark = error.context_mark if opened else error.problem_mark
            return Fault(_position(mark or error.context_mark), (), what, fix)
    return Fault(_position(error.problem_mark or error.context_mark), (), f"not valid YAML: {problem}")


def _position(mark: Any) -> Mark:
    return Mark(mark.line + 1, mark.column + 1) if mark else Mark(1, 1)

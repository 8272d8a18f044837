from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from compress.strict_yaml import MAX_VALUES, Mark, Unreadable, parse, resolve, shown


def fatal(text: str) -> tuple[int, int, str]:
    with pytest.raises(Unreadable) as caught:
        parse(text)
    fault = caught.value.fault
    return fault.mark.line, fault.mark.column, f"{fault.what}; {fault.fix}"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no", "no"),
        ("yes", "yes"),
        ("on", "on"),
        ("Off", "Off"),
        ("y", "y"),
        ("010", 10),
        ("0o17", 15),
        ("0x1F", 31),
        ("-0", 0),
        ("+5", 5),
        ("1e-3", 0.001),
        ("1e3", 1000.0),
        ("1.", 1.0),
        (".5", 0.5),
        ("-.5E+1", -5.0),
        ("12:30:45", "12:30:45"),
        ("1_000", "1_000"),
        ("2024-01-01", "2024-01-01"),
        ("", None),
        ("~", None),
        ("Null", None),
        ("nUll", "nUll"),
        ("true", True),
        ("FALSE", False),
        ("tRue", "tRue"),
        ("50%", "50%"),
        ("0b11", "0b11"),
        ("1.2.3", "1.2.3"),
        ("=", "="),
        ("<<", "<<"),
        ("١٢", "١٢"),
    ],
)
def test_scalars_are_yaml_1_2(text: str, value: Any) -> None:
    assert resolve(text) == value
    assert type(resolve(text)) is type(value)
    assert parse(f"a: {text}").data == {"a": value}


@pytest.mark.parametrize("text", [".inf", "-.INF", ".nan", "1e999", "9" * 5000, "0x" + "f" * 5000])
def test_numbers_beyond_reason_are_faults(text: str) -> None:
    document = parse(f"a: {text}\nb: 1")
    assert document.data == {"a": None, "b": 1}
    assert document.faults[0].what.startswith("expected a finite number, found ")
    assert document.faults[0].mark == Mark(1, 4)
    assert len(document.faults[0].what) < 80


def test_quoted_text_stays_text() -> None:
    assert parse("""{a: "1", b: 'no', c: "", d: 'it''s', e: "\\x41\\n"}""").data == {
        "a": "1",
        "b": "no",
        "c": "",
        "d": "it's",
        "e": "A\n",
    }
    assert parse("a: |\n  one\n  two\n").data == {"a": "one\ntwo\n"}


def test_positions_of_keys_and_values() -> None:
    document = parse("# comment\na:\n  b: [1,  {c: 2}]\n  d:\n")
    assert document.data == {"a": {"b": [1, {"c": 2}], "d": None}}
    assert document.keys[("a", "b")] == Mark(3, 3)
    assert document.values[("a", "b")] == Mark(3, 6)
    assert document.values[("a", "b", 1, "c")] == Mark(3, 15)
    assert document.values[("a", "b", 0)] == Mark(3, 7)
    assert document.values[()] == Mark(2, 1)
    assert document.keys[("a", "d")] == Mark(4, 3)


@pytest.mark.parametrize("text", ["", "\n\n", "# only a comment\n", "---\n", "null", "\ufeff"])
def test_nothing_is_none(text: str) -> None:
    assert parse(text).data is None
    assert parse(text).faults == []


def test_faults_that_reading_goes_on_after_are_all_noted() -> None:
    document = parse(
        "a: &x 1\nb: *x\nc: !!int 3\nd: 1\nd: [2]\n4: 5\n? [6]\n: 7\n'': 8\ne: \"\\ud800\"\nf: 9\n"
    )
    assert document.data == {"a": None, "b": None, "c": None, "d": 1, "e": None, "f": 9}
    found = [(fault.mark.line, fault.mark.column, fault.path, fault.what) for fault in document.faults]
    assert found == [
        (1, 4, ("a",), "anchors (&x) are not allowed"),
        (2, 4, ("b",), "aliases (*x) are not allowed"),
        (3, 4, ("c",), "tags (!!int) are not allowed"),
        (5, 1, ("d",), "duplicate key; it is already given on line 4"),
        (6, 1, ("?",), "a key must be text, found 4"),
        (7, 3, ("?",), "a key must be text, found a list"),
        (9, 1, ("?",), 'a key must be text, found ""'),
        (10, 4, ("e",), "holds a character that is not allowed in text"),
    ]
    assert all(fault.fix for fault in document.faults)


def test_a_value_after_a_duplicate_keeps_its_position() -> None:
    document = parse("a: {b: 1}\na: {b: 2, b: 3}\nc: 4\n")
    assert document.data == {"a": {"b": 1}, "c": 4}
    assert document.values[("a", "b")] == Mark(1, 8)
    assert document.values[("c",)] == Mark(3, 4)


@pytest.mark.parametrize(
    ("text", "line", "column", "words"),
    [
        ("a:\n\tb: 1", 2, 1, "a tab is not allowed here; use spaces"),
        ("a:\n  b: 1\n\tc: 2", 3, 1, "a tab is not allowed here"),
        ("a: [1, 2\nb: 3", 1, 4, "this list is never closed, or lacks a comma; write it as [1, 2, 3]"),
        ("a: {b: 1", 1, 4, "this mapping is never closed, or lacks a comma"),
        ("a: 'x\nb: 1", 1, 4, "this quote is never closed"),
        ('a: "\\q"', 1, 6, "unknown \\ escape in double quotes"),
        ('a: "\\U00110000"', 1, 7, "not valid YAML; check the escapes"),
        ("%YAML 1." + "9" * 5000 + "\n---\na: 1", 1, 9, "not valid YAML"),
        ("a: b: c", 1, 5, 'a ":" is not expected here'),
        ("a: 1\n  b: 2", 2, 4, 'a ":" is not expected here; indent evenly'),
        ("a:\n    b: 1\n  c: 2", 3, 3, "this line does not line up with those above; indent evenly"),
        ("a: @x", 1, 4, "unquoted text cannot start with @; put the value in quotes"),
        ("a: %x", 1, 4, "unquoted text cannot start with %"),
        ("a: - b", 1, 4, "a list item (-) is not expected here; start it on its own line"),
        ("a: 1\nb", 2, 2, 'a ":" is missing; write each line as "key: value"'),
        ("x: 1\n---\ny: 2", 2, 1, 'a second document starts here ("---"); keep one'),
        ("a: 1\nb: \x07", 2, 4, "a control character (U+0007) is not allowed; remove it"),
        ("[" * 33, 1, 33, "nested more than 32 levels deep"),
        ("a: " + "[x, " * MAX_VALUES, 1, 128, "nested more than 32 levels deep"),
    ],
)
def test_where_the_text_stops_making_sense(text: str, line: int, column: int, words: str) -> None:
    found = fatal(text)
    assert found[:2] == (line, column)
    assert found[2].startswith(words)


def test_depth_of_32_is_read() -> None:
    value = parse("[" * 32 + "]" * 32).data
    for _ in range(31):
        value = value[0]
    assert value == []


@pytest.mark.parametrize(
    "text",
    [
        "a: 1\n" * 200_000,
        "- " * 400_000,
        "? " * 500_000,
        "{" * 2**20,
        "[" + "1," * 400_000,
        "a: [" + "{}," * 20_000,
    ],
)
def test_bombs_stop_early(text: str) -> None:
    assert "more than" in fatal(text)[2]


def test_aliases_never_expand() -> None:
    lines = ["a0: &a0 [x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30)]
    document = parse("\n".join(lines))
    assert len(document.faults) == 30 + 29 * 9  # each anchor and each alias, once
    assert document.data["a29"] == [None] * 9


def test_shown_is_short_and_tells_text_from_numbers() -> None:
    values = ["fast", "1", 1, 1.5, True, None, [], [1], {}, {"a": 1}]
    assert [shown(value) for value in values] == [
        '"fast"',
        '"1"',
        "1",
        "1.5",
        "true",
        "nothing (null)",
        "an empty list",
        "a list",
        "an empty mapping",
        "a mapping",
    ]
    assert shown("x" * 1000) == '"' + "x" * 57 + '..."'
    assert shown(10**200).endswith("...")


PIECES = [
    "a",
    "b",
    ": ",
    ":",
    "- ",
    "\n",
    "  ",
    "\t",
    "[",
    "]",
    "{",
    "}",
    ", ",
    "'",
    '"',
    "&a ",
    "*a",
    "!!int ",
]
PIECES += [
    "!",
    "|",
    ">",
    "#",
    "%",
    "@",
    "---",
    "...",
    "? ",
    "\\",
    "\\x",
    "\\U00110000",
    "1",
    ".inf",
    "~",
    "\ufeff",
]
PIECES += ["\x00", "\x85", "\u2028", "\r", "<<", "é", "\ud800", "%YAML ", "%TAG ! x\n", "\\ud800", "=", "`"]


@settings(max_examples=400, deadline=None)
@given(st.one_of(st.text(max_size=60), st.lists(st.sampled_from(PIECES), max_size=25).map("".join)))
@example("%TAG ! \n--- !<%ff>")
@example("!<%ff>")
@example("? ? ? \n: - :")
def test_any_text_is_read_or_refused_with_a_position(text: str) -> None:
    try:
        document = parse(text)
    except Unreadable as error:
        faults = [error.fault]
    else:
        faults = document.faults
    for fault in faults:
        assert fault.mark.line >= 1
        assert fault.mark.column >= 1
        assert fault.what

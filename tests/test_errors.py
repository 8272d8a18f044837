from __future__ import annotations

import pickle

import pytest

from compress.errors import (
    CompressError,
    ConfigError,
    ConfigErrors,
    DataError,
    IntegrityError,
    Interrupted,
    LockedError,
    ModelError,
    ResourceError,
    TargetError,
    did_you_mean,
    escape,
)

CODES = {
    CompressError: 1,
    ConfigError: 3,
    DataError: 3,
    ModelError: 4,
    TargetError: 6,
    ResourceError: 7,
    IntegrityError: 8,
    LockedError: 9,
    Interrupted: 130,
}


@pytest.mark.parametrize(("kind", "code"), CODES.items())
def test_exit_codes(kind: type[CompressError], code: int) -> None:
    assert kind("what").exit_code == code
    assert issubclass(kind, CompressError)


@pytest.mark.parametrize(
    ("parts", "line"),
    [
        (("broken", "a.pt", "make it again"), "a.pt: broken; make it again"),
        (("broken", "", "make it again"), "broken; make it again"),
        (("broken", "a.pt", ""), "a.pt: broken"),
        (("broken",), "broken"),
    ],
)
def test_text_leaves_out_empty_parts(parts: tuple[str, ...], line: str) -> None:
    assert str(CompressError(*parts)) == line


def test_hostile_names_cannot_paint_or_forge_lines() -> None:
    line = str(ModelError("bad\x1b[31m layer\u202e\u2028", "a\nerror: b", "\udc80\0\t"))
    assert line == "a\\nerror: b: bad\\x1b[31m layer\\u202e\\u2028; \\udc80\\x00\\t"
    assert line.isprintable()
    assert line.encode("utf-8")


def test_escape_keeps_ordinary_text() -> None:
    assert escape("größe 東京 a\\b") == "größe 東京 a\\b"
    assert escape("a\rb") == "a\\rb"


def test_interrupted_carries_the_signal() -> None:
    assert Interrupted("stopped").exit_code == 130
    assert Interrupted("stopped", exit_code=143).exit_code == 143


@pytest.mark.parametrize(
    "error",
    [
        ModelError("what", "where", "fix"),
        Interrupted("stopped", "run", "run again", 143),
        ConfigErrors([ConfigError("a", "b", "c"), DataError("d")]),
    ],
)
def test_errors_survive_pickling_between_processes(error: CompressError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert (str(copy), copy.exit_code) == (str(error), error.exit_code)
    assert (copy.what, copy.where, copy.fix) == (error.what, error.where, error.fix)


def test_several_faults_are_one_line_each() -> None:
    error = ConfigErrors([ConfigError("first\n", "a:1"), ConfigError("second", "a:2")])
    assert str(error).splitlines() == ["a:1: first\\n", "a:2: second"]
    assert (error.what, error.where, error.exit_code) == ("first\n", "a:1", 3)
    with pytest.raises(ValueError, match="at least one"):
        ConfigErrors([])


@pytest.mark.parametrize(
    ("name", "fix"),
    [
        ("mac_ratio", "did you mean macs_ratio?"),
        ("MACS_RATIO", "did you mean macs_ratio?"),
        ("temp", "did you mean temperature?"),
        ("zzz", "known: lr, macs_ratio, temperature"),
    ],
)
def test_did_you_mean(name: str, fix: str) -> None:
    assert did_you_mean(name, ["temperature", "macs_ratio", "lr"]) == fix


def test_did_you_mean_stays_short() -> None:
    assert did_you_mean("zzz", []) == ""
    assert did_you_mean("zzz", [f"a{i:02}" for i in range(50)]).endswith("a11, ...")

"""Whatever stands in a config, it loads or is a config error: one line for each fault, without jargon."""

from __future__ import annotations

import re

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft7Validator
from test_config import BASE, keys

from compress.config import Config, json_schema, load, loads, template, to_dict
from compress.errors import ConfigError

JARGON = re.compile(
    r"input should|unable to parse|pydantic|valid (integer|number|string|boolean|list|dict)", re.I
)
WRONG: list[str] = [
    "fast",
    "-1",
    "1.5",
    "1e300",
    "-1e300",
    "9" * 30,
    "true",
    "null",
    "[]",
    "{}",
    "[[1]]",
    "[-1, x]",
]
WRONG += [
    "{a: 1}",
    "'5'",
    "'50%'",
    "''",
    '"\\a"',
    "'re:('",
    '["re:("]',
    "cuda:0",
    "[1, 2]",
    "0",
    "[0.5, 0.5, 0.5]",
]


@pytest.mark.parametrize("key", list(keys(json_schema())))
def test_every_key_with_every_wrong_value(key: str) -> None:
    validator, accepted = Draft7Validator(json_schema()), 0
    for value in WRONG:
        try:
            config = loads(BASE, overrides=[f"{key}={value}"])
        except ConfigError as error:
            for line in str(error).splitlines():
                assert line.startswith("--set "), line
                assert re.search(
                    r": (expected|must|unknown key|this key|holds a|not a valid|give only|no runner)", line
                ), line
                assert not JARGON.search(line), line
                assert line.isprintable()
        else:
            accepted += 1
            validator.validate(to_dict(config))
            assert loads(yaml.safe_dump(to_dict(config))) == config
    assert accepted < len(WRONG)  # every key refuses something


def survives(text: str, overrides: list[str]) -> None:
    try:
        config = loads(text, "compress.yaml", overrides)
    except ConfigError as error:
        message = str(error)
    else:
        assert isinstance(config, Config)
        return
    assert message
    assert all(line.isprintable() for line in message.split("\n"))


WORDS = [
    *keys(json_schema()),
    "0.5",
    "-1",
    "[1]",
    "{a: 1}",
    "null",
    "x",
    "'",
    "[",
    "&a",
    "*a",
    "\x1b",
    "\ud800",
]


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=200), st.lists(st.text(max_size=20), max_size=2))
def test_any_text_loads_or_is_a_config_error(text: str, overrides: list[str]) -> None:
    survives(text, overrides)
    survives(BASE + text, overrides)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_damage_to_a_good_config_is_a_config_error(data: st.DataObject) -> None:
    text = template(train_epochs=1)
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(text)))
        end = min(len(text), start + data.draw(st.integers(0, 12)))
        text = text[:start] + data.draw(st.sampled_from(["", "\t", "\n", ": ", "- ", *WORDS])) + text[end:]
    survives(text, [])


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(WORDS), st.sampled_from(["=", "", ".x=", "=="]), st.sampled_from(WORDS)),
        max_size=3,
    )
)
def test_any_override_is_taken_or_a_config_error(parts: list[tuple[str, str, str]]) -> None:
    survives(BASE, ["".join(part) for part in parts])


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=100))
def test_any_bytes_load_or_are_a_config_error(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "a.yaml"
    path.write_bytes(data)
    with pytest.raises(ConfigError):
        load(path)

"""Validation errors in plain words: what was expected, what was found, and how to mend it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from compress.errors import did_you_mean
from compress.strict_yaml import Path, resolve, shown

_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing_size": "a whole number of fewer digits",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "text",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": 'a mapping ("key: value" lines)',
}
_BOUNDS = {
    "greater_than": ("more than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
}


@dataclass(frozen=True)
class Problem:
    """One fault of the data at ``path``; ``unknown`` when it is the key itself that is wrong."""

    path: Path
    what: str
    fix: str = ""
    unknown: bool = False


def translate(error: ValidationError, data: Any, model: type[BaseModel]) -> list[Problem]:
    """One Problem per faulty place, in the order found. ``data`` is what ``model`` refused."""
    places: dict[Path, list[Mapping[str, Any]]] = {}
    for item in error.errors(include_url=False):
        places.setdefault(_place(item, data), []).append(item)
    return [_problem(path, items, _at(data, path), model) for path, items in places.items()]


def _place(item: Mapping[str, Any], data: Any) -> Path:
    """The path of the value at fault: pydantic appends the names of a union's branches to it."""
    path: Path = tuple(item["loc"])
    if item["type"] in {"missing", "extra_forbidden"}:
        return path
    kept = 0
    while kept < len(path) and _has(data, path[kept]):
        data = data[path[kept]]
        kept += 1
    return (*path[:kept], *item.get("ctx", {}).get("place", ()))


def _has(data: Any, key: str | int) -> bool:
    if isinstance(data, dict):
        return key in data
    return isinstance(data, list) and isinstance(key, int) and key < len(data)


def _at(data: Any, path: Path) -> Any:
    for key in path:
        if not _has(data, key):
            return None
        data = data[key]
    return data


def _problem(path: Path, items: Sequence[Mapping[str, Any]], value: Any, model: type[BaseModel]) -> Problem:
    exact = [item for item in items if item["type"] not in _EXPECTED and item["type"] != "literal_error"]
    if not exact:
        return _wrong_type(path, items, value)
    item = exact[0]
    kind, context = item["type"], item.get("ctx", {})
    if kind == "extra_forbidden":
        return Problem(path, "unknown key", _known_key(path, model), unknown=True)
    if kind == "missing":
        return Problem(path, "this key must be given", _example(path, model))
    if kind == "plain":
        return Problem(path, context["what"], context["fix"])
    if kind in _BOUNDS:
        words, key = _BOUNDS[kind]
        return Problem(path, f"must be {words} {_number(context[key])}, found {shown(value)}")
    if kind in {"too_short", "string_too_short"}:
        return Problem(path, f"must not be empty, found {shown(value)}")
    return Problem(path, f"{item['msg'][:1].lower()}{item['msg'][1:]}, found {shown(value)}")


def _wrong_type(path: Path, items: Sequence[Mapping[str, Any]], value: Any) -> Problem:
    """The value fits none of the types (or words) that it may be."""
    expected, words = [], []
    for item in items:
        if item["type"] == "literal_error":
            choice = item["ctx"]["expected"].replace("'", '"')
            words += re.findall(r'"([^"]*)"', choice)
            expected.append(choice)
        else:
            expected.append(_EXPECTED[item["type"]])
    fix = _mend(value, {item["type"] for item in items})
    if not fix and isinstance(value, str) and words:
        near = did_you_mean(value, words)
        fix = near if near.startswith("did") else ""
    return Problem(path, f"expected {' or '.join(expected)}, found {shown(value)}", fix)


def _mend(value: Any, kinds: set[str]) -> str:
    """What to write instead, where the intention is plain."""
    if isinstance(value, str) and kinds & {"int_type", "float_type"}:
        if _is_number(value):
            return "remove the quotes"
        share = re.fullmatch(r"([0-9]{1,3}(?:\.[0-9]{1,6})?) ?%", value)
        return f"write {float(share[1]) / 100:g}" if share and "float_type" in kinds else ""
    if isinstance(value, str) and "bool_type" in kinds:
        return {"yes": "write true", "on": "write true", "no": "write false", "off": "write false"}.get(
            value.lower(), ""
        )
    if isinstance(value, float) and "int_type" in kinds and value.is_integer() and abs(value) < 1e15:
        return f"write {int(value)}"
    if isinstance(value, bool | int | float) and "string_type" in kinds:
        return f'put it in quotes: "{shown(value)}"'
    if isinstance(value, bool | int | float | str) and "list_type" in kinds:
        return f"write [{shown(value) if not isinstance(value, str) else value[:60]}]"
    return ""


def _is_number(text: str) -> bool:
    try:
        return isinstance(resolve(text), int | float) and text not in {"true", "false"}
    except ValueError:
        return False


def _number(value: Any) -> str:
    return str(int(value)) if float(value).is_integer() else f"{value:g}"


def _known_key(path: Path, model: type[BaseModel]) -> str:
    """The nearest key of the same section, or the section where a key of this name belongs."""
    name = str(path[-1])
    known = section(model, path[:-1])
    fix = did_you_mean(name, known.model_fields if known else ())
    if fix.startswith("did"):
        return fix
    elsewhere = [place for place in _all_keys(model) if place.rpartition(".")[2] == name]
    return f"did you mean {' or '.join(elsewhere)}?" if elsewhere else fix


def _example(path: Path, model: type[BaseModel]) -> str:
    known = section(model, path[:-1])
    field = known.model_fields.get(str(path[-1])) if known else None
    return f"add {path[-1]}: {field.description}" if field and field.description else ""


def _all_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name in model.model_fields:
        yield prefix + name
        inner = section(model, (name,))
        if inner:
            yield from _all_keys(inner, f"{prefix}{name}.")


def section(model: type[BaseModel], path: Path) -> type[BaseModel] | None:
    """The model of the section at ``path``; None where there is none."""
    for key in path:
        field = model.model_fields.get(str(key))
        kinds = (field.annotation, *get_args(field.annotation)) if field else ()
        found = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
        if found is None:
            return None
        model = found
    return model

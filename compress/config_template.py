"""The generated ``compress.yaml``: every key of the schema with its default and a comment."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import yaml
from pydantic import BaseModel

from compress.config_faults import section
from compress.recipes import RECIPES, Values
from compress.schema import Config
from compress.strict_yaml import resolve

_COMMENT_COLUMN = 34
_PLAIN = re.compile(r"[A-Za-z0-9_/](?:[A-Za-z0-9_./:-]*[A-Za-z0-9_./])?")
_HEAD = """\
# compress.yaml: what to compress, how, and what must hold before it may ship.
# A line such as "# key: value" shows an option at its default: remove the "# " to change it.
# Any value can also be set for one run: compress run --set prune.macs_ratio=0.4
"""
_OFF = ("train", "budget")
# Shown as live lines; all other keys are shown as comments at their defaults.
_LIVE = {
    "model": ("name", "weights", "input_shape"),
    "data": ("name", "root", "batch_size"),
    "train": ("epochs", "lr"),
    "prune": ("macs_ratio",),
    "budget": ("latency_ms",),
    "finetune": ("epochs", "lr"),
    "export": ("tolerance",),
    "bench": ("target",),
    "gates": ("accuracy_drop", "parity"),
}


def render(given: Values, schema: str | None, recipe: str | None = None) -> str:
    """The file's text. ``given`` holds the values that differ from the defaults, by section.

    ``schema`` is the path or address of the JSON Schema for editors, named in the first line. ``recipe``: its
    values take the place of the defaults, and of what is given for the same keys.
    """
    usual: Values = RECIPES[recipe] if recipe else {}
    lines = [f"# yaml-language-server: $schema={schema}"] if schema else []
    lines += [*_HEAD.splitlines(), ""]
    for name in Config.model_fields:
        inner = section(Config, (name,))
        if inner is None:
            value = {"version": 1, "recipe": recipe}.get(name, _default(Config, name))
            lines.append(_line("", name, value, _description(Config, name)))
        elif name in _OFF and name not in given:
            lines += ["", _line("# ", name, None, _description(Config, name))]
        else:
            lines += ["", *_section(name, inner, given.get(name, {}), usual.get(name, {}))]
        if name in {"recipe", "gates"}:
            lines.append("")
    return "\n".join(line.rstrip() for line in lines).replace("\n\n\n", "\n\n") + "\n"


def _section(
    name: str, model: type[BaseModel], given: Mapping[str, Any], usual: Mapping[str, Any]
) -> list[str]:
    title = _description(Config, name)
    lines = [f"# {title[:1].upper()}{title[1:]}.", f"{name}:"]
    for key in model.model_fields:
        live = key in _LIVE[name] or (key in given and key not in usual)
        value = usual[key] if key in usual else given.get(key, _default(model, key))
        lines.append(_line("  " if live else "  # ", key, value, _description(model, key)))
    return lines


def _line(start: str, key: str, value: Any, comment: str) -> str:
    return f"{f'{start}{key}: {scalar(value)}':<{_COMMENT_COLUMN - 1}} # {comment}"


def _description(model: type[BaseModel], key: str) -> str:
    return model.model_fields[key].description or ""


def _default(model: type[BaseModel], key: str) -> Any:
    found = model.model_fields[key].get_default(call_default_factory=True, validated_data={})
    return found.model_dump(mode="json", exclude_defaults=True) if isinstance(found, BaseModel) else found


def scalar(value: Any) -> str:
    """``value`` as YAML on one line; text is quoted where YAML would read it as something else."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{scalar(str(k))}: {scalar(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(scalar(item) for item in value) + "]"
    if isinstance(value, str) and _PLAIN.fullmatch(value) and _is_text(value):
        return value
    return json.dumps(value, allow_nan=False)


def _is_text(value: str) -> bool:
    """Whether unquoted ``value`` is text by YAML 1.2 and, for other tools, by YAML 1.1 too (no, 12:30)."""
    try:
        return isinstance(resolve(value), str) and isinstance(yaml.safe_load(value), str)
    except ValueError:
        return False

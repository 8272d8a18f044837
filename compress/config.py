"""The pipeline file: read, checked, described. Every mistake in it is found at once, each on one line.

Torch is never imported here, so that checking a config answers at once.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from compress.config_faults import Problem, translate
from compress.config_template import render
from compress.errors import ConfigError, ConfigErrors
from compress.files import read_bytes
from compress.schema import (
    BenchConfig,
    BudgetConfig,
    Config,
    DataConfig,
    DistillConfig,
    ExportConfig,
    GatesConfig,
    ModelConfig,
    PruneConfig,
    TrainConfig,
)
from compress.strict_yaml import Document, Mark, Path, Unreadable, parse

__all__ = [
    "BenchConfig",
    "BudgetConfig",
    "Config",
    "DataConfig",
    "DistillConfig",
    "ExportConfig",
    "GatesConfig",
    "ModelConfig",
    "PruneConfig",
    "TrainConfig",
    "json_schema",
    "load",
    "loads",
    "section_hash",
    "template",
    "to_dict",
]

MAX_BYTES = 2**20
MAX_FAULTS = 20
DRAFT = "http://json-schema.org/draft-07/schema#"


def load(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Config:
    """Read a pipeline file. ``overrides`` are ``section.key=VALUE`` texts, VALUE as in YAML; the last wins.

    Raises ConfigError: one line per fault, first one first, each with file, line and column (or ``--set``).
    """
    name = os.fspath(path)
    try:
        data = read_bytes(path, MAX_BYTES)
    except FileNotFoundError as error:
        raise ConfigError("there is no such file", name, "make one with: compress init") from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"cannot be read: {reason}", name, "give the path of a .yaml file") from error
    if len(data) > MAX_BYTES:
        what = f"is larger than {MAX_BYTES} bytes, the most that is read"
        raise ConfigError(what, name, "is it a config file?")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        what = f"byte {error.start} is not UTF-8 text"
        raise ConfigError(what, f"{name}:{line}", "save the file as UTF-8") from error
    return loads(text, name, overrides)


def loads(text: str, name: str = "compress.yaml", overrides: Sequence[str] = ()) -> Config:
    """`load` for text; ``name`` stands for the file in errors."""
    if len(text) > MAX_BYTES:
        raise ConfigError(f"is larger than {MAX_BYTES} characters, the most that is read", name)
    try:
        document = parse(text)
    except Unreadable as error:
        fault = error.fault
        where = f"{name}:{fault.mark.line}:{fault.mark.column}"
        raise ConfigError(fault.what, where, fault.fix) from error
    if all(fault.path for fault in document.faults):
        _require_mapping(document, name)
    source = _Source(name, document)
    for override in overrides:
        source.override(override)
    return source.validated()


def _require_mapping(document: Document, name: str) -> None:
    if document.data is None:
        raise ConfigError("the file is empty", name, "make one with: compress init")
    if not isinstance(document.data, dict):
        mark = document.values[()]
        found = "a list" if isinstance(document.data, list) else "a single value"
        what = f'expected a mapping ("key: value" lines), found {found}'
        raise ConfigError(what, f"{name}:{mark.line}:{mark.column}", "make an example with: compress init")


class _Source:
    """A config's data with the place that every piece of it came from."""

    def __init__(self, name: str, document: Document) -> None:
        self.name = name
        self.document = document
        self.data: Any = document.data if isinstance(document.data, dict) else {}
        self.flags: dict[Path, str] = {}  # what --set gave, or made on its way: its dotted name
        self.problems: list[tuple[tuple[int, Any], ConfigError]] = []  # with what to sort them by
        self.blamed: set[Path] = set()  # whose value could not be read
        for fault in document.faults:
            if fault.lost:
                self.blamed.add(fault.path)
            where = _place(name, fault.mark, fault.path)
            self.problems.append(((0, fault.mark), ConfigError(fault.what, where, fault.fix)))

    def override(self, text: str) -> None:
        dotted, equals, value = text.partition("=")
        path = tuple(dotted.strip().split("."))
        flag = f"--set {dotted.strip()}".strip()
        if not equals or not all(path):
            what = "expected SECTION.KEY=VALUE" if equals else 'there is no "=" in it'
            return self._refuse(flag, what, "for example: --set prune.macs_ratio=0.5")
        if not value.strip():
            return self._refuse(flag, "there is no value after the =", "write null for none")
        try:
            found = parse(value)
        except Unreadable as error:
            return self._refuse(flag, error.fault.what, "quote it twice: --set 'KEY=\"VALUE\"'")
        for fault in found.faults:
            self._refuse(flag, fault.what, fault.fix)
        return None if found.faults else self._set(path, found.data, flag)

    def _set(self, path: Path, value: Any, flag: str) -> None:
        holder = self.data
        for depth, key in enumerate(path[:-1], start=1):
            if holder.get(key) is None:
                holder[key] = {}
                self.flags[path[:depth]] = flag
            holder = holder[key]
            if not isinstance(holder, dict):
                return self._refuse(flag, f"{_dotted(path[:depth])} holds no keys, it is a value")
        holder[path[-1]] = value
        for old in [place for place in self.flags if place[: len(path)] == path]:
            del self.flags[old]
        self.flags[path] = flag
        return None

    def _refuse(self, where: str, what: str, fix: str = "") -> None:
        self.problems.append(((1, Mark(len(self.problems), 0)), ConfigError(what, where, fix)))

    def validated(self) -> Config:
        config = None
        try:
            config = Config.model_validate(self.data)
        except ValidationError as error:
            for problem in translate(error, self.data, Config):
                if not any(problem.path[: len(path)] == path for path in self.blamed):
                    self._note(problem)
        if config is None or self.problems:
            raise _together([error for _order, error in sorted(self.problems, key=lambda item: item[0])])
        return config

    def _note(self, problem: Problem) -> None:
        path = problem.path
        prefixes = [path[:length] for length in range(len(path), -1, -1)]
        given = next((prefix for prefix in prefixes if prefix in self.flags), None)
        if given is not None:  # all of it came with this flag, whatever the file says there
            flag = self.flags[given]
            named = f" {_dotted(path)}" if problem.unknown and flag != f"--set {_dotted(path)}" else ""
            return self._refuse(flag, problem.what + named, problem.fix)
        for prefix in prefixes:
            mark = self._mark(prefix, of_key=problem.unknown or prefix != path)
            if mark is not None:
                error = ConfigError(problem.what, _place(self.name, mark, path), problem.fix)
                return self.problems.append(((0, mark), error))
        return self._refuse(f"{self.name} {_dotted(path)}".strip(), problem.what, problem.fix)

    def _mark(self, path: Path, of_key: bool) -> Mark | None:
        places = (self.document.keys, self.document.values)
        first, second = places if of_key else reversed(places)
        return first.get(path) or second.get(path)


def _place(name: str, mark: Mark, path: Path) -> str:
    return f"{name}:{mark.line}:{mark.column} {_dotted(path)}".strip()


def _dotted(path: Path) -> str:
    """``bench.batches[0]`` for ("bench", "batches", 0)."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")


def _together(errors: list[ConfigError]) -> ConfigError:
    shown = errors[:MAX_FAULTS]
    if len(errors) > MAX_FAULTS:
        shown.append(ConfigError(f"and {len(errors) - MAX_FAULTS} more faults"))
    return ConfigErrors(shown) if len(shown) > 1 else shown[0]


def to_dict(config: Config) -> dict[str, Any]:
    """The config as plain JSON data, defaults filled in; `loads` of it as YAML gives an equal config."""
    return config.model_dump(mode="json")


def section_hash(config: Config, names: Sequence[str]) -> str:
    """SHA-256 over the named top-level keys, for stage keys: equal values give equal hashes in any order.

    Raises KeyError for a name that is not a key of the config.
    """
    data = to_dict(config)
    chosen = {name: data[name] for name in names}
    text = json.dumps(chosen, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def json_schema() -> dict[str, Any]:
    """The JSON Schema (draft-07, which editors read) of the pipeline file, without references."""
    schema = Config.model_json_schema()
    definitions = schema.pop("$defs")
    flat: dict[str, Any] = _inline(schema, definitions)
    for inner in flat["properties"].values():
        if inner.get("type") == "object":
            inner["type"] = ["object", "null"]  # "prune:" with all its keys commented out
    return {"$schema": DRAFT, "title": "compress pipeline", **flat}


def _inline(schema: Any, definitions: Mapping[str, Any]) -> Any:
    """``schema`` with every reference replaced: draft-07 ignores what stands beside a ``$ref``."""
    if isinstance(schema, list):
        return [_inline(item, definitions) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        target = definitions[schema["$ref"].rpartition("/")[2]]
        beside = {key: value for key, value in schema.items() if key != "$ref"}
        return _inline({**target, **beside}, definitions)
    # A "title" that is text is pydantic's noise; one that is a mapping would be a property of that name.
    kept = {key: value for key, value in schema.items() if not (key == "title" and isinstance(value, str))}
    return {key: _inline(value, definitions) for key, value in kept.items()}


def template(
    *,
    model: str = "torchvision:resnet18",
    weights: str | None = "DEFAULT",
    input_shape: Sequence[int] = (3, 224, 224),
    data: str = "data/images",
    macs_ratio: float = 0.5,
    train_epochs: int | None = None,
    finetune_epochs: int = 10,
    target: str = "cpu-ort",
    schema: str | None = None,
) -> str:
    """A commented pipeline file that `load` accepts. ``train_epochs`` adds a ``train`` section.

    ``schema`` is where editors find the JSON Schema. Raises ConfigError when a value does not fit the schema.
    """
    given: dict[str, dict[str, Any]] = {
        "model": {"name": model, "weights": weights, "input_shape": list(input_shape)},
        "data": {"name": data},
        "prune": {"macs_ratio": macs_ratio},
        "finetune": {"epochs": finetune_epochs},
        "bench": {"target": target},
    }
    if train_epochs is not None:
        given["train"] = {"epochs": train_epochs}
    text = render(given, schema)
    loads(text, "the new compress.yaml")
    return text

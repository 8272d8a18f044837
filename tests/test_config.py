"""A config: what is accepted, the default of every key, its JSON Schema, the template and the hashes."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft7Validator
from pydantic import ValidationError

from compress.config import (
    Config,
    PruneConfig,
    TrainConfig,
    json_schema,
    load,
    loads,
    section_hash,
    template,
    to_dict,
)
from compress.errors import ConfigError
from compress.schema import RATIOS

ROOT = Path(__file__).parents[1]
BASE = "version: 1\nmodel: {name: torchvision:resnet18, input_shape: [3, 32, 32]}\ndata: {name: mnist5k}\n"
TRAIN = {
    "epochs": 10,
    "optimizer": "sgd",
    "lr": 0.01,
    "momentum": 0.9,
    "weight_decay": 0.0001,
    "schedule": "cosine",
    "step_epochs": 10,
    "step_gamma": 0.1,
    "warmup_epochs": 0.0,
    "label_smoothing": 0.0,
    "distill": None,
    "ema": 0.0,
    "recalibrate": 0,
    "amp": "auto",
}
DEFAULTS: dict[str, Any] = {
    "version": 1,
    "recipe": None,
    "model": {
        "name": "torchvision:resnet18",
        "weights": None,
        "kwargs": {},
        "part": None,
        "input_shape": [3, 32, 32],
    },
    "data": {
        "name": "mnist5k",
        "root": "data",
        "batch_size": 128,
        "mean": None,
        "std": None,
        "augment": "none",
        "validation": 0.1,
        "train_limit": None,
        "test_limit": None,
        "kwargs": {},
    },
    "train": None,
    "prune": {
        "macs_ratio": 0.5,
        "params_ratio": None,
        "units_ratio": None,
        "criterion": "taylor",
        "gates": "read",
        "minibatches_per_step": 10,
        "units_per_step": None,
        "lr": 0.001,
        "momentum": 0.9,
        "weight_decay": 0.0,
        "ema": 0.9,
        "align": "auto",
        "min_keep": 0.1,
        "rank": "importance_per_cost",
        "keep": [],
        "attention": "heads",
        "grouped_convs": "auto",
        "fold_weights": True,
        "inexact_norms": False,
        "max_loss_increase": None,
        "max_accuracy_drop": None,
    },
    "budget": None,
    "finetune": TRAIN,
    "export": {
        "opset": None,
        "tolerance": 1e-4,
        "batches": [1, 2, 7],
        "precisions": [],
        "calibration_images": 512,
        "keep_fp32": "first_last",
    },
    "bench": {
        "target": "cpu-ort",
        "precision": None,
        "batches": None,
        "repeats": 20,
        "seconds": 1.0,
        "threads": None,
        "runners": None,
        "streams": None,
        "engine": {
            "workspace_mib": None,
            "builder_level": None,
            "refit": False,
            "version_compatible": False,
            "compute_capability": None,
            "buffers": "torch",
        },
    },
    "gates": {
        "target": None,
        "accuracy_drop": 0.01,
        "metric_drop": None,
        "speedup": None,
        "latency_ms": None,
        "runner": None,
        "batch": None,
        "size_ratio": None,
        "parity": True,
    },
    "seed": 0,
    "device": "auto",
    "out": "run",
}


def keys(schema: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for name, inner in schema.get("properties", {}).items():
        yield prefix + name
        for option in (inner, *inner.get("anyOf", [])):
            yield from keys(option, f"{prefix}{name}.")


# --- what is accepted


def test_every_key_and_its_default() -> None:
    assert to_dict(loads(BASE)) == DEFAULTS


def test_the_file_is_read_and_frozen(tmp_path: Path) -> None:
    path = tmp_path / "compress.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + BASE.encode() + b"train: {epochs: 2}\n")
    config = load(path)
    assert config.train == TrainConfig(epochs=2)
    assert load(str(path)) == config
    with pytest.raises(ValidationError, match="frozen"):
        config.seed = 1


@pytest.mark.parametrize("name", ["prune", "export", "bench", "gates"])
def test_a_section_with_all_its_keys_commented_out_has_the_defaults(name: str) -> None:
    assert to_dict(loads(BASE + f"{name}:\n  # nothing here\n")) == DEFAULTS


@pytest.mark.parametrize("ratio", RATIOS)
def test_one_ratio_replaces_the_default(ratio: str) -> None:
    prune = loads(BASE + f"prune: {{{ratio}: 0.3}}").prune
    assert {key: getattr(prune, key) for key in RATIOS} == {**dict.fromkeys(RATIOS), ratio: 0.3}
    assert prune == PruneConfig(**{ratio: 0.3})
    assert PruneConfig().macs_ratio == 0.5
    assert loads(BASE + "prune: {macs_ratio: null}").prune.macs_ratio == 0.5


@pytest.mark.parametrize("prune", ["", "prune: {macs_ratio: null}\n", "recipe: modern\n"])
def test_a_budget_takes_the_place_of_the_default_ratio(prune: str) -> None:
    config = loads(BASE + prune + "budget: {latency_ms: 2, params_ratio: 0.5}\n")
    assert {key: getattr(config.prune, key) for key in RATIOS} == dict.fromkeys(RATIOS)
    assert config.budget is not None
    assert (config.budget.latency_ms, config.budget.params_ratio) == (2, 0.5)
    assert Config.model_validate(to_dict(config)) == config


def test_null_switches_off() -> None:
    config = loads(BASE + "finetune: null\ngates: {accuracy_drop: null}\n")
    assert config.finetune is None
    assert config.gates.accuracy_drop is None


def test_a_config_goes_round() -> None:
    config = loads(BASE + "train: {distill: {alpha: 1}, lr: 1}\nprune: {params_ratio: 0.3, align: 8}\n")
    again = loads(yaml.safe_dump(to_dict(config)))
    assert again == config
    assert isinstance(again.train, TrainConfig)
    assert type(again.train.lr) is float


def test_overrides() -> None:
    config = loads(
        BASE + "prune: {macs_ratio: 0.5}\n",
        overrides=[
            "prune.macs_ratio=0.4",
            "prune.macs_ratio=0.25",  # the last wins
            "train.epochs=3",  # a section that was absent
            "bench.batches=[1, 4]",
            "model.kwargs={num_classes: 10}",
            "data.root=~/a=b",
            "finetune=null",
            "model.name=my.module:build",
            " seed = 7",
        ],
    )
    assert config.prune.macs_ratio == 0.25
    assert config.train == TrainConfig(epochs=3)
    assert config.bench.batches == [1, 4]
    assert config.model.kwargs == {"num_classes": 10}
    assert config.data.root == "~/a=b"
    assert config.finetune is None
    assert (config.model.name, config.seed) == ("my.module:build", 7)


def test_an_override_may_mend_the_file() -> None:
    assert loads(BASE + "seed: fast\n", overrides=["seed=3"]).seed == 3


# --- the JSON Schema


def test_the_schema_is_draft_07_without_references() -> None:
    schema = json_schema()
    Draft7Validator.check_schema(schema)
    assert schema["$schema"] == "http://json-schema.org/draft-07/schema#"
    assert "$ref" not in str(schema)
    assert "$defs" not in schema


def test_every_key_is_described() -> None:
    def check(schema: dict[str, Any]) -> int:
        count = 0
        for inner in schema.get("properties", {}).values():
            assert inner["description"]
            count += 1 + sum(check(option) for option in (inner, *inner.get("anyOf", [])))
        if "properties" in schema:
            assert schema["additionalProperties"] is False
        return count

    assert check(json_schema()) > 60


def test_the_schema_agrees_with_load() -> None:
    validator = Draft7Validator(json_schema())
    base: dict[str, Any] = yaml.safe_load(BASE)
    assert validator.is_valid(base)
    assert validator.is_valid({**base, "prune": None, "finetune": None})
    for change in (
        {"prune": {"mac_ratio": 0.5}},
        {"prune": {"macs_ratio": 1.5}},
        {"bench": {"batches": []}},
        {"device": "gpu"},
        {"version": 2},
        {"seed": "1"},
        {"finetune": {"optimizer": "lion"}},
        {"model": {"name": "x"}},
    ):
        assert not validator.is_valid({**copy.deepcopy(base), **change}), change


# --- the template


@pytest.mark.parametrize(
    "options",
    [
        {},
        {
            "model": "my.module:build",
            "weights": None,
            "input_shape": (1, 28, 28),
            "data": "mnist5k",
            "train_epochs": 3,
        },
        {"model": "a b: #c", "weights": "wéights 'x\".pt", "data": "no", "target": "1e3", "macs_ratio": 0.25},
        {
            "model": "010",
            "data": "- x",
            "weights": "~",
            "target": "true",
            "finetune_epochs": 0,
            "schema": "s.json",
        },
    ],
)
def test_the_template_loads_with_what_was_asked(tmp_path: Path, options: dict[str, Any]) -> None:
    path = tmp_path / "compress.yaml"
    path.write_text(template(**options))
    config = load(path)
    assert config.model.name == options.get("model", "torchvision:resnet18")
    assert config.model.weights == options.get("weights", "DEFAULT")
    assert config.model.input_shape == list(options.get("input_shape", (3, 224, 224)))
    assert config.data.name == options.get("data", "data/images")
    assert config.bench.target == options.get("target", "cpu-ort")
    assert config.prune.macs_ratio == options.get("macs_ratio", 0.5)
    assert (config.train.epochs if config.train else None) == options.get("train_epochs")
    assert config.finetune is not None
    assert config.finetune.epochs == options.get("finetune_epochs", 10)
    Draft7Validator(json_schema()).validate(yaml.safe_load(path.read_text()))
    if "schema" in options:
        assert path.read_text().startswith("# yaml-language-server: $schema=s.json\n")


def test_the_templates_commented_lines_are_the_defaults() -> None:
    text = template(train_epochs=10)
    live = loads(text)
    everything = loads(re.sub(r"(?m)^( *)# (\w+: )", r"\1\2", text))
    assert everything == live
    shown = {line.strip("# ").split(":")[0] for line in text.splitlines()}
    assert {
        key.rpartition(".")[2]
        for key in keys(json_schema())
        if not re.search(r"distill\.|engine\.|budget\.", key)
    } <= shown


def test_the_template_is_pleasant() -> None:
    text = template()
    assert max(map(len, text.splitlines())) <= 110
    assert text.startswith("# compress.yaml: what to compress")
    assert "\n\n\n" not in text
    assert text.endswith("\n")
    assert not text.endswith("\n\n")
    assert all(line == line.rstrip() for line in text.splitlines())


def test_a_template_of_nonsense_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.input_shape\[1\]: must be at least 1, found 0"):
        template(input_shape=(3, 0, 5))
    with pytest.raises(ConfigError, match=r"model\.name: must not be empty"):
        template(model="")


# --- hashes, imports


def test_section_hash() -> None:
    config = loads(BASE + "prune: {lr: 1}")
    same = loads("prune: {lr: 1.0, momentum: 0.9}\n" + BASE + "out: elsewhere\n")
    other = loads(BASE + "prune: {lr: 2}")
    assert section_hash(config, ["prune", "data"]) == section_hash(same, ["data", "prune"])
    assert section_hash(config, ["prune"]) != section_hash(other, ["prune"])
    assert section_hash(config, ["data"]) == section_hash(other, ["data"])
    assert section_hash(config, ["data"]) != section_hash(config, ["model"])
    assert re.fullmatch("[0-9a-f]{64}", section_hash(config, []))
    with pytest.raises(KeyError):
        section_hash(config, ["prun"])


def test_the_hash_takes_odd_text() -> None:
    assert section_hash(loads(BASE + "out: größe\n"), ["out"])


def test_import_and_load_without_torch() -> None:
    code = (
        "import sys, compress.config as c; c.loads(c.template()); c.json_schema()\n"
        "print([name for name in ('torch', 'onnx', 'numpy', 'matplotlib') if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert result.stdout == "[]\n"

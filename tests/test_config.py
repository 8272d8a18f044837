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
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft7Validator
from pydantic import ValidationError

from compress.config import (
    MAX_BYTES,
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
ALIAS = "write the value out where it is needed; quote text that starts with & or *"
EXAMPLE = "make an example with: compress init"
SECTIONS = "bench, budget, data, device, export, finetune, gates, model, out, prune, recipe, seed, ..."
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
        "accuracy_drop": 0.01,
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


def lines(text: str, *overrides: str) -> list[str]:
    """The messages for a faulty config."""
    with pytest.raises(ConfigError) as caught:
        loads(text, "compress.yaml", overrides)
    assert caught.value.exit_code == 3
    return str(caught.value).splitlines()


def faults(extra: str, *overrides: str) -> list[str]:
    return lines(BASE + extra, *overrides)


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


# --- what is refused, and in which words


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        (
            "prune:\n  mac_ratio: 0.5\n",
            "compress.yaml:5:3 prune.mac_ratio: unknown key; did you mean macs_ratio?",
        ),
        ("Seed: 1", "compress.yaml:4:1 Seed: unknown key; did you mean seed?"),
        (
            "macs_ratio: 0.3",
            "compress.yaml:4:1 macs_ratio: unknown key; did you mean prune.macs_ratio or budget.macs_ratio?",
        ),
        ("epochs: 1", "compress.yaml:4:1 epochs: unknown key; did you mean train.epochs or finetune.epochs?"),
        (
            "export: {zzz: 1}",
            "compress.yaml:4:10 export.zzz: unknown key; "
            "known: batches, calibration_images, keep_fp32, opset, precisions, tolerance",
        ),
        (
            "finetune: {distill: {temp: 1}}",
            "compress.yaml:4:22 finetune.distill.temp: unknown key; did you mean temperature?",
        ),
        ("prune: {lr: fast}", 'compress.yaml:4:13 prune.lr: expected a number, found "fast"'),
        (
            "prune: {lr: '0.1'}",
            'compress.yaml:4:13 prune.lr: expected a number, found "0.1"; remove the quotes',
        ),
        (
            "prune: {macs_ratio: 50%}",
            'compress.yaml:4:21 prune.macs_ratio: expected a number, found "50%"; write 0.5',
        ),
        ("prune: {lr: true}", "compress.yaml:4:13 prune.lr: expected a number, found true"),
        ("prune: {lr: }", "compress.yaml:4:12 prune.lr: expected a number, found nothing (null)"),
        ("prune: {lr: 0}", "compress.yaml:4:13 prune.lr: must be more than 0, found 0"),
        ("prune: {macs_ratio: 1}", "compress.yaml:4:21 prune.macs_ratio: must be less than 1, found 1"),
        ("data2: 1", "compress.yaml:4:1 data2: unknown key; did you mean data?"),
        ("seed: 1.0", "compress.yaml:4:7 seed: expected a whole number, found 1.0; write 1"),
        ("seed: true", "compress.yaml:4:7 seed: expected a whole number, found true"),
        ("seed: -1", "compress.yaml:4:7 seed: must be at least 0, found -1"),
        (
            "bench: {threads: 99999999999}",
            "compress.yaml:4:18 bench.threads: must be at most 2147483647, found 99999999999",
        ),
        ("bench: {batches: 1}", "compress.yaml:4:18 bench.batches: expected a list, found 1; write [1]"),
        ("bench: {batches: []}", "compress.yaml:4:18 bench.batches: must not be empty, found an empty list"),
        ("bench: {batches: [1, 0]}", "compress.yaml:4:22 bench.batches[1]: must be at least 1, found 0"),
        (
            "bench: {batches: [1, x]}",
            'compress.yaml:4:22 bench.batches[1]: expected a whole number, found "x"',
        ),
        ("out: 5", 'compress.yaml:4:6 out: expected text, found 5; put it in quotes: "5"'),
        ("out: ''", 'compress.yaml:4:6 out: must not be empty, found ""'),
        ('out: "a\\nb"', "compress.yaml:4:6 out: holds a character that cannot be printed; remove it"),
        (
            "gates: {parity: yes}",
            'compress.yaml:4:17 gates.parity: expected true or false, found "yes"; write true',
        ),
        ("gates: {parity: 1}", "compress.yaml:4:17 gates.parity: expected true or false, found 1"),
        (
            "prune: {criterion: tailor}",
            'compress.yaml:4:20 prune.criterion: expected "taylor", "logits", "magnitude" or "random", '
            'found "tailor"; did you mean taylor?',
        ),
        ("prune: {align: x}", 'compress.yaml:4:16 prune.align: expected a whole number or "auto", found "x"'),
        ("prune: {align: 0}", "compress.yaml:4:16 prune.align: must be at least 1, found 0"),
        ("prune: 3", 'compress.yaml:4:8 prune: expected a mapping ("key: value" lines), found 3'),
        ("train: [1]", 'compress.yaml:4:8 train: expected a mapping ("key: value" lines), found a list'),
        (
            "prune: {macs_ratio: 0.5, units_ratio: 0.4}",
            "compress.yaml:4:39 prune.units_ratio: give only one of macs_ratio, params_ratio, units_ratio; "
            "found macs_ratio and units_ratio; set the others to null",
        ),
        (
            "prune: {keep: [fc, 're:(']}",
            "compress.yaml:4:20 prune.keep[1]: not a valid regular expression (missing ), unterminated "
            "subpattern at position 0); check what follows re:",
        ),
        (
            "device: gpu",
            'compress.yaml:4:9 device: expected "auto", "cpu" or "cuda", found "gpu"; '
            "for one GPU of many: cuda:1",
        ),
        (
            "train: {epochs: 2, warmup_epochs: 3}",
            "compress.yaml:4:35 train.warmup_epochs: must be at most epochs (2), found 3",
        ),
        (
            "gates: {speedup: 1.5, runner: tensorrt}\nbench: {runners: [torch]}",
            'compress.yaml:4:31 gates.runner: no runner of this name is measured, found "tensorrt"; '
            "add it to bench.runners",
        ),
        (
            "gates: {latency_ms: 1.5, batch: 3}\nbench: {batches: [1, 32]}",
            "compress.yaml:4:33 gates.batch: this batch size is not measured, found 3; "
            "add it to bench.batches",
        ),
        (
            "seed: 1\nseed: 2",
            "compress.yaml:5:1 seed: duplicate key; it is already given on line 4; keep one of the two",
        ),
        ("bench:\n\tthreads: 1", "compress.yaml:5:1: a tab is not allowed here; use spaces"),
        ("out: [a", "compress.yaml:4:6: this list is never closed, or lacks a comma; write it as [1, 2, 3]"),
        (
            "data: &a 1",
            "compress.yaml:4:1 data: duplicate key; it is already given on line 3; keep one of the two",
        ),
        ("bench: {seconds: .inf}", "compress.yaml:4:18 bench.seconds: expected a finite number, found .inf"),
        ("? [a]\n: 1", "compress.yaml:4:3 ?: a key must be text, found a list; put it in quotes"),
        ("model.name: x", "compress.yaml:4:1 model.name: unknown key; did you mean model?"),
        (
            "budget: {latency_ms: 2}\nprune:\n  params_ratio: 0.3",
            "compress.yaml:6:17 prune.params_ratio: there is a budget too, which takes the place of "
            "params_ratio; remove one of the two",
        ),
        (
            "budget: {latency_ms: 2, latency_ratio: 0.5}",
            "compress.yaml:4:40 budget.latency_ratio: give only one of latency_ms, latency_ratio and "
            "energy_ratio; found latency_ms and latency_ratio",
        ),
        (
            "budget: {batch: 1}",
            "compress.yaml:4:9 budget: must name a limit; give latency_ms, latency_ratio, energy_ratio, "
            "macs_ratio, params_ratio or memory_ratio",
        ),
        (
            "budget: {memory_ratio: 1}",
            "compress.yaml:4:24 budget.memory_ratio: must be less than 1, found 1",
        ),
        ("budget: {latency_ms: 0}", "compress.yaml:4:22 budget.latency_ms: must be more than 0, found 0"),
        (
            "budget: {latncy_ms: 1}",
            "compress.yaml:4:10 budget.latncy_ms: unknown key; did you mean latency_ms?",
        ),
    ],
)
def test_messages(extra: str, expected: str) -> None:
    found = faults(extra)
    assert expected in found


def test_the_mean_has_a_number_for_each_channel() -> None:
    text = BASE.replace("{name: mnist5k}", "{name: mnist5k, mean: [0.5, 0.5], std: [0.5, 0.5, 0.5]}")
    assert lines(text) == [
        "compress.yaml:3:29 data.mean: expected 3 numbers, one per channel of model.input_shape, found 2"
    ]


def test_missing_keys_say_what_to_add() -> None:
    assert lines("model: {}\nversion: 1") == [
        "compress.yaml:1:1 model.name: this key must be given; "
        "add name: torchvision:NAME, timm:NAME, package.module:function, or a .pt2 file",
        "compress.yaml:1:1 model.input_shape: this key must be given; "
        "add input_shape: one input without the batch, e.g. [3, 224, 224]",
        "compress.yaml:1:1 data: this key must be given; add data: the data it is pruned and judged on",
    ]


@pytest.mark.parametrize("value", ["2", "'1'", "true", "1.0", "null"])
def test_only_version_1(value: str) -> None:
    found = lines(BASE.replace("version: 1", f"version: {value}"))
    assert found[0].startswith("compress.yaml:1:10 version: expected 1, found ")


def test_all_faults_at_once_in_the_order_of_the_file() -> None:
    text = BASE + "seed: x\nprune: {lr: -1, zz: 1}\nout: &a 5\nbench: {batches: [0, 1, 0]}\nseed: 2\n"
    places = [line.split(": ")[0] for line in lines(text, "device=gpu", "nonsense")]
    assert places == [
        "compress.yaml:4:7 seed",
        "compress.yaml:5:13 prune.lr",
        "compress.yaml:5:17 prune.zz",
        "compress.yaml:6:6 out",
        "compress.yaml:7:19 bench.batches[0]",
        "compress.yaml:7:25 bench.batches[2]",
        "compress.yaml:8:1 seed",
        "--set nonsense",
        "--set device",
    ]


def test_a_flood_of_faults_is_cut_short() -> None:
    found = faults("".join(f"x{n}: 1\n" for n in range(500)))
    assert len(found) == 21
    assert found[-1] == "and 480 more faults"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("prune.mac_ratio=0.5", "--set prune.mac_ratio: unknown key; did you mean macs_ratio?"),
        ("prun.lr=0.5", "--set prun.lr: unknown key prun; did you mean prune?"),
        ("train.lrr=1", "--set train.lrr: unknown key; did you mean lr?"),
        ("train={lrr: 1}", "--set train: unknown key train.lrr; did you mean lr?"),
        ("seed", '--set seed: there is no "=" in it; for example: --set prune.macs_ratio=0.5'),
        ("", '--set: there is no "=" in it; for example: --set prune.macs_ratio=0.5'),
        ("=3", "--set: expected SECTION.KEY=VALUE; for example: --set prune.macs_ratio=0.5"),
        (
            "prune..lr=3",
            "--set prune..lr: expected SECTION.KEY=VALUE; for example: --set prune.macs_ratio=0.5",
        ),
        ("seed=", "--set seed: there is no value after the =; write null for none"),
        ("seed.x=3", "--set seed.x: seed holds no keys, it is a value"),
        ("bench.batches=[1, x]", '--set bench.batches: expected a whole number, found "x"'),
        ("bench.threads=1.5", "--set bench.threads: expected a whole number, found 1.5"),
        (
            "data.root=@x",
            "--set data.root: unquoted text cannot start with @; quote it twice: --set 'KEY=\"VALUE\"'",
        ),
        (
            "data.root=*x",
            "--set data.root: aliases (*x) are not allowed; " + ALIAS,
        ),
        (
            "prune.params_ratio=0.3",
            "--set prune.params_ratio: give only one of macs_ratio, params_ratio, units_ratio; "
            "found macs_ratio and params_ratio; set the others to null",
        ),
        ("prune={lr: -1}", "--set prune: must be more than 0, found -1"),
        (
            "a\x1b[31m\n=1",
            "--set a\\x1b[31m: unknown key; known: " + SECTIONS,
        ),
    ],
)
def test_override_messages(override: str, expected: str) -> None:
    assert faults("seed: 1\nprune: {macs_ratio: 0.5}\n", override) == [expected]


def test_a_conflict_with_an_override_can_be_mended_by_another() -> None:
    config = loads(
        BASE + "prune: {macs_ratio: 0.5}\n", overrides=["prune.units_ratio=0.3", "prune.macs_ratio=null"]
    )
    assert (config.prune.macs_ratio, config.prune.units_ratio) == (None, 0.3)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "compress.yaml: the file is empty; make one with: compress init"),
        ("# nothing\n---\n", "compress.yaml: the file is empty; make one with: compress init"),
        (
            "- a",
            'compress.yaml:1:1: expected a mapping ("key: value" lines), found a list; ' + EXAMPLE,
        ),
        (
            "\nabc",
            'compress.yaml:2:1: expected a mapping ("key: value" lines), found a single value; ' + EXAMPLE,
        ),
        (
            "*a",
            "compress.yaml:1:1: aliases (*a) are not allowed; " + ALIAS,
        ),
        ("[" * 50, "compress.yaml:1:33: nested more than 32 levels deep"),
        ("#" * (MAX_BYTES + 1), "compress.yaml: is larger than 1048576 characters, the most that is read"),
    ],
)
def test_texts_that_are_no_config(text: str, expected: str) -> None:
    assert lines(text) == [expected]


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "big.yaml").write_bytes(b"#" * (MAX_BYTES + 1))
    (tmp_path / "latin.yaml").write_bytes(b"version: 1\nout: gr\xf6\xdfe\n")
    (tmp_path / "folder.yaml").mkdir()
    cases = {
        "none.yaml": "there is no such file; make one with: compress init",
        "big.yaml": "is larger than 1048576 bytes, the most that is read; is it a config file?",
        "latin.yaml:2": "byte 18 is not UTF-8 text; save the file as UTF-8",
        "folder.yaml": "cannot be read: not a regular file; give the path of a .yaml file",
        "big.yaml/x": "cannot be read: Not a directory; give the path of a .yaml file",
        "a\0b": "cannot be read: embedded null byte; give the path of a .yaml file",
    }
    for name, words in cases.items():
        with pytest.raises(ConfigError) as caught:
            load(tmp_path / name.split(":")[0])
        assert str(caught.value) == f"{tmp_path}/{name}: {words}".replace("\0", "\\x00")


# --- no jargon, whatever is wrong

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


def keys(schema: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for name, inner in schema.get("properties", {}).items():
        yield prefix + name
        for option in (inner, *inner.get("anyOf", [])):
            yield from keys(option, f"{prefix}{name}.")


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


# --- hashes, imports, fuzz


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

"""Recipes: what they fill in, what wins over them, and that the config says so everywhere."""

from __future__ import annotations

import re
from typing import Any, get_args

import pytest
from jsonschema import Draft7Validator

from compress.config import Config, PruneConfig, TrainConfig, json_schema, loads, section_hash, to_dict
from compress.errors import ConfigError
from compress.recipes import RECIPES
from compress.starters import STARTERS, starter_text
from deploy.tables import facts

BASE = "version: 1\nmodel: {name: torchvision:resnet18, input_shape: [3, 32, 32]}\ndata: {name: mnist5k}\n"
every_recipe = pytest.mark.parametrize("recipe", RECIPES)


def changed(config: Config) -> set[str]:
    """The keys whose values are not the schema's defaults."""
    found, usual = to_dict(config), to_dict(loads(BASE))
    return {f"{s}.{k}" for s in ("prune", "finetune") for k in found[s] if found[s][k] != usual[s][k]}


def test_the_schema_names_every_recipe() -> None:
    names = Config.model_fields["recipe"].annotation
    assert {name for kind in get_args(names) for name in get_args(kind)} == set(RECIPES)


@every_recipe
def test_a_recipe_is_what_its_table_says(recipe: str) -> None:
    config = to_dict(loads(BASE + f"recipe: {recipe}\n"))
    for section, values in RECIPES[recipe].items():
        assert {key: config[section][key] for key in values} == values
    assert config["prune"]["macs_ratio"] == 0.5  # the user's, or the default
    assert config["train"] is None
    assert config["recipe"] == recipe


def test_the_papers_loop_by_number() -> None:
    config = loads(BASE + "recipe: molchanov2019\nprune: {macs_ratio: 0.55}\n")
    assert config.prune == PruneConfig(
        macs_ratio=0.55, criterion="taylor", minibatches_per_step=30, units_per_step=100, lr=1e-3,
        momentum=0.9, weight_decay=0.0, ema=0.9, align=1, min_keep=0.0, rank="importance",
    )  # fmt: skip
    assert config.finetune == TrainConfig(
        epochs=25, lr=1e-3, momentum=0.9, weight_decay=0.0, schedule="step", step_epochs=10, amp="off"
    )


def test_without_a_recipe_nothing_changes() -> None:
    assert to_dict(loads(BASE + "recipe: null\n")) == to_dict(loads(BASE))
    assert loads(BASE).recipe is None
    assert changed(loads(BASE)) == set()


@pytest.mark.parametrize("through", ["the file", "--set"])
def test_what_the_user_gives_wins_key_by_key(through: str) -> None:
    extra, overrides = "recipe: modern\nfinetune: {epochs: 3, distill: {alpha: 0.25}}\n", []
    if through == "--set":
        extra, overrides = "", ["finetune.epochs=3", "recipe=modern", "finetune.distill.alpha=0.25"]
    finetune = loads(BASE + extra, overrides=overrides).finetune
    assert finetune is not None
    assert finetune.distill is not None
    assert (finetune.epochs, finetune.distill.alpha) == (3, 0.25)
    modern = RECIPES["modern"]["finetune"]
    assert finetune.distill.temperature == modern["distill"]["temperature"]
    assert (finetune.lr, finetune.ema) == (modern["lr"], modern["ema"])


def test_null_wins_too_and_switches_off() -> None:
    assert loads(BASE + "recipe: modern\nfinetune: null\n").finetune is None
    finetune = loads(BASE + "recipe: modern\nfinetune: {distill: null}\n").finetune
    assert finetune is not None
    assert finetune.distill is None
    prune = loads(BASE + "recipe: molchanov2019\nprune: {units_per_step: null}\n").prune
    assert prune.units_per_step is None
    assert prune.minibatches_per_step == 30
    empty = loads(BASE + "recipe: molchanov2019\nprune:\n  # all comments\n").prune
    assert empty.minibatches_per_step == 30


@every_recipe
def test_the_effective_config_is_hashed_and_goes_round(recipe: str) -> None:
    by_name = loads(BASE + f"recipe: {recipe}\n")
    spelled = to_dict(by_name) | {"recipe": None}
    by_value = Config.model_validate(spelled)
    for section in ("prune", "finetune"):
        assert section_hash(by_name, [section]) == section_hash(by_value, [section])
    assert section_hash(by_name, ["finetune"]) != section_hash(loads(BASE), ["finetune"])
    assert Config.model_validate(to_dict(by_name)) == by_name
    Draft7Validator(json_schema()).validate(to_dict(by_name))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("modren", 'expected "molchanov2019" or "modern", found "modren"; did you mean modern?'),
        ("molchanov", 'expected "molchanov2019" or "modern", found "molchanov"; did you mean molchanov2019?'),
        ("3", 'expected "molchanov2019" or "modern", found 3'),
        ("[modern]", 'expected "molchanov2019" or "modern", found a list'),
    ],
)  # fmt: skip
def test_a_wrong_recipe_is_one_line(given: str, said: str) -> None:
    for extra, overrides, where in (
        (f"recipe: {given}\n", [], "compress.yaml:4:9 recipe: "),
        ("", [f"recipe={given}"], "--set recipe: "),
    ):
        with pytest.raises(ConfigError) as caught:
            loads(BASE + extra, overrides=overrides)
        assert str(caught.value) == where + said
        assert caught.value.exit_code == 3


def test_a_fault_beside_a_recipe_is_told_where_it_is() -> None:
    with pytest.raises(ConfigError) as caught:
        loads(BASE + "recipe: modern\nprune: {lr: fast}\nfinetune: 3\n")
    assert str(caught.value).splitlines() == [
        'compress.yaml:5:13 prune.lr: expected a number, found "fast"',
        'compress.yaml:6:11 finetune: expected a mapping ("key: value" lines), found 3',
    ]


@every_recipe
@pytest.mark.parametrize("template", STARTERS)
def test_init_with_a_recipe(template: str, recipe: str) -> None:
    text = starter_text(template, recipe)
    config: dict[str, Any] = to_dict(loads(text))
    assert config["recipe"] == recipe
    for section, values in RECIPES[recipe].items():
        assert {key: config[section][key] for key in values} == values
    everything = loads(re.sub(r"(?m)^( *)# (\w+: )", r"\1\2", text))
    assert to_dict(everything) == config  # a commented line shows what holds


@pytest.mark.parametrize(("extra", "said"), [("recipe: modern\n", "modern"), ("", "none")])
def test_the_report_names_the_recipe(extra: str, said: str) -> None:
    config = to_dict(loads(BASE + extra))
    assert ("Recipe", said) in facts({"provenance": {"config": config}}).rows

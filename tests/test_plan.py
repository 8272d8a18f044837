"""The plan as a document: it survives JSON, and what is wrong with one is said in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
from helpers import Cut, cut_at, images, random_keep, randomise, torchvision_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from compress.channelmap import channel_map
from compress.errors import ConfigError, ModelError
from compress.plan import Plan, from_json, make_plan
from compress.trace import trace


def depthwise() -> nn.Module:
    parts = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 4, 1)
    return randomise(nn.Sequential(*parts))


@cache
def example() -> Cut:
    traced = trace(depthwise(), images())
    cmap = channel_map(traced)
    return cut_at(traced, cmap, random_keep(cmap))


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000))
def test_json_round_trip(seed: int) -> None:
    cmap = example().cmap
    plan = make_plan(cmap, random_keep(cmap, seed), {"1.weight": 5}, ["net.py:3 x[:, :4]"])
    again = from_json(json.loads(json.dumps(plan.to_json())))
    assert again == plan
    assert again.fingerprint == plan.fingerprint


def test_what_a_plan_holds() -> None:
    done = example()
    kept = tuple(int(i) for i in np.flatnonzero(done.keep))
    names = [("0.weight", 0), ("0.bias", 0), ("1.weight", 0), ("1.bias", 0), ("3.weight", 1)]
    assert done.plan.axes == dict.fromkeys(names, kept)
    assert done.plan.groups == {"1.weight": len(kept)}
    assert done.plan.shapes["1.weight"] == (8, 1, 3, 3)
    assert done.plan.hard_coded == ()


def test_an_identity_plan_is_empty() -> None:
    plan = make_plan(example().cmap, np.ones(8, dtype=bool), {})
    assert plan.axes == {}
    assert from_json(plan.to_json()) == plan


def test_the_fingerprint_is_of_names_and_shapes() -> None:
    done = example()
    other = make_plan(done.cmap, random_keep(done.cmap, 5), {})
    assert other.fingerprint == done.plan.fingerprint
    changed = Plan({**done.plan.shapes, "0.weight": (9, 3, 3, 3)}, {}, {})
    assert changed.fingerprint != done.plan.fingerprint


def test_a_mask_of_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match="the model has 8 units"):
        make_plan(example().cmap, np.ones(9, dtype=bool), {})


def test_an_axis_is_never_emptied() -> None:
    with pytest.raises(ModelError, match=r"no channel of 0\.weight \(dimension 0\) would stay"):
        make_plan(example().cmap, np.zeros(8, dtype=bool), {})


def set_kept(document: dict[str, Any], kept: Any) -> None:
    document["axes"]["0.weight"]["0"] = kept


BAD: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "version": (lambda d: d.update(version=2), "plan version 2 is not 1"),
    "no axes": (lambda d: d.pop("axes"), "not a plan: KeyError 'axes'"),
    "axes of a wrong type": (lambda d: d.update(axes=[1]), "not a plan: AttributeError"),
    "text for an index": (lambda d: set_kept(d, ["a"]), "not a plan: ValueError"),
    "empty axis": (lambda d: set_kept(d, []), "axis 0 of 0.weight is not an ascending choice of 8 indices"),
    "descending": (lambda d: set_kept(d, [2, 1]), "not an ascending choice"),
    "twice": (lambda d: set_kept(d, [1, 1]), "not an ascending choice"),
    "negative": (lambda d: set_kept(d, [-1, 1]), "not an ascending choice"),
    "too large": (lambda d: set_kept(d, [0, 8]), "not an ascending choice"),
    "unknown axis": (lambda d: d["axes"]["0.weight"].update({"7": [0]}), "axis 7 of 0.weight"),
    "unknown tensor": (lambda d: d["axes"].update(x={"0": [0]}), "axis 0 of x is not"),
    "fingerprint": (lambda d: d.update(fingerprint="0" * 64), "fingerprint does not fit its shapes"),
    "shapes": (lambda d: d["shapes"].update({"3.bias": [5]}), "fingerprint does not fit its shapes"),
    "groups of nothing": (lambda d: d["groups"].update({"1.weight": 0}), "0 groups do not fit 1.weight"),
    "groups of an unknown layer": (lambda d: d["groups"].update(x=1), "1 groups do not fit x"),
}


@pytest.mark.parametrize(("change", "text"), BAD.values(), ids=BAD.keys())
def test_bad_plans_are_refused_in_one_line(change: Callable[[dict[str, Any]], Any], text: str) -> None:
    document = json.loads(json.dumps(example().plan.to_json()))
    change(document)
    with pytest.raises(ConfigError) as caught:
        from_json(document, "run/plan.json")
    line = str(caught.value)
    assert caught.value.exit_code == 3
    assert len(line.splitlines()) == 1
    assert line.startswith("run/plan.json: ")
    assert text in line


@pytest.mark.parametrize("document", [None, [], "plan", 3, {}])
def test_other_documents_are_no_plans(document: Any) -> None:
    with pytest.raises(ConfigError, match="not a plan"):
        from_json(document)


@pytest.mark.slow
def test_a_real_model_round_trips() -> None:
    traced = trace(torchvision_model("mobilenet_v3_large"), images(size=32))
    cmap = channel_map(traced)
    done = cut_at(traced, cmap, random_keep(cmap))
    assert from_json(json.loads(json.dumps(done.plan.to_json()))) == done.plan

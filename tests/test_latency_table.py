"""The file of measured latencies: what goes in comes out, and nothing else is believed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from deploy.errors import ArtifactError, DeployError, MeasureError
from deploy.latency_table import Entry, Row, Setting, Table, kinds, read
from deploy.to_onnx import export
from tests.helpers import randomise
from tests.precision_nets import Inverted

HERE = Setting("onnxruntime", "1.23.0", "a CPU", "fp32", 1, 8)

widths = st.integers(0, 4096)
times = st.integers(0, 10**9).map(lambda n: n / 10**6)
rows = st.builds(Row, st.text(max_size=8), st.text(max_size=8), st.tuples(widths, widths), times)
above = times.filter(bool)
counts = st.lists(widths, max_size=4).map(tuple)
entries = st.builds(
    Entry, st.sampled_from(["a", "b"]), counts, above, above, times, st.lists(rows, max_size=3).map(tuple)
)


def entry(model: str = "m", *found: int, ms: float = 2.0) -> Entry:
    return Entry(model, found, ms, 4.0, 0.1, (Row("conv", "Conv", (3, 8), 1.5),))


def write(path: Path, table: Table) -> Path:
    path.write_text(json.dumps(table.as_dict()))
    return path


@settings(max_examples=30, deadline=None)
@given(st.lists(entries, max_size=4), st.lists(entries, max_size=2))
def test_what_goes_in_comes_out(
    tmp_path_factory: pytest.TempPathFactory, own: list[Entry], looks: list[Entry]
) -> None:
    path = write(tmp_path_factory.getbasetemp() / "round.json", Table(HERE, own, looks))
    assert read(path, HERE) == Table(HERE, own, looks)


def test_no_file_is_an_empty_table(tmp_path: Path) -> None:
    assert read(tmp_path / "none.json", HERE) == Table(HERE)


def test_find_of_and_ratio() -> None:
    table = Table(HERE, [entry("m", 8, 4), entry("n", 8, 4), entry("m", 4, 4)], [entry("m", 2, 2)])
    assert table.of("m") == [entry("m", 8, 4), entry("m", 4, 4)]
    assert table.find("m", [4, 4]) == entry("m", 4, 4)
    assert table.find("m", (2, 2)) == entry("m", 2, 2)  # a look is a measurement too
    assert table.find("m", [4, 8]) is None
    assert table.find("o", [4, 4]) is None
    assert entry("m", 1).ratio == 0.5


def test_add_takes_over_what_is_new_looks_among_the_entries() -> None:
    table = Table(HERE, [entry("m", 8)], [entry("m", 4)])
    other = Table(HERE, [entry("m", 8, ms=9.0), entry("n", 8)], [entry("m", 4, ms=9.0), entry("m", 2)])
    assert table.add(other)
    assert table.entries == [entry("m", 8), entry("n", 8), entry("m", 2)]
    assert table.looks == [entry("m", 4)]
    assert not table.add(other)
    twice = Table(HERE)
    assert twice.add(Table(HERE, [entry("m", 8)], [entry("m", 8)]))
    assert len(twice.entries) == 1


def damage(change: Callable[[dict[str, Any]], Any]) -> str:
    document = Table(HERE, [entry("m", 8)]).as_dict()
    changed = change(document)
    return json.dumps(document if changed is None else changed)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "7",
        "[" * 100_000,
        "\x00\xff",
        damage(lambda d: d.pop("schema_version")),
        damage(lambda d: d.update(schema_version=2)),
        damage(lambda d: d.pop("looks")),
        damage(lambda d: d.update(entries=None)),
        damage(lambda d: d.update(entries=[7])),
        damage(lambda d: d["setting"].pop("batch")),
        damage(lambda d: d["setting"].update(more=1)),
        damage(lambda d: d["entries"][0].update(ms=0)),
        damage(lambda d: d["entries"][0].update(original_ms=-1)),
        damage(lambda d: d["entries"][0].update(ms="2")),
        damage(lambda d: d["entries"][0].update(ms=True)),
        damage(lambda d: d["entries"][0].update(ms=float("nan"))),
        damage(lambda d: d["entries"][0].update(outside_ms=float("inf"))),
        damage(lambda d: d["entries"][0].update(counts=[float("inf")])),
        damage(lambda d: d["entries"][0].update(counts=None)),
        damage(lambda d: d["entries"][0].update(rows=[["conv", "Conv", 3, 8]])),
        damage(lambda d: d["entries"][0].update(rows=[["conv", "Conv", "x", 8, 1.0]])),
        damage(lambda d: d["entries"][0].update(rows=[["conv", "Conv", 3, 8, None]])),
        damage(lambda d: d["entries"][0].pop("model")),
    ],
)
def test_a_damaged_file_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "table.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ArtifactError) as caught:
        read(path, HERE)
    said = str(caught.value)
    assert said.startswith("table.json: is no table of latencies: ")
    assert said.endswith("; delete it, and it is measured anew")
    assert len(said.splitlines()) == 1
    assert len(said) < 300
    assert caught.value.exit_code == 8


def test_a_folder_is_no_table_and_its_path_is_not_told(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"^folder: cannot read it: Is a directory; check the path$"):
        read((tmp_path / "folder").mkdir() or tmp_path / "folder", HERE)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"threads": 2}, "threads is 2, here 1"),
        ({"hardware": "b CPU", "batch": 1}, "hardware is b CPU, here a CPU, batch is 1, here 8"),
        ({"runner": "torch", "version": "2", "precision": "fp16"}, "runner is torch, here onnxruntime"),
    ],
)
def test_another_setting_is_refused_by_what_differs(
    tmp_path: Path, changed: dict[str, Any], said: str
) -> None:
    path = write(tmp_path / "table.json", Table(replace(HERE, **changed)))
    with pytest.raises(MeasureError) as caught:
        read(path, HERE)
    assert str(caught.value).startswith(f"table.json: was measured elsewhere: {said}")
    assert str(caught.value).endswith("; give another file, or none: then it is measured here")
    assert isinstance(caught.value, DeployError)
    assert caught.value.exit_code == 3


class Three(nn.Module):
    """A plain, a grouped and a depthwise convolution of one kernel, and one of another."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.plain = nn.Conv2d(3, width, 3, padding=1)
        self.grouped = nn.Conv2d(width, width, 3, padding=1, groups=2)
        self.deep = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.small = nn.Conv2d(width, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.small(self.deep(self.grouped(self.plain(x).relu()).relu()).relu()).mean((2, 3))


def kinds_of(net: nn.Module, path: Path) -> dict[str, str]:
    export(randomise(net).eval(), torch.randn(2, 3, 16, 16), path)
    return kinds(onnx.load(path).graph)


@pytest.mark.slow
def test_a_kind_does_not_depend_on_widths(tmp_path: Path) -> None:
    narrow, wide = (kinds_of(Three(n), tmp_path / "net.onnx") for n in (8, 12))
    assert narrow == wide
    own = {name: narrow[name] for name in ("plain", "grouped", "deep", "small")}
    assert len({*own.values()}) == 4
    assert "depthwise" in own["deep"]
    assert "group 2" in own["grouped"]
    assert "group" not in own["plain"]
    assert "kernel_shape 3x3" in own["plain"]
    assert "kernel_shape 1x1" in own["small"]
    assert not any("8" in text or "12" in text for text in own.values())


def test_every_layer_of_a_net_has_a_kind(tmp_path: Path) -> None:
    found = kinds_of(Inverted(), tmp_path / "net.onnx")
    assert {"stem.0", "deep.0", "gate.0", "gate.2", "project", "head"} <= {
        n.partition(" > ")[0] for n in found
    }
    assert "kernel_shape 1x1" in found["gate.0"]
    assert "depthwise" in found["deep.0"]

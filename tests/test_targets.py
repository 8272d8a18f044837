"""Targets are data: each file is valid, a new file is a new target, faults are named."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import deploy.targets
from deploy.errors import MeasureError
from deploy.targets import Budget, Target, load, names, resolve_align

GOOD = """
description = "my board"
runner = "onnxruntime"
precision = "fp32"
align = 4
threads = 2
batches = [1, 3]
"""


def test_the_module_is_the_file_and_not_the_folder() -> None:
    assert deploy.targets.__file__ is not None
    assert Path(deploy.targets.__file__).name == "targets.py"
    assert not (deploy.targets.FOLDER / "__init__.py").exists()


def test_it_answers_without_heavy_imports() -> None:
    code = "import sys, deploy.targets as t; t.load('t4'); print({'torch', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_a_target_may_name_every_runner() -> None:
    from deploy.runners import KINDS

    assert deploy.targets.RUNNERS == KINDS


def test_the_targets_that_come_with_the_package() -> None:
    assert names() == ("a100", "cpu-ort", "h100", "l4", "orin", "rtx4090", "t4")


@pytest.mark.parametrize("name", names())
def test_each_shipped_target_is_complete(name: str) -> None:
    target = load(name)
    assert target.name == name
    assert target.description
    if name == "cpu-ort":
        assert (target.runner, target.precision, target.align, target.gpu) == (
            "onnxruntime",
            "fp32",
            "auto",
            "",
        )
    else:
        assert (target.runner, target.precision, target.align) == ("tensorrt", "fp16", 8)
        assert target.gpu.lower().replace(" ", "").endswith(name)
        assert 7.5 <= float(target.compute_capability) <= 12


def test_a_file_of_ones_own_by_path(tmp_path: Path) -> None:
    (tmp_path / "board.toml").write_text(GOOD)
    found = load(str(tmp_path / "board.toml"))
    assert found == Target("board", "my board", "onnxruntime", "fp32", 4, 2, (1, 3))
    assert resolve_align(found) == 4


def test_a_name_with_a_precision() -> None:
    found = load("h100-int8")
    assert (found.name, found.precision, found.gpu) == ("h100-int8", "int8", "H100")
    assert load("cpu-ort-int8").precision == "int8"
    with pytest.raises(MeasureError, match="unknown target 'h100-int7'; use h100"):
        load("h100-int7")


def test_a_budget_is_part_of_a_target(tmp_path: Path) -> None:
    (tmp_path / "board.toml").write_text(GOOD + "budget = {latency_ms = 2.5, speedup = 2}\n")
    assert load(str(tmp_path / "board.toml")).budget == Budget(2.5, 2)
    assert load("h100").budget == Budget()
    for wrong in ("{latency = 1}", "{latency_ms = 0}", "{speedup = 'x'}", "{speedup = true}", "3"):
        (tmp_path / "board.toml").write_text(GOOD + f"budget = {wrong}\n")
        with pytest.raises(
            MeasureError, match=r"^board\.toml: budget is .*; it must be a table of latency_ms"
        ):
            load(str(tmp_path / "board.toml"))


def test_align_auto_asks_the_cpu() -> None:
    target = load("cpu-ort")
    assert resolve_align(target, {"sse", "avx2", "avx512f"}) == 16
    assert resolve_align(target, {"sse", "avx2"}) == 8
    assert resolve_align(target, set()) == 8
    assert resolve_align(target) in (8, 16)
    assert resolve_align(load("t4"), {"avx512f"}) == 8


def test_an_unknown_name_gives_the_nearest() -> None:
    with pytest.raises(
        MeasureError, match=r"^bench\.target: unknown target 'h10'; use h100, a100, or the path"
    ) as caught:
        load("h10")
    assert caught.value.exit_code == 3
    with pytest.raises(
        MeasureError, match=r"'zzz'; use a100, cpu-ort, h100, l4, orin, rtx4090, t4, or the path"
    ):
        load("zzz")
    with pytest.raises(MeasureError, match=r"unknown target '\.\./targets/h100'"):
        load("../targets/h100")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD + "alling = 3", "board.toml: unknown key alling; did you mean align?"),
        (GOOD + "qqq = 3", "board.toml: unknown key qqq; known keys: description, runner,"),
        (
            GOOD.replace("align = 4", ""),
            'align is missing; it must be a whole number of 1 or more, or "auto"',
        ),
        (GOOD.replace("align = 4", "align = true"), "align is True; it must be a whole number"),
        (GOOD.replace("align = 4", "align = 0"), "align is 0; it must be a whole number"),
        (GOOD.replace("[1, 3]", "[]"), "batches is []; it must be a list of whole numbers"),
        (GOOD.replace("[1, 3]", "[1, 2.5]"), "batches is [1, 2.5]; it must be a list"),
        (GOOD.replace('"onnxruntime"', "[1]"), "runner is [1]; it must be one of torch, "),
        (GOOD.replace('"fp32"', '"fp4"'), "precision is 'fp4'; it must be one of fp32, tf32, fp16, bf16"),
        (GOOD.replace('"my board"', "3"), "description is 3; it must be a text"),
        ("align = ", "board.toml: is not TOML: Invalid value"),
        ("\xff", "board.toml: is not TOML: "),
        ("a = " + "[" * 5000, "board.toml: is not TOML: "),
        ("#" * 70_000, "board.toml: is larger than 64 KiB"),
    ],
)
def test_faults_name_file_and_key(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "board.toml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(MeasureError) as caught:
        load(str(path))
    assert message in str(caught.value)
    assert str(tmp_path) not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(
        MeasureError, match=r"^none\.toml: cannot read it: No such file or directory; check the path$"
    ):
        load(str(tmp_path / "none.toml"))

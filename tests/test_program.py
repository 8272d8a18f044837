"""Exported programs: real ones load, and no archive gets code, objects or damage past the check."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Canary, refused
from torch import nn

from compress.errors import ConfigError, IntegrityError
from compress.models import load_program
from compress.program import inspect_program, only_weights


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real exported program with a dynamic batch."""
    path = tmp_path_factory.mktemp("program") / "net.pt2"
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    shapes = ({0: torch.export.Dim("batch", min=1, max=64) * 2},)
    torch.export.save(torch.export.export(model, (torch.randn(4, 3, 8, 8),), dynamic_shapes=shapes), path)
    return path


def rewritten(source: Path, target: Path, change: Any = None, **extra: bytes) -> Path:
    """A copy of an archive, ``change`` applied to its graph's JSON and members added."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        root = old.namelist()[0].split("/")[0]
        for name in old.namelist():
            data = old.read(name)
            if name.endswith("models/model.json") and change:
                document = json.loads(data)
                change(document)
                data = json.dumps(document).encode()
            new.writestr(name, data)
        for name, data in extra.items():
            new.writestr(f"{root}/{name}", data)
    return target


def first_call(document: dict[str, Any]) -> dict[str, Any]:
    node: dict[str, Any] = document["graph_module"]["graph"]["nodes"][0]
    return node


class TestPrograms:
    def test_a_real_program_loads_and_runs(self, program: Path) -> None:
        loaded = load_program(program)
        assert loaded.module()(torch.ones(2, 3, 8, 8)).shape == (2, 4, 6, 6)

    def test_a_rewritten_archive_still_loads(self, program: Path, tmp_path: Path) -> None:
        load_program(rewritten(program, tmp_path / "same.pt2", lambda document: None))

    def test_missing_and_truncated(self, program: Path, tmp_path: Path) -> None:
        refused(ConfigError, 3, lambda: load_program(tmp_path / "no.pt2"), "no such file")
        data = program.read_bytes()
        for length in (0, 10, 1000, len(data) // 2, len(data) - 1):
            (tmp_path / "cut.pt2").write_bytes(data[:length])
            refused(IntegrityError, 8, lambda: load_program(tmp_path / "cut.pt2"), "not a whole .pt2 archive")

    def test_a_flipped_byte_is_found(self, program: Path, tmp_path: Path) -> None:
        data = bytearray(program.read_bytes())
        with zipfile.ZipFile(program) as archive:
            member = next(m for m in archive.infolist() if "weights/weight_0" in m.filename)
        data[member.header_offset + 300] ^= 1
        (tmp_path / "flip.pt2").write_bytes(data)
        refused(IntegrityError, 8, lambda: load_program(tmp_path / "flip.pt2"), "damaged")

    @pytest.mark.parametrize(
        ("member", "text"),
        [
            ("data/aotinductor/model/x.so", "compiled code"),
            ("data/weights/x.SO", "compiled code"),
            ("data/aotinductor/model/x.cubin", "compiled code"),
            ("data/constants/custom_obj_0", "custom object"),
            ("data/constants/opaque_obj_0", "custom object"),
        ],
    )
    def test_compiled_code_and_objects(self, program: Path, tmp_path: Path, member: str, text: str) -> None:
        bad = rewritten(program, tmp_path / "bad.pt2", None, **{member: b"\x7fELF"})
        refused(IntegrityError, 8, lambda: load_program(bad), text, member)

    @pytest.mark.parametrize(
        "target",
        [
            "torch.serialization.os.system",
            "torch.ops.load_library",
            "torch.ops.aten.from_file.default",
            "torch.ops.aten.add.__class__.mro",
            "torch.ops.higher_order.inline_asm_elementwise",
            "_operator.methodcaller",
            "_operator.call",
            "math.__loader__.load_module",
            "os.system",
        ],
    )
    def test_operators_that_are_none(self, program: Path, tmp_path: Path, target: str) -> None:
        def change(document: dict[str, Any]) -> None:
            first_call(document)["target"] = target

        bad = rewritten(program, tmp_path / "bad.pt2", change)
        refused(IntegrityError, 8, lambda: load_program(bad), f"calls '{target}'", "not loaded")

    @pytest.mark.parametrize("field", ["expr_str", "guards_code"])
    def test_expressions_that_are_code_do_not_run(self, program: Path, tmp_path: Path, field: str) -> None:
        canary = tmp_path / "canary"
        code = f"__import__('pathlib').Path({str(canary)!r}).touch()"

        def change(document: dict[str, Any]) -> None:
            if field == "guards_code":
                document["guards_code"] = [code]
                return
            todo: list[Any] = [document]
            while todo:
                value = todo.pop()
                if isinstance(value, dict):
                    if "expr_str" in value:
                        value["expr_str"] = code
                    todo.extend(value.values())
                elif isinstance(value, list):
                    todo.extend(value)

        bad = rewritten(program, tmp_path / "bad.pt2", change)
        refused(IntegrityError, 8, lambda: load_program(bad), "holds the expression", "__import__")
        assert not canary.exists()
        if field == "expr_str":  # torch's own loader runs it: that is why the archive is read first
            with pytest.raises(Exception):  # noqa: B017, PT011  # any error will do, the file tells
                torch.export.load(bad)
            assert canary.exists()

    def test_names_that_are_code_do_not_run(self, program: Path, tmp_path: Path) -> None:
        canary = tmp_path / "canary"
        code = f"input=__import__('pathlib').Path({str(canary)!r}).touch()"

        def change(document: dict[str, Any]) -> None:
            text = json.dumps(document).replace('"input"', json.dumps(code))
            document.clear()
            document.update(json.loads(text))

        bad = rewritten(program, tmp_path / "bad.pt2", change)
        refused(IntegrityError, 8, lambda: load_program(bad), "holds the name")
        assert not canary.exists()

    def test_trees_of_other_classes(self, program: Path, tmp_path: Path) -> None:
        def change(document: dict[str, Any]) -> None:
            call = document["graph_module"]["module_call_graph"][0]
            spec = call["signature"]["in_spec"]
            call["signature"]["in_spec"] = spec.replace("builtins.dict", "collections.defaultdict")

        bad = rewritten(program, tmp_path / "bad.pt2", change)
        refused(
            IntegrityError, 8, lambda: load_program(bad), "inputs or outputs in a 'collections.defaultdict'"
        )

    @pytest.mark.parametrize("name", ["mobilenet_v3_small", pytest.param("swin_t", marks=pytest.mark.slow)])
    def test_real_networks_pass(self, tmp_path: Path, name: str) -> None:
        from torchvision.models import get_model

        model = get_model(name, num_classes=10).eval()
        batch = ({0: torch.export.Dim.DYNAMIC},)
        path = tmp_path / "net.pt2"
        torch.export.save(
            torch.export.export(model, (torch.randn(2, 3, 64, 64),), dynamic_shapes=batch), path
        )
        inspect_program(path)

    def test_pickled_sample_inputs_do_not_run(self, program: Path, tmp_path: Path) -> None:
        canary = tmp_path / "canary"
        torch.save(((Canary(canary),), {}), tmp_path / "inputs.pt")
        member = next(n for n in zipfile.ZipFile(program).namelist() if "sample_inputs" in n)
        bad = tmp_path / "bad.pt2"
        with zipfile.ZipFile(program) as old, zipfile.ZipFile(bad, "w") as new:
            for name in old.namelist():
                new.writestr(
                    name, (tmp_path / "inputs.pt").read_bytes() if name == member else old.read(name)
                )
        refused(IntegrityError, 8, lambda: load_program(bad), "cannot be read as an exported program")
        assert not canary.exists()

    def test_the_forcing_variables_are_put_back(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import os

        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
        before = dict(os.environ)
        with only_weights():
            assert "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD" not in os.environ
        assert dict(os.environ) == before

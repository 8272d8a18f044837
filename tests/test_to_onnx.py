"""ONNX export: same bytes everywhere, nothing of the machine inside, a dynamic batch, clear refusals."""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from torch import Tensor, nn

from deploy.errors import DeployError, ExportError
from deploy.runners import open_runner
from deploy.to_onnx import empty, export

REPOSITORY = Path(__file__).resolve().parents[1]
SOURCE = """
import sys
import torch
from pathlib import Path
from torch import nn
from deploy.to_onnx import export

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.skip = nn.Conv2d(3, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        print("the model prints")
        h = torch.relu(self.bn(self.conv(x)) + self.skip(x))
        return self.head(h.mean((2, 3)))

torch.manual_seed(0)
found = export(Net().eval(), torch.randn(2, 3, 8, 8), Path(sys.argv[1]), metadata={"plan": "abc", "a": "1"})
print(found.sha256)
"""


def small() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5)
    return nn.Sequential(*layers).eval()


X = torch.randn(2, 3, 4, 4)


@pytest.mark.slow
def test_two_processes_write_the_same_bytes_and_nothing_of_the_machine(tmp_path: Path) -> None:
    running = []
    for index, name in enumerate(("one", "another")):
        folder = tmp_path / "home" / "zaphod" / name
        folder.mkdir(parents=True)
        (folder / "model.py").write_text(SOURCE)
        environment = os.environ | {
            "PYTHONPATH": str(REPOSITORY),
            "PYTHONHASHSEED": str(index),
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, str(folder / "model.py"), str(folder / "model.onnx")]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=folder, env=environment)
        running.append((folder / "model.onnx", process))
    printed = [process.communicate(timeout=120)[0] for _, process in running]
    contents = [path.read_bytes() for path, _ in running]

    assert contents[0] == contents[1]
    # stdout holds the script's own line only: neither exporter nor model reach it.
    assert printed == [hashlib.sha256(contents[0]).hexdigest() + "\n"] * 2
    for trace in (
        b"zaphod",
        str(tmp_path).encode(),
        str(REPOSITORY).encode(),
        sys.prefix.encode(),
        b"File ",
        b".py",
    ):
        assert trace not in contents[0]


def test_metadata_is_the_callers_alone_and_producer_stays(tmp_path: Path) -> None:
    export(small(), X, tmp_path / "m.onnx", metadata={"b": "2", "a": "1"})
    proto = onnx.load(tmp_path / "m.onnx")
    assert [(entry.key, entry.value) for entry in proto.metadata_props] == [("a", "1"), ("b", "2")]
    assert proto.producer_name == "pytorch"
    assert b"pkg.torch" not in (tmp_path / "m.onnx").read_bytes()
    assert {"0.weight", "4.weight", "4.bias"} <= {tensor.name for tensor in proto.graph.initializer}


def test_the_result_describes_the_file(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    found = export(small(), X, path, opset=18)
    content = path.read_bytes()
    assert found.path == path
    assert (found.bytes, found.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert found.opset == 18
    assert [(port.name, port.dtype, port.shape) for port in found.inputs] == [
        ("input", "float", ("batch", 3, 4, 4))
    ]
    assert [(port.name, port.dtype, port.shape) for port in found.outputs] == [
        ("output", "float", ("batch", 5))
    ]
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.onnx"]


def test_an_exported_graph_module_is_accepted(tmp_path: Path) -> None:
    shapes = ({0: torch.export.Dim("batch")},)
    graph = torch.export.export(small(), (X,), dynamic_shapes=shapes).module()
    assert graph.training  # its flag says nothing, so it must not be the criterion
    found = export(graph, X, tmp_path / "m.onnx")
    assert found.inputs[0].shape == ("batch", 3, 4, 4)


class TwoInTwoOut(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {"sum": x + y, "product": x * y}


def test_several_inputs_and_outputs_are_numbered_in_order(tmp_path: Path) -> None:
    a, b = torch.randn(3, 4), torch.randn(3, 4)
    found = export(TwoInTwoOut().eval(), (a, b), tmp_path / "m.onnx")
    assert [port.name for port in found.inputs] == ["input_0", "input_1"]
    assert [port.name for port in found.outputs] == ["output_0", "output_1"]
    outputs = open_runner("onnxruntime", tmp_path / "m.onnx").infer((a.numpy(), b.numpy()))
    np.testing.assert_allclose(outputs[0], (a + b).numpy(), rtol=1e-6)
    np.testing.assert_allclose(outputs[1], (a * b).numpy(), rtol=1e-6)


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x * 2
        return x + 1


class FixedBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(48, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.head(x.reshape(2, -1)))


class Lu(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(torch.linalg.lu(x)[0])


class Raises(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise ValueError("needs \x1b[31mred\nsecond line")


@pytest.mark.parametrize(
    ("model", "parts"),
    [
        (Branch(), ("test_to_onnx.py:", "`if x.sum() > 0:`", "data-dependent", "; rewrite that part")),
        (
            FixedBatch(),
            ("input input: the model works for a batch of 2 only (shape [2, 3, 4, 4])", "x.shape"),
        ),
        (Lu(), ("No ONNX function found", "linalg_lu")),
        (Raises(), ("ValueError: needs \\x1b[31mred",)),
    ],
    ids=["branch", "fixed batch", "no operator", "raises"],
)
def test_what_cannot_be_exported_gets_one_line(
    model: nn.Module, parts: tuple[str, ...], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ExportError) as caught:
        export(model.eval(), X, tmp_path / "m.onnx")
    text = str(caught.value)
    assert all(part in text for part in parts), text
    assert "\n" not in text
    assert str(REPOSITORY) not in text
    assert caught.value.exit_code == 4
    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []


def test_training_mode_is_refused_in_modules_and_in_graphs(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"^1: BatchNorm2d is in training mode; call model.eval\(\) first$"):
        export(small().train(), X, tmp_path / "m.onnx")
    graph = torch.export.export(small().train(), (X,)).module()
    with pytest.raises(ExportError, match=r"^batch_norm: aten\.batch_norm\.default is in training mode"):
        export(graph, X, tmp_path / "m.onnx")


def test_non_finite_weights_are_refused_by_name(tmp_path: Path) -> None:
    model = small()
    with torch.no_grad():
        model.get_parameter("4.weight")[0, 0] = float("nan")
    with pytest.raises(ExportError, match=r"^4\.weight: holds NaN or infinity; "):
        export(model, X, tmp_path / "m.onnx")


def test_an_infinite_buffer_is_a_mask_and_a_nan_is_not(tmp_path: Path) -> None:
    class Masked(nn.Module):
        limit: Tensor

        def __init__(self, value: float) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.register_buffer("limit", torch.tensor([0.0, value, 0.0, 0.0]))

        def forward(self, x: Tensor) -> Tensor:
            return (self.fc(x) + self.limit).softmax(-1)

    x = torch.randn(2, 4)
    model = Masked(-torch.inf).eval()
    export(model, x, tmp_path / "m.onnx")
    (found,) = open_runner("onnxruntime", tmp_path / "m.onnx").infer((x.numpy(),))
    np.testing.assert_allclose(found, model(x).detach().numpy(), rtol=1e-4, atol=1e-6)
    with pytest.raises(ExportError, match="limit: holds NaN or infinity"):
        export(Masked(torch.nan).eval(), x, tmp_path / "m.onnx")


def test_limits_that_are_tensors(tmp_path: Path) -> None:
    class Limited(nn.Module):
        low: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("low", torch.tensor(-torch.inf))
            self.high = nn.Parameter(torch.tensor(0.2))

        def forward(self, x: Tensor) -> Tensor:
            return torch.clamp(torch.clamp(x, self.low, self.high) * 2, None, self.high)

    x = torch.randn(2, 4)
    model = Limited().eval()
    shapes = ({0: torch.export.Dim("batch")},)
    export(torch.export.export(model, (x,), dynamic_shapes=shapes).module(), x, tmp_path / "m.onnx")
    (found,) = open_runner("onnxruntime", tmp_path / "m.onnx").infer((x.numpy(),))
    np.testing.assert_allclose(found, model(x).detach().numpy(), rtol=1e-6)


def test_a_batch_of_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"input 0: example shape \[1, 3, 4, 4\] has no common batch"):
        export(small(), X[:1], tmp_path / "m.onnx")


def test_an_opset_that_the_exporter_does_not_write_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"opset 99 was asked for, the exporter wrote \d+; use opset \d+"):
        export(small(), X, tmp_path / "m.onnx", opset=99)


def test_a_model_too_large_for_one_file_is_refused_before_the_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deploy.to_onnx.LARGEST_FILE_BYTES", 100)
    monkeypatch.setattr("torch.onnx.export", None)
    with pytest.raises(ExportError, match=r"^\d+ bytes of weights do not fit in one ONNX file \(2 GiB\)"):
        export(small(), X, tmp_path / "m.onnx")


def test_empty_reaches_subgraphs_functions_and_value_info() -> None:
    node = helper.make_node("Relu", ["x"], ["y"], doc_string="secret")
    value = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1], doc_string="secret")
    body = helper.make_graph([node], "secret-free", [], [value], doc_string="secret", value_info=[value])
    branch = helper.make_node("If", ["c"], ["y"], then_branch=body, else_branch=body)
    function = helper.make_function("d", "f", ["x"], ["y"], [node], [helper.make_opsetid("", 18)])
    model = helper.make_model(
        helper.make_graph([branch], "g", [], [value]), functions=[function], doc_string="secret"
    )
    for message in (node, branch, value, model, model.graph, model.functions[0], model.graph.node[0]):
        entry = message.metadata_props.add()
        entry.key, entry.value = "pkg.torch.onnx.stack_trace", "secret"
    text = model.SerializeToString().replace(b"secret-free", b"")
    assert text.count(b"secret") >= 8
    empty(model)
    assert b"secret" not in model.SerializeToString().replace(b"secret-free", b"")
    assert model.graph.node[0].attribute[0].g.node[0].op_type == "Relu"


def test_logging_and_warnings_are_as_before_afterwards(tmp_path: Path) -> None:
    before = logging.root.manager.disable, list(warnings.filters)
    with pytest.raises(DeployError):
        export(Branch(), torch.randn(2, 3), tmp_path / "m.onnx")
    assert (logging.root.manager.disable, list(warnings.filters)) == before


class Windows(nn.Module):
    """Attention of tensors with one, two and three dimensions in front of the tokens."""

    def __init__(self, windows: int, heads: int, masked: bool) -> None:
        super().__init__()
        self.windows, self.heads = windows, heads
        self.qkv = nn.Linear(8, 24)
        self.mask = nn.Parameter(torch.randn(4, 4)) if masked else None

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        if self.heads:
            q, k, v = (y.reshape(x.shape[0], self.windows, self.heads, 4, -1) for y in (q, k, v))
        found = torch.nn.functional.scaled_dot_product_attention(q, k, v, self.mask)
        return found.reshape(x.shape)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("windows", "heads"), [(1, 0), (3, 2)])
def test_attention_of_any_rank(tmp_path: Path, windows: int, heads: int, masked: bool) -> None:
    torch.manual_seed(0)
    model, x = Windows(windows, heads, masked).eval(), torch.randn(2, 4 * windows, 8)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    export(program.module(), x, tmp_path / "m.onnx")
    other = torch.randn(5, 4 * windows, 8)
    (found,) = open_runner("onnxruntime", tmp_path / "m.onnx").infer((other.numpy(),))
    np.testing.assert_allclose(found, model(other).detach().numpy(), rtol=1e-4, atol=1e-5)

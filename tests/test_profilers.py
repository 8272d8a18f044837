"""Profiles of real networks, before and after pruning; whose layer each kernel is."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from deploy.errors import ArtifactError, MeasureError
from deploy.layer_names import Node, OnnxLayers, Place, place_nodes
from deploy.profile import compare
from deploy.profilers import (
    _onnx_macs,
    compare_onnx,
    profile_onnx,
    profile_torch,
    read_ort,
    read_tensorrt,
    read_torch,
)
from deploy.to_onnx import export

X = np.random.default_rng(0).standard_normal((4, 3, 24, 24), dtype=np.float32)


class Net(nn.Module):
    """Convolution and norm, a residual block, pooling, a classifier."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.norm = nn.BatchNorm2d(32)
        self.inner = nn.Conv2d(32, width, 3, padding=1)
        self.back = nn.Conv2d(width, 32, 3, padding=1)
        self.head = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(self.back(torch.relu(self.inner(x))) + x)
        found: torch.Tensor = self.head(nn.functional.max_pool2d(x, 2).mean((2, 3)))
        return found


@pytest.fixture(scope="module")
def nets() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {"before": Net(64).eval(), "after": Net(33).eval()}


@pytest.fixture(scope="module")
def files(nets: dict[str, nn.Module], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("onnx")
    example = torch.randn(2, 3, 24, 24)
    return {name: export(net, example, folder / f"{name}.onnx").path for name, net in nets.items()}


LAYERS = {"stem", "inner", "back", "head"}


def test_a_real_onnxruntime_profile_before_and_after(files: dict[str, Path]) -> None:
    found = profile_onnx(files, (X,), runs=6)
    for profile in found.values():
        names = [layer.name for layer in profile.layers]
        assert len(names) == len(set(names))
        assert set(names) >= LAYERS | {"back > MaxPool", "back > ReduceMean"}
        assert 0 < profile.layers_ms <= profile.run_ms
        assert (profile.runs, profile.source) == (3, "onnxruntime")
    rows = {row.layer: row for row in compare(found["before"], found["after"], align=16)}
    macs = 24 * 24 * 4 * 9 * 32
    before = {layer.name: layer for layer in found["before"].layers}
    assert before["inner"].macs == macs * 64
    assert before["head"].macs == 4 * 32 * 10
    assert before["inner"].channels == (32, 64)
    assert rows["inner"].macs_ratio == rows["back"].macs_ratio == 33 / 64
    assert rows["stem"].reason == rows["head"].reason == "not pruned"
    assert rows["back"].reason == "alignment"
    assert "33" in rows["back"].why


def test_nothing_of_a_real_profile_is_lost_or_counted_twice(files: dict[str, Path]) -> None:
    one = profile_onnx({"m": files["before"]}, (X,), runs=2)["m"]
    graph = onnx.load(files["before"]).graph
    assert sum(layer.calls for layer in one.layers) >= len(LAYERS)
    assert {layer.module for layer in one.layers if layer.module} == LAYERS
    assert len(graph.node) >= sum("Conv" in layer.op for layer in one.layers)


def test_requests_that_cannot_be_profiled(files: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(MeasureError, match=r"^profile: 1 runs of 1 models; profile 2 runs or more$"):
        profile_onnx({"m": files["before"]}, (X,), runs=1)
    with pytest.raises(MeasureError, match="0 models"):
        profile_torch({}, (X,))
    with pytest.raises(ArtifactError, match="no such file; export the model first"):
        profile_onnx({"m": tmp_path / "none.onnx"}, (X,))
    (tmp_path / "bad.onnx").write_bytes(b"garbage")
    with pytest.raises(ArtifactError, match="onnxruntime cannot load it"):
        profile_onnx({"m": tmp_path / "bad.onnx"}, (X,))


def event(name: str, start: int, took: int, **facts: Any) -> dict[str, Any]:
    category = "Session" if name == "model_run" else "Node"
    return {"cat": category, "name": name, "ts": start, "dur": took, "args": facts}


def small_graph() -> Any:
    weights = [
        helper.make_tensor("a.weight", TensorProto.FLOAT, [8, 3, 1, 1], np.zeros(24)),
        helper.make_tensor("b.weight", TensorProto.FLOAT, [10, 8], np.zeros(80)),
    ]
    nodes = [
        helper.make_node("Conv", ["x", "a.weight"], ["conv"], name="node_conv"),
        helper.make_node("Relu", ["conv"], ["relu"], name="node_relu"),
        helper.make_node("MaxPool", ["relu"], ["pool"], name="node_pool", kernel_shape=[2, 2]),
        helper.make_node("Gemm", ["pool", "b.weight"], ["y"], name="node_gemm", transB=1),
    ]
    ports = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in "xy"]
    return helper.make_graph(nodes, "g", ports[:1], ports[1:], weights)


def executed_graph() -> Any:
    """What onnxruntime makes of it: a blocked convolution with the activation inside, and a layout change."""
    nodes = [
        helper.make_node("Conv", ["x", "reorder"], ["t0"], name="relu_nchwc", domain="com.microsoft.nchwc"),
        helper.make_node("ReorderOutput", ["t0"], ["relu"], name="ReorderOutput"),
        helper.make_node("MaxPool", ["relu"], ["pool"], name="node_pool"),
        helper.make_node("Gemm", ["pool", "b.weight"], ["y"], name="node_gemm", transB=1),
    ]
    return helper.make_graph(nodes, "g", [], [])


def test_kernels_of_a_rewritten_graph_find_their_layers() -> None:
    found = OnnxLayers(small_graph()).of_optimised(executed_graph())
    assert [place.name for place, _ in found] == ["a", "a", "a > MaxPool", "b"]
    covered = [index for _, inside in found for index in inside]
    assert Counter(covered) == {0: 1, 1: 1, 2: 1, 3: 1}
    assert OnnxLayers(small_graph()).of_names(["node_conv", "node_relu"]) == Place("a", "a")
    assert OnnxLayers(small_graph()).of_names(["unknown"]) is None


def test_an_onnxruntime_profile_is_read_by_runs_without_the_warm_up() -> None:
    shapes = {"input_type_shape": [{"float": [2, 3, 4, 4]}], "output_type_shape": [{"float": [2, 8, 4, 4]}]}
    flat = {"input_type_shape": [{"float": [2, 8]}], "output_type_shape": [{"float": [2, 10]}]}
    events = []
    for run, slow in enumerate((50, 50, 50, 1, 9, 1)):
        start = 10_000 * run
        events += [
            event("relu_nchwc_kernel_time", start + 5, 100 * slow, activation_size="10", **shapes),
            event("ReorderOutput_kernel_time", start + 5 + 100 * slow, 10),
            event("node_pool_kernel_time", start + 20 + 100 * slow, 20),
            event("inside_a_loop_kernel_time", start + 21 + 100 * slow, 5),
            event("node_gemm_kernel_time", start + 40 + 100 * slow, 30, **flat),
            event("model_run", start, 100 * slow + 90),
        ]
    found = read_ort(events, small_graph(), executed_graph())
    assert found.runs == 2  # the quieter half of three
    assert {layer.name: layer.ms for layer in found.layers} == {"a": 0.11, "a > MaxPool": 0.02, "b": 0.03}
    assert found.run_ms == pytest.approx(0.19)
    assert found.outside_ms == pytest.approx(0.03)
    assert [layer.op for layer in found.layers] == ["Conv (blocked) + ReorderOutput", "MaxPool", "Gemm"]
    assert [layer.macs for layer in found.layers] == [2 * 16 * 24, 0, 2 * 80]
    with pytest.raises(MeasureError, match="no run in the profile; make more than 3 runs"):
        read_ort(events[:6], small_graph(), executed_graph())
    short = executed_graph()
    del short.node[-1]
    with pytest.raises(MeasureError, match="does not fit the graph"):
        read_ort(events, small_graph(), short)


def test_layers_without_parameters_follow_the_one_in_front() -> None:
    nodes = [
        Node("MaxPool", ()),
        Node("Conv", (0,), "a"),
        Node("Relu", (1,)),
        Node("MatMul", (2, 1)),
        Node("Softmax", (3,)),
        Node("MatMul", (4, 2)),
        Node("Add", (5, 2)),
        Node("Gemm", (6,), "a"),
    ]
    names = [place.name for place in place_nodes(nodes)]
    assert names == ["MaxPool", "a", "a", "a > MatMul", "a > Softmax", "a > MatMul 2", "a > MatMul 2", "a"]


def test_a_weight_without_a_name_takes_that_of_the_bias_or_of_its_stored_form() -> None:
    stored = [
        helper.make_tensor(name, TensorProto.FLOAT, [4, 4], np.zeros(16))
        for name in ("val_1", "fc.bias", "q.weight_quantized", "val_2")
    ]
    nodes = [
        helper.make_node("MatMul", ["x", "val_1"], ["m"], name="m"),
        helper.make_node("Add", ["m", "fc.bias"], ["n"], name="n"),
        helper.make_node("DequantizeLinear", ["q.weight_quantized", "s"], ["w"], name="d"),
        helper.make_node("MatMul", ["n", "w"], ["o"], name="o"),
        helper.make_node("MatMul", ["o", "val_2"], ["p"], name="p"),
    ]
    places = OnnxLayers(helper.make_graph(nodes, "g", [], [], stored)).places
    assert [place.name for place in places] == ["fc", "fc", "q", "q", "q > MatMul"]


def test_quantized_and_cast_kernels_find_their_layers_and_weights() -> None:
    weights = [helper.make_tensor("a.weight_quantized", TensorProto.INT8, [8, 3, 1, 1], np.zeros(24, int))]
    nodes = [
        helper.make_node("DequantizeLinear", ["a.weight_quantized", "s"], ["w"], name="d"),
        helper.make_node("Conv", ["x", "w"], ["conv"], name="c"),
        helper.make_node("Relu", ["conv"], ["relu"], name="r"),
    ]
    layers = OnnxLayers(helper.make_graph(nodes, "g", [], [], weights))
    assert layers.weight(1) == ((8, 3, 1, 1), True)
    assert layers.weight(0) is layers.weight(2) is None
    executed = [
        helper.make_node("Conv", ["x", "t"], ["t1"], name="InsertedPrecisionFreeCast_conv_nchwc"),
        helper.make_node("ReorderOutput", ["t1"], ["InsertedPrecisionFreeCast_relu"], name="out"),
    ]
    found = layers.of_optimised(helper.make_graph(executed, "g", [], []))
    assert found == [(Place("a", "a"), (0, 1)), (Place("a", "a"), (2,))]
    turned = [helper.make_node("QLinearConv", ["x", "s"], ["c"], name="c_token_7")]  # NHWC: named after nodes
    assert layers.of_optimised(helper.make_graph(turned, "g", [], [])) == [(Place("a", "a"), (0, 1))]


def test_macs_count_weights_and_places_whatever_the_layout() -> None:
    def macs(
        op: str, inputs: list[int], outputs: list[int], dims: tuple[int, ...], **more: int
    ) -> int | None:
        facts = {f"{side}_type_shape": [{"float": s}] for side, s in (("input", inputs), ("output", outputs))}
        return _onnx_macs(helper.make_node(op, [], [], **more), facts, (dims, True) if dims else None)

    assert macs("Conv", [2, 3, 9, 9], [2, 16, 8, 8], (10, 3, 2, 2)) == 2 * 64 * 120  # padded to 16
    assert macs("QLinearConv", [2, 9, 9, 3], [2, 8, 8, 10], (10, 3, 2, 2), channels_last=1) == 2 * 64 * 120
    assert macs("ConvTranspose", [2, 3, 4, 4], [2, 5, 8, 8], (3, 5, 2, 2)) == 2 * 16 * 60
    assert macs("Gemm", [2, 8], [2, 10], (10, 8)) == 160
    assert macs("MatMul", [2, 7, 8], [2, 7, 10], ()) == 2 * 7 * 10 * 8
    assert macs("Einsum", [2, 8], [2, 10], ()) is None
    assert macs("Relu", [2, 8], [2, 8], ()) == 0


def test_the_comparison_for_the_results_in_one_call(files: dict[str, Path]) -> None:
    macs = ({"inner": 200.0}, {"inner": 50.0})
    found = compare_onnx(
        files["before"], files["after"], (X,), align=16, runs=4, macs=macs, measured_ms=(1e9, None)
    )
    json.dumps(found, allow_nan=False)
    rows = {row["layer"]: row for row in found["rows"]}
    assert rows["inner"]["macs_ratio"] == 0.25
    assert found["totals"]["before"]["agrees"] is False
    for name in ("before", "after"):
        total = found["totals"][name]
        assert total["layers_ms"] + total["outside_ms"] == pytest.approx(total["run_ms"])
        assert sum(row[f"{name}_ms"] or 0 for row in found["rows"]) == pytest.approx(total["layers_ms"])


@pytest.mark.slow
def test_attention_of_a_real_transformer_gets_rows_of_its_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    for parameter in net.parameters():  # equal initial values would be stored once, under one name
        nn.init.normal_(parameter)
    path = export(net, torch.randn(2, 5, 16), tmp_path / "t.onnx").path
    found = profile_onnx({"m": path}, (np.zeros((2, 5, 16), np.float32),), runs=2)["m"]
    names = {layer.name for layer in found.layers}
    assert {"linear1", "linear2", "self_attn.out_proj", "norm1"} <= names
    assert any("Softmax" in layer.op for layer in found.layers)


def test_a_real_torch_profile_before_and_after(nets: dict[str, nn.Module]) -> None:
    found = profile_torch(nets, (X,), runs=3)
    names = [layer.name for layer in found["before"].layers]
    assert names == ["stem", "norm", "inner", "back", "back > max_pool2d", "back > mean", "head"]
    rows = {row.layer: row for row in compare(found["before"], found["after"], align=16)}
    assert rows["inner"].macs_ratio == 33 / 64
    inner = found["before"].layers[2]
    assert (inner.op, inner.channels, inner.macs) == ("conv2d + relu", (32, 64), 24 * 24 * 4 * 9 * 32 * 64)
    for profile in found.values():
        assert 0 < profile.layers_ms <= profile.run_ms
        assert profile.source == "torch, cpu"


class Average:
    """One of torch's key_averages()."""

    def __init__(self, key: str, cpu: float, device: float) -> None:
        self.key, self.cpu_time_total, self.device_time_total = key, cpu, device


def test_torchs_averages_are_read_by_run_and_device() -> None:
    from torch.autograd.profiler_util import FunctionEventAvg

    double = Average("", 0, 0)
    assert all(hasattr(FunctionEventAvg(), name) for name in vars(double))
    listed = [
        Average("run:m/3:", 900.0, 500.0),
        Average("run:m/3:conv2d", 200.0, 400.0),
        Average("run:m/3:conv2d", 0.0, 400.0),  # the same range, listed for the device
        Average("aten::conv2d", 190.0, 400.0),
    ]
    assert read_torch(listed, on_gpu=False) == {"m/3": {"": 0.9, "conv2d": 0.2}}
    assert read_torch(listed, on_gpu=True) == {"m/3": {"": 0.9, "conv2d": 0.4}}


def test_tensorrts_layers_are_found_by_metadata_and_by_name() -> None:
    inspected = [
        {
            "Name": "kernel_1",
            "LayerType": "CaskConvolution",
            "Metadata": "[ONNX Layer: node_conv]\x1e[ONNX Layer: node_relu]",
        },
        {"Name": "node_pool", "LayerType": "CaskPooling", "Metadata": ""},
    ]
    times = {"kernel_1": 2.0, "node_pool": 0.5, "node_gemm + something": 0.25, "Reformat 0": 0.125}
    runs = [{name: ms * factor for name, ms in times.items()} for factor in (9, 9, 9, 1, 7, 1)]
    found = read_tensorrt(runs, [3.0 * f for f in (9, 9, 9, 1, 7, 1)], inspected, small_graph())
    assert [(layer.name, layer.op, layer.ms) for layer in found.layers] == [
        ("a", "CaskConvolution", 2.0),
        ("a > MaxPool", "CaskPooling", 0.5),
        ("b", "kernel", 0.25),
        ("Reformat 0", "kernel", 0.125),
    ]
    assert (found.run_ms, found.runs) == (3.0, 2)
    assert found.outside_ms == 0.125
    with pytest.raises(MeasureError, match="no run in the profile"):
        read_tensorrt(runs[:3], [1.0] * 3, inspected, small_graph())
    assert json.dumps(inspected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_torch_profile_on_a_gpu(nets: dict[str, nn.Module]) -> None:
    found = profile_torch(nets, (X,), runs=3, device="cuda")["before"]
    assert next(layer for layer in found.layers if layer.name == "inner").ms > 0
    assert found.layers_ms <= found.run_ms

"""Small networks in ONNX, with random parameters that show, and how the tests of precisions look at files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from compress.zoo import cifar_resnet
from deploy.parity import normal_inputs
from deploy.runners import Array
from deploy.to_onnx import export
from tests.helpers import randomise

WEIGHTED = ("Conv", "Gemm", "MatMul")


class Block(nn.Module):
    """A vision transformer in small: patches, one block of attention and MLP, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 4, 4)
        self.one, self.two = nn.LayerNorm(16), nn.LayerNorm(16)
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        q, k, v = (y.unflatten(2, (2, 8)).transpose(1, 2) for y in self.qkv(self.one(x)).chunk(3, -1))
        mixed = ((q @ k.transpose(2, 3)) / 8**0.5).softmax(-1) @ v
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        x = x + self.mlp(self.two(x))
        return self.head(x.mean(1))


class Inverted(nn.Module):
    """MobileNet v3 in small: depthwise convolution, squeeze and excitation, hard swish, a skip."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.Hardswish())
        self.deep = nn.Sequential(
            nn.Conv2d(8, 8, 3, 1, 1, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU6()
        )
        self.gate = nn.Sequential(nn.Conv2d(8, 4, 1), nn.ReLU(), nn.Conv2d(4, 8, 1), nn.Hardsigmoid())
        self.project = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.deep(x)
        y = self.project(y * self.gate(y.mean((2, 3), keepdim=True)))
        return self.head((x + y).mean((2, 3)))


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet": (lambda: cifar_resnet(20), (3, 32, 32)),
    "vit": (Block, (3, 16, 16)),
    "mobile": (Inverted, (3, 16, 16)),
}


def export_all(folder: Path) -> dict[str, Path]:
    """Every net of NETS, exported with its name as metadata."""
    for name, (build, shape) in NETS.items():
        model, example = randomise(build()).eval(), torch.randn(2, *shape)
        export(model, example, folder / f"{name}.onnx", metadata={"plan": name})
    return {name: folder / f"{name}.onnx" for name in NETS}


def batches(shape: Sequence[int], count: int = 2, scale: float = 1.0) -> Iterator[tuple[Array, ...]]:
    return ((scale * normal_inputs([shape], 8, seed)[0],) for seed in range(count))


def types(model: onnx.ModelProto) -> dict[str, int]:
    """Element type of every value and initializer."""
    graph = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    values = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.output, *graph.value_info)}
    return values | {tensor.name: tensor.data_type for tensor in graph.initializer}


def of_type(model: onnx.ModelProto, *wanted: str) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type in wanted]


def run_plainly(path: Path, x: Array) -> Array:
    """ONNX Runtime without its optimisations: 1.32 breaks fp8 pairs with them."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    found: Array = onnxruntime.InferenceSession(str(path), options).run(None, {"input": x})[0]
    return found


def distance(a: Array, b: Array) -> float:
    return float(np.abs(a.astype(np.float64) - b).max() / np.abs(a).max())

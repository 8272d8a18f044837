"""Pruning a part of a model that cannot be exported whole: a detector's backbone and heads."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from helpers import assert_costs, assert_exact, cut_at, parameter_count, random_keep, randomise
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import _pytree as pytree
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign

import compress
from compress import files
from compress.channelmap import channel_map
from compress.config import ModelConfig
from compress.errors import CompressError
from compress.inspection import build, inspect
from compress.parts import Whole, arguments, trace_parts
from compress.ports import split
from compress.task import move
from compress.trace import GraphNet, trace
from tests.pipelines import DECIDES, start

OPTIONS: dict[str, Any] = {"minibatches_per_step": 1, "units_per_step": 1000, "lr": 1e-4, "macs_ratio": 0.6}


class Trunk(nn.Module):
    """Two feature maps in a dictionary, the lower one with the upper one added, as in a pyramid."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.out_channels = width
        self.stem = nn.Conv2d(3, 2 * width, 3, 4, 1, bias=False)
        self.bn = nn.BatchNorm2d(2 * width)
        self.down = nn.Conv2d(2 * width, 3 * width, 3, 2, 1)
        self.top, self.side = nn.Conv2d(3 * width, width, 1), nn.Conv2d(2 * width, width, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        low = self.bn(self.stem(x)).relu()
        high = self.top(self.down(low).relu())
        up = functional.interpolate(high, size=low.shape[-2:], mode="nearest")
        return OrderedDict([("low", self.side(low) + up), ("high", high)])


def detector() -> FasterRCNN:
    anchors = AnchorGenerator(((16,), (32,)), ((1.0,),) * 2)
    pool = MultiScaleRoIAlign(["low", "high"], 3, 2)
    model = FasterRCNN(
        Trunk(), 3, min_size=48, max_size=64, rpn_anchor_generator=anchors, box_roi_pool=pool,
        rpn_pre_nms_top_n_test=50, rpn_post_nms_top_n_test=20, box_score_thresh=0.0,
    )  # fmt: skip
    randomise(model.backbone)
    return model


def pictures(seed: int = 0, sizes: Sequence[tuple[int, int]] = ((48, 60), (64, 48))) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(3, *size, generator=generator) for size in sizes]


def batch(seed: int) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    target = {"boxes": torch.tensor([[5.0, 5.0, 40.0, 40.0]]), "labels": torch.tensor([1 + seed % 2])}
    sizes = ((48, 60), (64, 48)) if seed % 2 else ((48, 48), (48, 48))
    return pictures(seed, sizes), [dict(target) for _ in range(2)]


def loss(model: nn.Module, given: tuple[list[Tensor], list[dict[str, Tensor]]]) -> Tensor:
    """What the detector itself trains with."""
    return torch.stack(list(model(*given).values())).sum()


def prune(model: nn.Module, part: Any, **options: Any) -> tuple[Any, compress.Result]:
    batches = [batch(seed) for seed in range(4)]
    return compress.prune(model, (pictures(),), batches, loss, part=part, **{**OPTIONS, **options})


class TestDetector:
    def test_the_whole_model_comes_back_with_a_dense_part(self) -> None:
        model = detector()
        before = copy.deepcopy(model.state_dict())
        dense, result = prune(model, "backbone")
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
        assert all(p.requires_grad for p in model.parameters())
        assert isinstance(dense, FasterRCNN)
        assert isinstance(dense.backbone, GraphNet)
        assert isinstance(model.backbone, Trunk)
        assert result.reached
        assert result.macs[1] <= 0.6 * result.macs[0]
        assert parameter_count(dense.backbone) == result.params[1] < result.params[0]
        assert {name for name, _ in dense.named_parameters()} == {n for n, _ in model.named_parameters()}

    def test_part_and_whole_are_proved(self) -> None:
        _, result = prune(detector(), "backbone")
        assert result.whole is not None
        for proof in (result.verification, result.whole):
            assert proof.passed
            assert proof.dtype == "float64"
            assert proof.relative_error < 1e-11
            assert proof.movement > 1e-3

    def test_only_the_part_is_trained(self) -> None:
        model = detector()
        dense, _ = prune(model, "backbone", lr=0.01)
        before, after = model.state_dict(), dense.state_dict()
        outside = [name for name in before if not name.startswith("backbone.")]
        assert len(outside) > 8
        assert all(torch.equal(before[name], after[name]) for name in outside)
        kept = before["backbone.top.bias"].shape == after["backbone.top.bias"].shape
        assert kept
        assert not torch.equal(before["backbone.top.bias"], after["backbone.top.bias"])
        assert all(p.requires_grad for p in dense.parameters())

    def test_the_result_trains_on_images_of_other_sizes(self) -> None:
        dense, _ = prune(detector(), "backbone")
        dense.train()
        given = (pictures(5, ((64, 64), (33, 50))), batch(1)[1])
        value = loss(dense, given)
        value.backward()
        assert torch.isfinite(value)
        assert all(p.grad is not None for p in dense.backbone.parameters())
        found = dense.eval()(pictures(6, ((50, 40),)))
        assert set(found[0]) == {"boxes", "labels", "scores"}

    def test_names_channels_and_plan_are_the_whole_models(self) -> None:
        model = detector()
        _, result = prune(model, "backbone", keep=["backbone.top"])
        widths = {layer.name: (layer.before, layer.after) for layer in result.layers}
        assert widths["backbone.down"] == (24, 24)
        assert widths["backbone.stem"][1] < 16
        assert widths["backbone.top"] == (8, 8)
        assert compress.apply_plan(result.plan, copy.deepcopy(model)).backbone.stem.out_channels < 16

    def test_in_place_slices_the_users_own_part(self) -> None:
        model = detector()
        trunk = model.backbone
        same, result = prune(model, "backbone", in_place=True)
        assert same is model
        assert model.backbone is trunk
        assert trunk.stem.out_channels < 16
        assert parameter_count(trunk) == result.params[1]
        assert all(p.requires_grad for p in model.parameters())
        loss(model.train(), batch(0)).backward()

    def test_several_parts_share_one_target(self) -> None:
        model = detector()
        dense, result = prune(model, ["backbone", "rpn.head", "roi_heads.box_head"], macs_ratio=0.2)
        changed = {layer.name for layer in result.layers if layer.after < layer.before}
        assert {"backbone", "rpn", "roi_heads"} == {name.split(".")[0] for name in changed}
        assert result.whole is not None
        assert result.whole.passed
        assert result.verification.passed
        assert isinstance(dense.rpn.head, GraphNet)
        assert isinstance(dense.rpn, type(model.rpn))
        loss(dense.train(), batch(1)).backward()

    def test_evaluate_gets_the_whole_model_in_eval_mode(self) -> None:
        seen = []

        def evaluate(model: nn.Module) -> float:
            seen.append((type(model), model.training, model.rpn.training))
            return 1.0

        prune(detector(), "backbone", evaluate=evaluate, max_accuracy_drop=0.5)
        assert set(seen) == {(FasterRCNN, False, False)}

    def test_a_part_on_disk(self, tmp_path: Path) -> None:
        dense, _ = prune(detector(), "backbone")
        x = torch.rand(3, 3, 40, 56)
        compress.save(dense.backbone, tmp_path / "backbone", x)
        found = compress.load(tmp_path / "backbone")
        before, after = dense.backbone(x), found(x)
        assert type(after) is OrderedDict
        assert list(after) == ["low", "high"]
        assert all(torch.equal(before[name], after[name]) for name in before)


class TestModes:
    def test_frozen_batch_norms_stay_frozen(self) -> None:
        model = detector().train()
        model.backbone.bn.eval()
        dense, _ = prune(model, "backbone")
        assert not model.backbone.bn.training
        statistics = dense.backbone.get_buffer("bn.running_mean").clone()
        dense.train()
        loss(dense, batch(0))
        assert torch.equal(dense.backbone.get_buffer("bn.running_mean"), statistics)

    def test_others_train(self) -> None:
        dense, _ = prune(detector(), "backbone")
        statistics = dense.backbone.get_buffer("bn.running_mean").clone()
        loss(dense.train(), batch(0))
        assert not torch.equal(dense.backbone.get_buffer("bn.running_mean"), statistics)

    def test_a_frozen_batch_norm_of_a_whole_model(self) -> None:
        model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6))
        model.train()[1].eval()
        net = trace(model, (torch.randn(2, 3, 8, 8),)).net.train()
        before = {name: value.clone() for name, value in net.named_buffers()}
        net(torch.randn(4, 3, 8, 8))
        assert torch.equal(net.get_buffer("1.running_mean"), before["1.running_mean"])
        assert not torch.equal(net.get_buffer("3.running_mean"), before["3.running_mean"])

    def test_batches_of_targets_move_to_a_device(self) -> None:
        images, targets = move(batch(0), torch.device("meta"))
        assert all(x.is_meta for x in images)
        assert all(x.is_meta for target in targets for x in target.values())
        assert [list(target) for target in targets] == [["boxes", "labels"]] * 2


class Host(nn.Module):
    """Runs its parts where no exporter can follow."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Any:
        for part in self.children():
            x = part(x) if x.sum().item() < 1e9 else x
        return x


def body(width: int = 12) -> nn.Module:
    layers = nn.Linear(6, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 6)
    return randomise(nn.Sequential(*layers))


def squares(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def small(model: nn.Module, part: Any, **options: Any) -> tuple[Any, compress.Result]:
    xs = [torch.randn(5, 6, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    return compress.prune(model, xs[0], xs, squares, part=part, **{**OPTIONS, **options})


class TestPlaces:
    def test_nested_paths(self) -> None:
        model = Host(outer=Host(inner=body()), last=body())
        dense, result = small(model, "outer.inner")
        assert isinstance(dense.outer.inner, GraphNet)
        assert isinstance(dense.last, nn.Sequential)
        assert {layer.name for layer in result.layers} == {f"outer.inner.{i}" for i in (0, 2, 4)}
        assert result.whole is not None
        assert result.whole.passed

    def test_a_part_with_two_names_and_two_calls(self) -> None:
        part = body()
        dense, result = small(Twice(first=part, second=part), "first")
        assert dense.first is dense.second
        assert result.whole is not None
        assert result.whole.passed

    def test_parameters_shared_with_the_rest_stay(self) -> None:
        model = Host(first=nn.Sequential(body(), body()), second=body())
        model.second[2].weight = model.first[0][2].weight
        _, result = small(model, "first")
        widths = {layer.name: layer.after for layer in result.layers}
        assert widths["first.0.0"] == widths["first.0.2"] == 12
        assert widths["first.1.0"] < 12

    def test_keywords_and_plain_arguments(self) -> None:
        model = Scaled()
        dense, result = small(model, "part")
        assert result.whole is not None
        assert result.whole.passed
        found = dense.part(torch.ones(3, 6), scale=2.0, extra={"y": torch.ones(3, 6)})
        assert list(found) == ["sum", "count"]
        assert found["count"] == 3
        refused(4, "part: was traced with 2.0, and now gets 3.0", dense, torch.ones(3, 6), 3.0)

    def test_sizes_that_the_graph_does_not_hold_for_are_refused(self) -> None:
        class Flat(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv, self.last = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 4, 1)

            def forward(self, x: Tensor) -> Tensor:
                x = self.last(self.conv(x).relu())
                return x.view(x.shape[0], -1, x.shape[2], x.shape[3]).sum(2)

        model = Host(part=Flat())
        example = torch.randn(2, 3, 1, 4)
        parts = trace_parts(model, ["part"], arguments(example))
        graph = split(parts.traced.net, parts.ports)["part"]
        assert graph(torch.randn(5, 3, 1, 4)).shape == (5, 4, 4)
        if parts.ports[0].any_size:
            x = torch.randn(2, 3, 2, 8)
            assert torch.equal(graph(x), model.part.eval()(x))
        else:
            refused(
                4,
                "its graph holds for inputs of shape [3, 1, 4], and gets [3, 2, 8]",
                graph,
                torch.randn(2, 3, 2, 8),
            )

    def test_gates_of_attention_reach_the_part(self) -> None:
        class Attention(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.q, self.k, self.v, self.out = (nn.Linear(6, 6) for _ in range(4))

            def forward(self, x: Tensor) -> Tensor:
                q, k, v = (f(x).unflatten(-1, (2, 3)).transpose(1, 2) for f in (self.q, self.k, self.v))
                h = functional.scaled_dot_product_attention(q, k, v)
                return self.out(h.transpose(1, 2).flatten(2))

        xs = [torch.randn(5, 4, 6, generator=torch.Generator().manual_seed(i)) for i in range(3)]
        model, options = Host(part=randomise(Attention())), {**OPTIONS, "attention": "dims"}
        dense, result = compress.prune(model, xs[0], xs, squares, part="part", **options)
        assert result.reached
        assert result.verification.passed
        assert result.whole is not None
        assert result.whole.passed
        assert dense(xs[0]).shape == (5, 4, 6)


class Twice(Host):
    def forward(self, x: Tensor) -> Any:
        return self.second(self.first(x).tanh())


class Idle(Host):
    def forward(self, x: Tensor) -> Any:
        return self.second(x)


class Scaled(nn.Module):
    """Calls its part with a keyword, a number and a dictionary; takes one entry of its result."""

    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = body()

        def forward(self, x: Tensor, *, scale: float, extra: dict[str, Tensor]) -> dict[str, Any]:
            return {"sum": self.body(x) * scale + extra["y"], "count": 3}

    def __init__(self) -> None:
        super().__init__()
        self.part = Scaled.Part()

    def forward(self, x: Tensor, scale: float = 2.0) -> Any:
        assert x.sum().item() < 1e9
        return self.part(x, scale=scale, extra={"y": x})["sum"]


def refused(code: int, text: str, call: Any, *args: Any, **kwargs: Any) -> None:
    with pytest.raises(CompressError) as caught:
        call(*args, **kwargs)
    assert caught.value.exit_code == code, caught.value
    assert text in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


class TestRefusals:
    def test_names(self) -> None:
        refused(
            3, "part: the model has no module 'backbne'; did you mean backbone?", prune, detector(), "backbne"
        )
        text = "part: backbone.stem lies inside backbone; leave backbone.stem out"
        refused(3, text, prune, detector(), ["backbone.stem", "backbone"])
        text = "part: the model does not call first on the example inputs"
        refused(4, text, small, Idle(first=body(), second=body()), "first")

    def test_objects_that_are_no_tensors(self) -> None:
        text = "rpn: takes something of class ImageList, not only tensors in plain containers; choose a part"
        refused(4, text, prune, detector(), "rpn")

    def test_methods_that_a_graph_does_not_have(self) -> None:
        class Calls(Host):
            def forward(self, x: Tensor) -> Any:
                return self.first(x) if not self.training else self.first.scale(x)

        text = "first: has no scale as a graph, and the model or the loss asks for it; prune parts inside it"
        refused(4, text, small, Calls(first=body()), "first")

    def test_an_example_that_the_model_does_not_take(self) -> None:
        model = detector()
        text = "fails on its example inputs"
        refused(4, text, compress.prune, model, pictures(), [batch(0)], loss, part="backbone")

    def test_a_part_that_cannot_be_traced_names_module_and_line(self) -> None:
        model = Host(first=Host(deep=Host(last=body())))
        with pytest.raises(
            CompressError, match=r"test_parts.py:\d+ .*item\(\).* in module first.deep"
        ) as caught:
            small(model, "first.deep")
        assert caught.value.exit_code == 4


NAMES = {
    "fasterrcnn_mobilenet_v3_large_320_fpn": ["backbone", "rpn.head"],
    "fasterrcnn_resnet50_fpn": ["backbone"],
    "retinanet_resnet50_fpn": ["backbone", "head.regression_head.conv"],
    "ssd300_vgg16": ["backbone"],
    "ssdlite320_mobilenet_v3_large": ["backbone"],
    "retinanet_resnet50_fpn_v2": ["backbone", "head.classification_head.conv"],
    "fcos_resnet50_fpn": ["backbone", "head.classification_head.conv"],
    "maskrcnn_resnet50_fpn": ["backbone", "rpn.head", "roi_heads.mask_head"],
    "keypointrcnn_resnet50_fpn": ["backbone", "roi_heads.keypoint_head"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_torchvision_detectors(name: str) -> None:
    size: dict[str, int] = {} if name.startswith("ssd") else {"min_size": 64, "max_size": 96}
    if "rcnn" in name:
        size["rpn_post_nms_top_n_test"] = 20
    model = torchvision.models.get_model(name, weights=None, weights_backbone=None, **size)
    torch.manual_seed(0)
    example = arguments((pictures(0, ((64, 80), (64, 64))),))
    parts = trace_parts(model, NAMES[name], example)
    assert all(port.any_size for port in parts.ports)
    cmap = channel_map(parts.traced, parts.shared)
    done = cut_at(parts.traced, cmap, random_keep(cmap))
    assert_exact(done)
    assert_costs(done)
    whole = Whole(model, parts, example)
    proof = whole.proof(parts.traced.net, done.masked, done.dense)
    assert proof.passed, proof
    built: Any = whole.built(done.dense)
    with torch.no_grad():
        found = built(pictures(1, ((70, 64), (64, 90))))
    assert pytree.tree_structure(found) == pytree.tree_structure(model.eval()(pictures(0)))


class TestConfig:
    def config(self, part: str | list[str] | None, **more: Any) -> ModelConfig:
        given = {
            "name": "compress.zoo:cifar_resnet",
            "input_shape": [3, 16, 16],
            "kwargs": {"depth": 8, "width": 8},
        }
        return ModelConfig(**{**given, "part": part, **more})

    def test_only_the_part_is_pruned(self, tmp_path: Path) -> None:
        found = inspect(self.config("layer2"), tmp_path)
        free = {row["name"] for row in found["layers"] if not row["pinned"]}
        assert free == {"layer2.0.conv1"}
        assert (
            len({row["name"] for row in inspect(self.config(None), tmp_path)["layers"] if not row["pinned"]})
            > 3
        )

    @pytest.mark.slow
    def test_a_run(self, tmp_path: Path) -> None:
        assert start(tmp_path, ["model.part=layer2", "prune.macs_ratio=0.95"]).exit_code == 0
        found = files.read_json(tmp_path / "run" / "prune.json")
        assert {row["name"] for row in found["layers"] if row["after"] < row["before"]} == {"layer2.0.conv1"}
        assert (tmp_path / "run" / "dense.onnx").exists()

    def test_a_misspelt_part(self, tmp_path: Path) -> None:
        text = "model.part: 'layer22' names no module of the model that has parameters; did you mean layer2?"
        refused(3, text, inspect, self.config("layer22"), tmp_path)

    def test_parts_as_a_list(self, tmp_path: Path) -> None:
        found = inspect(self.config(["layer1", "layer2"]), tmp_path)
        free = {row["name"] for row in found["layers"] if not row["pinned"]}
        assert free == {"layer1.0.conv1", "layer2.0.conv1"}
        refused(3, "'layer9' names no module", inspect, self.config(["layer1", "layer9"]), tmp_path)

    def test_a_model_that_cannot_be_traced_whole(
        self, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "mine.py").write_text(DECIDES)
        config = self.config("body", name="mine:net", input_shape=[1, 28, 28], kwargs={})
        found = build(config, tmp_path)
        assert found.whole is not None
        assert "x.sum()" in found.why
        assert inspect(config, tmp_path)["parts"] == ["body"]
        whole = config.model_copy(update={"part": None})
        refused(4, "mine.py:9 return", build, whole, tmp_path)
        assert capfd.readouterr() == ("", "")

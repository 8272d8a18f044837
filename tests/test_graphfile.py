"""The graph on disk: the same network back, without its source, and no way to smuggle code in."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    Mlp,
    SmallNet,
    Tied,
    cut_at,
    images,
    outputs,
    random_keep,
    randomise,
    small_cifar,
    torchvision_model,
)
from torch import Tensor, nn
from torch.nn import functional

from compress.channelmap import channel_map
from compress.errors import IntegrityError, ModelError
from compress.graphfile import load, save
from compress.trace import GraphNet, trace


class Mixed(nn.Module):
    """Two inputs, a dict of outputs, constants, infinities, dtypes, an index and a parameter of rank 0."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.scale = nn.Linear(4, 6), nn.Linear(3, 6), nn.Parameter(torch.tensor(1.5))
        self.register_buffer("order", torch.tensor([5, 1, 0, 2]))

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Any]:
        h = (self.a(x) + self.b(y)).clamp(min=float("-inf"), max=float("inf"))
        h = h.masked_fill(h > 2, float("inf")).clamp(max=3.0) * self.scale
        return {"h": h[:, self.order].to(torch.float64), "pair": (h.sum(1), [h.amax(1, keepdim=True)])}


def both_paths(stem: Path) -> tuple[Path, Path]:
    return stem.with_name(stem.name + ".graph.json"), stem.with_name(stem.name + ".safetensors")


def train_step(net: nn.Module) -> dict[str, Tensor]:
    net = copy.deepcopy(net).train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    torch.manual_seed(2)
    for _ in range(2):
        loss = functional.cross_entropy(net(torch.randn(4, 3, 8, 8)), torch.randint(5, (4,)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.state_dict()


class TestRoundTrip:
    @pytest.mark.parametrize(
        ("build", "example"),
        [
            (SmallNet, images()),
            (small_cifar, images()),
            (Mlp, (torch.randn(2, 4),)),
            (Mixed, (torch.randn(2, 4), torch.randn(2, 3))),
            (Tied, (torch.arange(6).reshape(2, 3),)),
        ],
    )
    def test_outputs_are_bit_equal(self, build: Any, example: tuple[Tensor, ...], tmp_path: Path) -> None:
        traced = trace(randomise(build()), example)
        shapes = [list(x.shape[1:]) for x in example]
        paths = save(traced.net, tmp_path / "net", shapes)
        assert paths == both_paths(tmp_path / "net")
        found, found_shapes = load(tmp_path / "net")
        assert found_shapes == shapes
        assert isinstance(found, GraphNet)
        assert not found.training
        inputs = tuple(torch.cat([x, x[:1]]) for x in example)
        before, after = traced.net(*inputs), found(*inputs)
        assert torch.utils._pytree.tree_structure(before) == torch.utils._pytree.tree_structure(after)
        assert all(map(torch.equal, outputs(traced.net, inputs), outputs(found, inputs)))
        assert [n for n, _ in found.named_parameters()] == [n for n, _ in traced.net.named_parameters()]

    def test_a_cut_network(self, tmp_path: Path) -> None:
        traced = trace(torchvision_model("shufflenet_v2_x0_5"), images(size=32))
        cmap = channel_map(traced)
        dense = cut_at(traced, cmap, random_keep(cmap)).dense
        save(dense, tmp_path / "net", [[3, 32, 32]])
        found, _ = load(tmp_path / "net")
        assert torch.equal(found(*images(size=32, batch=3)), dense(*images(size=32, batch=3)))

    def test_training_goes_on_bit_identically(self, tmp_path: Path) -> None:
        net = trace(randomise(SmallNet()), images()).net
        save(net, tmp_path / "net", [[3, 8, 8]])
        before, after = train_step(net), train_step(load(tmp_path / "net")[0])
        assert list(before) == list(after)
        assert all(torch.equal(before[name], after[name]) for name in before)

    def test_frozen_parameters_and_source_lines(self, tmp_path: Path) -> None:
        net = trace(randomise(SmallNet()), images()).net
        net.get_parameter("conv1.weight").requires_grad_(False)
        save(net, tmp_path / "net", [[3, 8, 8]])
        found, _ = load(tmp_path / "net")
        assert [n for n, p in found.named_parameters() if not p.requires_grad] == ["conv1.weight"]
        assert [n.meta["source"] for n in found.graph.nodes] == [n.meta["source"] for n in net.graph.nodes]

    def test_saving_twice_gives_the_same_bytes(self, tmp_path: Path) -> None:
        net = trace(randomise(SmallNet()), images()).net
        for name in ("a", "b"):
            save(net, tmp_path / name, [[3, 8, 8]])
        pairs = zip(both_paths(tmp_path / "a"), both_paths(tmp_path / "b"), strict=True)
        assert all(a.read_bytes() == b.read_bytes() for a, b in pairs)

    def test_a_fresh_process_without_the_source(self, tmp_path: Path) -> None:
        source = "import torch\nclass Net(torch.nn.Sequential): pass\n"
        (tmp_path / "gone_net.py").write_text(source)
        sys.path.insert(0, str(tmp_path))
        try:
            import gone_net  # type: ignore[import-not-found]  # written above

            layers = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 5)
            net = trace(randomise(gone_net.Net(*layers)), images()).net
        finally:
            sys.path.remove(str(tmp_path))
        (tmp_path / "gone_net.py").unlink()
        save(net, tmp_path / "net", [[3, 8, 8]])
        x = images(batch=3)[0]
        torch.save({"x": x, "y": net(x).detach()}, tmp_path / "io.pt")
        code = (
            "import sys, torch; from pathlib import Path; from compress.graphfile import load\n"
            f"folder = Path({str(tmp_path)!r}); net, _ = load(folder / 'net')\n"
            "io = torch.load(folder / 'io.pt', weights_only=True); torch.set_num_threads(1)\n"
            "assert torch.equal(net(io['x']), io['y']) and 'gone_net' not in sys.modules; print('equal')"
        )
        root = Path(__file__).parents[1]
        environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            env=environment,
            cwd=tmp_path,
            check=False,
        )
        assert done.stdout.strip() == "equal", done.stderr


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save(trace(randomise(SmallNet()), images()).net, tmp_path / "net", [[3, 8, 8]])
    return tmp_path / "net"


def refused(stem: Path, *texts: str) -> None:
    with pytest.raises(IntegrityError) as caught:
        load(stem)
    line = str(caught.value)
    assert caught.value.exit_code == 8
    assert len(line.splitlines()) == 1
    for text in texts:
        assert text in line


class TestDamage:
    @pytest.mark.parametrize("share", [0, 0.3, 0.9, 0.999])
    def test_truncated_weights(self, saved: Path, share: float) -> None:
        path = both_paths(saved)[1]
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * share)])
        refused(saved, str(path), "cannot be read")

    def test_missing_weights(self, saved: Path) -> None:
        both_paths(saved)[1].unlink()
        refused(saved, "net.safetensors", "cannot be read")

    @pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'"graph"', b"{}", b"\xff\xfe", b"NaN"])
    def test_broken_json(self, saved: Path, content: bytes) -> None:
        both_paths(saved)[0].write_bytes(content)
        refused(saved, str(both_paths(saved)[0]))

    @pytest.mark.parametrize("share", [0.2, 0.7, 0.99])
    def test_truncated_json(self, saved: Path, share: float) -> None:
        path = both_paths(saved)[0]
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * share)])
        refused(saved, "net.graph.json")


def node(document: dict[str, Any], op: str) -> dict[str, Any]:
    """The first node whose target holds `op`, or of that kind."""
    nodes: list[dict[str, Any]] = document["nodes"]
    return next(n for n in nodes if op in (n["op"], n["target"]) or op in n["target"])


EVIL = "__import__('pathlib').Path('owned').touch()"
SPEC = {"type": "collections.defaultdict", "context": '{"default_factory_module": "os"}', "children_spec": []}
CHANGES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "version": (lambda d: d.update(version=9), "version 9, not 1"),
    "namespace": (
        lambda d: node(d, "conv2d").update(target="os::system.default"),
        "is not in aten, torchvision",
    ),
    "no namespace": (lambda d: node(d, "conv2d").update(target="conv2d"), "is not in aten, torchvision"),
    "unknown op": (lambda d: node(d, "conv2d").update(target="aten::nothing.default"), "not a graph"),
    "unknown function": (lambda d: node(d, "conv2d").update(target="operator::call"), "not a graph"),
    "attribute": (
        lambda d: node(d, "conv2d").update(target="aten::__class__.mro"),
        "is not an op of a network",
    ),
    "op on files": (
        lambda d: node(d, "conv2d").update(target="aten::from_file.default"),
        "is not an op of a network",
    ),
    "method": (
        lambda d: node(d, "conv2d").update(op="call_method", target="numpy"),
        "node kind 'call_method'",
    ),
    "module": (
        lambda d: node(d, "conv2d").update(op="call_module", target="conv1"),
        "node kind 'call_module'",
    ),
    "input": (lambda d: node(d, "placeholder").update(target=f"x={EVIL}"), "is not a plain name"),
    "argument": (lambda d: d.update(arguments=[f"x={EVIL}"]), "is not a plain name"),
    "keyword": (lambda d: node(d, "conv2d").update(kwargs={f"a={EVIL},b": 1}), "is not a plain name"),
    "name": (lambda d: node(d, "conv2d").update(name=f"x={EVIL}"), "not a graph"),
    "tensor": (lambda d: node(d, "get_attr").update(target="other"), "'other' is not in the file of weights"),
    "missing node": (
        lambda d: node(d, "conv2d").update(args=[{"node": "nowhere"}]),
        "not a graph: KeyError 'nowhere'",
    ),
    "structure": (
        lambda d: d.update(out_spec=json.dumps([1, SPEC])),
        "a structure of type collections.defaultdict",
    ),
    "keyword of the call": (
        lambda d: d.update(in_spec=d["in_spec"].replace('"[]"', json.dumps(json.dumps([f"a': {EVIL}, 'b"])))),
        "is not a plain name",
    ),
    "nodes": (lambda d: d.update(nodes=[{}]), "not a graph: KeyError"),
    "parameter": (lambda d: d["parameters"].append("ghost"), "not a graph: KeyError 'ghost'"),
    "argument kind": (lambda d: node(d, "conv2d").update(args=[{"code": "1"}]), "not a graph"),
    "dtype": (lambda d: node(d, "conv2d").update(args=[{"torch": "torch.load"}]), "not a graph"),
}


class TestRefusals:
    @pytest.mark.parametrize(("change", "text"), CHANGES.values(), ids=CHANGES.keys())
    def test_changed_documents(
        self,
        change: Callable[[dict[str, Any]], Any],
        text: str,
        saved: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.chdir(saved.parent)
        path = both_paths(saved)[0]
        document = json.loads(path.read_text())
        change(document)
        path.write_text(json.dumps(document))
        refused(saved, text)
        assert not Path("owned").exists()

    def test_names_of_tensors_that_carry_code(self, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from safetensors.torch import load_file, save_file

        monkeypatch.chdir(saved.parent)
        graph, weights = both_paths(saved)
        name = f'conv1.0"), {EVIL}, ("'
        tensors = {name if key == "conv1.weight" else key: t for key, t in load_file(weights).items()}
        save_file(tensors, weights)
        graph.write_text(graph.read_text().replace('"conv1.weight"', json.dumps(name)))
        refused(saved, "is not a name of a tensor")
        assert not Path("owned").exists()

    def test_what_is_no_aten_graph_is_not_written(self, tmp_path: Path) -> None:
        net = trace(SmallNet(), images()).net
        conv = next(n for n in net.graph.nodes if "conv2d" in str(n.target))
        conv.target = functional.conv2d
        with pytest.raises(ModelError, match="cannot be written to a file"):
            save(net, tmp_path / "net", [[3, 8, 8]])
        assert not list(tmp_path.iterdir())

"""The one call: compress.prune."""

from __future__ import annotations

import copy
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import compress
from compress.errors import CompressError
from compress.zoo import cifar_resnet


def batches(count: int = 4, classes: int = 10) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(0)
    return [
        (torch.randn(8, 3, 16, 16, generator=g), torch.randint(0, classes, (8,), generator=g))
        for _ in range(count)
    ]


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


OPTIONS = {"minibatches_per_step": 1, "units_per_step": 20}


def test_returns_a_dense_model_and_leaves_the_given_one_alone() -> None:
    model = cifar_resnet(8, width=8)
    before = copy.deepcopy(model.state_dict())
    dense, result = compress.prune(model, batches()[0][0], batches(), loss, macs_ratio=0.5, **OPTIONS)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.training
    assert result.reached
    assert result.macs[1] <= 0.5 * result.macs[0]
    assert sum(p.numel() for p in dense.parameters()) == result.params[1] < result.params[0]
    assert result.verification.passed
    assert dense(batches()[0][0]).shape == (8, 10)


def test_in_place_slices_the_users_own_module() -> None:
    model = torchvision.models.mobilenet_v3_small(num_classes=10)
    same, result = compress.prune(
        model, batches()[0][0], batches(), loss, macs_ratio=0.7, in_place=True, units_per_step=300,
        minibatches_per_step=1,
    )  # fmt: skip
    assert same is model
    assert sum(p.numel() for p in model.parameters()) == result.params[1]
    loss(model, batches()[0]).backward()


def test_in_place_leaves_channels_that_the_code_counts() -> None:
    model = cifar_resnet(8, width=8)
    _, result = compress.prune(
        model, batches()[0][0], batches(), loss, macs_ratio=0.8, in_place=True, **OPTIONS
    )
    assert any(
        "written into the model's code" in pin.reason and "zoo.py" in pin.source for pin in result.pinned
    )
    assert model.layer3[0].conv2.out_channels == 32
    assert model(batches()[0][0]).shape == (8, 10)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda model, batch: None, "NoneType, not a scalar tensor; end it with return"),
        (lambda model, batch: model(batch[0]), "has shape [8, 10]"),
        (lambda model, batch: loss(model, batch).detach(), "no gradient reaches them"),
    ],
)
def test_a_loss_that_nothing_follows_from_is_one_line(wrong: Any, said: str) -> None:
    for call in (compress.prune, compress.finetune):
        example = (batches()[0][0],) if call is compress.prune else ()
        with pytest.raises(CompressError) as caught:
            call(cifar_resnet(8, width=8), *example, batches(), wrong)  # type: ignore[operator]
        assert said in str(caught.value)
        assert caught.value.exit_code == 4


def test_any_loss_will_do() -> None:
    """A generator against a fixed critic: no labels, no logits."""
    torch.manual_seed(0)
    generator = nn.Sequential(
        nn.ConvTranspose2d(8, 32, 4),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.ConvTranspose2d(32, 3, 4, 2, 1),
        nn.Tanh(),
    )
    critic = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 1)).requires_grad_(
        False
    )
    noise = [torch.randn(4, 8, 1, 1) for _ in range(3)]
    dense, result = compress.prune(
        generator,
        noise[0],
        noise,
        lambda model, z: -critic(model(z)).mean(),
        macs_ratio=0.5,
        minibatches_per_step=1,
    )
    assert result.reached
    assert dense(noise[0]).shape == (4, 3, 8, 8)
    assert result.history[-1].accuracy is None


def test_save_and_load_need_no_source(tmp_path: Path) -> None:
    stem = tmp_path / "small"
    dense, _ = compress.prune(cifar_resnet(8, width=8), batches()[0][0], batches(), loss, **OPTIONS)
    compress.save(dense, stem, batches()[0][0])
    x = batches()[0][0]
    assert torch.equal(compress.load(stem)(x), dense.eval()(x))


@pytest.mark.parametrize(
    ("options", "code", "text"),
    [
        ({"macs_ratio": 0.0}, 3, "compress.prune(macs_ratio): must be more than 0, found 0"),
        ({"macs_ratio": 1.5}, 3, "compress.prune(macs_ratio): must be less than 1, found 1.5"),
        ({"mac_ratio": 0.5}, 3, "compress.prune(mac_ratio): unknown key; did you mean macs_ratio?"),
        ({"keep": ["nosuch"]}, 3, "'nosuch' names no parameter of the model"),
        ({"macs_ratio": 0.001}, 4, "macs_ratio 0.001 cannot be reached"),
        ({"max_accuracy_drop": 0.1}, 3, "max_accuracy_drop needs evaluate"),
    ],
)
def test_bad_options_are_one_line(options: dict[str, object], code: int, text: str) -> None:
    with pytest.raises(CompressError) as refused:
        compress.prune(cifar_resnet(8, width=8), batches()[0][0], batches(), loss, **options)
    assert refused.value.exit_code == code
    assert text in str(refused.value)


def test_keep_pins_a_layer() -> None:
    model = cifar_resnet(8, width=8)
    _, result = compress.prune(
        model,
        batches()[0][0],
        batches(),
        loss,
        macs_ratio=0.7,
        keep=["layer1.0.conv1", "re:^layer2.*conv1"],
        **OPTIONS,
    )
    widths = {layer.name: (layer.before, layer.after) for layer in result.layers}
    assert widths["layer1.0.conv1"][0] == widths["layer1.0.conv1"][1]
    assert widths["layer2.0.conv1"][0] == widths["layer2.0.conv1"][1]
    assert any(pin.reason == "kept on request" for pin in result.pinned)


@pytest.mark.parametrize("criterion", ["taylor", "magnitude", "random"])
@pytest.mark.parametrize("target", ["macs_ratio", "params_ratio", "units_ratio"])
def test_every_criterion_meets_every_target(criterion: str, target: str) -> None:
    model = cifar_resnet(8, width=8)
    dense, result = compress.prune(
        model, batches()[0][0], batches(), loss, criterion=criterion, **{target: 0.6}, **OPTIONS
    )
    left = {
        "macs_ratio": result.macs[1] / result.macs[0],
        "params_ratio": sum(p.numel() for p in dense.parameters())
        / sum(p.numel() for p in model.parameters()),
        "units_ratio": result.history[-1].units_kept / 88,  # 56 inside the blocks, 32 in the streams
    }
    assert result.reached
    assert 0.2 < left[target] <= 0.6


def test_stops_at_the_accuracy_that_may_be_lost_and_says_so() -> None:
    values = iter([0.9, 0.89, 0.88, 0.5])
    options = {**OPTIONS, "units_per_step": 4, "macs_ratio": 0.2, "max_accuracy_drop": 0.05}
    _, result = compress.prune(
        cifar_resnet(8, width=8), batches()[0][0], batches(), loss, evaluate=lambda _: next(values), **options
    )
    assert not result.reached
    assert result.stop_reason == (
        "accuracy fell from 0.9000 to 0.5000, more than max_accuracy_drop 0.05; went back to removal 2"
    )
    assert [step.accuracy for step in result.history] == [0.89, 0.88]
    assert result.verification.passed


def test_the_result_says_what_was_done() -> None:
    _, result = compress.prune(cifar_resnet(8, width=8), batches()[0][0], batches(), loss, **OPTIONS)
    macs, params = result.macs[1] / result.macs[0], result.params[1] / result.params[0]
    assert (result.macs_ratio, result.params_ratio) == (macs, params)
    assert str(result).startswith(f"{macs:.1%} of the MACs, {params:.1%} of the parameters left (")
    assert "; exact: relative error " in str(result)


def test_finetune_recovers_what_pruning_lost(tmp_path: Path) -> None:
    torch.manual_seed(0)
    data = batches(2)
    dense, _ = compress.prune(cifar_resnet(8, width=8), data[0][0], data, loss, **OPTIONS)
    before = [loss(dense.eval(), batch).item() for batch in data]
    same, done = compress.finetune(dense, data, loss, epochs=15, lr=0.05, checkpoint=tmp_path)
    assert same is dense
    assert not dense.training
    assert sum(loss(dense, batch).item() for batch in data) < 0.9 * sum(before)
    assert done.best_epoch == 15  # without evaluate the last one stays
    weights = copy.deepcopy(dense.state_dict())
    other = copy.deepcopy(dense)
    compress.finetune(other, data, loss, epochs=0)
    assert all(torch.equal(weights[name], value) for name, value in other.state_dict().items())


def test_finetune_keeps_the_best_epoch_and_learns_from_a_teacher() -> None:
    torch.manual_seed(0)
    data, values = batches(2), iter([0.3, 0.9, 0.5])
    teacher, student = cifar_resnet(8, width=8).eval(), cifar_resnet(8, width=4)
    seen: list[dict[str, Tensor]] = []

    def evaluate(net: nn.Module) -> float:
        seen.append(copy.deepcopy(net.state_dict()))
        return next(values)

    _, done = compress.finetune(
        student, data, loss, evaluate=evaluate, teacher=teacher, epochs=3, distill={"alpha": 0.5}
    )
    assert (done.best_epoch, done.best) == (2, 0.9)
    assert all(torch.equal(seen[1][name], value) for name, value in student.state_dict().items())


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"epoch": 3}, "compress.finetune(epoch): unknown key; did you mean epochs?"),
        ({"lr": -1}, "compress.finetune(lr): must be more than 0, found -1"),
        ({"distill": {}}, "distill needs a teacher"),
    ],
)
def test_bad_options_of_finetune_are_one_line(options: dict[str, Any], text: str) -> None:
    with pytest.raises(CompressError) as refused:
        compress.finetune(cifar_resnet(8, width=8), batches(), loss, **options)
    assert refused.value.exit_code == 3
    assert text in str(refused.value)


def test_public_names() -> None:
    assert all(getattr(compress, name) is not None for name in compress.__all__)
    assert len(compress.__all__) <= 12


SOURCE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.conv, self.bn = nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12)
        self.a, self.b, self.c = nn.Linear(12, 16), nn.Linear(16, 4), nn.Linear(16, 3)

    def forward(self, x, *, scale=None):
        h = self.a(self.bn(self.conv(x)).relu().mean((2, 3))).relu()
        if self.kind == "one":
            return self.b(h)
        if self.kind == "many":
            return self.b(h), [self.c(h), x]
        return {"logits": self.b(h) * scale, "more": {"mean": self.c(h).mean(1)}}
"""
READ = """
import importlib.util, json, sys, torch
from pathlib import Path
from torch.utils import _pytree as pytree
import compress
torch.set_num_threads(1)

def check(net, folder):
    saved = torch.load(folder / "io.pt", weights_only=True)
    with torch.no_grad():
        found = net(**saved["given"])
    leaves = pytree.tree_leaves(found)
    assert str(pytree.tree_structure(found)) == saved["structure"], found
    assert len(leaves) == len(saved["leaves"]) and all(map(torch.equal, leaves, saved["leaves"]))
    print("equal")

for folder in sorted(Path(sys.argv[1]).glob("kind-*")):
"""
WITHOUT = """
    assert importlib.util.find_spec("gone") is None
    check(compress.load(folder / "small"), folder)
    check(compress.load(folder / "small.pt2"), folder)
    check(torch.export.load(folder / "small.pt2").module(), folder)
"""
WITH = """
    import gone
    from compress.plan import from_json
    from safetensors.torch import load_file
    plan = from_json(json.loads((folder / "plan.json").read_text()))
    net = compress.apply_plan(plan, gone.Net(folder.name.removeprefix("kind-"))).eval()
    net.load_state_dict(load_file(folder / "small.safetensors"), strict=False)
    check(net, folder)
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pruned models with one, several and nested outputs in every form; source/ holds their class."""
    folder = tmp_path_factory.mktemp("written")
    (folder / "source").mkdir()
    (folder / "source" / "gone.py").write_text(SOURCE)
    sys.path.insert(0, str(folder / "source"))
    try:
        module = importlib.import_module("gone")
    finally:
        sys.path.remove(str(folder / "source"))
    for kind in ("one", "many", "nested"):
        _write(module.Net(kind), folder / f"kind-{kind}")
    return folder


def squares(given: dict[str, Tensor]) -> Any:
    """A loss on all that a model returns."""

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return torch.stack([leaf.square().mean() for leaf in pytree.tree_leaves(model(**given))]).sum()

    return loss


def _write(net: nn.Module, folder: Path) -> None:
    given = {"x": torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(2))}
    if folder.name == "kind-nested":
        given["scale"] = torch.tensor([[1.0], [2.0], [3.0]])
    dense, result = compress.prune(net, given, [0, 1], squares(given), **OPTIONS)
    assert result.verification.passed
    folder.mkdir()
    for name in ("small", "small.pt2"):
        compress.save(dense, folder / name, given)
    (folder / "plan.json").write_text(json.dumps(result.plan.to_json()))
    with torch.no_grad():
        leaves, spec = pytree.tree_flatten(dense(**given))
    torch.save({"given": given, "leaves": leaves, "structure": str(spec)}, folder / "io.pt")


@pytest.mark.parametrize(
    ("code", "times"), [pytest.param(WITHOUT, 9, marks=pytest.mark.slow), (WITH, 3)], ids=["without", "with"]
)
def test_a_fresh_process_gives_bit_equal_outputs(written: Path, code: str, times: int) -> None:
    """The graph, the .pt2 and torch's own reader of it without the model's source; the plan with it."""
    paths = [str(Path(compress.__file__).parents[1]), *([str(written / "source")] if code == WITH else [])]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", READ + code, str(written)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        cwd=written,
        check=False,
    )
    assert done.stdout.split() == ["equal"] * times, done.stderr[-2000:]


@pytest.mark.parametrize("kind", ["one", "many"])
def test_the_users_own_module_computes_what_the_graph_does(written: Path, kind: str) -> None:
    """In place, in this process: the same weights, sliced, give the same numbers."""
    net = importlib.import_module("gone").Net(kind)
    x = torch.randn(3, 3, 8, 8)
    twin, loss = copy.deepcopy(net), squares({"x": x})
    dense, first = compress.prune(net, x, [0, 1], loss, **OPTIONS)
    same, second = compress.prune(twin, x, [0, 1], loss, in_place=True, **OPTIONS)
    assert first.plan.axes == second.plan.axes
    with torch.no_grad():
        pairs = zip(pytree.tree_leaves(dense(x)), pytree.tree_leaves(same.eval()(x)), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)

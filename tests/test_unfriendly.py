"""Models with unfriendly inputs, results and tensors: cut exactly, or refused in one line."""

from __future__ import annotations

import copy
import dataclasses
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from helpers import Tied, free_units, parameter_count, random_keep, randomise
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import _pytree as pytree

import compress
from compress.channelmap import ChannelMap, channel_map
from compress.errors import CompressError
from compress.importance import read_gates
from compress.parts import Parts, arguments, trace_parts
from compress.ports import split
from compress.surgery import apply_plan, cut, mask
from compress.trace import GraphNet, trace

X = torch.randn(2, 4, generator=torch.Generator().manual_seed(3))


class Body(nn.Module):
    """Three linear layers; 2 * width channels can leave."""

    def __init__(self, inputs: int = 4, outputs: int = 4, width: int = 12) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(inputs, width), nn.Linear(width, width), nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(functional.silu(self.b(functional.silu(self.a(x)))))


def numbers(value: Any) -> list[Tensor]:
    """The tensors of a result that have a derivative."""
    return [
        x
        for x in pytree.tree_leaves(value)
        if isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())
    ]


def score(value: Any) -> Tensor:
    return torch.stack(
        [x.abs().square().mean().to(torch.promote_types(x.real.dtype, torch.float32)) for x in numbers(value)]
    ).sum()


def called(model: nn.Module, example: Any) -> Any:
    args, kwargs = arguments(example)
    return model(*args, **kwargs)


@dataclasses.dataclass(frozen=True)
class Done:
    """What `exact` made: the parts, their channels, the dense model, the same cut of the user's module."""

    parts: Parts
    cmap: ChannelMap
    dense: GraphNet
    sliced: nn.Module


def exact(model: nn.Module, example: Any, *, least: int = 8, tolerance: float = 1e-5) -> Done:
    """The graph computes what the model does; a random cut is exact, trains, and fits the user's module."""
    model = randomise(model).eval()
    parts = trace_parts(model, [""], arguments(example))
    with torch.no_grad():
        ours, theirs = (called(m, example) for m in (split(parts.traced.net, parts.ports)[""], model))
    assert pytree.tree_structure(ours) == pytree.tree_structure(theirs)
    for a, b in zip(numbers(ours), numbers(theirs), strict=True):
        assert torch.allclose(a, b, rtol=tolerance, atol=tolerance)
    cmap = channel_map(parts.traced, in_place=True)
    assert cmap.units >= least
    keep = random_keep(cmap)
    masked = copy.deepcopy(parts.traced.net)
    mask(masked, cmap, keep)
    small, plan = cut(parts.traced.net, cmap, keep)
    proof = compress.verify(parts.traced.net, masked, small, parts.traced.example)
    assert proof.passed, proof
    assert proof.relative_error < 1e-12
    assert proof.movement > 1e-6
    dense = split(small, parts.ports)[""]
    sliced = apply_plan(plan, copy.deepcopy(model))
    with torch.no_grad():
        for a, b in zip(*(numbers(called(m, example)) for m in (dense, sliced)), strict=True):
            assert torch.allclose(a, b, rtol=tolerance, atol=tolerance)
    assert parameter_count(dense) < parameter_count(model)
    score(called(dense.train(), example)).backward()
    assert any(p.grad is not None for p in dense.parameters())
    return Done(parts, cmap, dense, sliced)


def prune(model: Any, example: Any = X, **options: Any) -> tuple[Any, compress.Result]:
    """The one call, with a loss on whatever the model returns."""

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return score(called(model, batch))

    given = {"macs_ratio": 0.7, "minibatches_per_step": 1, "units_per_step": 100, **options}
    return compress.prune(model, example, [example] * 3, loss, **given)


def refused(model: Any, *texts: str, example: Any = X, **options: Any) -> None:
    with pytest.raises(CompressError) as caught:
        prune(model, example, **options)
    line = str(caught.value)
    assert caught.value.exit_code == 4, line
    assert len(line.splitlines()) == 1
    assert "parts.0" not in line
    for text in texts:
        assert text in line


class TestInputsAndOutputs:
    def test_several_of_both(self) -> None:
        class Two(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b, self.c, self.d = (
                    nn.Linear(i, o) for i, o in ((4, 12), (3, 12), (12, 2), (12, 5))
                )

            def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, list[Tensor]]:
                h = torch.tanh(self.a(x) + self.b(y))
                return self.c(h), [self.d(h), y]

        done = exact(Two(), (X, X[:, :3]))
        assert free_units(done.cmap, "a.weight") == 12

    def test_keyword_only_inputs_and_nested_outputs(self) -> None:
        class Keywords(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.body = Body()

            def forward(self, *, x: Tensor, more: Mapping[str, Tensor], flag: bool = True) -> dict[str, Any]:
                y = self.body(x) + more["y"]
                return {"a": y, "b": [more["y"], (x, None, 7)], "flag": flag}

        done = exact(Keywords(), {"x": X, "more": {"y": X}})
        found = done.dense(x=X[:1], more={"y": X[:1]})
        assert found["b"][1][1:] == (None, 7)
        assert found["flag"] is True
        _, result = prune(Keywords(), {"x": X, "more": {"y": X}})
        assert result.verification.passed

    def test_a_dataclass(self) -> None:
        @dataclasses.dataclass
        class Output:
            logits: Tensor
            hidden: tuple[Tensor, ...] = ()

        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.body = Body()

            def forward(self, x: Tensor) -> Output:
                return Output(self.body(x), (x,))

        dense, result = prune(Model())
        assert type(dense(X)) is Output
        assert dense(X).logits.shape == (2, 4)
        assert result.verification.passed

    def test_an_ordered_dictionary_with_attributes(self) -> None:
        """As the outputs of language model libraries are: a dataclass that is a dictionary too."""

        @dataclasses.dataclass
        class ModelOutput(OrderedDict[str, Any]):
            loss: Any = None
            logits: Any = None

            def __post_init__(self) -> None:
                for field in dataclasses.fields(self):
                    if getattr(self, field.name) is not None:
                        self[field.name] = getattr(self, field.name)

        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.words, self.body = nn.Embedding(9, 6), Body(6, 3)

            def forward(
                self, input_ids: Any = None, attention_mask: Any = None, use_cache: bool = False
            ) -> Any:
                return ModelOutput(logits=self.body(self.words(input_ids) * attention_mask[..., None]))

        ids = torch.randint(9, (2, 5), generator=torch.Generator().manual_seed(0))
        example = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
        dense, result = prune(Model(), example)
        assert dense(**example).logits.shape == (2, 5, 3)
        assert list(dense(**example)) == ["logits"]
        assert result.verification.passed

    def test_classes_that_are_no_container(self) -> None:
        class Opaque:
            pass

        class Model(Body):
            def forward(self, x: Tensor) -> Any:
                super().forward(x)
                return Opaque()

        refused(
            Model(), "the model: returns something of class Opaque", "use tuples, lists, dicts or dataclasses"
        )

    def test_an_example_that_does_not_fit(self) -> None:
        refused(
            Body(), "Body fails on its example inputs", "test_unfriendly.py:", "in module a", example=X[:, :3]
        )

    def test_integer_inputs(self) -> None:
        exact(Tied(), (torch.arange(6).reshape(2, 3),), least=6)

    def test_a_model_that_takes_one_example_at_a_time(self) -> None:
        class One(Body):
            def forward(self, x: Tensor) -> Tensor:
                assert len(x) == 1, "one at a time"
                return super().forward(x)

        refused(One(), "test_unfriendly.py:", "One cannot be traced: one at a time", example=X[:1])


class TestTensors:
    def test_parameter_lists_and_dictionaries(self) -> None:
        class Lists(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weights = nn.ParameterList([torch.randn(12, 4), torch.randn(4, 12)])
                self.more = nn.ParameterDict({"scale": torch.randn(12)})

            def forward(self, x: Tensor) -> Tensor:
                h = torch.tanh(functional.linear(x, self.weights[0])) * self.more["scale"]
                return functional.linear(h, self.weights[1])

        done = exact(Lists(), X)
        sliced: Any = done.sliced
        assert sliced.more["scale"].shape[0] == sliced.weights[0].shape[0] < 12

    def test_buffers_and_plain_tensors_follow(self) -> None:
        class Scaled(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b, self.c = nn.Linear(4, 12), nn.Linear(12, 12), nn.Linear(12, 4)
                self.register_buffer("scale", torch.rand(12) + 0.5)
                self.register_buffer("hidden", torch.rand(12) + 0.5, persistent=False)
                self.plain = torch.rand(12) + 0.5

            def forward(self, x: Tensor) -> Tensor:
                return self.c(
                    torch.tanh(self.b(torch.tanh(self.a(x)) * self.scale + self.plain)) * self.hidden
                )

        done = exact(Scaled(), X)
        sliced: Any = done.sliced
        assert sliced.scale.shape == sliced.plain.shape == sliced.a.bias.shape
        assert sliced.hidden.shape == sliced.b.bias.shape

    def test_complex_parameters(self) -> None:
        model = nn.Sequential(
            nn.Linear(4, 12, dtype=torch.complex64), nn.Linear(12, 4, dtype=torch.complex64)
        )
        x = torch.complex(X, X.flip(0))
        dense, result = prune(model, x)
        assert result.verification.passed
        assert dense(x).is_complex()
        assert parameter_count(dense) < parameter_count(model)

    def test_importance_of_complex_units(self) -> None:
        model = nn.Sequential(
            nn.Linear(4, 6, dtype=torch.complex128), nn.Linear(6, 3, dtype=torch.complex128)
        )
        x = torch.complex(X, X.flip(0)).to(torch.complex128)
        traced = trace(model, (x,))
        score(traced.net(x)).backward()
        found = read_gates(traced.net, channel_map(traced))
        weight, step, losses = model[1].weight, 1e-6, []
        for unit in range(6):
            for sign in (1, -1):
                changed = weight.detach().clone()
                changed[:, unit] *= 1 + sign * step
                losses.append(score(functional.linear(model[0](x), changed, model[1].bias)).item())
        found_at = torch.tensor(losses, dtype=torch.float64)
        expected = (found_at[::2] - found_at[1::2]) / (2 * step)
        assert torch.allclose(found.double(), expected, rtol=1e-4, atol=1e-5)

    def test_complex_inputs_and_spectra(self) -> None:
        class Spectral(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.last = Body(8, 8), Body(8, 3)
                self.filter = nn.Parameter(torch.randn(5, dtype=torch.complex64))

            def forward(self, z: Tensor) -> Tensor:
                x = self.first(torch.view_as_real(z).flatten(1))
                return self.last(torch.fft.irfft(torch.fft.rfft(x) * self.filter, n=8))

        _, result = prune(Spectral(), torch.complex(X, X.flip(1)))
        assert result.verification.passed
        assert any(pin.op == "fft_rfft" and "test_unfriendly.py" in pin.source for pin in result.pinned)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision(self, dtype: torch.dtype) -> None:
        class Casts(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv, self.bn, self.last = nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.Linear(12, 4)

            def forward(self, x: Tensor) -> Tensor:
                h = self.bn(self.conv(x)).float().mean((2, 3))
                return self.last(torch.tanh(h).to(self.conv.weight.dtype)).float()

        dense, result = prune(Casts().to(dtype), torch.randn(2, 3, 6, 6, dtype=dtype))
        assert result.verification.passed
        assert result.verification.relative_error < 1e-12  # in float64: the casts in the graph are widened
        assert {p.dtype for p in dense.parameters()} == {dtype}

    def test_two_devices(self) -> None:
        model = Body()
        model.b.to("meta")
        refused(model, "b.weight: is on meta, but a.weight is on cpu", "model.to(device)")

    def test_no_numbers(self) -> None:
        refused(
            Body().to("meta"), "a.weight: is on the meta device and holds no numbers", example=X.to("meta")
        )

    def test_lazy_modules(self) -> None:
        lazy = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.Linear(8, 3))
        refused(lazy, "0.weight: has no shape yet: the module is lazy; run the model on a batch once")
        lazy(X)
        prune(lazy)

    def test_no_parameters(self) -> None:
        refused(
            nn.Sequential(nn.ReLU()), "Sequential: the model has no parameters; there is nothing to prune"
        )

    def test_no_gradients(self) -> None:
        text = "Body: no parameter of the model requires gradients", "call model.requires_grad_(True)"
        refused(Body().requires_grad_(False), *text)

    def test_frozen_layers_are_cut_by_their_importance_and_not_trained(self) -> None:
        model = randomise(Body(width=16))
        model.b.requires_grad_(False)
        with torch.no_grad():
            model.b.weight[:, :8] = 0  # what a frozen layer does not read is what can go
        dense, result = prune(model, min_keep=0.5, lr=1e-9, macs_ratio=0.6)
        plan = {key: set(kept) for key, kept in result.plan.axes.items()}
        assert plan["a.weight", 0] == set(range(8, 16))
        assert torch.equal(dense.get_parameter("b.weight"), model.b.weight[:, 8:])
        assert {name for name, p in dense.named_parameters() if not p.requires_grad} == {"b.weight", "b.bias"}

    def test_nothing_to_prune_says_why(self) -> None:
        class Sums(Body):
            def forward(self, x: Tensor) -> Tensor:
                return self.b(self.a(x)).sum(1, keepdim=True) + self.a(x).sum(1, keepdim=True)

        refused(Sums(), "test_unfriendly.py:", "no prunable channel", "runs over the channels")


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


class TestFiles:
    @pytest.mark.parametrize("ending", ["", ".pt2"])
    def test_results_of_a_class_of_the_users_are_not_written(self, ending: str, tmp_path: Path) -> None:
        class Model(Body):
            def forward(self, x: Tensor) -> Any:
                return Pair(super().forward(x), x)

        dense, _ = prune(Model())
        assert type(dense(X)) is Pair
        with pytest.raises(CompressError) as caught:
            compress.save(dense, tmp_path / f"net{ending}", X)
        assert caught.value.exit_code == 4
        assert "the network returns Pair, which cannot be written to a file" in str(caught.value)
        assert not list(tmp_path.iterdir())

    def test_a_module_is_not_a_graph(self, tmp_path: Path) -> None:
        with pytest.raises(CompressError, match="a Body is not a graph") as caught:
            compress.save(Body(), tmp_path / "net", X)
        assert caught.value.exit_code == 4

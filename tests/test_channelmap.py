"""The map from indices to units: what leaves together, what stays and why."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import Mlp, SmallNet, Tied, free_units, images, small_cifar
from torch import Tensor, nn
from torch.nn import functional

from compress.channelmap import ChannelMap, channel_map
from compress.errors import ModelError
from compress.trace import trace


def labelled(model: nn.Module, example: tuple[Tensor, ...], **given: object) -> ChannelMap:
    return channel_map(trace(model, example), **given)  # type: ignore[arg-type]


class TestUnits:
    def test_a_chain_of_layers(self) -> None:
        cmap = labelled(Mlp((4, 8, 6, 3)), (torch.randn(2, 4),))
        assert cmap.units == 14
        assert set(cmap.axes) == {
            *(("layers.0.weight", 0), ("layers.0.bias", 0), ("layers.1.weight", 1)),
            *(("layers.1.weight", 0), ("layers.1.bias", 0), ("layers.2.weight", 1)),
        }
        assert cmap.axes["layers.0.weight", 0].tolist() == list(range(8))
        assert cmap.axes["layers.1.weight", 1].tolist() == list(range(8))
        assert cmap.axes["layers.1.weight", 0].tolist() == list(range(8, 14))
        assert cmap.reads == {("layers.1.weight", 1), ("layers.2.weight", 1)}
        assert cmap.classes.tolist() == [0] * 8 + [1] * 6
        assert cmap.multiplicity.tolist() == [1] * 14

    def test_a_skip_ties_its_ends_and_batch_norm_follows(self) -> None:
        cmap = labelled(SmallNet(6), images())
        assert cmap.units == 6
        expected = {("conv1.weight", 0), ("conv2.weight", 0), ("conv2.weight", 1), ("fc.weight", 1)}
        norms = {(f"bn{i}.{n}", 0) for i in (1, 2) for n in ("weight", "bias", "running_mean", "running_var")}
        assert set(cmap.axes) == expected | norms
        assert all(units.tolist() == list(range(6)) for units in cmap.axes.values())

    def test_zero_padded_shortcuts_add_units_to_the_stream(self) -> None:
        cmap = labelled(small_cifar(), images(size=8))
        assert not cmap.pinned[1:]
        assert free_units(cmap, "conv1.weight") == 8
        assert set(cmap.axes["layer2.0.conv2.weight", 0]) > set(cmap.axes["conv1.weight", 0])
        assert free_units(cmap, "linear.weight", 1) == 32

    def test_flatten_gives_a_unit_many_columns(self) -> None:
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 2))
        cmap = labelled(net, images())
        assert np.bincount(cmap.axes["2.weight", 1]).tolist() == [36] * 4
        assert cmap.multiplicity.tolist() == [1] * 4

    def test_multiplicity_of_concatenated_copies(self) -> None:
        class Doubled(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.wide = nn.Conv2d(3, 8, 3, groups=1)
                self.depthwise = nn.Conv2d(8, 16, 3, groups=8)
                self.last = nn.Conv2d(16, 4, 1)

            def forward(self, x: Tensor) -> Tensor:
                return self.last(self.depthwise(self.wide(x)))

        cmap = labelled(Doubled(), images())
        assert cmap.units == 8
        assert np.bincount(cmap.axes["last.weight", 1]).tolist() == [2] * 8

    def test_parts_of_a_split_are_classes_of_their_own(self) -> None:
        class Parts(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)

            def forward(self, x: Tensor) -> Tensor:
                a, b = self.first(x).split([2, 6], 1)
                return self.last(torch.cat([a.relu(), b], 1))

        assert labelled(Parts(), images()).classes.tolist() == [0, 0, 1, 1, 1, 1, 1, 1]

    def test_labels_of_every_node_have_its_shape(self) -> None:
        traced = trace(SmallNet(), images())
        cmap = channel_map(traced)
        conv = next(n for n in traced.net.graph.nodes if str(n.target) == "aten.conv2d.default")
        assert cmap.nodes[conv.name].shape == (2, 6, 8, 8)
        assert set(cmap.nodes) == {n.name for n in traced.net.graph.nodes if n.op != "output"}

    def test_tied_weights_are_one_axis(self) -> None:
        cmap = labelled(Tied(), (torch.arange(4).reshape(2, 2),))
        assert free_units(cmap, "embedding.weight", 1) == 8
        assert ("embedding.weight", 0) not in cmap.axes
        assert "head.weight" not in cmap.shapes

    def test_writers_know_their_norm(self) -> None:
        cmap = labelled(SmallNet(), images())
        found = {w.weight[0]: (w.bias, w.gamma, w.beta) for w in cmap.writers}
        assert found == {
            "conv1.weight": ("", "bn1.weight", "bn1.bias"),
            "conv2.weight": ("", "bn2.weight", "bn2.bias"),
            "fc.weight": ("fc.bias", "", ""),
        }


class TestPins:
    def test_the_output_is_pinned_with_its_layer(self) -> None:
        (pin,) = labelled(Mlp((4, 8, 3)), (torch.randn(2, 4),)).pinned
        assert pin.reason == "it is an output of the model"
        assert pin.channels == 3
        assert set(pin.parameters) == {"layers.1.weight", "layers.1.bias"}

    def test_reason_op_and_line_of_an_unknown_op(self) -> None:
        class Sorts(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

            def forward(self, x: Tensor) -> Tensor:
                return self.b(torch.sort(self.a(x), dim=1)[0])

        cmap = labelled(Sorts(), (torch.randn(2, 4),))
        assert cmap.units == 0
        pin = next(p for p in cmap.pinned if "a.weight" in p.parameters)
        assert (pin.reason, pin.op, pin.channels) == ("sort has no pruning rule", "sort", 6)
        assert pin.source.startswith("test_channelmap.py:")
        assert "torch.sort" in pin.source

    def test_kept_on_request(self) -> None:
        cmap = labelled(Mlp((4, 8, 6, 3)), (torch.randn(2, 4),), keep=["layers.0.weight"])
        assert cmap.units == 6
        assert any(p.reason == "kept on request" and "layers.0.weight" in p.parameters for p in cmap.pinned)

    def test_a_pin_reaches_everything_tied(self) -> None:
        cmap = labelled(SmallNet(), images(), keep=["fc.weight"])
        assert cmap.units == 0
        assert "conv1.weight" in {name for p in cmap.pinned for name in p.parameters}

    def test_data_dependent_sizes_are_refused(self) -> None:
        class Picks(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x[x[:, 0] > 0]

        with pytest.raises(ModelError) as caught:
            labelled(Picks(), (torch.randn(2, 4),))
        assert "depends on the data" in str(caught.value)
        assert "test_channelmap.py:" in str(caught.value)

    def test_an_example_of_another_dtype_than_the_net_says_so(self) -> None:
        traced = trace(nn.Conv2d(3, 4, 3), images())
        traced.net.double()
        with pytest.raises(ModelError, match="conv2d: fails on the example: "):
            channel_map(traced)

    def test_in_place_pins_what_the_code_counts(self) -> None:
        class Halves(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(4, 6, 1), nn.Conv2d(6, 2, 1)

            def forward(self, x: Tensor) -> Tensor:
                return self.c(self.b(functional.relu(self.a(x)[:, :4])))

        assert labelled(Halves(), images()).units == 14
        cmap = labelled(Halves(), images(), in_place=True)
        assert cmap.units == 6
        assert any("written into the model's code" in p.reason for p in cmap.pinned)


class TestGate:
    """A 1-channel gate ties and pins nothing of the trunk that it multiplies."""

    def test_trunk_stays_free(self) -> None:
        class Gated(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.trunk, self.gate = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 1, 3, padding=1)
                self.last = nn.Conv2d(8, 4, 1)

            def forward(self, x: Tensor) -> Tensor:
                return self.last(self.trunk(x) * self.gate(x).sigmoid())

        cmap = labelled(Gated(), images())
        assert cmap.units == 8
        assert free_units(cmap, "trunk.weight") == 8
        assert ("gate.weight", 0) not in cmap.axes
        assert {p.reason for p in cmap.pinned if "trunk.weight" in p.parameters} == set()

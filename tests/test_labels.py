"""Label arithmetic: which axis varies, what is tied, what is pinned."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx, nn

from compress.labels import (
    Ledger,
    Value,
    along,
    axis,
    collapse,
    core,
    fixed,
    short_name,
    varying,
    vector,
)


def channels(count: int, *shape: int, dim: int = 1) -> torch.Tensor:
    return along(torch.arange(1, count + 1), dim, shape)


class TestArrays:
    def test_along_is_stride_0_elsewhere(self) -> None:
        labels = channels(4, 2, 4, 5)
        assert labels.stride() == (0, 1, 0)
        assert labels[1, :, 3].tolist() == [1, 2, 3, 4]
        assert varying(labels) == [1]
        assert core(labels).shape == (1, 4, 1)

    def test_collapse_finds_constant_axes(self) -> None:
        labels = channels(4, 2, 4, 5).clone()  # strides of its own
        assert varying(labels) == [0, 1, 2]
        assert varying(collapse(labels)) == [1]
        assert torch.equal(collapse(labels), labels)

    def test_vector(self) -> None:
        labels = channels(4, 2, 4, 5)
        found = vector(labels, 1)
        assert found is not None
        assert found.tolist() == [1, 2, 3, 4]
        constant = vector(channels(1, 2, 1, 5), 2)
        assert constant is not None
        assert constant.tolist() == [1] * 5
        assert vector(labels, 2) is None
        assert vector(labels, -2) is not None

    @given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.data())
    def test_collapse_keeps_every_label(self, shape: list[int], data: st.DataObject) -> None:
        size = int(np.prod(shape))
        numbers = data.draw(st.lists(st.integers(0, 2), min_size=size, max_size=size))
        labels = torch.tensor(numbers).reshape(shape)
        thin = collapse(labels)
        assert torch.equal(thin, labels)
        for dim in range(len(shape)):
            constant = bool((labels == labels.narrow(dim, 0, 1)).all())
            assert (dim in varying(thin)) == (not constant)


class TestLedger:
    def test_a_parameter_has_a_layer_per_dimension(self) -> None:
        ledger = Ledger(batch=2)
        weight = ledger.parameter("w", torch.zeros(3, 2))
        assert ledger.axes == {("w", 0): range(1, 4), ("w", 1): range(4, 6)}
        assert axis(weight, 0).tolist() == [1, 2, 3]
        assert axis(weight, 1).tolist() == [4, 5]
        assert weight.real is None
        whole = ledger.parameter("n", torch.tensor([5, 7]))
        assert whole.real is not None
        assert whole.real.tolist() == [5, 7]
        assert len(ledger.parameter("scalar", torch.tensor(1.0)).layers) == 1

    def test_axis_of_a_value_without_labels_is_zero(self) -> None:
        plain = Value((torch.zeros(3, 2, dtype=torch.int64),), torch.empty(3, 2, device="meta"), weight=True)
        assert axis(plain, 1).tolist() == [0, 0]

    def test_ties_are_unique_and_a_tie_with_0_pins(self) -> None:
        ledger = Ledger(batch=2)
        a = ledger.issue(4)
        ledger.tie(torch.stack([a, a]), torch.stack([a + 4, a + 4]))
        assert ledger.edges[0].tolist() == [[1, 5], [2, 6], [3, 7], [4, 8]]
        ledger.tie(a[:2], torch.tensor([0, 2]))
        assert ledger.edges[1].tolist() == []
        assert [pin.labels.tolist() for pin in ledger.pins] == [[1]]
        assert ledger.pins[0].reason == "meets channels that stay"

    def test_pins_know_their_op_and_line(self) -> None:
        ledger = Ledger(batch=2)
        node = fx.Graph().create_node("call_function", torch.ops.aten.relu_.default)
        node.meta = {"source": "net.py:3 relu(x)"}
        ledger.node = node
        ledger.pin(torch.tensor([0, 2, 2, 3]), "why")
        ledger.pin(torch.zeros(3, dtype=torch.int64), "nothing to pin")
        (pin,) = ledger.pins
        assert (pin.labels.tolist(), pin.reason, pin.op, pin.source) == (
            [2, 3],
            "why",
            "relu",
            "net.py:3 relu(x)",
        )

    def test_pin_value_pins_all_layers(self) -> None:
        ledger = Ledger(batch=2)
        ledger.pin_value(ledger.parameter("w", torch.zeros(2, 2)), "why")
        assert sorted(int(i) for pin in ledger.pins for i in pin.labels) == [1, 2, 3, 4]

    def test_cost_is_per_example(self) -> None:
        ledger = Ledger(batch=4)
        ledger.node = fx.Graph().placeholder("x")
        ledger.cost("linear", "w", 4 * 15.0, torch.arange(3), torch.arange(5))
        assert ledger.terms[0].factor == 1.0
        ledger.cost("bmm", "", 8.0)
        assert ledger.terms[1].factor == 2.0


def test_short_names() -> None:
    graph = fx.Graph()
    assert short_name(graph.call_function(torch.ops.aten.conv2d.default)) == "conv2d"
    assert short_name(graph.call_function(torch.ops.aten.add_.Tensor)) == "add"
    assert short_name(graph.call_function(nn.functional.relu)) == "relu"


def test_fixed_values_have_no_channels() -> None:
    value = fixed(torch.empty(2, 3, device="meta"))
    assert value.labels.shape == (2, 3)
    assert not value.labels.any()
    with pytest.raises(AttributeError):
        value.name = "w"  # type: ignore[misc]  # frozen on purpose

"""Tracing: the same numbers, the same training, and one clear line where it cannot be done."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from helpers import SmallNet, Tied, images, outputs, randomise
from torch import Tensor, nn
from torch.nn import functional

from compress.errors import ModelError
from compress.trace import from_program, get_tensor, placeholders, put_tensor, source_line, tied, trace


def train_steps(net: nn.Module, steps: int = 3) -> dict[str, Tensor]:
    """SGD with momentum in train mode on seeded data and dropout; the state afterwards."""
    net = copy.deepcopy(net).train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    torch.manual_seed(4)
    for _ in range(steps):
        loss = functional.cross_entropy(net(torch.randn(5, 3, 8, 8)), torch.randint(5, (5,)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {name: value for name, value in net.state_dict().items() if not name.endswith("_tracked")}


class TestSameNetwork:
    def test_eval_outputs_are_bit_equal_for_any_batch(self) -> None:
        model = randomise(SmallNet()).eval()
        net = trace(model, images()).net
        for batch in (1, 2, 7):
            x = images(batch=batch)
            assert torch.equal(model(*x), net(*x))

    def test_training_is_bit_identical(self) -> None:
        model = randomise(SmallNet())
        expected, found = train_steps(model), train_steps(trace(model, images()).net)
        assert set(found) == set(expected)
        assert all(torch.equal(found[name], expected[name]) for name in expected)

    def test_training_changes_weights_statistics_and_counters(self) -> None:
        model = randomise(SmallNet())
        before, after = model.state_dict(), train_steps(trace(model, images()).net)
        changed = {name for name in after if not torch.equal(before[name], after[name])}
        assert {"conv1.weight", "bn1.running_mean", "bn1.running_var", "fc.bias"} <= changed

    def test_the_switch_changes_dropout_and_statistics(self) -> None:
        net = trace(randomise(SmallNet()), images()).net
        x = images(batch=6)
        assert not net.training
        assert torch.equal(*(net(*x) for _ in range(2)))
        net.train()
        assert net.training
        torch.manual_seed(0)
        assert not torch.equal(*(net(*x) for _ in range(2)))
        statistics = net.get_buffer("bn1.running_mean").clone()
        net.eval()
        net(*x)
        assert torch.equal(net.get_buffer("bn1.running_mean"), statistics)

    @pytest.mark.parametrize("tracks", [False, True])
    def test_instance_norm_switches_where_it_has_statistics(self, tracks: bool) -> None:
        model = nn.InstanceNorm1d(4, affine=True, track_running_stats=tracks)
        net = trace(model, (torch.randn(2, 4, 5),)).net
        x = torch.randn(3, 4, 5) + 5
        for train in (False, True, False):
            theirs = copy.deepcopy(model).train(train)(x)
            assert torch.equal(copy.deepcopy(net).train(train)(x), theirs)

    def test_a_flag_that_the_model_fixes_does_not_switch(self) -> None:
        class Always(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return functional.dropout(x, 0.5, training=True)

        net = trace(Always(), (torch.ones(2, 50),)).net
        assert (net(torch.ones(2, 50)) == 0).any()
        net.train().eval()
        assert (net(torch.ones(2, 50)) == 0).any()

    def test_the_models_mode_and_weights_are_left(self) -> None:
        model = SmallNet().train()
        model.bn2.eval()
        before = copy.deepcopy(model.state_dict())
        trace(model, images())
        assert model.training
        assert model.conv1.training
        assert not model.bn2.training
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())

    def test_names_are_the_models(self) -> None:
        model = SmallNet()
        net = trace(model, images()).net
        assert {n for n, _ in net.named_parameters()} == {n for n, _ in model.named_parameters()}
        assert {n for n, _ in net.named_buffers()} <= {n for n, _ in model.named_buffers()}
        SmallNet().load_state_dict(net.state_dict())  # strict, although the graph counts no batches

    def test_a_batch_of_one_is_doubled(self) -> None:
        traced = trace(SmallNet(), images(batch=1))
        assert traced.example[0].shape == (2, 3, 8, 8)
        assert traced.net(*images(batch=1)).shape == (1, 5)

    def test_modules_and_source_lines_are_kept(self) -> None:
        net = trace(SmallNet(), images()).net
        node = next(n for n in net.graph.nodes if str(n.target) == "aten.linear.default")
        assert node.meta["module"] == "fc"
        assert node.meta["source"].startswith("helpers.py:")
        assert "self.fc" in node.meta["source"]

    def test_precision_and_device_are_not_fixed(self) -> None:
        class Casts(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return (x.to(torch.float32) * 2).relu()

        net = trace(Casts(), (torch.randn(2, 3),)).net.double()
        assert not any("assert" in str(node.target) for node in net.graph.nodes)
        assert net(torch.ones(3, 3, dtype=torch.float64)).sum() == 18


class TestStructure:
    def test_two_inputs_and_a_dict_of_outputs(self) -> None:
        class Two(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b = nn.Linear(4, 6), nn.Linear(3, 6)

            def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
                h = self.a(x) + self.b(y)
                return {"h": h, "s": h.sum(1)}

        model = Two()
        traced = trace(model, (torch.randn(2, 4), torch.randn(2, 3)))
        assert len(placeholders(traced.net)) == 2
        inputs = (torch.randn(5, 4), torch.randn(5, 3))
        found = traced.net(*inputs)
        assert list(found) == ["h", "s"]
        assert all(map(torch.equal, outputs(model, inputs), outputs(traced.net, inputs)))

    def test_a_dataclass_of_outputs(self) -> None:
        @dataclasses.dataclass
        class Output:
            logits: Tensor
            hidden: Tensor

        class Model(nn.Linear):
            def forward(self, x: Tensor) -> Any:
                y = super().forward(x)
                return Output(y, y.relu())

        model = Model(4, 3)
        traced = trace(model, (torch.randn(2, 4),))
        x = torch.randn(5, 4)
        assert type(traced.net(x)) is Output
        assert torch.equal(traced.net(x).hidden, model(x).hidden)

    def test_parameters_that_no_output_needs_are_named(self) -> None:
        class Auxiliary(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.main, self.aux, self.bn = nn.Linear(4, 4), nn.Linear(4, 2), nn.BatchNorm1d(4)

            def forward(self, x: Tensor) -> Any:
                y = self.bn(self.main(x))
                return (y, self.aux(y)) if self.training else y

        traced = trace(Auxiliary(), (torch.randn(2, 4),))
        assert sorted(traced.unreached) == ["aux.bias", "aux.weight"]
        assert not hasattr(traced.net, "aux")

    def test_tied_parameters_have_aliases(self) -> None:
        model = Tied()
        traced = trace(model, (torch.arange(4).reshape(2, 2),))
        assert traced.aliases == (("head.weight", "embedding.weight"),)
        assert tied(model) == [("head.weight", "embedding.weight")]
        assert tied(SmallNet()) == []

    def test_from_program_takes_an_exported_program(self) -> None:
        model = randomise(SmallNet()).eval()
        dynamic = ({0: torch.export.Dim.DYNAMIC},)
        program = torch.export.export(model, images(), dynamic_shapes=dynamic)
        traced = from_program(program, images())
        assert torch.equal(traced.net(*images(batch=3)), model(*images(batch=3)))
        assert train_steps(traced.net).keys() == train_steps(trace(model, images()).net).keys()

    def test_get_and_put_tensor(self) -> None:
        module = nn.Module()
        put_tensor(module, "a.0.weight", nn.Parameter(torch.ones(2)))
        put_tensor(module, "a.mean", torch.zeros(3))
        assert [n for n, _ in module.named_parameters()] == ["a.0.weight"]
        assert [n for n, _ in module.named_buffers()] == ["a.mean"]
        assert get_tensor(module, "a.mean").shape == (3,)
        with pytest.raises(AttributeError):
            get_tensor(module, "a.1.weight")


class TestRefusals:
    def refused(self, model: nn.Module, example: Any, *texts: str) -> None:
        with pytest.raises(ModelError) as caught:
            trace(model, example)
        line = str(caught.value)
        assert caught.value.exit_code == 4
        assert len(line.splitlines()) == 1
        for text in texts:
            assert text in line

    def test_control_flow_on_data(self) -> None:
        class Branches(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x + 1 if x.sum() > 0 else x

        texts = ("test_trace.py:", "Branches cannot be traced", "part=...")
        self.refused(Branches(), (torch.randn(2, 3),), *texts)

    def test_a_wrong_input_shape(self) -> None:
        self.refused(SmallNet(), (torch.randn(2, 4, 8, 8),), "SmallNet cannot be traced", "input shape")

    def test_outputs_of_other_classes(self) -> None:
        class Model(nn.Linear):
            def forward(self, x: Tensor) -> Any:
                return [super().forward(x), object()]

        texts = "the model: returns something of class object", "use tuples, lists, dicts or dataclasses"
        self.refused(Model(4, 3), (torch.randn(2, 4),), *texts)

    def test_a_fixed_batch(self) -> None:
        class Fixed(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x.view(2, 3) * torch.ones(2, 3)

        self.refused(Fixed(), (torch.randn(2, 3),), "Fixed cannot be traced")

    def test_inputs_that_are_no_batches(self) -> None:
        self.refused(SmallNet(), (torch.tensor(1.0),), "must be tensors with a batch dimension")
        self.refused(SmallNet(), ("image",), "must be tensors with a batch dimension")

    def test_the_mode_is_restored_after_a_refusal(self) -> None:
        model = SmallNet().train()
        self.refused(model, (torch.randn(2, 4, 8, 8),), "cannot be traced")
        assert model.training


def test_source_line_is_the_innermost_outside_torch() -> None:
    stack = (
        'File "/home/a/model.py", line 12, in forward\n    return self.body(x)\n'
        'File "/home/a/parts/block.py", line 7, in forward\n    y = self.conv(x)\n'
        'File "/usr/torch/nn/modules/conv.py", line 99, in forward\n    return F.conv2d(x)\n'
    )
    assert source_line(stack) == "block.py:7 y = self.conv(x)"
    assert source_line(stack[-90:].lstrip()) != ""
    assert source_line("") == ""

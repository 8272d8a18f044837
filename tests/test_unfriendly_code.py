"""Models whose code is not friendly: cut exactly, or refused in one line that names module and source."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_unfriendly import Body, X, exact, prune, refused
from torch import Tensor, nn

import compress
from compress.errors import CompressError


class TestCode:
    def test_control_flow_on_data_names_module_and_line(self) -> None:
        class Branches(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x * 2 if x.mean() > 0 else x

        model = nn.Sequential(Body(), Branches())
        refused(model, "return x * 2 if x.mean() > 0 else x in module 1", "cannot be traced", "part=...")
        dense, result = prune(model, part="0")
        assert isinstance(dense[1], Branches)
        assert result.whole is not None
        assert result.whole.passed

    def test_sizes_that_depend_on_data(self) -> None:
        class Picks(Body):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x[x[:, 0] > -9])

        refused(
            Picks(), "return super().forward(x[x[:, 0] > -9])", "the size of its result depends on the data"
        )

    def test_branches_by_torch_cond(self) -> None:
        class Cond(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b = Body(), Body()

            def forward(self, x: Tensor) -> Any:
                return torch.cond(x.sum() > 0, lambda y: self.a(y), lambda y: self.b(y), (x,))

        refused(Cond(), "return torch.cond(x.sum() > 0", "torch.cond cannot be followed", "part=...")

    def test_ops_that_cannot_be_exported(self) -> None:
        class Numpy(Body):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(torch.from_numpy(x.detach().numpy() * 2))

        refused(Numpy(), "torch.from_numpy(x.detach().numpy() * 2)", "Numpy cannot be traced")

    def test_sparse_tensors(self) -> None:
        class Graph(Body):
            def __init__(self) -> None:
                super().__init__()
                self.register_buffer("edges", torch.eye(4).to_sparse())

            def forward(self, x: Tensor) -> Tensor:
                return super().forward(torch.sparse.mm(self.edges, x.t()).t())

        refused(Graph(), "torch.sparse.mm(self.edges, x.t()).t()", "Graph cannot be traced", "_sparse_addmm")

    def test_a_custom_autograd_function(self) -> None:
        class Straight(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor) -> Tensor:
                return x.clamp(-1, 1)

            @staticmethod
            def backward(ctx: Any, gradient: Tensor) -> Tensor:
                return gradient

        class Model(Body):
            def forward(self, x: Tensor) -> Any:
                return self.c(Straight.apply(self.b(torch.tanh(self.a(x)))))

        exact(Model(), X)

    def test_a_custom_operator_pins_its_channels_and_is_not_written_to_a_file(self, tmp_path: Path) -> None:
        @torch.library.custom_op("unfriendly::twice", mutates_args=())
        def twice(x: Tensor) -> Tensor:
            return x * 2

        twice.register_fake(torch.empty_like)
        twice.register_autograd(lambda ctx, gradient: gradient * 2)

        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.last = Body(), Body()

            def forward(self, x: Tensor) -> Any:
                return self.last(twice(self.first(x)))

        dense, result = prune(Model())
        assert any("twice has no pruning rule" in pin.reason for pin in result.pinned)
        with pytest.raises(CompressError, match=r"unfriendly\.twice.* cannot be written to a file") as caught:
            compress.save(dense, tmp_path / "net", X)
        assert caught.value.exit_code == 4

    def test_regions_without_gradients(self) -> None:
        class Frozen(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.teacher, self.body = Body(), Body()

            def forward(self, x: Tensor) -> Tensor:
                with torch.no_grad():
                    y = self.teacher(x)
                return self.body(x) + torch.tanh(y)

        done = exact(Frozen(), X, least=40)
        gradients = {name: p.grad is not None for name, p in done.dense.named_parameters()}
        assert {name for name, there in gradients.items() if not there} == {
            name for name in gradients if name.startswith("teacher.")
        }

    def test_autocast_inside_the_model(self) -> None:
        class Mixed(nn.Module):
            def __init__(self, enabled: bool) -> None:
                super().__init__()
                self.body, self.enabled = Body(), enabled

            def forward(self, x: Tensor) -> Tensor:
                with torch.autocast("cpu", torch.bfloat16, enabled=self.enabled):
                    return self.body(x)

        refused(
            Mixed(True),
            "test_unfriendly.py:",
            "in module body.",
            "runs under torch.autocast inside the model",
        )
        exact(Mixed(False), X)

    def test_gradient_checkpointing(self) -> None:
        class Checkpointed(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.body = Body()

            def forward(self, x: Tensor) -> Any:
                return torch.utils.checkpoint.checkpoint(self.body, x, use_reentrant=False)

        exact(Checkpointed(), X)

    def test_buffers_that_forward_changes(self) -> None:
        class Counts(Body):
            def __init__(self) -> None:
                super().__init__()
                self.register_buffer("calls", torch.zeros(()))
                self.register_buffer("mean", torch.zeros(4))

            def forward(self, x: Tensor) -> Tensor:
                self.calls += 1
                self.mean.mul_(0.5).add_(x.mean(0))
                return super().forward(x) + self.mean

        model = Counts()
        dense, result = prune(model)
        assert result.verification.passed
        assert model.calls == 0
        before = dense.get_buffer("calls").item()
        first, second = dense(X), dense(X)
        assert dense.get_buffer("calls").item() == before + 2
        assert not torch.equal(first, second)

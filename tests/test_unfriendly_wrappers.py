"""Hooks, wrappers and what is no plain model: pruned all the same, or refused with what to give instead."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import free_units
from test_unfriendly import Body, X, exact, prune, refused
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import compress
from compress.config import ModelConfig
from compress.errors import CompressError
from compress.models import build_model


class TestWrappers:
    def test_hooks(self) -> None:
        model = Body()
        model.a.register_forward_hook(lambda module, given, made: made * 2)
        model.b.register_forward_pre_hook(lambda module, given: (given[0] + 1,))
        exact(model, X)

    def test_parametrizations(self) -> None:
        class Square(nn.Module):
            def forward(self, weight: Tensor) -> Tensor:
                return weight * weight.abs()

        model = Body()
        parametrize.register_parametrization(model.b, "weight", Square())
        done = exact(model, X)
        assert "b.parametrizations.weight.original" in done.cmap.parameters

    @pytest.mark.parametrize("norm", [parametrizations.weight_norm, parametrizations.spectral_norm])
    def test_norms_of_weights_are_exact_or_pinned(self, norm: Callable[..., Any]) -> None:
        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.last = Body(), Body()
                norm(self.first.b)

            def forward(self, x: Tensor) -> Tensor:
                return self.last(torch.tanh(self.first(x)))

        exact(Model(), X)

    def test_old_weight_norm(self) -> None:
        model = nn.Sequential(Body(), Body())
        with pytest.warns(FutureWarning):
            nn.utils.weight_norm(model[0].b)
        model(X).sum()  # it now remembers a weight that is no leaf
        _, result = prune(model)
        assert result.folded == ("0.b.weight",)
        same, result = prune(model, in_place=True)
        assert same is model
        assert result.verification.passed
        assert model(X).shape == (2, 4)

    def test_data_parallel(self) -> None:
        dense, result = prune(nn.DataParallel(Body()))
        assert "a.weight" in result.plan.shapes
        assert "a.weight" in dict(dense.named_parameters())
        wrapped = nn.DataParallel(Body())
        same, _ = prune(wrapped, in_place=True)
        assert same is wrapped
        assert wrapped.module.a.out_features < 12
        assert wrapped(X).shape == (2, 4)

    def test_distributed_data_parallel(self) -> None:
        from torch import distributed

        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
        try:
            _, result = prune(nn.parallel.DistributedDataParallel(Body()))
        finally:
            distributed.destroy_process_group()
        assert "a.weight" in result.plan.shapes

    @pytest.mark.slow
    def test_compiled_models(self) -> None:
        model: Any = torch.compile(Body())
        dense, result = prune(model)
        assert "a.weight" in result.plan.shapes
        assert dense(X).shape == (2, 4)
        done = exact(nn.Sequential(torch.compile(Body()), nn.Linear(4, 3)), X)  # type: ignore[arg-type]
        assert free_units(done.cmap, "0._orig_mod.a.weight") == 12

    @pytest.mark.parametrize("inside", [False, True])
    @pytest.mark.parametrize("make", [torch.jit.script, lambda body: torch.jit.trace(body, X)])
    @pytest.mark.filterwarnings("ignore")  # TorchScript is on its way out
    def test_torchscript(self, make: Any, inside: bool) -> None:
        script = make(Body())
        model = nn.Sequential(Body(), script) if inside else script
        where = "1: is TorchScript" if inside else "Module: is TorchScript"
        refused(model, where, "give the Python model it was made from, with the weights of its state_dict()")

    @pytest.mark.filterwarnings("ignore")  # so is this quantization
    def test_quantized_models(self) -> None:
        model = torch.ao.quantization.quantize_dynamic(Body(), {nn.Linear})
        refused(model, "a: is a quantized Linear, which cannot be trained", "prune the float model")

    def test_things_that_are_no_model(self, tmp_path: Path) -> None:
        refused(Body().state_dict(), "the model is a OrderedDict, not a torch.nn.Module", "load_state_dict")
        refused(str(tmp_path / "model.pt"), "the model is a str, not a torch.nn.Module")

    @pytest.mark.parametrize("name", ["model.pt", "runs/best.pth", "net.BIN", "weights.safetensors"])
    def test_pickled_models(self, name: str, tmp_path: Path) -> None:
        def build(path: str) -> nn.Module:
            return build_model(ModelConfig(name=path, input_shape=[4]), tmp_path)

        for call in (build, compress.load):
            with pytest.raises(CompressError) as caught:
                call(name)
            assert caught.value.exit_code == 4
            assert f"{name} is no model: a pickled module or TorchScript is code" in str(caught.value)
            assert "give the function that builds the model" in str(caught.value)

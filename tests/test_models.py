"""Models and weights by name, and the weights files that must be refused."""

from __future__ import annotations

import pickle
import sys
import types
import urllib.error
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Canary, refused
from safetensors.torch import save_file
from torch import nn

from compress.config import ModelConfig
from compress.errors import ConfigError, DataError, IntegrityError, ModelError
from compress.models import build_model, is_program, load_weights


def config(name: str, **given: Any) -> ModelConfig:
    return ModelConfig(name=name, input_shape=[3, 32, 32], **given)


def small() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))


class TestNames:
    def test_torchvision_with_keywords(self, tmp_path: Path) -> None:
        model = build_model(config("torchvision:resnet18", kwargs={"num_classes": 10}), tmp_path)
        assert model.fc.out_features == 10
        assert model.training

    def test_same_seed_same_weights_and_the_callers_generator_is_left(self, tmp_path: Path) -> None:
        def first(seed: int) -> torch.Tensor:
            model = build_model(config("torchvision:squeezenet1_1"), tmp_path, seed=seed)
            return next(model.parameters()).detach()

        torch.manual_seed(5)
        expected = torch.rand(3)
        torch.manual_seed(5)
        a, b, c = first(1), first(1), first(2)
        assert torch.equal(torch.rand(3), expected)
        assert torch.equal(a, b)
        assert not torch.equal(a, c)

    @pytest.mark.parametrize(
        ("name", "texts"),
        [
            (
                "torchvision:resnet81",
                ("model.name: unknown torchvision model 'resnet81'", "did you mean resnet18"),
            ),
            ("torchvision:zzzzzz", ("unknown torchvision model", "list_models()")),
            ("resnet18", ("unknown model 'resnet18'", "did you mean torchvision:resnet18")),
            ("torchvison:resnet18", ("no module named 'torchvison'", "did you mean torchvision?")),
            ("!!", ("unknown model '!!'", '"torchvision:NAME", "timm:NAME", "package.module:function"')),
        ],
    )
    def test_unknown_names_give_the_nearest(self, tmp_path: Path, name: str, texts: tuple[str, ...]) -> None:
        refused(ConfigError, 3, lambda: build_model(config(name), tmp_path), *texts)

    def test_wrong_keyword(self, tmp_path: Path) -> None:
        wrong = config("torchvision:resnet18", kwargs={"classes": 3})
        refused(
            ConfigError, 3, lambda: build_model(wrong, tmp_path), "model.kwargs: ", "resnet18", "'classes'"
        )

    def test_user_function_beside_the_config(self, tmp_path: Path) -> None:
        (tmp_path / "my_nets_a.py").write_text(
            "from torch import nn\n"
            "def net(width=4):\n    return nn.Linear(width, 2)\n"
            "def number():\n    return 3\n"
            "def fails():\n    raise RuntimeError('no such thing\\nat all')\n"
        )
        assert build_model(config("my_nets_a:net", kwargs={"width": 7}), tmp_path).in_features == 7
        refused(
            ConfigError,
            3,
            lambda: build_model(config("my_nets_a:nett"), tmp_path),
            "no 'nett'",
            "did you mean net?",
        )
        refused(ModelError, 4, lambda: build_model(config("my_nets_a:number"), tmp_path), "gave a int")
        refused(
            ConfigError,
            3,
            lambda: build_model(config("my_nets_a:fails"), tmp_path),
            "at all (my_nets_a.py:7)",
        )
        refused(
            ConfigError,
            3,
            lambda: build_model(config("my_nets_a:net", kwargs={"w": 1}), tmp_path),
            "model.kwargs",
            "'w'",
        )

    def test_modules_that_cannot_be_imported(self, tmp_path: Path) -> None:
        (tmp_path / "my_nets_b.py").write_text("import torch\n1 / 0\n")
        (tmp_path / "my_nets_c.py").write_text("import surely_not_installed\n")
        (tmp_path / "my_nets_d.py").write_text("import sys\nsys.exit(0)\n")
        for module, text in (
            ("my_nets_z", "no module named 'my_nets_z'; did you mean my_nets_"),
            ("my_nets_b", "fails on import: ZeroDivisionError: division by zero (my_nets_b.py:2)"),
            ("my_nets_c", "needs 'surely_not_installed'; install 'surely_not_installed' first"),
            ("my_nets_d", "fails on import: SystemExit: 0"),
        ):
            refused(ConfigError, 3, lambda m=module: build_model(config(f"{m}:net"), tmp_path), text)

    def test_timm_missing_is_one_line(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "timm", None)
        text = "timm:resnet18 needs timm, which is not installed; pip install 'compress-release[timm]'"
        refused(ConfigError, 3, lambda: build_model(config("timm:resnet18"), tmp_path), text)

    def test_timm_by_its_own_names(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        timm = types.ModuleType("timm")
        seen: dict[str, Any] = {}

        def create(name: str, **kwargs: Any) -> nn.Module:
            seen.update(kwargs, name=name)
            if kwargs.get("pretrained"):
                raise ConnectionError("no route\nto host")
            return small()

        vars(timm).update(
            is_model=lambda n: n == "tiny_net", list_models=lambda: ["tiny_net"], create_model=create
        )
        monkeypatch.setitem(sys.modules, "timm", timm)
        assert isinstance(
            build_model(config("timm:tiny_net", kwargs={"num_classes": 2}), tmp_path), nn.Module
        )
        assert seen == {"name": "tiny_net", "num_classes": 2}
        refused(
            ConfigError, 3, lambda: build_model(config("timm:tiny_nett"), tmp_path), "did you mean tiny_net?"
        )
        pretrained = config("timm:tiny_net", weights="DEFAULT")
        refused(
            DataError, 3, lambda: build_model(pretrained, tmp_path), "cannot be downloaded", "model.weights"
        )

    def test_programs_are_opened_otherwise(self, tmp_path: Path) -> None:
        assert is_program("net.pt2")
        refused(ModelError, 4, lambda: build_model(config("net.pt2"), tmp_path), "exported program")


class TestTorchvisionWeights:
    def test_unknown_weights_list_the_choices(self, tmp_path: Path) -> None:
        wrong = config("torchvision:resnet18", weights="IMAGENET")
        line = refused(ConfigError, 3, lambda: build_model(wrong, tmp_path), "model.weights", "'IMAGENET'")
        assert "IMAGENET1K_V1" in line

    def test_no_network(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))

        def unreachable(*_: Any, **__: Any) -> None:
            raise urllib.error.URLError("Name or service not known")

        monkeypatch.setattr("torch.hub.urlopen", unreachable)
        wanted = config("torchvision:squeezenet1_1", weights="DEFAULT")
        refused(
            DataError,
            3,
            lambda: build_model(wanted, tmp_path),
            "the weights of squeezenet1_1 cannot be downloaded",
            "download https://download.pytorch.org/models/squeezenet1_1",
            "give the file as model.weights",
        )

    def test_cached_weights_are_read_with_weights_only(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from torchvision.models import SqueezeNet1_1_Weights

        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        file = tmp_path / "hub" / "checkpoints" / Path(SqueezeNet1_1_Weights.DEFAULT.url).name
        file.parent.mkdir(parents=True)
        made = build_model(config("torchvision:squeezenet1_1"), tmp_path, seed=3)
        torch.save(made.state_dict(), file)
        wanted = config("torchvision:squeezenet1_1", weights="DEFAULT")
        found = build_model(wanted, tmp_path)
        assert all(torch.equal(a, b) for a, b in zip(made.parameters(), found.parameters(), strict=True))
        few = config("torchvision:squeezenet1_1", weights="DEFAULT", kwargs={"num_classes": 3})
        adapted, state = build_model(few, tmp_path), made.state_dict()
        assert adapted(torch.zeros(1, 3, 64, 64)).shape == (1, 3)
        new = {name for name, x in adapted.state_dict().items() if not torch.equal(x[:3], state[name][:3])}
        assert new == {"classifier.1.weight"}  # and its bias, which starts at zero in both
        canary = tmp_path / "canary"
        torch.save({"state_dict": Canary(canary)}, file)
        refused(IntegrityError, 8, lambda: build_model(wanted, tmp_path), "damaged", file.name)
        assert not canary.exists()


class TestWeights:
    @pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "w.pth"])
    @pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod."])
    def test_round_trip(self, tmp_path: Path, name: str, prefix: str) -> None:
        torch.manual_seed(1)
        source, target = small(), small()
        state = {prefix + k: v for k, v in source.state_dict().items()}
        if name.endswith(".safetensors"):
            save_file(state, str(tmp_path / name))
        else:
            torch.save({"state_dict": state, "epoch": 3} if name == "w.pth" else state, tmp_path / name)
        load_weights(target, tmp_path / name)
        for key, value in source.state_dict().items():
            assert torch.equal(target.state_dict()[key], value), key

    def test_old_format_without_batch_counters(self, tmp_path: Path) -> None:
        source, target = small(), small()
        state = {k: v for k, v in source.state_dict().items() if not k.endswith("num_batches_tracked")}
        torch.save(state, tmp_path / "w.th", _use_new_zipfile_serialization=False)
        load_weights(target, tmp_path / "w.th")
        assert torch.equal(target[0].weight, source[0].weight)

    def test_by_config_relative_to_its_folder(self, tmp_path: Path) -> None:
        made = build_model(config("torchvision:squeezenet1_1"), tmp_path, seed=9)
        save_file(made.state_dict(), str(tmp_path / "w.safetensors"))
        found = build_model(config("torchvision:squeezenet1_1", weights="w.safetensors"), tmp_path)
        assert torch.equal(next(found.parameters()), next(made.parameters()))

    def test_missing_file(self, tmp_path: Path) -> None:
        refused(
            ConfigError, 3, lambda: load_weights(small(), tmp_path / "w.pt"), "w.pt: no such weights file"
        )

    def test_shape_that_does_not_fit(self, tmp_path: Path) -> None:
        state = small().state_dict() | {"3.weight": torch.zeros(5, 4)}
        save_file(state, str(tmp_path / "w.safetensors"))
        text = "3.weight has shape [5, 4], the model's has [2, 4]"
        refused(ConfigError, 3, lambda: load_weights(small(), tmp_path / "w.safetensors"), text)

    def test_keys_that_do_not_fit(self, tmp_path: Path) -> None:
        state = small().state_dict()
        state["4.weight"] = state.pop("3.weight")
        torch.save(state, tmp_path / "w.pt")
        text = "has no 3.weight, shape [2, 4] (1 keys missing); the file has 4.weight"
        refused(ConfigError, 3, lambda: load_weights(small(), tmp_path / "w.pt"), text)
        torch.save(small().state_dict() | {"extra": torch.zeros(3)}, tmp_path / "w.pt")
        refused(
            ConfigError,
            3,
            lambda: load_weights(small(), tmp_path / "w.pt"),
            "extra, shape [3], is not in the model",
        )

    def test_not_a_state_dict_and_not_finite(self, tmp_path: Path) -> None:
        for given, text in (([1, 2], "holds a list"), ({}, "holds a dict"), ({"lr": 0.1}, "'lr' is a float")):
            torch.save(given, tmp_path / "w.pt")
            refused(ConfigError, 3, lambda: load_weights(small(), tmp_path / "w.pt"), text)
        state = small().state_dict()
        state["0.weight"][0, 0, 0, 0] = float("nan")
        torch.save(state, tmp_path / "w.pt")
        refused(ConfigError, 3, lambda: load_weights(small(), tmp_path / "w.pt"), "0.weight holds NaN")

    @pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
    def test_every_truncation_is_refused(self, tmp_path: Path, name: str) -> None:
        path = tmp_path / name
        state = small().state_dict()
        save_file(state, str(path)) if name.endswith("safetensors") else torch.save(state, path)
        whole = path.read_bytes()
        for length in [0, 1, 7, 100, *range(500, len(whole) - 1, 97), len(whole) - 1]:
            path.write_bytes(whole[:length])
            line = refused(IntegrityError, 8, lambda: load_weights(small(), path))
            assert line.startswith(str(path))

    def test_garbage(self, tmp_path: Path) -> None:
        path = tmp_path / "w.pt"
        for data in (b"hello, this is text", b"\x00" * 500, b"PK\x03\x04" + b"x" * 300, b"\x80\x02."):
            path.write_bytes(data)
            refused(IntegrityError, 8, lambda: load_weights(small(), path), "not a weights file")

    @pytest.mark.parametrize("new_format", [True, False])
    def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(
        self, tmp_path: Path, new_format: bool
    ) -> None:
        canary, path = tmp_path / "canary", tmp_path / "w.pt"
        hostile = small().state_dict() | {"x": Canary(canary)}
        torch.save(hostile, path, _use_new_zipfile_serialization=new_format)
        refused(
            IntegrityError,
            8,
            lambda: load_weights(small(), path),
            "would run code when read; it was not read",
            "safetensors.torch.save_file(model.state_dict()",
        )
        assert not canary.exists()
        path.write_bytes(pickle.dumps(Canary(canary)))
        refused(IntegrityError, 8, lambda: load_weights(small(), path))
        assert not canary.exists()
        pickle.loads(path.read_bytes())
        assert canary.exists()  # it would have run

    def test_whole_models_and_torchscript(self, tmp_path: Path) -> None:
        path = tmp_path / "w.pt"
        torch.save(small(), path)
        refused(
            IntegrityError,
            8,
            lambda: load_weights(small(), path),
            "objects other than tensors",
            "state_dict()",
        )
        with zipfile.ZipFile(path, "w") as archive:
            for member in ("w/data.pkl", "w/constants.pkl", "w/code/__torch__.py", "w/version"):
                archive.writestr(member, b"3")
        refused(IntegrityError, 8, lambda: load_weights(small(), path), "TorchScript")

    def test_a_compressed_archive_is_refused_before_it_is_unpacked(self, tmp_path: Path) -> None:
        torch.save({"x": torch.zeros(1_000_000)}, tmp_path / "w.pt")
        bomb = zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED)
        with zipfile.ZipFile(tmp_path / "w.pt") as source, bomb:
            for name in source.namelist():
                bomb.writestr(name, source.read(name))
        assert (tmp_path / "bomb.pt").stat().st_size < 50_000
        refused(IntegrityError, 8, lambda: load_weights(small(), tmp_path / "bomb.pt"), "compressed")

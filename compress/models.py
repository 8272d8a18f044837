"""Models and weights by name: torchvision, timm, a Python function; state dicts without pickled code."""

from __future__ import annotations

import pickle
import urllib.error
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from compress import seeds
from compress.errors import ConfigError, DataError, IntegrityError, ModelError
from compress.names import OBJECT_NAME, call_user, first_line, last_line, load_object, nearest
from compress.program import check_members, load_program, only_weights

if TYPE_CHECKING:
    from compress.config import ModelConfig

__all__ = ["build_model", "is_program", "load_program", "load_weights"]

FORMS = 'a model is "torchvision:NAME", "timm:NAME", "package.module:function" or "file.pt2"'
WEIGHT_FILES = (".safetensors", ".pt", ".pth", ".th", ".ckpt", ".bin")
NESTED = ("state_dict", "model_state_dict", "model")  # where training scripts put the state dict
PREFIXES = ("module.", "_orig_mod.")  # left by DataParallel and torch.compile
SAVE_AGAIN = (
    "only a state dict is read: safetensors.torch.save_file(model.state_dict(), 'weights.safetensors')"
)


def is_program(name: str) -> bool:
    """Whether a model's name is a ``.pt2`` file; `load_program` reads those, not `build_model`."""
    return name.endswith(".pt2")


def build_model(config: ModelConfig, folder: Path, *, seed: int = 0) -> nn.Module:
    """The model that ``config`` names, with its weights; in train mode, on the CPU.

    folder: the config's folder: relative weight files and user modules are looked for there. seed: of
    the initial weights, where ``config.weights`` does not give them; the global generators are left as
    they were. Raises ConfigError (exit 3) for an unknown name or keyword, ModelError (exit 4) when the
    thing named is not a module, and the errors of `load_weights`.
    """
    with seeds.isolated(seeds.derive(seed, "model")):
        return _build(config, folder)


def refuse_pickled(name: str, where: str) -> None:
    """Refuse a file in the place of a model: ModelError (exit 4), with what to do instead."""
    if name.lower().endswith(WEIGHT_FILES):
        what = f"{name} is no model: a pickled module or TorchScript is code, which is not run"
        fix = "give the function that builds the model, and this file's state_dict as weights; or a .pt2"
        raise ModelError(what, where, fix)


def load_weights(model: nn.Module, path: Path) -> None:
    """Copy the state dict in ``path`` (safetensors, or torch.save read with weights_only) into ``model``.

    ``{"state_dict": ...}`` is opened and the prefixes ``module.`` and ``_orig_mod.`` are taken off.
    Raises ConfigError (exit 3) when the file is missing or a key or shape does not fit, naming the
    first; IntegrityError (exit 8) when it is truncated, holds anything but tensors and plain
    containers, or is not a weights file.
    """
    if not path.is_file():
        raise ConfigError(
            "no such weights file", str(path), "model.weights is relative to the config's folder"
        )
    found = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    state = _state_dict(found, path)
    wanted = {key: value for key, value in model.state_dict().items() if isinstance(value, Tensor)}
    _check_fit(wanted, state, path)
    model.load_state_dict(state, strict=False)  # strict in effect: _check_fit has compared every key


def _build(config: ModelConfig, folder: Path) -> nn.Module:
    scheme, _, name = config.name.partition(":")
    if is_program(config.name):
        raise ModelError("a .pt2 file is an exported program, not a module", config.name, "use load_program")
    refuse_pickled(config.name, "model.name")
    if scheme == "torchvision":
        return _torchvision(config, name, folder)
    if scheme == "timm":
        return _timm(config, name, folder)
    if not OBJECT_NAME.fullmatch(config.name):
        raise ConfigError(f"unknown model {config.name!r}", "model.name", _hint(config.name))
    function = load_object(config.name, folder, "model.name")
    model = call_user(function, config.name, dict(config.kwargs), "model.kwargs")
    if not isinstance(model, nn.Module):
        what = f"{config.name} gave a {type(model).__name__}, not a torch.nn.Module"
        raise ModelError(what, "model.name", "let the function return the model")
    return _with_file(model, config, folder)


def _hint(name: str) -> str:
    """For a name without a scheme: the torchvision model it most likely means."""
    from torchvision.models import list_models

    plain = name.rpartition(":")[2]
    near = nearest(plain, list_models())
    return near.replace("mean ", "mean torchvision:", 1).replace(", ", ", torchvision:") or FORMS


def _torchvision(config: ModelConfig, name: str, folder: Path) -> nn.Module:
    from torchvision.models import get_model, get_model_weights, list_models

    known = list_models()
    if name not in known:
        fix = nearest(name, known) or "torchvision.models.list_models() lists them"
        raise ConfigError(f"unknown torchvision model {name!r}", "model.name", fix)
    kwargs = dict(config.kwargs)
    if config.weights is None or _is_file(config.weights, folder):
        return _with_file(_call(get_model, "torchvision", name, kwargs | {"weights": None}), config, folder)
    choices = get_model_weights(name).__members__
    short = config.weights.rpartition(".")[2]  # "ResNet18_Weights.DEFAULT" and "DEFAULT" alike
    if short not in choices:
        fix = nearest(short, choices) or f"one of {', '.join(choices)}, or a file"
        raise ConfigError(f"torchvision has no weights {config.weights!r} for {name}", "model.weights", fix)
    weights = choices[short]
    classes = len(weights.meta.get("categories", ()))
    own = kwargs.pop("num_classes", classes)
    model = _pretrained(get_model, name, kwargs | {"weights": weights}, weights.url)
    if own == classes:
        return model
    return _with_head_of(_call(get_model, "torchvision", name, kwargs | {"num_classes": own}), model)


def _with_head_of(fresh: nn.Module, model: nn.Module) -> nn.Module:
    """``model`` with the untrained layers of ``fresh`` in the place of those that have other shapes there."""
    wanted = fresh.state_dict()
    other = [
        name for name, x in model.state_dict().items() if name in wanted and wanted[name].shape != x.shape
    ]
    for path in dict.fromkeys(name.rpartition(".")[0] for name in other):
        model.set_submodule(path, fresh.get_submodule(path))
    return model


def _pretrained(get_model: Any, name: str, kwargs: dict[str, Any], url: str) -> nn.Module:
    """A torchvision model with weights from its cache or the network, read with weights_only."""
    try:
        with only_weights():
            return _call(get_model, "torchvision", name, kwargs)
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        what = f"the weights of {name} cannot be downloaded ({first_line(error)})"
        fix = f"download {url} where there is a network and give the file as model.weights"
        raise DataError(what, "model.weights", fix) from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, zipfile.BadZipFile) as error:
        what = f"the downloaded weights of {name} are damaged ({first_line(error)})"
        fix = f"delete {Path(url).name} in torch's hub cache and run again"
        raise IntegrityError(what, "model.weights", fix) from error


def _timm(config: ModelConfig, name: str, folder: Path) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        fix = "pip install 'compress-release[timm]'"
        raise ConfigError(f"{config.name} needs timm, which is not installed", "model.name", fix) from error
    if not timm.is_model(name):
        fix = nearest(name.partition(".")[0], timm.list_models()) or "timm.list_models() lists them"
        raise ConfigError(f"unknown timm model {name!r}", "model.name", fix)
    kwargs = dict(config.kwargs)
    if config.weights is None or _is_file(config.weights, folder):
        return _with_file(_call(timm.create_model, "timm", name, kwargs), config, folder)
    if config.weights != "DEFAULT":
        raise ConfigError(
            f"unknown weights {config.weights!r}", "model.weights", 'for timm: "DEFAULT" or a file'
        )
    try:
        with only_weights():
            return _call(timm.create_model, "timm", name, kwargs | {"pretrained": True})
    except OSError as error:  # every network error of its hub client is one
        fix = "download them where there is a network and give the file as model.weights"
        what = f"the weights of {name} cannot be downloaded ({first_line(error)})"
        raise DataError(what, "model.weights", fix) from error


def _call(function: Any, library: str, name: str, kwargs: dict[str, Any]) -> nn.Module:
    try:
        model: nn.Module = function(name, **kwargs)
    except (TypeError, ValueError, AssertionError) as error:
        what = f"{library} cannot build {name} with these arguments: {last_line(error)}"
        raise ConfigError(what, "model.kwargs") from error
    return model


def _is_file(weights: str, folder: Path) -> bool:
    return weights.endswith(WEIGHT_FILES) or "/" in weights or (folder / weights).is_file()


def _with_file(model: nn.Module, config: ModelConfig, folder: Path) -> nn.Module:
    if config.weights is not None:
        load_weights(model, folder / config.weights)
    return model


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(str(path)))
    except (SafetensorError, ValueError, OSError) as error:
        what = f"not a whole safetensors file: {last_line(error)}"
        raise IntegrityError(what, str(path), "copy or download it again") from error


def _read_torch(path: Path) -> Any:
    if zipfile.is_zipfile(path):
        _check_zip(path)
    try:
        with warnings.catch_warnings():  # its remarks on pickle's protocols help nobody here
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "GLOBAL" in str(error) or "instantiate" in str(error) or "Unsupported class" in str(error):
            what = "holds pickled objects other than tensors, which would run code when read; it was not read"
            raise IntegrityError(what, str(path), SAVE_AGAIN) from error
        raise IntegrityError(f"not a weights file: {first_line(error)}", str(path), SAVE_AGAIN) from error
    except Exception as error:  # a damaged pickle can make torch's reader raise anything
        what = f"truncated or not a weights file: {first_line(error)}"
        raise IntegrityError(what, str(path), "copy or download it again") from error


def _check_zip(path: Path) -> None:
    """Refuse TorchScript, and archives that would unpack to more than they are."""
    try:
        with zipfile.ZipFile(path) as archive:
            check_members(archive, path)
            script = any(name.endswith("/constants.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError) as error:
        what = f"truncated or not a weights file: {last_line(error)}"
        raise IntegrityError(what, str(path), "copy or download it again") from error
    if script:
        raise IntegrityError("holds a TorchScript program, not weights", str(path), SAVE_AGAIN)


def _state_dict(found: Any, path: Path) -> dict[str, Tensor]:
    for key in NESTED:
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
            break
    if not isinstance(found, Mapping) or not found:
        raise ConfigError(f"holds a {type(found).__name__}, not a state dict", str(path), SAVE_AGAIN)
    state: dict[str, Tensor] = {}
    for key, value in found.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            what = f"its entry {key!r} is a {type(value).__name__}, not a tensor"
            raise ConfigError(what, str(path), SAVE_AGAIN)
        state[_plain(key)] = value
    return state


def _plain(key: str) -> str:
    for prefix in PREFIXES:
        key = key.removeprefix(prefix)
    return key


def _check_fit(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor], path: Path) -> None:
    """Every key there, of the same shape, and finite; only BatchNorm's batch counters may be missing."""
    fix = "are model.name and model.kwargs those the weights were trained with?"
    missing = [k for k in wanted if k not in given and not k.endswith("num_batches_tracked")]
    extra = [k for k in given if k not in wanted and not k.endswith("num_batches_tracked")]
    for key in wanted:
        if key in given and wanted[key].shape != given[key].shape:
            what = f"{key} has shape {list(given[key].shape)}, the model's has {list(wanted[key].shape)}"
            raise ConfigError(what, str(path), fix)
    if missing:
        near = nearest(missing[0], extra).replace("did you mean", "the file has")
        what = f"has no {missing[0]}, shape {list(wanted[missing[0]].shape)} ({len(missing)} keys missing)"
        raise ConfigError(what, str(path), near or fix)
    if extra:
        shape = list(given[extra[0]].shape)
        what = f"{extra[0]}, shape {shape}, is not in the model ({len(extra)} keys too many)"
        raise ConfigError(what, str(path), fix)
    for key, value in given.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise ConfigError(
                f"{key} holds NaN or infinite values", str(path), "give weights that trained well"
            )

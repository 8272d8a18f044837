"""Objects by name: the nearest names to one mistyped, and user code as ``package.module:function``."""

from __future__ import annotations

import difflib
import importlib
import linecache
import os
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from compress.errors import ConfigError

OBJECT_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


def nearest(name: str, known: Iterable[str]) -> str:
    """``did you mean a, b?`` for the names most like ``name``; empty when none is near."""
    by_lower = {k.lower(): k for k in known}
    close = difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.6)
    return f"did you mean {', '.join(by_lower[c] for c in close)}?" if close else ""


def last_line(error: BaseException) -> str:
    """The error's class and the last line of its text that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1][:300]}" if lines else type(error).__name__


def first_line(error: BaseException) -> str:
    """The error's class and the first line of its text."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def users_line(error: Exception) -> str:
    """`file.py:12 code` where a function that the config names raised it; "" where this package did.

    The innermost frame that is neither the interpreter's nor an installed package's decides.
    """
    paths = sysconfig.get_paths()
    libraries = tuple(
        os.path.join(paths[kind], "") for kind in ("stdlib", "platstdlib", "purelib", "platlib")
    )
    own = tuple(os.path.join(Path(__file__).parent.parent, name, "") for name in ("compress", "deploy"))
    found, called = "", False
    for frame, number in traceback.walk_tb(error.__traceback__):
        file = frame.f_code.co_filename
        if file.startswith(own):
            found, called = "", True
        elif called and not file.startswith(("<", *libraries)):
            found = code_line(file, number)
    return found


def code_line(file: str, number: int) -> str:
    """`file.py:12 code`, without the file's directory."""
    return f"{Path(file).name}:{number} {linecache.getline(file, number).strip()}"


def load_object(name: str, folder: Path, where: str) -> Callable[..., Any]:
    """The callable that ``package.module:function`` names, with ``folder`` first on ``sys.path``.

    Importing runs the user's code. Raises ConfigError (exit 3), with ``where`` as its place, when the module
    cannot be imported, has no such name, or the thing named cannot be called.
    """
    module_name, _, attributes = name.partition(":")
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
        importlib.invalidate_caches()
    found: Any = _import(module_name, folder, where)
    for attribute in attributes.split("."):
        if not hasattr(found, attribute):
            known = [k for k in dir(found) if not k.startswith("_")]
            fix = nearest(attribute, known)
            raise ConfigError(f"module {module_name!r} has no {attributes!r}", where, fix)
        found = getattr(found, attribute)
    if not callable(found):
        raise ConfigError(f"{name!r} is a {type(found).__name__}, not a function", where)
    return found  # type: ignore[no-any-return]  # callable() has just said so


def call_user(function: Callable[..., Any], name: str, kwargs: dict[str, Any], where: str) -> Any:
    """``function(**kwargs)``; anything it raises becomes a ConfigError naming the user's file and line."""
    try:
        return function(**kwargs)
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{name} failed: {last_line(error)}{_place(error)}", where) from error


def _import(module_name: str, folder: Path, where: str) -> Any:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or module_name
        if module_name == missing or module_name.startswith(missing + "."):
            beside = (p.stem if p.suffix == ".py" else p.name for p in folder.glob("*"))
            fix = (
                nearest(missing, ["torchvision", "timm", *beside])
                or f"it is looked for in {folder.name or '.'}/ and on sys.path"
            )
            raise ConfigError(f"no module named {missing!r}", where, fix) from error
        fix = f"install {missing!r} first"
        raise ConfigError(f"module {module_name!r} needs {missing!r}", where, fix) from error
    except (Exception, SystemExit) as error:
        what = f"module {module_name!r} fails on import: {last_line(error)}{_place(error)}"
        raise ConfigError(what, where) from error


def _place(error: BaseException) -> str:
    """`` (file.py:12)`` of the innermost frame that raised."""
    frames = traceback.extract_tb(error.__traceback__)
    return f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""

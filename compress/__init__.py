"""A trained model in, a dense smaller model out.

`compress.prune` is the one call, and `compress.finetune` trains what it gives; the others are its parts: run
a traced model (`compress.trace.trace`) on channel labels (`channel_map`), `cut` the channels out, `verify`
the result, `apply_plan` to a fresh instance, `save` and `load` it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compress.api import Result, finetune, load, prune, save
    from compress.channelmap import ChannelMap, channel_map
    from compress.errors import CompressError
    from compress.plan import Plan
    from compress.surgery import apply_plan, cut, verify

_HOME = {
    **dict.fromkeys(("prune", "finetune", "Result", "save", "load"), "api"),
    **dict.fromkeys(("channel_map", "ChannelMap"), "channelmap"),
    **dict.fromkeys(("apply_plan", "cut", "verify"), "surgery"),
    "CompressError": "errors",
    "Plan": "plan",
}

__all__ = [
    "ChannelMap",
    "CompressError",
    "Plan",
    "Result",
    "apply_plan",
    "channel_map",
    "cut",
    "finetune",
    "load",
    "prune",
    "save",
    "verify",
]


def __getattr__(name: str) -> Any:
    """Import on first use, so that `compress --help` needs no torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'compress' has no attribute {name!r}")
    return getattr(import_module(f"compress.{_HOME[name]}"), name)

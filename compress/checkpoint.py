"""A training run's state on disk: tensors as safetensors, the rest as JSON, two generations.

A generation is ``a`` or ``b``: ``a.safetensors`` and ``a.json``, which holds a serial number and the hash of
the tensors and is written last. A new generation replaces the older of the two, so that at every moment one
whole generation is on disk, and a damaged file is found and the one before it used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from compress import files
from compress.errors import IntegrityError

FORMAT = 1
SLOTS = ("a", "b")


@dataclass(frozen=True)
class Snapshot:
    """tensors: by name. state: JSON data. note: what is wrong with a newer one that was passed over."""

    tensors: Mapping[str, Tensor]
    state: Mapping[str, Any]
    note: str = ""


def save(folder: Path, snapshot: Snapshot) -> None:
    """Write a generation. The tensors may be on any device, and share memory.

    Raises ResourceError (exit 7) on a full disk; the newest generation is then still whole.
    """
    from safetensors.torch import save_file

    newest = max(
        _records(folder).items(), key=lambda item: item[1]["serial"], default=(SLOTS[1], {"serial": 0})
    )
    slot, serial = SLOTS[1 - SLOTS.index(newest[0])], int(newest[1]["serial"]) + 1
    record, tensors = folder / f"{slot}.json", folder / f"{slot}.safetensors"
    record.unlink(missing_ok=True)
    own = {
        name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in snapshot.tensors.items()
    }
    with files.whole(tensors) as temporary:
        save_file(own, str(temporary))
        digest, size = files.sha256(temporary), temporary.stat().st_size
    facts = {"format": FORMAT, "serial": serial, "sha256": digest, "bytes": size}
    files.write_json(record, facts | {"state": dict(snapshot.state)})


def load(folder: Path) -> Snapshot | None:
    """The newest whole generation; None when nothing was saved.

    Raises IntegrityError (exit 8) when something was saved and no generation of it is whole.
    """
    from safetensors.torch import load_file

    records = sorted(_records(folder).items(), key=lambda item: item[1]["serial"], reverse=True)
    note = ""
    for slot, record in records:
        tensors = folder / f"{slot}.safetensors"
        problem = _damage(tensors, record)
        if not problem:
            return Snapshot(load_file(str(tensors)), record["state"], note)
        note = note or problem
    if any((folder / f"{slot}.json").exists() for slot in SLOTS):
        what = note or "the checkpoint's records are damaged"
        raise IntegrityError(what, str(folder), "remove this folder to train from the start")
    return None


def prefixed(prefix: str, tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    """Those of ``tensors`` that are tensors, with ``prefix`` before their names."""
    return {prefix + name: value for name, value in tensors.items() if isinstance(value, Tensor)}


def under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those whose names begin with ``prefix``, without it."""
    return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}


def by_parameter(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """``optimizer/NAME/KEY`` as {NAME: {KEY: tensor}}."""
    found: dict[str, dict[str, Tensor]] = {}
    for path, value in under(tensors, "optimizer/").items():
        name, _, key = path.rpartition("/")
        found.setdefault(name, {})[key] = value
    return found


def _records(folder: Path) -> dict[str, dict[str, Any]]:
    """The readable records by slot; a broken one counts as absent."""
    found = {}
    for slot in SLOTS:
        path = folder / f"{slot}.json"
        try:
            record = files.read_json(path) if path.exists() else None
        except IntegrityError:
            continue
        if (
            isinstance(record, dict)
            and record.get("format") == FORMAT
            and isinstance(record.get("serial"), int)
        ):
            found[slot] = record
    return found


def _damage(tensors: Path, record: Mapping[str, Any]) -> str:
    """What is wrong with a generation's tensors, in one line; empty when nothing is."""
    if not tensors.is_file():
        return f"{tensors.name} is missing"
    found = files.sha256(tensors)
    if found != record.get("sha256"):
        return f"{tensors.name} has changed: sha256 {found[:12]}, expected {str(record.get('sha256'))[:12]}"
    return ""

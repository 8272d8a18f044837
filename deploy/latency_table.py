"""What networks and their layers took on one target: a file that can be shared.

An entry is one network that was measured whole, in turns with the network that it was pruned from, and the
part of its latency that each layer took by the runtime's own profiler. So a layer's time is that of the fused
operators that the runtime executes, in their place among the others. A latency model is fitted to entries.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from deploy.errors import ArtifactError, MeasureError
from deploy.layer_names import OnnxLayers

SCHEMA_VERSION = 1
LARGEST_BYTES = 256 * 2**20
_SHOWN = ("kernel_shape", "strides", "dilations")


@dataclass(frozen=True)
class Setting:
    """What latencies in one table have in common: where, with what and how they were measured."""

    runner: str
    version: str
    hardware: str
    precision: str
    threads: int
    batch: int

    def differs(self, other: Setting) -> str:
        """What another setting has differently, in words; "" where they are the same."""
        pairs = ((key, getattr(other, key), value) for key, value in asdict(self).items())
        return ", ".join(f"{key} is {there}, here {here}" for key, there, here in pairs if here != there)


@dataclass(frozen=True)
class Row:
    """One layer of a measured network. kind: what it computes, but for its widths; widths: (in, out)
    channels, 0 where there are none; ms: its part of the latency."""

    name: str
    kind: str
    widths: tuple[int, int]
    ms: float


@dataclass(frozen=True)
class Entry:
    """One measured network. model: the architecture it was pruned from, counts: units kept per class; ms: its
    latency, original_ms: that of the unpruned one beside it; outside_ms: what no layer took."""

    model: str
    counts: tuple[int, ...]
    ms: float
    original_ms: float
    outside_ms: float
    rows: tuple[Row, ...]

    @property
    def ratio(self) -> float:
        """Latency over that of the unpruned network, both measured in turns."""
        return self.ms / self.original_ms


@dataclass(frozen=True)
class Energy:
    """What a call of one network took of its device's energy, and one of the unpruned one beside it."""

    model: str
    counts: tuple[int, ...]
    mj: float
    original_mj: float

    @property
    def ratio(self) -> float:
        """Energy over that of the unpruned network."""
        return self.mj / self.original_mj


@dataclass
class Table:
    """Entries of one setting, in the order they were measured. looks: at networks that a model fitted to the
    entries had chosen; apart, so that the same entries give the same model again. energies: of such."""

    setting: Setting
    entries: list[Entry] = field(default_factory=list)
    looks: list[Entry] = field(default_factory=list)
    energies: list[Energy] = field(default_factory=list)

    def of(self, model: str) -> list[Entry]:
        """The entries of one architecture."""
        return [entry for entry in self.entries if entry.model == model]

    def find(self, model: str, counts: Sequence[int]) -> Entry | None:
        """The measurement of this very network."""
        known = (*self.entries, *self.looks)
        return next((e for e in known if e.model == model and e.counts == tuple(counts)), None)

    def energy(self, model: str, counts: Sequence[int]) -> Energy | None:
        """The energy of this very network."""
        own = (e for e in self.energies if e.model == model and e.counts == tuple(counts))
        return next(own, None)

    def add(self, other: Table) -> bool:
        """Take over what another table of the same setting has more, looks among the entries."""
        before = len(self.entries) + len(self.energies)
        for entry in (*other.entries, *other.looks):
            if self.find(entry.model, entry.counts) is None:
                self.entries.append(entry)
        for energy in other.energies:
            if self.energy(energy.model, energy.counts) is None:
                self.energies.append(energy)
        return len(self.entries) + len(self.energies) > before

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        entries, looks = ([_plain(entry) for entry in own] for own in (self.entries, self.looks))
        setting = asdict(self.setting)
        energies = [asdict(energy) for energy in self.energies]
        return {
            "schema_version": SCHEMA_VERSION,
            "setting": setting,
            "entries": entries,
            "looks": looks,
            "energies": energies,
        }


def _plain(entry: Entry) -> dict[str, Any]:
    return asdict(entry) | {"rows": [[r.name, r.kind, *r.widths, r.ms] for r in entry.rows]}


def read(path: Path, setting: Setting | None = None) -> Table:
    """The table in a file; an empty one of `setting` where there is none. setting: None takes any.

    Raises ArtifactError for a file that is no table, MeasureError for one of another setting.
    """
    if setting is not None and not path.exists():
        return Table(setting)
    try:
        if path.stat().st_size > LARGEST_BYTES:
            raise ValueError("larger than 256 MiB")
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["schema_version"] != SCHEMA_VERSION:
            raise ValueError(f"schema_version {document['schema_version']}")
        found = Setting(**document["setting"])
        entries, looks = ([_entry(entry) for entry in document[key]] for key in ("entries", "looks"))
        energies = [_energy(entry) for entry in document.get("energies", ())]
    except OSError as error:
        raise ArtifactError(f"cannot read it: {error.strerror}", path.name, "check the path") from None
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        what = f"is no table of latencies: {_said(error)}"
        raise ArtifactError(what, path.name, "delete it, and it is measured anew") from None
    if setting is not None and (differs := setting.differs(found)):
        fix = "give another file, or none: then it is measured here"
        raise MeasureError(f"was measured elsewhere: {differs}", path.name, fix)
    return Table(found, entries, looks, energies)


def _said(error: Exception) -> str:
    return f"{error} is missing" if isinstance(error, KeyError) else str(error)


def _entry(entry: Mapping[str, Any]) -> Entry:
    rows = tuple(Row(str(n), str(k), (int(a), int(b)), _number(ms)) for n, k, a, b, ms in entry["rows"])
    counts = tuple(int(n) for n in entry["counts"])
    times = (_number(entry[key]) for key in ("ms", "original_ms", "outside_ms"))
    ms, original_ms, outside_ms = times
    if ms == 0 or original_ms == 0:
        raise ValueError("a network that takes no time")
    return Entry(str(entry["model"]), counts, ms, original_ms, outside_ms, rows)


def _energy(entry: Mapping[str, Any]) -> Energy:
    mj, original_mj = (_number(entry[key], "energy in mJ") for key in ("mj", "original_mj"))
    if mj == 0 or original_mj == 0:
        raise ValueError("a network that takes no energy")
    return Energy(str(entry["model"]), tuple(int(n) for n in entry["counts"]), mj, original_mj)


def _number(value: Any, what: str = "time in ms") -> float:
    if type(value) not in (int, float) or not 0 <= value < math.inf:
        raise ValueError(f"{value!r} is no {what}")
    return float(value)


def kinds(graph: Any) -> dict[str, str]:
    """What each layer of an exported ONNX graph computes, but for its widths, by the name its times go by."""
    layers = OnnxLayers(graph)
    found: dict[str, list[str]] = {}
    for node, place in zip(graph.node, layers.places, strict=True):
        found.setdefault(place.name, []).append(_operator(node, layers.weights))
    return {name: ", ".join(dict.fromkeys(operators)) for name, operators in found.items()}


def _operator(node: Any, weights: Mapping[str, tuple[int, ...]]) -> str:
    group = next((entry.i for entry in node.attribute if entry.name == "group"), 1)
    dims = next((weights[name] for name in node.input[1:2] if name in weights), ())
    depthwise = group > 1 and len(dims) > 1 and dims[1] == 1
    shown = sorted((entry.name, entry.ints) for entry in node.attribute if entry.name in _SHOWN)
    said = [f"{key} {'x'.join(map(str, values))}" for key, values in shown]
    said += ["depthwise"] if depthwise else [f"group {group}"] if group > 1 else []
    return " ".join([node.op_type, *said])

"""A config's budgets for one network: what they ask of it, with its latency or energy as measured on the
target and the memory of its activations."""

from __future__ import annotations

import hashlib
import os
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from compress import aim, distributed, files
from compress.budget import AIM, WITHIN, Look, Measure, aimed_at, close, narrow
from compress.channelmap import ChannelMap
from compress.config import Config
from compress.cost import class_counts, cost_model
from compress.errors import CompressError, ConfigError, ModelError
from compress.latency import LatencyModel
from compress.memory import points
from compress.meter import SILENT, Listener, Meter, setting_of
from compress.select import Space, Target, check_reachable, levels_of
from compress.trace import GraphNet

if TYPE_CHECKING:
    from deploy.latency_table import Setting, Table

TABLE = "latency.json"
"""What a run measured while it pruned, in its folder."""


@dataclass(frozen=True)
class Budgeted:
    """The space to choose from with its budgets; latency and meter where one of them is measured."""

    where: Space
    latency: LatencyModel | None = None
    meter: Meter | None = None

    @property
    def is_energy(self) -> bool:
        """Whether what is measured is energy."""
        return self.where.measured is not None and self.where.measured.kind == "energy"

    @property
    def measure(self) -> Measure | None:
        """On the target; the same in all processes."""
        meter = self.meter
        if meter is None:
            return None

        on_target = meter.energy_ratio if self.is_energy else meter.ratio

        def look(keep: np.ndarray) -> float:
            ratio = on_target(keep) if distributed.is_main() else 0.0
            return float(distributed.from_main(np.array(ratio)))

        return look

    def as_dict(
        self,
        keep: np.ndarray,
        looks: tuple[Look, ...],
        look: Look | None = None,
        gap: float | None = None,
    ) -> dict[str, Any]:
        """For prune.json: what was asked for, what the model knew, what was measured.

        keep: bool (units,), what was chosen; look: the one of `looks` at that network, None where there is
        none; gap: if known.
        """
        asked = {f"{t.kind}_ratio": t.ratio for t in self.where.targets if t != self.where.measured}
        document: dict[str, Any] = {
            "asked": asked, "gap": gap, "latency": None, "energy": None, "memory": self._memory(keep),
        }  # fmt: skip
        if self.where.measured is not None and self.latency is not None and self.meter is not None:
            ratio = aimed_at(self.where) / AIM
            if self.is_energy:
                whole = {"original_mj": self.meter.original_mj, "counter": self.meter.counter.name}
            else:
                ms = self.latency.original_ms
                whole = {"original_ms": ms, "asked_ms": ratio * ms}
            document[self.where.measured.kind] = {
                "target": self.meter.bench.place.target.name,
                **asdict(self.meter.table.setting),
                **whole,
                "asked_ratio": ratio,
                "model_error": self.latency.known_error,
                "networks": self.latency.networks,
                "within": WITHIN,
                "measured_ratio": None if look is None else look.measured,
                "looks": [asdict(look) | {"fits": look.fits, "near": look.near} for look in looks],
            }
        return document

    def _memory(self, keep: np.ndarray) -> dict[str, Any] | None:
        """Peak bytes of activations per example before and after, and at which ops; None if not asked for."""
        known = self.where.cost.memory
        if known is None:
            return None
        full, counts = self.where.cost.full, class_counts(self.where.cmap, keep)
        return {
            "before": round(known.total(full)),
            "after": round(known.total(counts)),
            "op_before": known.peak_op(full),
            "op_after": known.peak_op(counts),
        }


def budgeted(
    config: Config,
    net: GraphNet,
    cmap: ChannelMap,
    example: tuple[Tensor, ...],
    *,
    run: Path | None,
    folder: Path,
    listener: Listener = SILENT,
) -> Budgeted:
    """The budgets of an aimed config. run: where to keep what is measured, None to share it only.

    Raises ModelError where a budget lies below the narrowest network, ConfigError where one asks for nothing.
    """
    budget = config.budget
    assert budget is not None
    levels = levels_of(cmap, aim.align(config), config.prune.min_keep)
    given = (("macs", budget.macs_ratio), ("params", budget.params_ratio), ("memory", budget.memory_ratio))
    targets = [Target(kind, ratio) for kind, ratio in given if ratio is not None]
    cost, found = cost_model(cmap), None
    if budget.memory_ratio is not None:
        cost = replace(cost, memory=points(net, cmap, example))
    if budget.is_measured:
        at = aim.place(config)
        found = measured(config, at, net, cmap, levels, example, run=run, folder=folder, listener=listener)
        cost = found[1].added_to(cost)
        kind = "energy" if budget.energy_ratio is not None else "latency"
        targets.insert(0, Target(kind, _asked(config, found[1]) * AIM))
    where = Space(cmap, cost, levels, targets[0], budgets=tuple(targets))
    _check(where, config, found[1] if found else None)
    return Budgeted(where) if found is None else Budgeted(where, found[1], found[0])


def _asked(config: Config, latency: LatencyModel) -> float:
    """The share of the unpruned latency, or energy, that is asked for."""
    budget = config.budget
    assert budget is not None
    given = budget.latency_ratio or budget.energy_ratio
    if given is not None:
        return given
    assert budget.latency_ms is not None
    ratio = budget.latency_ms / latency.original_ms
    if ratio >= 1:
        what = f"the model takes {latency.original_ms:.3g} ms on {budget.target} as it is"
        raise ConfigError(what, "budget.latency_ms", f"ask for less than that, found {budget.latency_ms:g}")
    return ratio


def _check(where: Space, config: Config, latency: LatencyModel | None) -> None:
    fix = f"lower prune.min_keep ({config.prune.min_keep:g}) or prune.align ({aim.align(config)})"
    if latency is not None and config.budget is not None and config.budget.has_latency:
        least, asked = latency.ms(where.narrowest), where.target.ratio / AIM * latency.original_ms
        if least > asked * AIM:
            what = (
                f"{asked:.3g} ms cannot be reached: {least:.3g} ms is the least of {latency.original_ms:.3g}"
            )
            raise ModelError(what, "budget", f"{fix}, or shorten prune.keep")
    check_reachable(where, fix)


def measured(
    config: Config,
    place: aim.Place,
    net: GraphNet,
    cmap: ChannelMap,
    levels: tuple[np.ndarray, ...],
    example: tuple[Tensor, ...],
    *,
    run: Path | None,
    folder: Path,
    listener: Listener,
    elsewhere: Table | None = None,
) -> tuple[Meter, LatencyModel]:
    """The latency model of a network, from the run's own table, the shared one, or measured now.

    config: aimed; place: the budget's or another. elsewhere: what `brought` found, from which all is read.
    """
    from deploy import latency_table, targets

    block = targets.resolve_align(place.target)
    if elsewhere is not None:
        path = _Shared.of(config, place, folder, elsewhere.setting).path
        meter = Meter(net, cmap, levels, example, place, path, block=block, table=elsewhere)
        return meter, meter.fitted()
    setting = setting_of(place)
    shared = _Shared.of(config, place, folder, setting)
    path = shared.path if run is None else run / TABLE
    if distributed.is_main():
        known = shared.read()
        if run is not None:
            _begin(path, known, setting)
    distributed.barrier()
    meter = Meter(net, cmap, levels, example, place, path, block=block, listener=listener)
    if distributed.is_main():
        meter.calibrated()
        if run is not None:
            shared.add(meter.table)
    distributed.barrier()
    meter.table = latency_table.read(path, setting)
    return meter, meter.calibrated()


def brought(config: Config, place: aim.Place, folder: Path) -> Table | None:
    """The table of `budget.table`, if it was measured on another machine but for that as it would be here."""
    from deploy import latency_table

    budget = config.budget
    if budget is None or budget.table is None or place != aim.place(config):
        return None
    path = folder / budget.table
    if not path.exists():
        return None
    found, here = latency_table.read(path), setting_of(place)
    moved = replace(here, hardware=found.setting.hardware, version=found.setting.version)
    return found if found.setting == moved != here else None


def _begin(path: Path, shared: Table, setting: Setting) -> None:
    """The run's own table: as it is, so that a run that goes on decides as before, else what is shared."""
    from deploy import latency_table
    from deploy.errors import DeployError

    with suppress(DeployError):
        if latency_table.read(path, setting).entries:
            return
    files.write_json(path, shared.as_dict())


@dataclass(frozen=True)
class _Shared:
    """The file that runs share: the config's, else one for each setting in the user's cache, where a file
    that cannot be read or written to is as good as none."""

    path: Path
    setting: Setting
    is_cache: bool

    @classmethod
    def of(cls, config: Config, place: aim.Place, folder: Path, setting: Setting) -> _Shared:
        budget = config.budget
        if budget is not None and budget.table is not None and place == aim.place(config):
            return cls(folder / budget.table, setting, is_cache=False)
        digest = hashlib.sha256(repr(setting).encode()).hexdigest()[:12]
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        name = f"latency-{setting.runner}-{digest}.json"
        return cls(cache / "compress" / name, setting, is_cache=True)

    def read(self) -> Table:
        from deploy import latency_table
        from deploy.errors import DeployError

        try:
            return latency_table.read(self.path, self.setting)
        except DeployError:
            if not self.is_cache:
                raise
            with suppress(OSError):
                self.path.unlink()
            return latency_table.Table(self.setting)

    def add(self, table: Table) -> None:
        """Leave what was measured to the next run."""
        found = self.read()
        if not found.add(table):
            return
        with suppress(CompressError) if self.is_cache else nullcontext():
            files.write_json(self.path, found.as_dict())


def chosen(
    found: Budgeted, scores: np.ndarray, *, pace: float = 0.02
) -> tuple[np.ndarray, bool, tuple[Look, ...]]:
    """All steps to the budgets at once, without training: what is kept, whether it meets them, the looks."""
    where, keep = found.where, np.ones(found.where.cmap.units, dtype=bool)
    looks: tuple[Look, ...] = ()
    while True:
        if found.measure is None:
            selection, ends = narrow(scores, keep, where, pace), False
        else:
            closed = close(scores, keep, where, pace, found.measure, looks)
            selection, ends = closed.selection, closed.ends
            looks += closed.looks
        keep = selection.keep
        if ends:
            return keep, looks[-1].met, looks
        if selection.reached or not selection.removed:
            return keep, selection.reached, looks

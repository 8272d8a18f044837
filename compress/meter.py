"""Measuring pruned networks on a target: what a latency model is fitted to, and what shows that it is right.

Latency does not depend on what the weights are, so a network can be measured before it is trained: cut out,
exported, and timed in turns with the unpruned one, layer by layer and as a whole.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from torch import Tensor

from compress import aim, files
from compress.aim import Place
from compress.channelmap import ChannelMap
from compress.cost import class_counts
from compress.errors import ModelError
from compress.latency import LatencyModel, Widths, anchor_of, fingerprint, fit, widths_of
from compress.surgery import cut
from compress.trace import GraphNet

if TYPE_CHECKING:
    from deploy.energy import Counter
    from deploy.latency_table import Entry, Row, Setting, Table
    from deploy.profile import Profile
    from deploy.quiet import Quiet

NETWORKS = 8
"""Pruned networks that a model is fitted to."""
NARROWEST = 0.2
REPEATS, SECONDS = 10, 1.0
RUNS, TRIES = 20, 3


@dataclass(frozen=True)
class Listener:
    """Who hears how measuring goes on. progress: (done, of, text); note: a line, when a quiet machine is
    waited for."""

    progress: Callable[[int, int, str], None] = lambda done, of, text: None
    note: Callable[[str], None] = lambda text: None


SILENT = Listener()


def setting_of(place: Place) -> Setting:
    """What makes latencies that are measured there comparable with others."""
    from deploy import machine
    from deploy.latency_table import Setting

    kind, gpus, versions = place.target.runner, machine.gpus(), machine.versions()
    hardware = gpus[0]["name"] if place.target.gpu and gpus else machine.cpu_model()
    library = "torch" if kind.startswith("torch") else kind.partition("_")[0]
    library = "tensorrt-rtx" if kind == "tensorrt_rtx" else library
    found = next((v for name, v in versions.items() if name.startswith(library)), "unknown")
    return Setting(kind, found, hardware, place.precision, place.threads, place.batch)


class Meter:
    """Measures networks cut from one network, and keeps what it measured in a table.

    net: unpruned, left as it is. path: the table's file, written after every measurement, so that what was
    measured is never measured again. table: one of another machine, which has all that `fitted` needs.
    """

    def __init__(
        self,
        net: GraphNet,
        cmap: ChannelMap,
        levels: Sequence[np.ndarray],
        example: tuple[Tensor, ...],
        place: Place,
        path: Path,
        *,
        block: int,
        listener: Listener = SILENT,
        table: Table | None = None,
    ) -> None:
        from deploy import latency_table

        self.net, self.cmap, self.levels = copy.deepcopy(net).cpu().eval(), cmap, levels
        self.bench, self.path = _Bench(place, example), path
        self.block, self.listener = block, listener
        self.table = table or latency_table.read(path, setting_of(place))
        self.model = fingerprint(self.net, cmap)
        self.widths: Widths = widths_of(cmap)
        self.full = class_counts(cmap, np.ones(cmap.units, dtype=bool))
        self._scratch = tempfile.TemporaryDirectory()
        self._resizes: bool | None = None  # whether a narrower network's file is this one's at other widths

    def calibrated(self) -> LatencyModel:
        """The model of this network, fitted to what the table has and, where that is not enough, to more."""
        if len(self.table.of(self.model)) > NETWORKS and self.table.find(self.model, self.full.tolist()):
            with suppress(ModelError):  # measured when other layers could be narrowed
                return self.fitted()
        plans = [self.full, *designs(self.levels, NETWORKS)]
        for done, counts in enumerate(plans):
            self.listener.progress(done, len(plans), "measuring networks of other widths")
            self._kept(counts, None, self.table.entries)
        return self.fitted()

    def fitted(self) -> LatencyModel:
        """The model fitted to all entries there are."""
        own = self.table.of(self.model)
        if not own:
            what = "has no measurement of this model, as it is traced here"
            raise ModelError(what, self.path.name, "make it anew there: compress inspect --target")
        others = [entry for entry in self.table.entries if entry.model != self.model]
        own.sort(key=lambda entry: -sum(entry.counts))  # the unpruned network comes first
        movable = np.array([len(widths) > 1 for widths in self.levels])
        return fit(own, others, self.widths, self.block, movable)

    def ratio(self, keep: np.ndarray) -> float:
        """The share of the unpruned latency that the network of keep (units,) really has."""
        return self._kept(class_counts(self.cmap, keep), keep, self.table.looks).ratio

    def energy_ratio(self, keep: np.ndarray) -> float:
        """The share of the unpruned energy per call that the network of keep (units,) really takes."""
        from deploy.latency_table import Energy

        counts = class_counts(self.cmap, keep)
        known = self.table.energy(self.model, counts.tolist())
        if known is None:
            with tempfile.TemporaryDirectory() as folder:
                pruned = self._artifact(self._cut(counts, keep), Path(folder))
                artifacts = {"original": self._original, "pruned": pruned}
                mj = self._steady(lambda: self.bench.energies(artifacts, self.counter))
            known = Energy(self.model, tuple(counts.tolist()), mj["pruned"], mj["original"])
            self.table.energies.append(known)
            files.write_json(self.path, self.table.as_dict())
        return known.ratio

    @property
    def original_mj(self) -> float | None:
        """What a call of the unpruned network took where it was measured last."""
        own = [entry for entry in self.table.energies if entry.model == self.model]
        return own[-1].original_mj if own else None

    @cached_property
    def counter(self) -> Counter:
        """The energy counter of the device that the target runs on."""
        from deploy import energy

        return energy.open_counter(gpu=bool(self.bench.place.target.gpu))

    def _kept(self, counts: np.ndarray, keep: np.ndarray | None, among: list[Entry]) -> Entry:
        """The network with these counts, as the table has it or measured now."""
        known = self.table.find(self.model, counts.tolist())
        if known is None:
            known = self._measured(counts, keep)
            among.append(known)
            files.write_json(self.path, self.table.as_dict())
        return known

    def _measured(self, counts: np.ndarray, keep: np.ndarray | None) -> Entry:
        from deploy.latency_table import Entry

        with tempfile.TemporaryDirectory() as folder:
            artifacts = {"original": self._original}
            if not np.array_equal(counts, self.full):
                artifacts["pruned"] = self._artifact(self._cut(counts, keep), Path(folder))
            ms = self._quiet(lambda: self.bench.latencies(artifacts))
            name = list(artifacts)[-1]
            profile = self.bench.profile(artifacts[name])
            rows = self._rows(profile, self.bench.kinds(artifacts[name]), counts, ms[name])
        outside = ms[name] * (1 - profile.layers_ms / _run_ms(profile, ms[name]))
        return Entry(self.model, tuple(counts.tolist()), ms[name], ms["original"], outside, rows)

    @cached_property
    def _quiet(self) -> Quiet:
        known = [e.original_ms for e in (*self.table.entries, *self.table.looks) if e.model == self.model]
        return self._as_quiet_as(known, "longer")

    @cached_property
    def _steady(self) -> Quiet:
        known = [entry.original_mj for entry in self.table.energies if entry.model == self.model]
        return self._as_quiet_as(known, "more energy")

    def _as_quiet_as(self, known: Sequence[float], more: str) -> Quiet:
        """Waits while the unpruned network takes more than the least known of it."""
        from deploy.quiet import Quiet

        return Quiet("original", min(known, default=float("inf")), say=self.listener.note, more=more)

    @cached_property
    def _original(self) -> _Artifact:
        folder = Path(self._scratch.name)
        exported = self.bench.exported(self.net, folder / "original.onnx")
        return self.bench.artifact(self.net, exported)

    def _artifact(self, net: GraphNet, folder: Path) -> _Artifact:
        """What is timed of a narrower network; exported once to see whether that is needed at all."""
        from deploy import resized

        path, original = folder / "pruned.onnx", Path(self._scratch.name, "original.onnx")
        if self.bench.kind.startswith("torch"):
            return self.bench.artifact(net, path)
        shapes = {name: tuple(p.shape) for name, p in net.named_parameters()}
        if self._resizes is not False and resized.resize(original, path, shapes):
            if self._resizes is None:
                exported = self.bench.exported(net, folder / "exported.onnx")
                self._resizes = resized.same_network(path, exported)
            if self._resizes:
                return self.bench.artifact(net, path)
        self._resizes = False
        return self.bench.artifact(net, self.bench.exported(net, path))

    def _cut(self, counts: np.ndarray, keep: np.ndarray | None) -> GraphNet:
        keep = first_units(self.cmap, counts) if keep is None else keep
        return cut(self.net, self.cmap, keep)[0].eval()

    def _rows(
        self, profile: Profile, kinds: Mapping[str, str], counts: np.ndarray, ms: float
    ) -> tuple[Row, ...]:
        """The profile's layers as parts of the latency that was measured without a profiler."""
        from deploy.latency_table import Row

        widths, rows = self.widths.at(counts), []
        for layer in profile.layers:
            anchor = anchor_of(layer.name)
            kind = kinds.get(layer.name) or layer.op
            if anchor in self.widths.pairs:
                kind = f"{kind} | {self.widths.pairs[anchor]:g} MACs a pair of channels"
            if anchor != layer.name:
                kind = f"{kind} behind {kinds.get(anchor, anchor)}"
            share = round(ms * layer.ms / _run_ms(profile, ms), 6)  # as much as a clock can tell
            rows.append(Row(layer.name, kind, widths.get(anchor, (0, 0)), share))
        return tuple(rows)


def _run_ms(profile: Profile, ms: float) -> float:
    """What the layers are parts of. On a busy machine their medians stand, that of a whole run does not;
    what was measured without a profiler then says how long a run is."""
    return max(profile.layers_ms, min(profile.run_ms, ms))


def first_units(cmap: ChannelMap, counts: np.ndarray) -> np.ndarray:
    """bool (units,): so many of each class, the first ones."""
    keep = np.zeros(cmap.units, dtype=bool)
    for own, count in zip(cmap.members(), counts, strict=True):
        keep[own[: int(count)]] = True
    return keep


def designs(levels: Sequence[np.ndarray], count: int) -> list[np.ndarray]:
    """Widths of networks to measure: half of them narrow everywhere alike, half in each class by its own
    permutation of the same shares (a Latin hypercube), so that each pair of widths is seen far apart."""
    rng = np.random.default_rng(0)
    alike = count // 2
    shares = np.linspace(NARROWEST, 0.9, alike)
    plans = [np.array([_nearest(own, share) for own in levels]) for share in shares]
    mixed = np.linspace(NARROWEST, 1.0, count - alike)
    columns = [rng.permutation(mixed) for _ in levels]
    plans += [
        np.array([_nearest(own, column[row]) for own, column in zip(levels, columns, strict=True)])
        for row in range(count - alike)
    ]
    return plans


def _nearest(levels: np.ndarray, share: float) -> int:
    return int(levels[np.abs(levels - share * levels[-1]).argmin()])


@dataclass(frozen=True)
class _Artifact:
    """What a runner opens, and the ONNX file it was made from; torch opens the network itself."""

    opens: Any
    onnx: Path | None = None


@dataclass(frozen=True)
class _Bench:
    """The target's runner: what it opens, how long that takes, and where in it."""

    place: Place
    example: tuple[Tensor, ...]

    @property
    def kind(self) -> str:
        return self.place.target.runner

    @property
    def shapes(self) -> list[list[int]]:
        return [list(x.shape[1:]) for x in self.example]

    def exported(self, net: GraphNet, path: Path) -> Path:
        from deploy import to_onnx

        if not self.kind.startswith("torch"):
            to_onnx.export(net, self.example if len(self.example) > 1 else self.example[0], path)
        return path

    def artifact(self, net: GraphNet, onnx: Path) -> _Artifact:
        """What the runner opens of a network that is exported as `onnx`; torch opens the network itself."""
        from deploy.runners import ENGINE_KINDS

        if self.kind.startswith("torch"):
            return _Artifact(net)
        if self.place.precision not in ("fp32", "tf32"):
            onnx = self._converted(onnx)
        return _Artifact(self._engine(onnx) if self.kind in ENGINE_KINDS else onnx, onnx)

    def _converted(self, onnx: Path) -> Path:
        from deploy import parity, precision

        low = onnx.with_suffix(f".{self.place.precision}.onnx")
        batches = [parity.normal_inputs(self.shapes, 4, seed) for seed in range(4)]  # ranges cost no time
        precision.convert(onnx, low, self.place.precision, calibration=batches, runner=self.kind)
        return low

    def _engine(self, onnx: Path) -> Path:
        from deploy import to_tensorrt

        batch, path = self.place.batch, onnx.with_suffix(".engine")
        options = to_tensorrt.EngineOptions(batches=(batch,) * 3, tf32=self.place.precision == "tf32")
        to_tensorrt.build(onnx, path, self.kind, options)
        return path

    def open(self, artifact: _Artifact) -> Any:
        from deploy.runners import ENGINE_KINDS, open_runner

        own = self.kind.startswith("torch_cuda")  # a file has its precision in it
        is_flag = self.place.precision == "tf32" and self.kind not in ENGINE_KINDS
        precision = self.place.precision if own or is_flag else "fp32"
        return open_runner(self.kind, artifact.opens, self.place.threads, precision=precision)

    def latencies(self, artifacts: Mapping[str, _Artifact]) -> dict[str, float]:
        """Milliseconds by name: a low quantile of samples that take turns.

        One thread on a CPU is timed by its own clock, which stands while others run: on a busy machine a
        short call fits between two interruptions and a long one does not; their ratio would be wrong.
        """
        from deploy import latency

        alone = self.kind in aim.ON_CPU and self.place.threads == 1
        clock = time.thread_time if alone else time.perf_counter

        with ExitStack() as opened:
            runners = {name: self.open(artifact) for name, artifact in artifacts.items()}
            for runner in runners.values():
                opened.callback(runner.close)
            found = latency.measure(runners, self.shapes, self.place.batch, REPEATS, SECONDS, clock=clock)
        return found.quick_ms

    def energies(self, artifacts: Mapping[str, _Artifact], counter: Counter) -> dict[str, float]:
        """Millijoules of one call by name, taken in turns."""
        from deploy import energy

        with ExitStack() as opened:
            runners = {name: self.open(artifact) for name, artifact in artifacts.items()}
            for runner in runners.values():
                opened.callback(runner.close)
            return energy.per_call(runners, self.shapes, self.place.batch, counter)

    def profile(self, artifact: _Artifact) -> Profile:
        """Its layers; more runs where something else disturbed the first ones. Raises ModelError for a runner
        that does not tell, MeasureError where its numbers do not add up."""
        from deploy.errors import MeasureError

        for tried in range(1, TRIES):
            with suppress(MeasureError):
                return self._profile(artifact, tried * RUNS)
        return self._profile(artifact, TRIES * RUNS)

    def _profile(self, artifact: _Artifact, runs: int) -> Profile:
        from deploy import parity, profilers
        from deploy.runners import ENGINE_KINDS

        inputs, found = parity.normal_inputs(self.shapes, self.place.batch, 0), {"": artifact.opens}
        if self.kind == "onnxruntime":
            return profilers.profile_onnx(found, inputs, runs=runs, threads=self.place.threads)[""]
        if self.kind in ENGINE_KINDS:
            runner = self.open(artifact)
            try:
                return profilers.profile_engine(runner, cast("Path", artifact.onnx), inputs, runs=runs)
            finally:
                runner.close()
        if self.kind.startswith("torch"):
            device = "cuda" if self.place.target.gpu else "cpu"
            return profilers.profile_torch(found, inputs, runs=runs, device=device)[""]
        fix = "take a target of ONNX Runtime on the CPU, TensorRT or torch"
        raise ModelError(f"{self.kind} does not tell how long each layer takes", "budget.target", fix)

    def kinds(self, artifact: _Artifact) -> dict[str, str]:
        """What its layers compute, by name."""
        import onnx

        from deploy import latency_table

        if artifact.onnx is None:
            return {}
        return latency_table.kinds(onnx.load(artifact.onnx, load_external_data=False).graph)

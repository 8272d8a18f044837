"""A latency model finds again what measurements were made from, on networks of many kinds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pytest
import torch
from helpers import Mlp, images, randomise, small_cifar
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.channelmap import ChannelMap, channel_map
from compress.cost import CostModel, class_counts, cost_model, in_blocks
from compress.errors import ModelError
from compress.latency import LatencyModel, Widths, fingerprint, fit, widths_of
from compress.meter import designs
from compress.select import levels_of
from compress.trace import Traced, trace
from deploy.latency_table import Entry, Row
from tests.precision_nets import Inverted


@cache
def traced(name: str) -> Traced:
    if name == "mlp":
        return trace(Mlp((4, 48, 40, 32, 3)), (torch.randn(2, 4),))
    if name == "mobile":
        return trace(randomise(Inverted()).eval(), images(size=16))
    return trace(small_cifar(), images(size=8))


@cache
def map_of(name: str) -> ChannelMap:
    return channel_map(traced(name))


NAMES = ("cifar", "mlp", "mobile")


@dataclass(frozen=True)
class Board:
    """A target that takes c0 + c1 a + c2 b + c3 a b for a layer, a time of its own outside all layers, and of
    all that the power; each number is off by `noise`, relative."""

    coefficients: dict[str, np.ndarray]
    kind: Callable[[str], str]
    power: float = 1.0
    noise: float = 0.0
    outside: float = 0.02
    block: int = 1

    @classmethod
    def of(cls, seed: int, *, kinds: int = 3, **given_: float) -> Board:
        rng = np.random.default_rng(seed)
        # The largest part of a layer of 32 channels may be any of the four.
        table = {f"kind {n}": rng.random(4) * (0.1, 1 / 320, 1 / 320, 1 / 10240) for n in range(kinds)}
        return cls(table, lambda name: f"kind {sum(map(ord, name)) % kinds}", **given_)  # type: ignore[arg-type]

    def layer(self, name: str, widths: tuple[int, int]) -> float:
        a, b = in_blocks(np.array(widths, dtype=float), self.block)
        return float(self.coefficients[self.kind(name)] @ (1, a, b, a * b))

    def raw(self, cmap: ChannelMap, counts: np.ndarray) -> float:
        """The sum of all layers."""
        widths = widths_of(cmap).at(counts)
        return self.outside + sum(self.layer(name, size) for name, size in widths.items())

    def ratio(self, cmap: ChannelMap, counts: np.ndarray) -> float:
        return float((self.raw(cmap, counts) / self.raw(cmap, full_of(cmap))) ** self.power)

    def entry(
        self, cmap: ChannelMap, counts: np.ndarray, rng: np.random.Generator, speed: float = 1.0
    ) -> Entry:
        """speed: of the machine at that moment; of the original beside it too."""
        off = lambda: float(np.exp(self.noise * rng.standard_normal()))  # noqa: E731  # one line is enough
        whole, total = self.raw(cmap, full_of(cmap)), self.raw(cmap, counts)
        ms = whole * self.ratio(cmap, counts) * speed
        widths = widths_of(cmap).at(counts)
        rows = tuple(
            Row(name, self.kind(name), size, ms * self.layer(name, size) / total * off())
            for name, size in widths.items()
        )
        is_full = (counts == full_of(cmap)).all()
        measured = whole * speed if is_full else ms * off()
        return Entry("it", tuple(counts.tolist()), measured, whole * speed, self.outside * ms / total, rows)


def full_of(cmap: ChannelMap) -> np.ndarray:
    return class_counts(cmap, np.ones(cmap.units, dtype=bool))


def entries_of(board: Board, cmap: ChannelMap, seed: int, *, align: int = 1, count: int = 8) -> list[Entry]:
    rng = np.random.default_rng(seed)
    plans = [full_of(cmap), *designs(levels_of(cmap, align, 0.1), count)]
    return [board.entry(cmap, counts, rng, speed=rng.uniform(0.8, 1.25)) for counts in plans]


def unseen(cmap: ChannelMap, seed: int, align: int = 1) -> np.ndarray:
    rng = np.random.default_rng(1000 + seed)
    return np.array([rng.choice(own) for own in levels_of(cmap, align, 0.2)])


def fitted(board: Board, cmap: ChannelMap, seed: int, block: int = 1, align: int = 1) -> LatencyModel:
    return fit(entries_of(board, cmap, seed, align=align), [], widths_of(cmap), block)


def left(model: LatencyModel, counts: np.ndarray) -> float:
    return model.ms(counts) / model.original_ms


names, seeds = st.sampled_from(NAMES), st.integers(0, 999)


class TestLaws:
    @settings(max_examples=12, deadline=None)
    @given(names, seeds)
    def test_without_noise_every_network_is_predicted(self, name: str, seed: int) -> None:
        cmap, board = map_of(name), Board.of(seed)
        model = fitted(board, cmap, seed)
        for number in range(5):
            counts = unseen(cmap, seed + number)
            assert left(model, counts) == pytest.approx(board.ratio(cmap, counts), rel=1e-3)
        assert model.error < 0.02
        assert model.networks == 9

    @settings(max_examples=12, deadline=None)
    @given(names, seeds, st.floats(0.8, 1.3), st.sampled_from([0.01, 0.05]))
    def test_with_noise_within_a_few_times_of_it(
        self, name: str, seed: int, power: float, noise: float
    ) -> None:
        cmap, board = map_of(name), Board.of(seed, power=power, noise=noise)
        model = fitted(board, cmap, seed)
        off = [
            left(model, counts) / board.ratio(cmap, counts) - 1
            for counts in (unseen(cmap, seed + number) for number in range(10))
        ]
        assert np.sqrt(np.mean(np.square(off))) < 4 * noise + 0.03  # a power is not a sum of products
        assert model.error < 6 * noise + 0.06
        assert model.error > noise / 6

    @settings(max_examples=12, deadline=None)
    @given(names, seeds, st.floats(0.7, 1.4), st.data())
    def test_exact_where_nothing_is_pruned_and_never_slower_for_less(
        self, name: str, seed: int, power: float, data: st.DataObject
    ) -> None:
        cmap, board = map_of(name), Board.of(seed, power=power, noise=0.1)
        model = fitted(board, cmap, seed)
        full = full_of(cmap)
        assert model.ms(full) == pytest.approx(model.original_ms, rel=1e-9)
        cost = model.added_to(cost_model(cmap))
        assert cost.ratio("latency", full) == pytest.approx(1, rel=1e-9)
        counts = unseen(cmap, seed)
        fewer = np.maximum(
            counts
            - np.array(data.draw(st.lists(st.integers(0, 5), min_size=len(counts), max_size=len(counts)))),
            1,
        )
        assert model.ms(fewer) <= model.ms(counts) * (1 + 1e-12)
        layers = model.by_layer(counts)
        assert sum(layers.values()) == pytest.approx(model.ms(counts))
        assert {*layers} <= {"", *widths_of(cmap).names}
        one_by_one(cost, counts, fewer)

    def test_a_power_is_found(self) -> None:
        cmap = map_of("mlp")
        # One kind of layer whose times are products alone: then a power of the sum can be told from the sum.
        board = replace(Board.of(1, kinds=1), coefficients={"kind 0": np.array([0, 0, 0, 1e-3])}, outside=0.0)
        for power in (0.8, 1.0, 1.25):
            model = fitted(replace(board, power=power), cmap, 0)
            for number in range(5):
                counts = unseen(cmap, number)
                assert left(model, counts) == pytest.approx(board_ratio(board, power, cmap, counts), rel=0.08)

    def test_latency_that_does_not_depend_on_widths_is_no_accident(self) -> None:
        """Noise may then give any power; the model must stay a number that falls with the widths."""
        cmap = map_of("mlp")
        flat = {f"kind {n}": np.array([0.1, 0, 0, 1e-9]) for n in range(3)}
        for seed in range(20):
            model = fitted(replace(Board.of(0, noise=0.05), coefficients=flat), cmap, seed)
            least, full = model.ms(unseen(cmap, 0)), model.ms(full_of(cmap))
            assert np.isfinite([least, full]).all()
            assert 0.5 * full < least <= full * (1 + 1e-9)


def one_by_one(cost: CostModel, counts: np.ndarray, fewer: np.ndarray) -> None:
    """What the selection asks, class by class, is what whole counts give."""
    found = cost.ratios("latency", counts, counts - fewer)
    for group in range(len(counts)):
        alone = counts.copy()
        alone[group] = fewer[group]
        assert found[group] == pytest.approx(cost.ratio("latency", alone), rel=1e-9)


def board_ratio(board: Board, power: float, cmap: ChannelMap, counts: np.ndarray) -> float:
    return replace(board, power=power).ratio(cmap, counts)


class TestBlocks:
    def test_widths_are_rounded_up_to_whole_blocks(self) -> None:
        found = in_blocks(np.array([0.0, 1, 2, 3, 4, 5, 8, 9, 15.9999999999, 16, 17]), 8)
        assert found.tolist() == [0, 1, 2, 4, 4, 8, 8, 16, 16, 16, 24]

    @settings(max_examples=6, deadline=None)
    @given(names, seeds)
    def test_a_target_of_blocks_is_found_again(self, name: str, seed: int) -> None:
        cmap, board = map_of(name), replace(Board.of(seed), block=4)
        model = fitted(board, cmap, seed, block=4)
        for number in range(5):
            counts = unseen(cmap, seed + number)
            assert left(model, counts) == pytest.approx(board.ratio(cmap, counts), rel=1e-3)


class TestWhatIsKnown:
    def one_width(self) -> tuple[list[Entry], str]:
        """Entries where one layer that can be narrowed, alone of its kind, was always as wide as at first."""
        cmap, board = map_of("mlp"), Board.of(0)
        name = widths_of(cmap).names[1]
        size = widths_of(cmap).at(full_of(cmap))[name]
        made = entries_of(board, cmap, 0)
        own = [
            replace(e, rows=tuple(Row(name, "own", size, 0.1) if r.name == name else r for r in e.rows))
            for e in made
        ]
        return own, name

    def test_a_layer_seen_at_one_width_is_refused_by_name(self) -> None:
        own, name = self.one_width()
        with pytest.raises(ModelError) as caught:
            fit(own, [], widths_of(map_of("mlp")), 1)
        assert str(caught.value) == (
            f"budget: the latency of {name} was measured at 1 width only, but it can be narrowed; delete the "
            "table of latencies, and they are measured anew"
        )
        assert caught.value.exit_code == 4

    def test_one_width_is_enough_where_it_has_no_other(self) -> None:
        own, name = self.one_width()
        widths = widths_of(map_of("mlp"))
        at = widths.names.index(name)
        movable = ~widths.weight[at].any(axis=0)
        model = fit(own, [], widths, 1, movable)
        terms = [number for number, layer in enumerate(model.layers) if layer == name]
        assert len(terms) == 1
        assert not model.products.weight[terms].any()

    def test_another_models_layers_of_the_same_kind_help(self) -> None:
        own, name = self.one_width()
        other = [
            Entry("other", (n,), 1.0, 1.0, 0.0, (Row("x", "own", (n, 2 * n), 0.01 * n),))
            for n in (4, 8, 16, 24)
        ]
        model = fit(own, other, widths_of(map_of("mlp")), 1)
        assert model.networks == len(own)
        counts = full_of(map_of("mlp"))
        assert 0 < model.by_layer(counts // 2)[name] < model.by_layer(counts)[name]

    def test_a_pinned_layer_that_comes_first_does_not_freeze_its_kind(self) -> None:
        """Coefficients belong to a kind; the first layer of it may be one that never changes."""
        cmap = channel_map(traced("mlp"), keep=["layers.0.weight", "layers.1.weight"])
        board = Board.of(0, kinds=1)
        model = fitted(board, cmap, 0)
        counts = np.array([own[0] for own in levels_of(cmap, 1, 0.2)])
        assert left(model, counts) == pytest.approx(board.ratio(cmap, counts), rel=1e-3)
        assert left(model, counts) < 0.95

    def test_too_few_networks_to_tell_the_error(self) -> None:
        cmap = map_of("mlp")
        model = fit(entries_of(Board.of(0), cmap, 0, count=2), [], widths_of(cmap), 1)
        assert np.isnan(model.error)

    def test_the_architecture_is_what_counts(self) -> None:
        net, cmap = traced("cifar").net, map_of("cifar")
        same = trace(randomise(small_cifar(), seed=5), images(size=8))
        assert fingerprint(same.net, channel_map(same)) == fingerprint(net, cmap)
        kept = channel_map(traced("cifar"), keep=["layer1.0.conv1.weight"])
        assert fingerprint(net, kept) != fingerprint(net, cmap)
        larger = trace(small_cifar(), images(size=12))
        assert fingerprint(larger.net, channel_map(larger)) != fingerprint(net, cmap)


@pytest.mark.parametrize("name", NAMES)
def test_widths_are_those_of_the_weights(name: str) -> None:
    cmap = map_of(name)
    widths: Widths = widths_of(cmap)
    shapes = {
        n.removesuffix(".weight"): s for n, s in cmap.shapes.items() if n.endswith(".weight") and len(s) > 1
    }
    found = widths.at(full_of(cmap))
    assert all(found[layer] == (shape[1], shape[0]) for layer, shape in shapes.items())
    narrow = widths.at(np.maximum(full_of(cmap) // 2, 1))
    assert all(narrow[layer] <= found[layer] for layer in shapes)
    assert any(narrow[layer][1] < found[layer][1] for layer in shapes)

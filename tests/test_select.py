"""Which channels leave: never a whole layer, aligned widths, cheapest first, down to the target."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from helpers import Mlp, SmallNet, images, small_cifar
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from torch import nn

from compress.channelmap import ChannelMap, channel_map
from compress.cost import class_counts, cost_model
from compress.errors import ModelError
from compress.select import Selection, Space, Target, remove, space, widths
from compress.trace import trace


@cache
def cifar_map() -> ChannelMap:
    return channel_map(trace(small_cifar(), images(size=8)))


@cache
def mlp_map() -> ChannelMap:
    return channel_map(trace(Mlp((4, 24, 10, 3)), (torch.randn(2, 4),)))


def all_of(cmap: ChannelMap) -> np.ndarray:
    return np.ones(cmap.units, dtype=bool)


def scores_of(cmap: ChannelMap, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random(cmap.units)


def chosen(cmap: ChannelMap, target: Target, seed: int = 0, **given_: object) -> tuple[Space, Selection]:
    where = space(cmap, target, **given_)  # type: ignore[arg-type]
    return where, remove(scores_of(cmap, seed), all_of(cmap), where)


kinds = st.sampled_from(["macs", "params", "units"])
maps = st.sampled_from([cifar_map, mlp_map])


class TestProperties:
    @settings(max_examples=60, deadline=None)
    @given(maps, kinds, st.floats(0.3, 0.95), st.integers(0, 99), st.sampled_from([1, 4, 8]), st.booleans())
    def test_reaches_the_target_with_allowed_widths(
        self, source: object, kind: str, ratio: float, seed: int, align: int, per_cost: bool
    ) -> None:
        cmap = source()  # type: ignore[operator]
        try:
            where, found = chosen(cmap, Target(kind, ratio), seed, align=align, per_cost=per_cost)
        except ModelError:  # its text is tested below
            reject()
        counts = class_counts(cmap, found.keep)
        assert found.reached
        assert where.cost.ratio(kind, counts) <= ratio + 1e-12
        assert found.removed == cmap.units - found.keep.sum()
        for group, count in enumerate(counts):
            assert count >= 1
            assert count in where.levels[group]
            assert count in widths(int(where.cost.full[group]), align, 1, 0.1)

    @settings(max_examples=40, deadline=None)
    @given(maps, st.floats(0.3, 0.95), st.integers(0, 99), st.sampled_from([1, 4]))
    def test_the_lowest_scores_of_a_class_leave(
        self, source: object, ratio: float, seed: int, align: int
    ) -> None:
        cmap = source()  # type: ignore[operator]
        _, found = chosen(cmap, Target("units", ratio), seed, align=align)
        scores = scores_of(cmap, seed)
        for group in set(cmap.classes.tolist()):
            gone, left = (
                scores[(cmap.classes == group) & ~found.keep],
                scores[(cmap.classes == group) & found.keep],
            )
            assert not gone.size or gone.max() <= left.min()

    @settings(max_examples=40, deadline=None)
    @given(maps, st.integers(0, 99), st.data())
    def test_fewer_units_never_cost_more(self, source: object, seed: int, data: st.DataObject) -> None:
        cmap = source()  # type: ignore[operator]
        keep = np.random.default_rng(seed).random(cmap.units) < 0.8
        fewer = keep.copy()
        fewer[data.draw(st.integers(0, cmap.units - 1))] = False
        model = cost_model(cmap)
        for products in (model.macs, model.params):
            assert products.total(class_counts(cmap, fewer)) <= products.total(class_counts(cmap, keep))

    @settings(max_examples=40, deadline=None)
    @given(st.integers(1, 300), st.sampled_from([1, 2, 4, 8, 16, 32]), st.integers(1, 4), st.floats(0, 1))
    def test_widths(self, units: int, align: int, multiplicity: int, min_keep: float) -> None:
        found = widths(units, align, multiplicity, min_keep)
        assert found[-1] == units
        assert found[0] >= max(1, min_keep * units - 1e-6)
        assert (np.diff(found) > 0).all()
        if units > align:
            assert all(width * multiplicity % align == 0 for width in found[:-1])

    @settings(max_examples=20, deadline=None)
    @given(st.integers(0, 99), st.integers(1, 40))
    def test_steps_of_a_count_end_where_one_call_ends_or_below(self, seed: int, count: int) -> None:
        cmap = mlp_map()
        where = space(cmap, Target("units", 0.4))
        scores, keep = scores_of(cmap, seed), all_of(cmap)
        while True:
            found = remove(scores, keep, where, count)
            assert (found.keep <= keep).all()
            assert found.reached or found.removed >= count
            keep = found.keep
            if found.reached:
                break
        assert keep.sum() / cmap.units <= 0.4


class TestChoice:
    def test_ranked_over_layers_by_score(self) -> None:
        cmap = mlp_map()
        scores = np.ones(cmap.units)
        scores[:6] = 0.1
        found = remove(scores, all_of(cmap), space(cmap, Target("units", 28.5 / 34)))
        assert np.flatnonzero(~found.keep).tolist() == list(range(6))

    def test_ranked_per_what_the_target_counts(self) -> None:
        cmap = mlp_map()
        # A unit of the first layer saves 4 + 10 MACs and 4 + 1 + 10 parameters, one of the second 24 + 3 and
        # 24 + 1 + 3: of equal ones the second's leave, and the first's where they matter half as much.
        for kind in ("macs", "params"):
            where = space(cmap, Target(kind, 0.95))
            found = remove(np.ones(cmap.units), all_of(cmap), where)
            assert found.keep[:24].all()
            assert not found.keep[24:].all()
            scores = np.where(np.arange(cmap.units) < 24, 0.5, 1.0)
            assert not remove(scores, all_of(cmap), where).keep[:24].all()
            plain = space(cmap, Target(kind, 0.95), per_cost=False)
            scores = np.where(np.arange(cmap.units) < 24, 0.9, 1.0)
            assert remove(scores, all_of(cmap), plain).keep[24:].all()
            assert remove(scores, all_of(cmap), where).keep[:24].all()

    def test_units_cost_the_same(self) -> None:
        cmap = mlp_map()
        for seed in range(5):
            scores, target = scores_of(cmap, seed), Target("units", 0.5)
            found = [
                remove(scores, all_of(cmap), space(cmap, target, per_cost=c)).keep for c in (False, True)
            ]
            assert np.array_equal(*found)

    def test_the_given_mask_is_left(self) -> None:
        cmap = mlp_map()
        keep = all_of(cmap)
        remove(scores_of(cmap, 0), keep, space(cmap, Target("units", 0.5)))
        assert keep.all()

    def test_a_met_target_removes_nothing(self) -> None:
        cmap = mlp_map()
        keep = all_of(cmap)
        keep[:20] = False
        found = remove(scores_of(cmap, 0), keep, space(cmap, Target("units", 0.5)))
        assert found.reached
        assert found.removed == 0

    def test_floors_hold_and_the_miss_is_told(self) -> None:
        cmap = mlp_map()
        where = space(cmap, Target("units", 0.5), min_keep=0.5)
        keep = all_of(cmap)
        keep[24:29] = False
        scores = np.arange(cmap.units)[::-1].astype(float)
        found = remove(scores, keep, where, count=1000)
        assert found.reached
        tight = Space(cmap, where.cost, where.levels, Target("units", 0.1))
        missed = remove(scores, keep, tight)
        assert not missed.reached
        assert class_counts(cmap, missed.keep).tolist() == [level[0] for level in where.levels]


class TestRefusals:
    def refused(self, call: object, *texts: str) -> None:
        with pytest.raises(ModelError) as caught:
            call()  # type: ignore[operator]
        line = str(caught.value)
        assert caught.value.exit_code == 4
        assert len(line.splitlines()) == 1
        for text in texts:
            assert text in line

    @pytest.mark.parametrize("ratio", [0, 1, -0.5, 1.5, float("nan")])
    def test_a_ratio_outside_0_and_1(self, ratio: float) -> None:
        self.refused(lambda: Target("macs", ratio), f"macs_ratio is {ratio}", "between 0 and 1")

    def test_an_unknown_kind(self) -> None:
        with pytest.raises(ValueError, match="unknown target flops"):
            Target("flops", 0.5)

    def test_an_unreachable_target(self) -> None:
        call = lambda: space(mlp_map(), Target("macs", 0.05), min_keep=0.5)  # noqa: E731  # one line is enough
        self.refused(call, "macs_ratio 0.05 cannot be reached", "is the least", "prune.min_keep (0.5)")

    def test_a_model_without_units(self) -> None:
        cmap = channel_map(trace(nn.Linear(4, 3), (torch.randn(2, 4),)))
        self.refused(lambda: space(cmap, Target("macs", 0.5)), "no prunable unit", "compress inspect")

    def test_all_kept_on_request(self) -> None:
        cmap = channel_map(trace(SmallNet(), images()), keep=["fc.weight"])
        self.refused(lambda: space(cmap, Target("units", 0.5)), "no prunable unit")

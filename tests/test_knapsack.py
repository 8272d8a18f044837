"""The knapsack: what is chosen fits, the bound holds, and both against brute force and HiGHS."""

from __future__ import annotations

import pickle
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.knapsack import Choice, Infeasible, choose, exact

Groups = list[np.ndarray]


def optimum(values: Groups, costs: Groups, budgets: np.ndarray) -> float | None:
    """By trying everything; None where nothing fits."""
    best = None
    for levels in product(*(range(len(own)) for own in values)):
        spent = sum(own[level] for own, level in zip(costs, levels, strict=True))
        if (spent <= budgets * (1 + 1e-9)).all():
            value = sum(own[level] for own, level in zip(values, levels, strict=True))
            best = value if best is None else max(best, value)
    return best


def consistent(found: Choice, values: Groups, costs: Groups, budgets: np.ndarray) -> None:
    """One level for each group, sums that are theirs, budgets kept, bound not below the value."""
    assert found.levels.shape == (len(values),)
    picked = list(zip(values, costs, found.levels, strict=True))
    np.testing.assert_allclose(found.value, sum(own[level] for own, _, level in picked), rtol=1e-12)
    np.testing.assert_allclose(found.costs, sum(own[level] for _, own, level in picked), rtol=1e-12)
    assert (found.costs <= budgets * (1 + 1e-8)).all()
    assert found.value <= found.bound <= found.top * (1 + 1e-12)
    assert 0 <= found.gap <= 1
    assert found.gap <= found.loss_gap + 1e-12 or found.value < found.top - found.bound


def layers(groups: int, levels: int, resources: int, seed: int, align: int = 1) -> tuple[Groups, Groups]:
    """Layers of a network: heavy-tailed importances, latency as a staircase, MACs and parameters as lines."""
    draw = np.random.default_rng(seed)
    values, costs = [], []
    for _ in range(groups):
        kept = np.arange(align, levels + 1, align)
        importance = -np.sort(-draw.pareto(1.5, levels)) * draw.lognormal()
        latency = draw.uniform(0.02, 0.1) + draw.uniform(0.01, 0.2) * np.ceil(kept / 16)
        lines = [kept * draw.lognormal(3.0) for _ in range(resources - 1)]
        values.append(importance.cumsum()[kept - 1])
        costs.append(np.stack([latency, *lines], axis=1))
    return values, costs


def between(costs: Groups, share: float) -> np.ndarray:
    """Budgets that lie this far from the least to the greatest costs."""
    least, most = (sum(f(own) for own in costs) for f in (lambda c: c.min(axis=0), lambda c: c.max(axis=0)))
    return np.asarray(least + share * (most - least))


@st.composite
def problems(draw: st.DrawFn) -> tuple[Groups, Groups, np.ndarray]:
    """Up to five groups of up to four levels, up to three resources; whole numbers for ties, or reals."""
    resources = draw(st.integers(1, 3))
    numbers: st.SearchStrategy[float] = st.integers(0, 6).map(float)
    if draw(st.booleans()):
        numbers = st.floats(0, 10).map(lambda x: round(x, 3))
    values, costs = [], []
    for _ in range(draw(st.integers(1, 5))):
        n = draw(st.integers(1, 4))
        values.append(np.array(draw(st.lists(numbers, min_size=n, max_size=n))))
        row = st.lists(numbers, min_size=resources, max_size=resources)
        costs.append(np.array(draw(st.lists(row, min_size=n, max_size=n))))
    budgets = between(costs, 0.0)
    share = draw(st.lists(st.floats(-0.1, 1.1), min_size=resources, max_size=resources))
    budgets = np.maximum(budgets + np.array(share) * (between(costs, 1.0) - budgets), 0)
    return values, costs, np.round(budgets, 3)


class TestAgainstBruteForce:
    @settings(max_examples=300, deadline=None)
    @given(problems())
    def test_value_is_below_the_optimum_and_the_bound_above(
        self, problem: tuple[Groups, Groups, np.ndarray]
    ) -> None:
        best = optimum(*problem)
        if best is None:
            with pytest.raises(Infeasible):
                choose(*problem)
            return
        found = choose(*problem)
        consistent(found, *problem)
        assert found.value <= best + 1e-9
        assert found.bound >= best - 1e-9 * max(best, 1)
        assert found.value >= best * (1 - found.gap) - 1e-9

    @settings(max_examples=80, deadline=None)
    @given(problems())
    def test_exact_finds_the_optimum(self, problem: tuple[Groups, Groups, np.ndarray]) -> None:
        best = optimum(*problem)
        if best is None:
            with pytest.raises(Infeasible):
                exact(*problem)
            return
        found = exact(*problem)
        consistent(found, *problem)
        assert found.value == pytest.approx(best, rel=1e-6)
        assert found.bound >= best - 1e-6 * max(best, 1)


class TestAgainstHighs:
    @pytest.mark.parametrize("resources", [1, 2, 3])
    @pytest.mark.parametrize(("groups", "levels", "align"), [(12, 20, 1), (12, 32, 8), (150, 2, 1)])
    @pytest.mark.parametrize("share", [0.3, 0.7])
    def test_close_to_the_optimum(
        self, groups: int, levels: int, align: int, resources: int, share: float
    ) -> None:
        values, costs = layers(groups, levels, resources, seed=groups + levels, align=align)
        budgets = between(costs, share)
        found, best = choose(values, costs, budgets), exact(values, costs, budgets)
        consistent(found, values, costs, budgets)
        assert best.gap <= 1e-6
        assert best.value * (1 - found.gap - 1e-9) <= found.value <= best.value * (1 + 1e-6)
        assert found.bound >= best.value * (1 - 1e-6)
        assert found.gap <= 0.005

    def test_values_that_are_neither_concave_nor_monotone(self) -> None:
        draw = np.random.default_rng(5)
        values = [draw.random(15) for _ in range(40)]
        costs = [draw.random((15, 1)) for _ in range(40)]
        budgets = between(costs, 0.08)
        found, best = choose(values, costs, budgets), exact(values, costs, budgets)
        consistent(found, values, costs, budgets)
        assert found.value >= best.value * (1 - 1e-3)

    def test_exact_stops_at_the_gap_that_is_asked(self) -> None:
        values, costs = layers(12, 20, 3, seed=3)
        found = exact(values, costs, between(costs, 0.5), gap=0.05)
        consistent(found, values, costs, between(costs, 0.5))
        assert found.gap <= 0.05


class TestLargeOnes:
    @pytest.mark.parametrize("resources", [1, 3])
    @pytest.mark.parametrize(("groups", "levels", "align"), [(100, 100, 1), (60, 160, 16), (10_000, 2, 1)])
    def test_the_gap_is_below_half_a_percent(
        self, groups: int, levels: int, align: int, resources: int
    ) -> None:
        values, costs = layers(groups, levels, resources, seed=1, align=align)
        budgets = between(costs, 0.5)
        found = choose(values, costs, budgets)
        consistent(found, values, costs, budgets)
        assert found.gap <= 0.005
        assert found.loss_gap <= 0.05

    def test_equal_groups_share_what_there_is(self) -> None:
        values, costs = [np.array([0.0, 1.0])] * 3000, [np.array([[0.0], [1.0]])] * 3000
        found = choose(values, costs, np.array([1234.5]))
        assert found.value == 1234
        assert found.bound < 1235


class TestShapesOfCost:
    def test_the_best_level_of_a_plateau_is_taken(self) -> None:
        values = [np.array([1.0, 2.0, 3.0, 4.0])] * 2
        costs = [np.array([[1.0], [1.0], [2.0], [2.0]])] * 2
        assert choose(values, costs, np.array([3.0])).levels.tolist() in ([1, 3], [3, 1])
        assert choose(values, costs, np.array([2.9])).levels.tolist() == [1, 1]

    def test_a_level_that_costs_nothing_fits_a_budget_of_nothing(self) -> None:
        values, costs = [np.array([1.0, 5.0, 9.0])], [np.array([[0.0, 3.0], [0.0, 2.0], [1e-9, 1.0]])]
        found = choose(values, costs, np.array([0.0, 5.0]))
        assert found.levels.tolist() == [1]
        assert found.gap == 0

    def test_one_level_each_leaves_no_choice(self) -> None:
        values, costs = [np.array([2.0]), np.array([3.0])], [np.array([[1.0]]), np.array([[2.0]])]
        found = choose(values, costs, np.array([3.0]))
        assert (found.levels.tolist(), found.value, found.bound, found.gap) == ([0, 0], 5.0, 5.0, 0.0)

    @pytest.mark.parametrize("solve", [choose, exact])
    def test_slack_budgets_take_the_best_everywhere(self, solve: object) -> None:
        values, costs = layers(20, 10, 3, seed=2)
        found = solve(values, costs, between(costs, 1.0))  # type: ignore[operator]
        assert found.levels.tolist() == [int(own.argmax()) for own in values]
        assert (found.gap, found.loss_gap) == (0.0, 0.0)

    def test_a_budget_of_exactly_the_least_takes_the_least(self) -> None:
        values, costs = layers(20, 10, 2, seed=2)
        found = choose(values, costs, between(costs, 0.0))
        assert found.levels.tolist() == [0] * 20

    def test_whole_costs_are_solved_to_the_optimum(self) -> None:
        draw = np.random.default_rng(7)
        values = [draw.random(6).cumsum() for _ in range(15)]
        costs = [1000.0 * draw.integers(1, 60, (6, 1)).cumsum(axis=0) for _ in range(15)]
        found = choose(values, costs, between(costs, 0.31))
        assert found.value == pytest.approx(exact(values, costs, between(costs, 0.31)).value, rel=2e-3)
        assert found.loss_gap <= 0.002

    @pytest.mark.parametrize("unit", [1e-13, 1e13])
    def test_the_unit_of_cost_does_not_matter(self, unit: float) -> None:
        values, costs = layers(12, 20, 1, seed=6)
        budgets = between(costs, 0.4)
        expected = choose(values, costs, budgets)
        found = choose(values, [own * unit for own in costs], budgets * unit)
        assert found.value == pytest.approx(expected.value, rel=1e-3)
        assert found.gap <= expected.gap + 1e-3

    def test_values_of_zero(self) -> None:
        found = choose([np.zeros(3)], [np.arange(3.0)[:, None]], np.array([1.0]))
        assert (found.value, found.bound, found.gap, found.loss_gap) == (0.0, 0.0, 0.0, 0.0)


class TestInfeasible:
    def test_says_how_little_it_could_cost(self) -> None:
        values, costs = layers(5, 4, 2, seed=0)
        least = between(costs, 0.0)
        for solve in (choose, exact):
            with pytest.raises(Infeasible, match="no choice fits all budgets") as caught:
                solve(values, costs, least * [0.9, 2.0])
            np.testing.assert_allclose(caught.value.least, least)
            np.testing.assert_allclose(caught.value.budgets, least * [0.9, 2.0])
            assert not caught.value.together

    def test_survives_pickling(self) -> None:
        error = pickle.loads(pickle.dumps(Infeasible(np.array([2.0]), np.array([1.0]))))
        assert str(error) == "no choice fits all budgets; least cost of each resource: 2 of 1"

    def test_is_not_claimed_when_time_is_up(self) -> None:
        values, costs = layers(60, 20, 3, seed=2)
        with pytest.raises(TimeoutError, match="did not rule one out"):
            exact(values, costs, between(costs, 0.5), seconds=0.0)

    def test_budgets_that_cannot_be_met_together(self) -> None:
        values = [np.array([1.0, 1.0])] * 4
        costs = [np.array([[1.0, 0.0], [0.0, 1.0]])] * 4
        for solve in (choose, exact):
            with pytest.raises(Infeasible) as caught:
                solve(values, costs, np.array([1.9, 1.9]))
            assert caught.value.together
            assert caught.value.least.tolist() == [0.0, 0.0]

    def test_the_one_choice_that_fits_is_found(self) -> None:
        draw = np.random.default_rng(11)
        values = [draw.random(3) for _ in range(9)]
        costs = [draw.random((3, 3)) for _ in range(9)]
        only = draw.integers(0, 3, 9)
        budgets = sum(own[level] for own, level in zip(costs, only, strict=True))
        found = choose(values, costs, np.asarray(budgets))
        consistent(found, values, costs, np.asarray(budgets))


class TestInput:
    @pytest.mark.parametrize(
        ("values", "costs", "budgets", "text"),
        [
            ([], [], [1.0], "groups with levels"),
            ([[]], [np.zeros((0, 1))], [1.0], "groups with levels"),
            ([[1.0]], [[[1.0, 2.0]]], [1.0], r"the shape \(levels, 1\)"),
            ([[1.0]], [[[-1.0]]], [1.0], "costs must be finite"),
            ([[np.nan]], [[[1.0]]], [1.0], "values must be finite"),
            ([[1.0]], [[[1.0]]], [np.inf], "budgets must be finite"),
        ],
    )
    def test_is_refused_where_misshapen(
        self, values: list, costs: list, budgets: list[float], text: str
    ) -> None:
        with pytest.raises(ValueError, match=text):
            choose([np.array(v) for v in values], [np.array(c) for c in costs], np.array(budgets))


class TestDeterminism:
    @pytest.mark.parametrize("resources", [1, 3])
    def test_the_same_every_time(self, resources: int) -> None:
        values, costs = layers(30, 12, resources, seed=4)
        values = [np.round(own, 1) for own in values]  # many ties
        first, second = (choose(values, costs, between(costs, 0.4)) for _ in range(2))
        assert first.levels.tolist() == second.levels.tolist()
        assert (first.value, first.bound) == (second.value, second.bound)

    def test_ties_go_to_the_first_level(self) -> None:
        values, costs = [np.array([2.0, 2.0, 1.0])] * 2, [np.array([[1.0], [1.0], [0.5]])] * 2
        assert choose(values, costs, np.array([9.0])).levels.tolist() == [0, 0]

    def test_nothing_is_printed(self, capfd: pytest.CaptureFixture[str]) -> None:
        values, costs = layers(100, 100, 1, seed=1)
        exact(values, costs, between(costs, 0.5), seconds=2.0)
        assert capfd.readouterr().out == ""

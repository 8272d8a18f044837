"""Random networks from the op vocabulary, cut at random units: masked = dense and every other law."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from random_laws import Outcome, check, check_in_place
from random_networks import (
    KINDS,
    MAPS,
    NESTED,
    TOKENS,
    Network,
    Source,
    draw_network,
    seeded_network,
    shrink,
)
from random_parts import Block
from random_pins import PINNED, WHOLE_HEADS_PINNED
from random_regressions import IN_PLACE, REGRESSIONS

FAST, PER_KIND = 16, 34
RUN = settings(
    deadline=None,
    database=None,
    print_blob=False,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
REMOVING = 0.8  # least share of networks in which units were removed
REMOVING_OF_A_KIND = 0.5  # the same where every network has, say, a norm over channels
PRODUCTS = {"matmul", "bmm", "einsum", "scaled_dot_product_attention"}
OPTIONS = [f"{kind}.{option}" for kind, table in {**MAPS, **TOKENS, **NESTED}.items() for option in table]


class Drawn:
    """Decisions by hypothesis, which makes them simpler when a network fails."""

    def __init__(self, draw: Callable[[st.SearchStrategy[Any]], Any]) -> None:
        self.draw = draw

    def one(self, options: Sequence[Any]) -> Any:
        return self.draw(st.sampled_from(options))

    def some(self, make: Callable[[Source], Block], least: int, most: int) -> list[Block]:
        block = st.composite(lambda draw: make(Drawn(draw)))()
        return self.draw(st.lists(block, min_size=least, max_size=most))


@st.composite
def networks(draw: Callable[[st.SearchStrategy[Any]], Any], kind: str = "") -> Network:
    return draw_network(Drawn(draw), kind)


def check_many(examples: int, kind: str = "") -> list[Outcome]:
    """Check that many networks, the same ones in every run."""
    outcomes: list[Outcome] = []

    @seed(zlib.crc32(kind.encode()))
    @settings(RUN, max_examples=examples)
    @given(networks(kind))
    def run(network: Network) -> None:
        outcomes.append(check(network))

    run()
    return outcomes


def test_networks() -> None:
    outcomes = check_many(FAST)
    assert len(outcomes) == FAST
    assert sum(o.removed_units > 0 for o in outcomes) >= REMOVING * FAST


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_networks_with(kind: str) -> None:
    """Together more than 1,000 networks; units were removed from most, and through every kind of block."""
    outcomes = check_many(PER_KIND, kind)
    assert len(outcomes) == PER_KIND
    assert sum(o.removed_units > 0 for o in outcomes) >= REMOVING_OF_A_KIND * PER_KIND
    passed = {name.partition(".")[0] for o in outcomes for name in o.passed}
    assert kind in passed or all(
        f"{kind}.{option}" in PINNED for option in {**MAPS, **TOKENS, **NESTED}[kind]
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_units_go_through_every_option(name: str) -> None:
    """... or the option stands in the list of pins, and the report says the listed reason."""
    kind, _, option = name.partition(".")
    tokens = kind in TOKENS or kind == "block"
    layer = Block("linear" if tokens else "conv", "plain", 6)
    inside = (layer,) if kind in NESTED else ()
    found = check(Network((Block(kind, option, 8, inside, inside), layer), "row" if tokens else "map2"))
    assert name in found.seen
    assert (name in found.passed) == (name not in PINNED)
    reason = PINNED.get(name, "") or WHOLE_HEADS_PINNED.get(name, "")
    assert any(reason in given for given in found.reasons)
    if kind.startswith(("attention", "window")):
        heads = any((name, op) in found.passed_ops for op in PRODUCTS)
        assert heads == (name not in WHOLE_HEADS_PINNED)


@pytest.mark.slow
def test_the_slow_suite_checks_a_thousand_networks() -> None:
    assert len(KINDS) * PER_KIND >= 1000


@pytest.mark.parametrize("network", REGRESSIONS.values(), ids=REGRESSIONS)
def test_networks_that_failed_once(network: Network) -> None:
    check(network)


@pytest.mark.parametrize("network", IN_PLACE.values(), ids=IN_PLACE)
def test_modules_that_failed_once_in_place(network: Network) -> None:
    check_in_place(network)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 100, 20))
def test_the_module_itself_cut_in_place(first: int) -> None:
    for number in range(first, first + 20):
        check_in_place(seeded_network(number))


class TestNetworksAsData:
    def test_a_network_is_printed_as_it_is_written(self) -> None:
        for number in range(50):
            network = seeded_network(number)
            assert eval(repr(network), {"Network": Network, "Block": Block}) == network
        assert repr(Network((Block("conv", "plain"),), head="map")) == (
            "Network(blocks=(Block(kind='conv', option='plain'),), head='map')"
        )

    def test_a_seed_gives_one_network(self) -> None:
        assert seeded_network(3) == seeded_network(3)
        assert len({seeded_network(number) for number in range(100)}) == 100

    def test_every_kind_is_drawn(self) -> None:
        found = [block for number in range(300) for block in seeded_network(number).blocks]
        assert {block.kind for block in found} == set(KINDS)

    def test_shrinking_leaves_what_is_needed(self) -> None:
        def fails(network: Network) -> bool:
            blocks = [*network.blocks, *(b for block in network.blocks for b in block.inside)]
            return any(block.kind == "conv" for block in blocks)

        network = next(n for n in map(seeded_network, range(500)) if fails(n) and len(n.blocks) > 2)
        found = shrink(network, fails)
        assert [block.kind for block in found.blocks] == ["conv"]
        assert (found.head, found.seed, found.width, found.blocks[0].width) == ("mean", 0, 4, 4)


def test_tables_name_each_kind_once() -> None:
    assert len(KINDS) == len(set(KINDS)) == len(MAPS) + len(TOKENS) + len(NESTED)

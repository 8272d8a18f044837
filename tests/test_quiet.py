"""Waiting for a quiet machine: what is timed again, what is believed in the end."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from deploy.quiet import PATIENCE, PAUSES, Quiet


class Machine:
    """Times a network of 10 ms and one of 4 ms, so many times slower in each turn, the small one more so."""

    def __init__(self, *slower: float) -> None:
        self.slower, self.turns = slower, 0

    def __call__(self) -> dict[str, float]:
        factor = self.slower[min(self.turns, len(self.slower) - 1)]
        self.turns += 1
        return {"whole": 10 * factor, "small": 4 * factor**2}


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    found: list[float] = []
    monkeypatch.setattr("deploy.quiet.time.sleep", found.append)
    return found


@pytest.mark.parametrize(
    ("slower", "turns"), [([1.0], 1), ([1.02], 1), ([1.1, 1.0], 2), ([1.1, 1.2, 1.3, 1.01], 4)]
)
def test_it_is_timed_again_until_the_reference_is_as_fast_as_before(
    slower: Sequence[float], turns: int, pauses: list[float]
) -> None:
    machine, quiet = Machine(*slower), Quiet("whole", 10.0)
    assert quiet(machine)["small"] == pytest.approx(4 * slower[-1] ** 2)
    assert machine.turns == turns
    assert pauses == [*PAUSES[:turns]]


def test_the_first_is_believed_and_the_fastest_is_what_counts_then() -> None:
    quiet = Quiet("whole")
    assert quiet(Machine(1.2))["whole"] == 12
    assert quiet(Machine(1.0))["whole"] == 10
    machine = Machine(1.2, 1.0)
    assert quiet(machine)["whole"] == 10
    assert machine.turns == 2


def test_it_does_not_wait_for_ever(pauses: list[float]) -> None:
    quiet = Quiet("whole", 10.0)
    for _ in range(20):
        quiet.fastest_ms = 10.0
        quiet(Machine(1.1, 1.2, 1.1, 1.3, 1.2))
    assert PATIENCE - 2 < sum(pauses) <= PATIENCE
    machine = Machine(1.1)
    assert quiet(machine)["whole"] == pytest.approx(11)
    assert machine.turns == 1


def test_where_waiting_does_not_help_the_quietest_try_is_taken_and_nobody_waits_again() -> None:
    machine, quiet = Machine(1.3, 1.2, 1.1, 1.2, 1.3, 1.1), Quiet("whole", 10.0)
    assert quiet(machine)["whole"] == pytest.approx(11)
    assert machine.turns == len(PAUSES)
    assert quiet(machine)["whole"] == pytest.approx(11)
    assert machine.turns == len(PAUSES) + 1


def test_a_line_is_said_whenever_waiting_begins() -> None:
    said: list[str] = []
    quiet = Quiet("whole", 10.0, say=said.append)
    for slower in ([1.0], [1.2, 1.0], [1.12, 1.1, 1.2, 1.0]):
        quiet(Machine(*slower))
    begins = "waiting for a quiet machine: the whole network takes"
    assert said == [f"{begins} 20% longer than before", f"{begins} 12% longer than before"]

"""What a run says at its end: no missed target goes untold."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from compress.console import make_console
from compress.show import show_run


@pytest.mark.parametrize("reached", [True, False])
def test_a_missed_target_is_told_even_where_no_gate_asks(reached: bool, tmp_path: Path) -> None:
    stream = io.StringIO()
    pruning = {"reached": reached, "stop_reason": "accuracy fell from 0.9 to 0.8"}
    results = {"verdict": "no gates", "pruning": pruning}
    show_run(make_console(stream, colour=False), results, tmp_path)
    lines = [line.split() for line in stream.getvalue().splitlines()]
    assert (["target", "missed", "accuracy", "fell", "from", "0.9", "to", "0.8"] in lines) is not reached

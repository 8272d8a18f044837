"""Waiting for a quiet machine: latencies that are timed beside a network which tells when something is amiss.

What else runs on a host slows large and small networks by other factors, for seconds or minutes, whatever
statistic is taken of the samples: MobileNet v3 by 10 %, its narrowed half beside it by 26 %. The network that
is timed again and again shows it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

SLOWER = 0.03
"""By so much more than before, and both are timed again."""
PAUSES = (0, 2, 4, 8, 16)
"""Before each try, in seconds."""
PATIENCE = 60.0
"""Seconds in all: on a machine that is never quiet, waiting is in vain."""


@dataclass
class Quiet:
    """fastest_ms: of the network called `reference` so far; patience: seconds that may still be waited; say:
    gets a line whenever waiting begins. Energy is waited for as latency is; more: of it, in that line."""

    reference: str
    fastest_ms: float = float("inf")
    patience: float = PATIENCE
    say: Callable[[str], None] = lambda text: None
    more: str = "longer"

    def __call__(self, timed: Callable[[], dict[str, float]]) -> dict[str, float]:
        """What `timed` gives (milliseconds by name) while the reference is as fast as it was before.

        Where waiting does not help, the quietest of the tries, and from then on nothing better is expected.
        """
        found: list[dict[str, float]] = []
        for seconds in PAUSES:
            if seconds > self.patience:
                break
            if len(found) == 1:
                self._tell(found[0][self.reference] / self.fastest_ms - 1)
            self.patience -= seconds
            time.sleep(seconds)
            found.append(timed())
            if found[-1][self.reference] <= self.fastest_ms * (1 + SLOWER):
                self.fastest_ms = min(self.fastest_ms, found[-1][self.reference])
                return found[-1]
        best = min(found, key=lambda ms: ms[self.reference])
        self.fastest_ms = best[self.reference]
        return best

    def _tell(self, slower: float) -> None:
        takes = f"the {self.reference} network takes {slower:.0%} {self.more} than before"
        self.say(f"waiting for a quiet machine: {takes}")

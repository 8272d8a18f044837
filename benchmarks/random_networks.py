"""Random networks from the op vocabulary, outside of hypothesis: how many, how much was removed, what failed.

    python benchmarks/random_networks.py [COUNT [FIRST_SEED]]

One network per seed: one to three blocks, some of which wrap others, 4 to 16 channels. A network is exact
when the dense one equals the masked one in float64 (1e-12), the mask moves the output, MACs and parameters
are as torch counts them, a plan that keeps all changes nothing, the plan survives JSON, and a training step
runs.
Rows: one per kind and option of block (networks that had it, networks that removed units through it), then
one per op, then one per failure (shrunk, as it is written in tests/random_regressions.py).
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from benchmarks.common import note, write

LEAST_REMOVING = 0.8  # share of networks from which units must be removed


def failure(network: Any, error: Exception) -> dict[str, Any]:
    """A failing network, as small as it still fails with the same kind of error."""
    from random_laws import check
    from random_networks import shrink

    def fails(candidate: Any) -> bool:
        try:
            check(candidate)
        except Exception as found:  # any way to fail is a failure
            return type(found) is type(error)
        return False

    return {"failure": repr(shrink(network, fails)), "error": f"{type(error).__name__}: {str(error)[:300]}"}


def main() -> None:
    import torch
    from random_laws import Outcome, check
    from random_networks import seeded_network

    torch.set_num_threads(1)
    count, first = (int(n) for n in [*sys.argv[1:3], *("2000", "0")[len(sys.argv) - 1 :]])
    outcomes: list[Outcome] = []
    failures = []
    start = time.perf_counter()
    for seed in range(first, first + count):
        network = seeded_network(seed)
        try:
            outcomes.append(check(network))
        except Exception as error:  # recorded, shrunk, and the run goes on
            failures.append({"seed": seed, **failure(network, error)})
            note(f"seed {seed}: {failures[-1]['error']}")
    found = summary(count, outcomes)
    found["seconds_per_network"] = (time.perf_counter() - start) / count
    write("random_networks", found, [*block_rows(outcomes), *op_rows(outcomes), *failures])
    if found["removing_share"] < LEAST_REMOVING or failures:
        sys.exit(
            f"{len(failures)} failures; units removed from {found['removing_share']:.0%} of the networks"
        )


def summary(count: int, outcomes: list[Any]) -> dict[str, Any]:
    removable, removed, whole = (sum(o.channels[i] for o in outcomes) for i in range(3))
    return {
        "networks": count,
        "exact": len(outcomes),
        "removing_share": sum(o.removed_units > 0 for o in outcomes) / count,
        "removable_channels_share": removable / whole,
        "removed_channels_share": removed / whole,
        "block_kinds": len({name for o in outcomes for name in o.seen}),
        "block_kinds_passed": len({name for o in outcomes for name in o.passed}),
        "ops": len({op for o in outcomes for op in o.ops_seen}),
        "ops_passed": len({op for o in outcomes for _, op in o.passed_ops}),
    }


def block_rows(outcomes: list[Any]) -> list[dict[str, Any]]:
    """Per kind and option: networks that had it, and networks that removed units through it."""
    seen = Counter(name for o in outcomes for name in o.seen)
    passed = Counter(name for o in outcomes for name in o.passed)
    return [{"block": n, "networks": seen[n], "removed_through": passed[n]} for n in sorted(seen)]


def op_rows(outcomes: list[Any]) -> list[dict[str, Any]]:
    seen = Counter(op for o in outcomes for op in o.ops_seen)
    passed = Counter(op for o in outcomes for op in {op for _, op in o.passed_ops})
    return [{"op": op, "networks": seen[op], "removed_through": passed[op]} for op in sorted(seen)]


if __name__ == "__main__":
    main()

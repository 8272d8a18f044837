"""Networks that once failed, shrunk, as plain data: each is checked in every run of the suite.

A failing test prints its network as it is written here.
"""

from __future__ import annotations

from random_networks import Network
from random_parts import Block

REGRESSIONS: dict[str, Network] = {
    # one kept channel: torch.einsum multiplies without a product that the counter sees
    "einsum cut to one channel": Network((Block("linear", "einsum", 4),), width=4, seed=90),
    # a parameter whose channels were pinned in one round let go of what it met in the next
    "a position after a maxout": Network(
        (Block("conv", "plain", 8), Block("act", "maxout", 8), Block("position", "full", 8)), width=8
    ),
    # the cut channels are those that nothing reads
    "channels that nothing reads": Network((Block("slice", "middle", 4),), width=12, head="normed", seed=91),
}

IN_PLACE: dict[str, Network] = {
    "channels in another order by a table": Network((Block("slice", "list", 4),), width=4),
    "channels rolled": Network((Block("move", "roll_channels", 4),), width=4),
    "a channel shuffle op": Network((Block("grouped", "shuffled", 4),), width=4),
    "a grouped transposed conv": Network((Block("transposed", "grouped", 4),), width=4),
    "a depthwise transposed conv": Network((Block("transposed", "depthwise", 4),), width=4),
}
"""The same for the model itself, sliced in place."""

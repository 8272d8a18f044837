"""The options of the random networks that let no unit through, and the reason that the report must give.

An option that becomes prunable is taken off here: tests/test_random_networks.py checks both directions.
"""

from __future__ import annotations

STATISTICS = "takes its statistics over the channels"
ALONE = "all leave together: nothing would remain"

PINNED = {
    # by nature: removing a channel changes what the others are
    "norm.group_single": "group_norm takes its statistics",
    "norm.layer": f"layer_norm {STATISTICS}",
    "norm.layer2d": "mean runs over the channels",
    "norm.unit_length": "linalg_vector_norm runs over the channels",
    "norm.local_response": "avg_pool3d runs over an axis of channels",
    "act.softmax_channels": "softmax runs over the channels",
    "pool.over_channels": "amax runs over the channels",
    "gate.places": "mean runs over the channels",
    "gate.neighbours": ALONE,
    "grouped.narrow": ALONE,
    "grouped.funnel": ALONE,
    "token_norm.layer": f"layer_norm {STATISTICS}",
    "token_norm.layer_bare": f"layer_norm {STATISTICS}",
    "token_norm.rms": f"rms_norm {STATISTICS}",
    "token_norm.rms_written": "mean runs over the channels",
    "move.roll_both": "channels are rolled together with another axis",
    "move.reshape_across": "softmax runs over the channels",
    "pad.crop_channels": "padding takes channels away",
    # not followed: a rule could be written
    "linear.einsum_heads": "meets channels that stay",
    "linear.grouped": "meets channels that stay",
}
WHOLE_HEADS_PINNED = {
    "attention.learned_queries": "meets channels that stay",
    "attention_norm.sub": f"layer_norm {STATISTICS}",
    "attention_group.multi_query_expanded": "one channel is broadcast over several",
}
"""Attention whose heads stay."""

"""The streams of a GPU on which the nodes of a fused program run; no torch."""

from __future__ import annotations

from megatron_mhc.schedule.program import ALL_TO_ALL

COMPUTE_STREAM, A2A_STREAM, PRIORITY_STREAM = "compute", "all-to-all", "priority"


def stream_of(node: str, moe: bool) -> str:
    """The stream of a fused program's node; the nodes of a dense layer that do something compute."""
    if node in ALL_TO_ALL:
        return A2A_STREAM if moe else COMPUTE_STREAM
    # post_res waits for the combine, and the compute stream should not: it has other work meanwhile.
    return PRIORITY_STREAM if node == "post" else COMPUTE_STREAM

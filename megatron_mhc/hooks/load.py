"""Checkpoints of the other kind are refused, or adapted to, before they are loaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron_mhc.checkpoint import adapt_request


def guard_load(load: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `dist_checkpointing.load` with `adapt_request`."""

    def load_checked(sharded_state_dict: Any, checkpoint_dir: str, *args: Any, **kwargs: Any) -> Any:
        return load(adapt_request(sharded_state_dict, checkpoint_dir), checkpoint_dir, *args, **kwargs)

    return load_checked

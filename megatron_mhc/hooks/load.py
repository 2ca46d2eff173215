"""Checkpoints of the other kind are refused, or adapted to, before they are loaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron_mhc.checkpoint import adapt_request, check_partial_load, check_state_dict


def guard_load(load: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `dist_checkpointing.load` with `adapt_request`."""

    def load_checked(sharded_state_dict: Any, checkpoint_dir: str, *args: Any, **kwargs: Any) -> Any:
        return load(adapt_request(sharded_state_dict, checkpoint_dir), checkpoint_dir, *args, **kwargs)

    return load_checked


def guard_partial_load(show: Callable[..., None]) -> Callable[..., None]:
    """Wrap what Megatron-FSDP's loading calls in front of it, with `check_partial_load`."""

    def show_checked(state_dict_metadata: Any, load_state_dict: Any, *args: Any, **kwargs: Any) -> None:
        check_partial_load(load_state_dict, state_dict_metadata)
        show(state_dict_metadata, load_state_dict, *args, **kwargs)

    return show_checked


def guard_load_state_dict(load_state_dict: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `load_state_dict` of a model with `check_state_dict`."""

    def load_checked(model: Any, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        check_state_dict(model, state_dict)
        return load_state_dict(model, state_dict, *args, **kwargs)

    return load_checked

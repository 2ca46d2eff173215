"""Checkpoints of the other kind are refused, or adapted to, before they are loaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.distributed.checkpoint import FileSystemReader

from megatron_mhc.checkpoint import adapt_request, check_fsdp_load, check_state_dict
from megatron_mhc.checkpoint_keys import compare_arithmetic
from megatron_mhc.config import MHCConfig


def guard_load(load: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `dist_checkpointing.load` with `adapt_request`."""

    def load_checked(sharded_state_dict: Any, checkpoint_dir: str, *args: Any, **kwargs: Any) -> Any:
        return load(adapt_request(sharded_state_dict, checkpoint_dir), checkpoint_dir, *args, **kwargs)

    return load_checked


def guard_fsdp_load(load: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `_load_base_checkpoint` of megatron.training with `check_fsdp_load`, and compare options.

    Those in MEGATRON_MHC are not among the arguments that Megatron saves.
    """

    def load_checked(load_dir: str, args: Any, rank0: bool = False, *more: Any, **kwargs: Any) -> Any:
        loaded = state_dict, checkpoint, _, kind = load(load_dir, args, rank0, *more, **kwargs)
        if kind is not None and kind.name == "FSDP_DTENSOR" and not rank0 and "model" in state_dict:
            there = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
            check_fsdp_load(state_dict["model"], there)
            saved = state_dict.get("args")
            if MHCConfig.has_flags(saved) and MHCConfig.has_flags(args):
                compare_arithmetic(MHCConfig.from_args(saved).arithmetic(), MHCConfig.from_args(args))
        return loaded

    return load_checked


def guard_load_state_dict(load_state_dict: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `load_state_dict` of a model with `check_state_dict`."""

    def load_checked(model: Any, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        check_state_dict(model, state_dict)
        return load_state_dict(model, state_dict, *args, **kwargs)

    return load_checked

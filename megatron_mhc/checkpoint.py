"""Checkpoints of the other kind: a plain one is taken only under --mhc-load-dense, never by accident.

An mHC checkpoint differs from a plain one in two ways: it has mapping parameters, and its final norm
lies at `final_layernorm.norm.`. So even stock Megatron refuses an mHC checkpoint (missing key), and here
an mHC model is kept from half-loading a plain one:

    torch_dist   `adapt_request` compares the request with the checkpoint's metadata before reading
    any format   `take_or_refuse` is called by the modules when load_state_dict reaches them
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedTensor
from torch import Tensor

from megatron_mhc.config import MHCConfig, flag, in_options

_MAPPING = "_hyper_connection."
_HEAD = "final_layernorm.head."
_ARITHMETIC = "decoder.final_layernorm._extra_state"
_NORM, _PLAIN_NORM = "decoder.final_layernorm.norm.", "decoder.final_layernorm."
_REMEDY = (
    f"the checkpoint holds no mHC parameters (a plain GPT): pass {flag('load_dense')} together with "
    "--finetune or --no-load-optim to start from its weights, or load an mHC checkpoint"
    + in_options("load_dense", True)
)


def take_or_refuse(
    mhc: MHCConfig, state_dict: dict[str, Any], prefix: str, current: Iterable[tuple[str, Tensor]]
) -> None:
    """Fill a state dict that lacks all of a module's entries with the module's own values.

    Args:
        mhc: options of the module's model.
        state_dict: what load_state_dict was given; changed in place.
        prefix: the module's prefix in it.
        current: the module's entries, (name, value).

    Raises:
        ValueError: entries are absent and `load_dense` is off.
    """
    entries = dict(current)
    if not entries or any(prefix + name in state_dict for name in entries):
        return
    if not mhc.load_dense:
        raise ValueError(f"{prefix}*: {_REMEDY}")
    state_dict.update({prefix + name: value.detach() for name, value in entries.items()})


def adapt_request(request: dict[str, Any], checkpoint_dir: str) -> dict[str, Any]:
    """Compare what a model asks of a torch_dist checkpoint with what is there.

    From a plain checkpoint an mHC model asks the shared part; `take_or_refuse` decides about the rest.

    Raises:
        ValueError: an mHC checkpoint for a plain model; another number of streams or kind of mapping; a
            plain checkpoint's optimizer.
    """
    from megatron.core.dist_checkpointing import load_tensors_metadata

    items = [item for item in _leaves(request) if isinstance(item, ShardedBase)]
    # Transformer Engine's norm has an extra state too: a plain model's may lie where mHC's arithmetic does.
    ours = any(_is_mhc(item.key) and item.key != _ARITHMETIC or item.key.startswith(_NORM) for item in items)
    wanted = [item for item in items if ours and _is_mhc(item.key)]
    if not wanted and not any(item.key.startswith("decoder.layers.") for item in items):
        return request
    there = load_tensors_metadata(checkpoint_dir)
    is_mhc = any(_MAPPING in key for key in there)
    if not wanted:
        if is_mhc:
            raise ValueError(
                f"{checkpoint_dir} is an mHC model's: add --spec megatron_mhc.specs gpt_mhc_spec "
                "(with megatron_mhc.pretrain_gpt, drop --no-mhc), or load a plain checkpoint"
            )
        return request
    if is_mhc:
        for item in wanted:
            _check_shape(item, there)
        return request
    if any(_is_optimizer(key) for key in request):
        raise ValueError(f"{checkpoint_dir}: {_REMEDY}")
    return _without_mhc(request)


def _is_mhc(key: str) -> bool:
    return _MAPPING in key or _HEAD in key or key == _ARITHMETIC


def _is_optimizer(key: str) -> bool:
    return key.startswith("optimizer")


def _check_shape(item: ShardedBase, there: dict[str, Any]) -> None:
    if not isinstance(item, ShardedTensor):
        return
    saved = there.get(item.key)
    if saved is None or tuple(saved.global_shape) != tuple(item.global_shape):
        found = "absent" if saved is None else f"of shape {tuple(saved.global_shape)}"
        raise ValueError(
            f"{item.key} is {found} in the checkpoint and of shape {tuple(item.global_shape)} here: give "
            f"{flag('num_residual_streams')} and the other --mhc-* options that it was trained with"
        )


def _leaves(tree: Any) -> Iterable[Any]:
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, (list, tuple)):
        yield tree
        return
    for branch in tree:
        yield from _leaves(branch)


def _without_mhc(tree: dict[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            out[key] = _without_mhc(value)
        elif isinstance(value, ShardedBase):
            if _is_mhc(value.key):
                continue
            if value.key.startswith(_NORM):
                value.key = _PLAIN_NORM + value.key[len(_NORM) :]
            out[key] = value
        else:
            out[key] = value
    return out


def json_tensor(text: str) -> Tensor:
    """Text as a uint8 tensor [bytes], which every checkpoint format stores."""
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)

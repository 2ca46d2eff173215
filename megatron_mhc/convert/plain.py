"""A plain checkpoint turned into an mHC one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_mhc.checkpoint_keys import (
    ARITHMETIC,
    DEPTH,
    HEAD,
    PLAIN_NORM,
    encode_arithmetic,
    ends_decoder,
    is_mhc,
)
from megatron_mhc.config import MHCConfig, flag
from megatron_mhc.convert.check import LAYER, SUBLAYERS, check_finite, check_numbers
from megatron_mhc.convert.names import move_norm


def from_plain(
    state: dict[str, Any], mhc: MHCConfig, first_layer: int = 0, seed: int = 1234
) -> dict[str, Any]:
    """Add initial mappings to a plain model's state dict.

    With `--mhc-init home_stream` the new model computes what the plain one did, up to the norms'
    epsilons: its streams stay copies of one another, and every norm takes back the scale of H_pre.

    Args:
        state: entries of a plain GPT, or of one of its pipeline stages.
        mhc: options of the new model.
        first_layer: 0-based index of the first layer in `state`, where its layers are numbered from 0.
        seed: of the random projections of `--mhc-init uniform`, combined with the sub-layer's index, so
            that copies of a layer in several files agree.

    Raises:
        ValueError: `state` has mHC already, or is broken.
    """
    if is_mhc(state):
        raise ValueError("the checkpoint has mHC parameters already: use --from plugin")
    depth = next((key for key in state if DEPTH.match(key)), None)
    if depth is not None and mhc.mtp == "multistream":
        raise ValueError(
            f"{depth}: a plain model's layers of multi-token prediction read the final norm's output, those "
            f"of {flag('mtp')} multistream the streams: give mtp=single"
        )
    check_finite(state)
    layers = {key: match.group(1) for key in state if (match := LAYER.match(key))}
    check_numbers(layers.values())
    out = {move_norm(key, "plain", "plugin") or key: value for key, value in state.items()}
    for key, number in layers.items():
        width, count = state[key].shape[-2], state[key].shape[0] if number is None else 1
        for sublayer in SUBLAYERS:
            at = [first_layer + (i if number is None else int(number)) for i in range(count)]
            made = [_initial(mhc, width, 2 * layer + (sublayer == "mlp"), seed) for layer in at]
            middle = "" if number is None else f"{number}."
            for part in made[0]:
                rows = [one[part] for one in made]
                name = f"decoder.layers.{middle}{sublayer}_hyper_connection.{part}"
                out[name] = torch.stack(rows) if number is None else rows[0]
    if ends_decoder(state):
        out[ARITHMETIC] = encode_arithmetic(mhc)
        if mhc.contract == "learned_head":
            from megatron_mhc.streams import ContractHead

            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed - 1)  # no connection's
                head = ContractHead(_tiny_config(state[PLAIN_NORM + "weight"].shape[0]), mhc)
            out.update({HEAD + name: p.detach() for name, p in head.named_parameters()})
    return out


def _initial(mhc: MHCConfig, width: int, sublayer_index: int, seed: int) -> dict[str, Tensor]:
    """Initial parameters of one connection, from the module that a new model would build."""
    from megatron_mhc.hyper_connection import HyperConnectionModule

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + sublayer_index)
        module = HyperConnectionModule(_tiny_config(width), mhc, sublayer_index)
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def _tiny_config(width: int) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    sizes = dict(num_layers=1, hidden_size=width, num_attention_heads=1)
    return TransformerConfig(**sizes, use_cpu_initialization=True)

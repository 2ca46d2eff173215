"""A plain checkpoint turned into an mHC one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from megatron_mhc.checkpoint_keys import DEPTH, FINAL_NORMS, encode_arithmetic, ends_decoder, is_mhc
from megatron_mhc.config import MHCConfig, flag
from megatron_mhc.convert.check import LAYER, SUBLAYERS, check_finite, check_numbers

_HYBRID = re.compile(  # what gives a hybrid layer's sub-layer, and C
    r"^decoder\.layers\.(\d+)\.(self_attention|mlp|mixer)\.(linear_proj|out_proj|linear_fc2|router)\.weight$"
)
_Connections = tuple[str, int, list[int], bool]  # prefix of its keys, C, its sub-layers' indices, stacked?


def from_plain(
    state: dict[str, Any],
    mhc: MHCConfig,
    first_layer: int = 0,
    seed: int = 1234,
    *,
    init_method_std: float = 0.02,
    hybrid: bool = False,
) -> dict[str, Any]:
    """Add initial mappings to a plain model's state dict.

    With `--mhc-init home_stream` the new model computes what the plain one did, up to the norms'
    epsilons: its streams stay copies of one another, and every norm takes back the scale of H_pre.

    Args:
        state: entries of a plain GPT or HybridModel, or of one of its pipeline stages.
        mhc: options of the new model.
        first_layer: 0-based index of the first layer in `state`, where its layers are numbered from 0.
        seed: of the random projections of `--mhc-init uniform` and `mean_read`, combined with the sub-layer's
            index, so that copies of a layer in several files agree.
        init_method_std: --init-method-std of the new model, by which `mean_read` draws.
        hybrid: whether the layers are a HybridModel's, with one connection each; the stage that ends its
            decoder says so itself.

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
    final = ends_decoder(state)
    if hybrid or final is FINAL_NORMS[1]:
        connections = _of_hybrid(state, first_layer)
    else:
        connections = _of_gpt(state, first_layer)
    out = {_moved(key): value for key, value in state.items()}
    for prefix, width, indices, stacked in connections:
        made = [_initial(mhc, width, index, seed, init_method_std) for index in indices]
        for part in made[0] if made else ():
            rows = [one[part] for one in made]
            out[f"{prefix}_hyper_connection.{part}"] = torch.stack(rows) if stacked else rows[0]
    if final:
        out[final.arithmetic] = encode_arithmetic(mhc)
        if mhc.contract == "learned_head":
            from megatron_mhc.streams import ContractHead

            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed - 1)  # no connection's
                width = state[final.plain + "weight"].shape[0]
                head = ContractHead(_tiny_config(width, init_method_std), mhc)
            out.update({final.head + name: p.detach() for name, p in head.named_parameters()})
    return out


def _moved(key: str) -> str:
    """The key of the mHC model, whose final norm lies inside its contraction."""
    final = next((final for final in FINAL_NORMS if key.startswith(final.plain)), None)
    return final.norm + key.removeprefix(final.plain) if final else key


def _of_gpt(state: dict[str, Any], first_layer: int) -> Iterator[_Connections]:
    layers = {key: match.group(1) for key in state if (match := LAYER.match(key))}
    check_numbers(layers.values())
    for key, number in layers.items():
        count = state[key].shape[0] if number is None else 1
        at = [first_layer + (i if number is None else int(number)) for i in range(count)]
        middle = "" if number is None else f"{number}."
        for i, sublayer in enumerate(SUBLAYERS):
            prefix = f"decoder.layers.{middle}{sublayer}"
            yield prefix, state[key].shape[-2], [2 * layer + i for layer in at], number is None


def _of_hybrid(state: dict[str, Any], first_layer: int) -> Iterator[_Connections]:
    layers: dict[str, tuple[str, int]] = {}
    for key, value in state.items():
        if (match := _HYBRID.match(key)) and isinstance(value, Tensor):
            layers[match[1]] = match[2], value.shape[-1 if match[3] == "router" else -2]
    check_numbers(layers)
    for number, (sublayer, width) in layers.items():
        yield f"decoder.layers.{number}.{sublayer}", width, [first_layer + int(number)], False


def _initial(mhc: MHCConfig, width: int, sublayer_index: int, seed: int, std: float) -> dict[str, Tensor]:
    """Initial parameters of one connection, from the module that a new model would build."""
    from megatron_mhc.hyper_connection import HyperConnectionModule

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + sublayer_index)
        module = HyperConnectionModule(_tiny_config(width, std), mhc, sublayer_index)
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def _tiny_config(width: int, std: float) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    sizes = dict(num_layers=1, hidden_size=width, num_attention_heads=1, init_method_std=std)
    return TransformerConfig(**sizes, use_cpu_initialization=True)

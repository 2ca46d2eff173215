"""What an mHC checkpoint is known by: its keys, and the options that it was trained under.

    decoder.layers.N.{self_attention,mlp}_hyper_connection.*   MAPPING; none where all mappings are fixed
    decoder.final_layernorm.norm.*                             NORM; of every mHC model, on its last stage
    decoder.final_layernorm.head.*                             HEAD; under --mhc-contract learned_head
    decoder.final_layernorm._extra_state                       ARITHMETIC; beside NORM

A plain model keeps the final norm at `decoder.final_layernorm.` itself; Transformer Engine's norm has an
extra state of its own there, under ARITHMETIC's key.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_mhc.config import MHCConfig, flag, in_options

MAPPING = "_hyper_connection."
PLAIN_NORM = "decoder.final_layernorm."
NORM = PLAIN_NORM + "norm."
HEAD = PLAIN_NORM + "head."
ARITHMETIC = PLAIN_NORM + "_extra_state"


def is_mhc(keys: Iterable[str]) -> bool:
    """Whether the entries of a model, or of one of its pipeline stages, are an mHC model's.

    A stage that neither ends the decoder nor has a mapping that learns looks like a plain model's.
    """
    return any(MAPPING in key or NORM in key for key in keys)


def ends_decoder(keys: Iterable[str]) -> bool:
    """Whether the final norm, plain or mHC's, is among the entries."""
    return any(PLAIN_NORM in key for key in keys)


def encode_arithmetic(mhc: MHCConfig) -> Tensor:
    """The entry ARITHMETIC: JSON as a uint8 tensor [bytes], which every checkpoint format stores."""
    return torch.frombuffer(bytearray(json.dumps(mhc.arithmetic()).encode()), dtype=torch.uint8)


def decode_arithmetic(entry: Any) -> dict[str, Any]:
    """The options of an entry ARITHMETIC, by field name.

    Raises:
        ValueError: it is something else.
    """
    try:
        options = json.loads(bytes(entry.cpu().tolist()))
        MHCConfig.from_mapping(options, ARITHMETIC)
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{ARITHMETIC} does not hold the options of an mHC model: {error}") from error
    return options


def compare_arithmetic(saved: Mapping[str, Any], mhc: MHCConfig) -> None:
    """Compare a checkpoint's options with a model's.

    Raises:
        ValueError: naming the first flag whose value differs, and the value to give.
    """
    for name, value in mhc.arithmetic().items():
        if name in saved and saved[name] != value:
            raise ValueError(
                f"the checkpoint was trained with {flag(name)} {saved[name]}, this run has {value}: "
                f"pass {flag(name)} {saved[name]}{in_options(name, saved[name])}"
            )

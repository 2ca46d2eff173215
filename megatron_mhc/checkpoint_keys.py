"""The marks of an mHC checkpoint: its keys, and the options with which it was trained.

    decoder.layers.N.{self_attention,mlp}_hyper_connection.*   MAPPING; none where all mappings are fixed
    decoder.final_layernorm.norm.*                             NORM; unless a contraction replaces the norm
    decoder.final_layernorm.head.*                             HEAD; under --mhc-contract learned_head
    decoder.final_layernorm.contraction.*                      CONTRACTION; of a contraction that was supplied
    decoder.final_layernorm._extra_state                       ARITHMETIC; beside these

NORM or CONTRACTION stands on the last stage of every mHC model.

Under --mhc-mtp multistream each `mtp.layers.N.` has such a norm, head and arithmetic in its own
`final_layernorm.`, and MAPPING in its `transformer_layer.`

A plain model keeps the final norm at `decoder.final_layernorm.` itself; Transformer Engine's norm has an
extra state of its own there, under ARITHMETIC's key. A HybridModel calls its norm `final_norm`, and
has connections around a `mixer` too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_mhc.config import MHCConfig, flag, in_options


class FinalNorm(NamedTuple):
    """Where a model keeps its final norm, and what is there in an mHC model's checkpoint."""

    plain: str
    norm: str
    head: str
    contraction: str
    arithmetic: str
    spec: str  # what builds such a model

    @classmethod
    def at(cls, plain: str, spec: str) -> FinalNorm:
        norm, head, contraction = plain + "norm.", plain + "head.", plain + "contraction."
        return cls(plain, norm, head, contraction, plain + "_extra_state", spec)

    def is_ours(self, key: str) -> bool:
        """Whether a key, which may have a wrapper's prefix, is one that a plain model lacks."""
        return self.norm in key or self.contraction in key


MAPPING = "_hyper_connection."
FINAL_NORMS = (
    FinalNorm.at("decoder.final_layernorm.", "gpt_mhc_spec"),
    FinalNorm.at("decoder.final_norm.", "hybrid_mhc_spec"),
)
PLAIN_NORM, NORM, HEAD, CONTRACTION, ARITHMETIC, _ = FINAL_NORMS[0]
DEPTH = re.compile(r"^mtp\.layers\.(\d+)\.(.+)$")  # an entry of a layer of multi-token prediction


def is_mhc(keys: Iterable[str]) -> bool:
    """Whether the entries of a model, or of one of its pipeline stages, are an mHC model's.

    A stage that neither ends the decoder nor has a mapping that learns looks like a plain model's.
    """
    return any(MAPPING in key or any(final.is_ours(key) for final in FINAL_NORMS) for key in keys)


def ends_decoder(keys: Iterable[str]) -> FinalNorm | None:
    """The final norm, plain or mHC's, that is among the entries."""
    return next((final for key in keys for final in FINAL_NORMS if final.plain in key), None)


def is_arithmetic(key: str) -> bool:
    """Whether an entry holds options: of the model, or of a layer of multi-token prediction."""
    depth = DEPTH.match(key)
    ends = any(key == final.arithmetic for final in FINAL_NORMS)
    return ends or bool(depth and depth[2] == ARITHMETIC.removeprefix("decoder."))


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
    saved = MHCConfig.from_mapping(saved).arithmetic()  # what has no entry there was at its default
    for name, value in mhc.arithmetic().items():
        if saved[name] != value:
            raise ValueError(
                f"the checkpoint was trained with {flag(name)} {saved[name]}, this run has {value}: "
                f"pass {flag(name)} {saved[name]}{in_options(name, saved[name])}"
            )

"""The --mhc-* command-line flags, one per field of MHCConfig."""

from __future__ import annotations

import argparse
from dataclasses import fields

from megatron_mhc.config import _CHOICES, MHCConfig, flag

_HELP = {
    "num_residual_streams": "number of parallel residual streams",
    "preset": "arithmetic of the mappings",
    "h_res": "mixing of the streams; unconstrained is plain hyper-connections",
    "h_pre": "read weights; fixed is 1/n",
    "h_post": "write weights; fixed is 1",
    "sinkhorn_iterations": "column and row normalisations of H_res",
    "init": "initial mappings; home_stream starts near the plain network",
    "init_gating_factor": "initial value of the gating factors alpha",
    "contract": "how the streams become one before the final norm",
    "norm_eps": "epsilon inside the root of the mappings' RMS norm",
    "load_dense": "let --load take a checkpoint without mHC parameters (a plain GPT); "
    "the mappings keep their initial values",
    "backend": "kernels; auto is Triton on CUDA where it was checked there, else plain torch",
}


def add_mhc_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the --mhc-* flags; pass it to Megatron as `extra_args_provider`."""
    group = parser.add_argument_group("mhc")
    kinds = {"int": int, "float": float, "str": str}
    for f in fields(MHCConfig):
        help_text = f"{_HELP[f.name]} (default: {f.default})"
        if f.type == "bool":
            group.add_argument(flag(f.name), action="store_true", default=None, help=help_text)
        else:
            # None means "not given", so that MHCConfig alone knows the defaults.
            group.add_argument(
                flag(f.name),
                type=kinds[str(f.type)],
                choices=_CHOICES.get(f.name),
                default=None,
                help=help_text,
            )
    return parser

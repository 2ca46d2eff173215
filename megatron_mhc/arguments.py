"""The --mhc-* command-line flags, one per field of MHCConfig."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from typing import Any

from megatron_mhc.config import _CHOICES, MHCConfig, flag, refuse_environment
from megatron_mhc.version import check_version

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
    "backend": "kernels; auto is triton where it can serve, else plain torch; hopper is for H100 and H200",
    "boundary": "what the kernels of two connections in a row do together",
    "log_interval": "steps between two diagnostics in TensorBoard and W&B (mhc/...); 0 is never",
    "log_tokens": "tokens of a micro-batch that the diagnostics sample",
    "alarm": "what to do when a gain or a mapping logit leaves its range",
    "alarm_gain": "alarm beyond this gain, and below its inverse",
    "alarm_logit": "alarm beyond this absolute value of a mapping logit",
    "recompute_layer_num": "drop the streams and layer inputs of this many sub-layers at a time and replay "
    "them in backward: a number, auto, or off",
    "recompute_coefficients": "replay the coefficients too, instead of keeping them",
    "pipeline_schedule": "interleaved overlaps the streams' messages with compute, fused also MoE's",
    "pp_boundary": "what leaves a pipeline stage; split sends the mixed streams before the last MLP",
}


def add_mhc_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the --mhc-* flags; pass it to Megatron as `extra_args_provider`.

    Raises:
        ValueError: an unsupported Megatron; one that has hyper-connections has flags of these names too.
    """
    if "megatron.core" in sys.modules:  # else the parser is not Megatron's
        check_version()
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


def use_mhc(args: Any, model_config: Any) -> None:
    """Build the model with mHC if the command line has an --mhc-* flag; see patches/.

    Args:
        args: Megatron's parsed arguments, from a parser that `add_mhc_args` extended.
        model_config: Megatron's GPTModelConfig, whose `transformer_layer_spec` is set.

    Raises:
        ValueError: options in MEGATRON_MHC, another --spec, or a model that takes no layer spec.
    """
    given = [f.name for f in fields(MHCConfig) if getattr(args, "mhc_" + f.name) is not None]
    refuse_environment()
    if not given:
        return
    from megatron_mhc.specs import gpt_mhc_spec

    if args.spec is not None and list(args.spec) != ["megatron_mhc.specs", "gpt_mhc_spec"]:
        raise ValueError(f"--spec {' '.join(args.spec)}: drop it; mHC wraps what Megatron chooses")
    if getattr(args, "modelopt_enabled", False) or not hasattr(model_config, "transformer_layer_spec"):
        raise ValueError(f"{flag(given[0])}: only for a GPT that takes a layer spec, not for ModelOpt's")
    model_config.transformer_layer_spec = gpt_mhc_spec

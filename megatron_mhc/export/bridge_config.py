"""Megatron-Bridge's record of a run, as the arguments that Megatron would have saved."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import yaml

RUN_CONFIG = "run_config.yaml"
# Whose models are plain GPTModels; others change a forward pass in code, which no value in the record tells.
_PROVIDERS = (
    "megatron.bridge.models.gpt_provider.GPTModelProvider",
    "megatron.bridge.models.mla_provider.MLAModelProvider",
)
# Megatron's name of an argument: Bridge's of the field.
_RENAMED = {
    "max_position_embeddings": "seq_length",
    "use_rope_scaling": "rope_scaling",
    "rotary_seq_len_interpolation_factor": "seq_len_interpolation_factor",
    "num_experts": "num_moe_experts",
}


def arguments(folder: Path) -> Namespace | None:
    """The arguments of the run that saved a checkpoint; None where Bridge has not saved it.

    Raises:
        ValueError: it cannot be read, or is of a model that is not a plain GPTModel.
    """
    file = folder / RUN_CONFIG
    if not file.exists():
        return None
    try:
        run = yaml.safe_load(file.read_text())
        model, words = dict(run["model"]), dict(run.get("tokenizer") or {})  # of a mere conversion: none
    except (KeyError, TypeError, ValueError, yaml.YAMLError) as error:
        raise ValueError(
            f"{RUN_CONFIG}: {' '.join(str(error).split())}; save the checkpoint again"
        ) from error
    if (provider := model.get("_target_")) not in _PROVIDERS:
        raise ValueError(
            f"{RUN_CONFIG}: the model is of {provider}, which may compute more than its sizes say; generate "
            "by Megatron-Bridge instead"
        )
    args = Namespace(**model)
    for name, field in _RENAMED.items():
        setattr(args, name, model.get(field))
    latent, groups = model.get("multi_latent_attention"), model.get("num_query_groups")
    args.group_query_attention = not latent and groups is not None
    if isinstance(base := model.get("rotary_base"), float) and base.is_integer():
        args.rotary_base = int(base)  # as --rotary-base takes it
    args.swiglu = model["gated_linear_unit"] and _is_silu(model["activation_func"])
    args.untie_embeddings_and_output_weights = not model["share_embeddings_and_output_weights"]
    args.tokenizer_type, args.tokenizer_model = words.get("tokenizer_type"), words.get("tokenizer_model")
    if (saved := folder / "tokenizer").is_dir():
        args.tokenizer_model = str(saved)
    return args


def _is_silu(function: Any) -> bool:
    return isinstance(function, dict) and str(function.get("_target_")).endswith(".silu")

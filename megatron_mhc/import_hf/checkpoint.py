"""Megatron's model of a launch: which tensors it has, and the checkpoint of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from torch import Tensor

from megatron_mhc.checkpoint_keys import FINAL_NORMS, MAPPING, NORM, PLAIN_NORM
from megatron_mhc.config import MHCConfig
from megatron_mhc.convert import from_plain
from megatron_mhc.convert.files import single_process
from megatron_mhc.convert.read import TRACKER, naming
from megatron_mhc.export import weights
from megatron_mhc.schedule.stages import with_experts
from megatron_mhc.specs import gpt_mhc_spec

HEAD = FINAL_NORMS[0].head
EXTRA = "_extra_state"


@contextmanager
def empty_model(args: Any, config: Any, source: str) -> Iterator[Any]:
    """Megatron's GPT without values, in a process group of this process; `source` is named in errors."""
    from megatron.core.models.gpt import GPTModel

    with single_process():
        ours = not parallel_state.model_parallel_is_initialized()
        if ours:
            parallel_state.initialize_model_parallel()
        try:
            tensor_parallel.model_parallel_cuda_manual_seed(1234, force_reset_rng=True)
            with naming(source):
                model = GPTModel(
                    config,
                    gpt_mhc_spec(args, config),
                    args.padded_vocab_size,
                    args.max_position_embeddings,
                    share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
                    position_embedding_type="rope",
                )
            yield model
        finally:
            if ours:
                parallel_state.destroy_model_parallel()


def expected(model: Any, args: Any) -> dict[str, Tensor]:
    """The exported model's tensors, on the meta device: their names, shapes and dtypes."""
    state = {key: value.to("meta") for key, value in model.state_dict().items() if EXTRA not in key}
    return weights.translate(weights.stack_experts(state), args)


def fill(model: Any, args: Any, mhc: MHCConfig, tensors: dict[str, Tensor]) -> None:
    """Give a model the exported model's tensors.

    Args:
        tensors: all that are `expected`; those of a dense model lack mHC's, which start by `--mhc-init`.
    """
    own = model.state_dict()
    plain = not any("_hc." in name for name in tensors) and any(MAPPING in key or HEAD in key for key in own)
    state: dict[str, Any] = {}
    for key, value in own.items():
        if EXTRA not in key and not (plain and (MAPPING in key or key.startswith(HEAD))):
            state[key] = _gather(key, value, args, tensors)
    if plain:
        known = {PLAIN_NORM + key[len(NORM) :] if key.startswith(NORM) else key: state[key] for key in state}
        state = from_plain(known, mhc)
    state |= {key: value for key, value in own.items() if EXTRA in key}
    model.load_state_dict(state, assign=True)


def _gather(key: str, like: Tensor, args: Any, tensors: dict[str, Tensor]) -> Tensor:
    """One of Megatron's tensors, of those of the exported model that it is made of."""
    if key in weights.MODEL:
        return tensors[weights.MODEL[key]]
    layer = weights.LAYER.fullmatch(key)
    assert layer is not None  # `expected` would have raised
    prefix = f"model.layers.{layer[1]}."
    if expert := weights.EXPERT.fullmatch(layer[2]):
        whole = f"mlp.experts.experts.{expert[2] or expert[3]}"
        [name] = weights.of_layer(whole, like.to("meta"), args) or {}
        return tensors[prefix + name][int(expert[1] or expert[4])].clone()
    names = [prefix + name for name in weights.of_layer(layer[2], like.to("meta"), args) or {}]
    if len(names) == 1 and ".alpha_" in names[0]:
        whole, _, which = names[0].partition("_hc.alpha_")
        there = list(MHCConfig.from_args(args).parts)
        return tensors[whole + "_hc.alpha"][there.index(which)].reshape(1).clone()
    parts = [tensors[name] for name in names]
    if len(parts) == 3:  # for each group: its queries, its key, its value
        head = weights.head_size(args)
        groups = parts[1].shape[0] // head
        return torch.cat([part.unflatten(0, (groups, -1, head)) for part in parts], dim=1).flatten(0, 2)
    return torch.cat(parts) if len(parts) == 2 else parts[0]


def write(model: Any, args: Any, folder: Path, transformer_engine: bool) -> None:
    """Save a checkpoint of torch_dist as of a release, whose training has not begun.

    Args:
        transformer_engine: whether its layers' names are Transformer Engine's, not those of Megatron's own.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedBase

    metadata = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
    state = model.sharded_state_dict(metadata=dict(metadata))
    if transformer_engine:
        for entry in nested_values(state):
            if isinstance(entry, ShardedBase):
                entry.key = engines_name(entry.key, args)
    common = {"args": args, "iteration": 0, "checkpoint_version": 3.0}
    release = folder / "release"
    release.mkdir(parents=True)
    dist_checkpointing.save({**state, **common}, str(release), content_metadata=metadata)
    (folder / TRACKER).write_text("release")


def engines_name(key: str, args: Any) -> str:
    """Transformer Engine's name of a tensor in a checkpoint, by that of Megatron's own layers."""
    experts = any(_experts(args))
    layer = key.removeprefix("decoder.layers.").split(".")[0]
    dense = not (_experts(args)[int(layer)] if layer.isdecimal() else experts)
    if args.multi_latent_attention:
        key = key.replace("self_attention.q_layernorm.", "self_attention.linear_q_up_proj.layer_norm_")
        key = key.replace("self_attention.kv_layernorm.", "self_attention.linear_kv_up_proj.layer_norm_")
        return key.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_") if dense else key
    return key if dense else key.replace("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm.")


def _experts(args: Any) -> list[bool]:
    """Which layers have experts."""
    if not args.num_experts:
        return [False] * args.num_layers
    return with_experts(args.moe_layer_freq, args.num_layers)

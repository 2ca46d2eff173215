"""A parameter's name in the whole model, the values that follow from it, and a rank's share of them."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state as ps
from torch import Tensor

from megatron_mhc.checkpoint_parts import InParts

# A local module for each expert, or one grouped module with a weight for each.
_EXPERT = re.compile(r"(local_experts\.|experts\.linear_fc[12]\.(?:weight|bias))(\d+)")


def global_parameters(chunks: list[Any]) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Every parameter of this rank with its name in the whole model."""
    for chunk in chunks:
        core = chunk
        while hasattr(core, "module"):
            core = core.module
        experts = (core.config.num_moe_experts or 0) // core.config.expert_model_parallel_size
        for name, parameter in core.named_parameters():
            if found := re.match(r"decoder\.layers\.(\d+)\.", name):
                number = core.decoder.layers[int(found[1])].layer_number - 1
                name = name.replace(found[0], f"decoder.layers.{number}.", 1)
            if found := _EXPERT.search(name):
                number = int(found[2]) + ps.get_expert_model_parallel_rank() * experts
                name = name.replace(found[0], f"{found[1]}{number}")
            if name == "output_layer.weight" and core.share_embeddings_and_output_weights:
                name = "embedding.word_embeddings.weight"  # the last stage's copy of the tied weight
            yield name, parameter


def _tensor_parallel(parameter: Tensor) -> tuple[int, int]:
    """(rank, size) of the split of a parameter over TP, or expert TP; (0, 1) where it is replicated."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return 0, 1
    if getattr(parameter, "allreduce", True):
        return ps.get_tensor_model_parallel_rank(), ps.get_tensor_model_parallel_world_size()
    return ps.get_expert_tensor_parallel_rank(), ps.get_expert_tensor_parallel_world_size()


def shard(full: Tensor, parameter: Any) -> Tensor:
    """The part of a full tensor that `parameter` holds on this rank."""
    rank, size = _tensor_parallel(parameter)
    if size == 1:
        return full
    if sections := getattr(parameter, "sections", None):  # each of them split
        own = (part.chunk(size, parameter.partition_dim)[rank] for part in full.split(sections, dim=0))
        return torch.cat(list(own), dim=parameter.partition_dim)
    # stride 2: gate and up projection lie one after the other, each of them split
    stride = getattr(parameter, "partition_stride", 1)
    parts = full.chunk(size * stride, dim=parameter.partition_dim)
    return torch.cat(parts[rank::size], dim=parameter.partition_dim)


@torch.no_grad()
def fill(chunks: list[Any], std: float = 0.1) -> None:
    """Give every parameter values that depend on its global name alone.

    Mapping parameters get values of order one, so that their coefficients vary from token to token.

    Args:
        std: of weight matrices, but those of mappings and routers.
    """
    modules = [module for chunk in chunks for module in chunk.modules() if isinstance(module, InParts)]
    parts = {id(module.affine): module.parts for module in modules if module.parts}
    for name, parameter in global_parameters(chunks):
        shape = list(parameter.shape)
        if (size := _tensor_parallel(parameter)[1]) > 1:
            shape[parameter.partition_dim] *= size  # type: ignore[attr-defined]
        if id(parameter) in parts:
            at, own = name.removesuffix("affine"), parts[id(parameter)]
            full = torch.cat([_values(at + part, [size], std) for part, size in own.items()])
        else:
            full = _values(name, shape, std)
        parameter.copy_(shard(full, parameter))


def _values(name: str, shape: list[int], std: float) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    if "hyper_connection" in name or "norm.head" in name or "norm.contraction" in name:
        return noise * (0.1 if "proj" in name else 0.5) + (1.0 if "alpha" in name else 0.0)
    if "norm" in name and name.endswith("weight"):
        return 1 + 0.1 * noise
    return noise * (0.5 if "router" in name else std)


def gradient(parameter: Any) -> Tensor:
    """The gradient that a data-parallel wrapper of Megatron keeps."""
    return parameter.main_grad

"""One parameter in memory, several in a checkpoint: a module's entries by the names of their parts.

A data-parallel wrapper and an optimizer do something for every parameter, so small ones that always go
together are one. Checkpoints keep the parts' names, whatever the format:

    torch          `state_dict` splits, `load_state_dict` joins
    torch_dist     a ShardedTensorFactory does, of the model and of every state that an optimizer keeps of it
    fsdp_dtensor   has it whole: a DTensor, whose shards end inside of parts
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class InParts(MegatronModule):
    """A module with a one-dimensional parameter that checkpoints have in parts."""

    whole: str  # its name
    parts: Mapping[str, int]  # the parts' names and lengths, in order; empty where there is no such parameter

    def split(self, values: Tensor) -> dict[str, Tensor]:
        """Views of values: [sum of lengths], by the parts' names."""
        ends = accumulate(self.parts.values())
        sizes = self.parts.items()
        return {name: values[end - size : end] for (name, size), end in zip(sizes, ends, strict=True)}

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.parts and not isinstance(destination[prefix + self.whole], DTensor):
            parts = self.split(destination.pop(prefix + self.whole))
            destination.update({prefix + name: part for name, part in parts.items()})

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        if self.parts and prefix + self.whole not in state_dict:  # a factory has joined it
            values = dict(self.split(getattr(self, self.whole).detach()))
            for name, own in values.items():
                found = state_dict.pop(prefix + name, None)
                if found is None:
                    missing_keys += [prefix + name] * strict
                elif found.shape != own.shape:
                    error_msgs.append(
                        f"size mismatch for {prefix}{name}: {tuple(found.shape)} in the checkpoint, "
                        f"{tuple(own.shape)} in this model"
                    )
                else:
                    values[name] = found.to(own)
            state_dict[prefix + self.whole] = torch.cat(list(values.values()))
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    # By these names Megatron asks for parameters of several entries (--load-main-params-from-ckpt), see
    # DistributedOptimizer._synthesize_state_dict_params_for_model.

    def _synthetic_state_dict_key_suffixes(self) -> list[str]:
        return list(self.parts)[:1]

    def _synthesize_fused_qkv_down_weight(self, state_dict: dict[str, Any], prefix: str) -> None:
        if prefix + self.whole not in state_dict:
            state_dict[prefix + self.whole] = torch.cat([state_dict[prefix + name] for name in self.parts])

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> Any:
        entries = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if self.parts and prefix + self.whole not in entries:
            parts = {name: entries.pop(prefix + name) for name in self.parts}
            entries[prefix + self.whole] = self._factory(prefix, getattr(self, self.whole), parts)
        return entries

    def _factory(
        self, prefix: str, whole: nn.Parameter, entries: dict[str, ShardedTensor]
    ) -> ShardedTensorFactory:
        """Of the parts' own entries; an optimizer calls `build` with the states that it keeps of `whole`."""

        def build(key: str, values: Tensor, replica_id: Any, flattened_range: slice | None) -> Any:
            # An optimizer puts names of its own in front.
            at = key.removesuffix(self.whole)
            return {
                name: replace(
                    entries[name],
                    key=at + name,
                    data=part,
                    dtype=part.dtype,
                    replica_id=replica_id,
                    flattened_range=flattened_range,  # which Megatron refuses
                )
                for name, part in self.split(values.detach()).items()
            }

        def merge(parts: dict[str, Tensor]) -> Tensor:
            return torch.cat([parts[name] for name in self.parts])

        some = next(iter(entries.values()))
        return ShardedTensorFactory(prefix + self.whole, whole, build, merge, some.replica_id)


def in_shards(module: nn.Module, entries: dict[str, Any], prefix: str) -> dict[str, Any]:
    """A module's torch_dist entries, changed where FSDP2 has cut a parameter along its first dimension.

    Megatron's take the cuts for even ones. A parameter of `InParts` has the entries of its parts here too.
    """
    for name, parameter in module.named_parameters():
        if isinstance(parameter, DTensor):
            parts = module.parts if isinstance(module, InParts) and name == module.whole else None
            parts = parts or {name.rpartition(".")[2]: parameter.shape[0]}
            entries[prefix + name] = _shard_factory(prefix + name, parameter, parts, entries[prefix + name])
    return entries


def _shard_factory(
    key: str, whole: DTensor, parts: Mapping[str, int], megatrons: ShardedTensor
) -> ShardedTensorFactory:
    stacked = megatrons.prepend_axis_num  # 1 where layers are one entry
    shape, offset = megatrons.global_shape[:stacked], megatrons.global_offset[:stacked]
    with torch.no_grad():
        local = whole.to_local()  # by which Megatron's optimizers know it
    longest = -(-whole.shape[0] // whole.device_mesh.size())
    first = min(whole.device_mesh.get_local_rank() * longest, whole.shape[0])

    def build(key: str, values: Tensor, replica_id: Any, flattened_range: slice | None) -> Any:
        built, end, at = {}, 0, key[: key.rindex(".") + 1]
        for name, size in parts.items():
            begin, end = end, end + size
            ours = slice(max(begin, first), min(end, first + values.shape[0]))
            if ours.start < ours.stop:
                data = values.detach()[ours.start - first : ours.stop - first][(None,) * stacked]
                built[name] = ShardedTensor(
                    at + name,
                    data,
                    data.dtype,
                    tuple(data.shape),
                    (*shape, size, *data.shape[stacked + 1 :]),
                    (*offset, ours.start - begin, *[0] * (data.dim() - stacked - 1)),
                    axis_fragmentations=None,
                    replica_id=replica_id,
                )
        return built or LocalNonpersistentObject(None)  # of the last ranks, where there are few rows

    # Loading fills the shards in place.
    return ShardedTensorFactory(key, local, build, lambda loaded: local, megatrons.replica_id)

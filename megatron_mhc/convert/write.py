"""Checkpoints on disk, written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from megatron_mhc.checkpoint_keys import is_arithmetic
from megatron_mhc.convert.read import RUN_STATE, State, import_safetensors


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A path to write to; it becomes `target` at the end of the block, and vanishes on an error."""
    there = next(parent for parent in target.absolute().parents if parent.is_dir())
    with tempfile.TemporaryDirectory(dir=there, prefix=".mhc_convert_") as folder:
        path = Path(folder) / target.name
        yield path
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, target)


def write_torch_dist(state: State, common: State, folder: Path) -> None:
    """Save what `read_torch_dist` gave, under the names that `state` has now."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor

    sharded: State = dict(common)
    metadata = sharded.pop("content_metadata", None)
    for key, value in state.items():
        if isinstance(value, ShardedObject):
            value.key = key.split("/")[0]
            sharded[key] = value
        elif is_arithmetic(key):
            sharded[key] = ShardedObject(key, value, (1,), (0,))
        else:
            sharded[key] = ShardedTensor.from_rank_offsets(key, value)
    folder.mkdir(parents=True)
    dist_checkpointing.save(sharded, str(folder), content_metadata=metadata)


def write_torch(saved: State, file: Path) -> None:
    """Save one rank's file of a torch checkpoint, without the state of the run that saved it."""
    file.parent.mkdir(parents=True)
    torch.save({key: value for key, value in saved.items() if key not in RUN_STATE}, file)


def save_safetensors(tensors: dict[str, Any], path: Path) -> None:
    """Save a .safetensors file, which others may read where they may any new file."""
    path.touch()
    mode = path.stat().st_mode
    import_safetensors().torch.save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(mode)


def write_published(tensors: dict[str, Any], path: Path) -> None:
    """Save a .safetensors file, or torch.save's under any other ending."""
    if path.suffix == ".safetensors":
        save_safetensors(tensors, path)
    else:
        torch.save(tensors, path)

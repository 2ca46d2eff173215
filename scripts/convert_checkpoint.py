"""Convert a checkpoint's mHC parameters to other names, or start mHC from a plain checkpoint.

    # a trained plain GPT becomes an mHC checkpoint that --load takes (with --finetune)
    python scripts/convert_checkpoint.py --from plain --to plugin --load plain/ --save mhc/ \\
        --options num_residual_streams=4
    # for Megatron-LM's own mHC branches, and back
    python scripts/convert_checkpoint.py --from plugin --to megatron-dev --load mhc/ --save dev/
    python scripts/convert_checkpoint.py --from megatron-dev --to plugin --load dev/ --save mhc/ \\
        --options preset=deepseek_v4
    # mapping parameters alone, by the names of transformers' DeepSeek-V4; back into a plugin checkpoint
    python scripts/convert_checkpoint.py --from plugin --to transformers --load mhc/ --save hc.safetensors
    python scripts/convert_checkpoint.py --from transformers --to plugin --load hc.safetensors \\
        --into mhc/ --save new/ --options preset=deepseek_v4

Megatron's formats torch_dist and torch are read and written as they are found, by one process on a CPU,
which holds all weights (of one file for torch) in memory. Weights and arguments are kept; optimizer and
random states are dropped, so load the result with --finetune, or --no-load-optim --no-load-rng.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from megatron_mhc import convert
from megatron_mhc.config import MHCConfig
from megatron_mhc.testing import cpu

TRACKER = "latest_checkpointed_iteration.txt"
FILE = "model_optim_rng.pt"
# What belongs to the run that saved, not to the model.
RUN_STATE = ("optimizer", "opt_param_scheduler", "rng_state", "rerun_state_machine")
State = dict[str, Any]


def iteration_folder(folder: Path) -> Path:
    """The folder of the last iteration under --load, or `folder` if it is one itself."""
    if not (folder / TRACKER).exists():
        return folder
    last = (folder / TRACKER).read_text().strip()
    return folder / ("release" if last == "release" else f"iter_{int(last):07d}")


def format_of(folder: Path) -> str:
    """torch_dist or torch.

    Raises:
        ValueError: neither.
    """
    if (folder / "metadata.json").exists():
        return "torch_dist"
    if any(folder.glob(f"mp_rank_*/{FILE}")):
        return "torch"
    raise ValueError(f"{folder} has neither metadata.json (torch_dist) nor mp_rank_*/{FILE} (torch)")


@contextmanager
def single_process() -> Iterator[None]:
    """The process group of one rank that Megatron's loaders ask for; one that exists is used."""
    if torch.distributed.is_initialized():
        yield
        return
    with tempfile.TemporaryDirectory() as folder:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=0, world_size=1
        )
        try:
            yield
        finally:
            torch.distributed.destroy_process_group()


def read_torch_dist(folder: Path) -> tuple[State, State]:
    """A model's tensors and objects, put together from their shards, and the checkpoint's common state."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedObject
    from megatron.core.dist_checkpointing.serialization import load_sharded_metadata

    request = {
        key: item
        for key, item in load_sharded_metadata(str(folder)).items()
        if not item.key.startswith((*RUN_STATE, "chained_", "common_state"))  # chained_0.optimizer. ...
    }
    common = dist_checkpointing.load_common_state_dict(str(folder))
    loaded = dist_checkpointing.load(dict(request), str(folder), validate_access_integrity=False)
    # A plain model's final norm, by Transformer Engine, has its own extra state in this place.
    plugin = any(key.startswith("decoder.final_layernorm.norm.") for key in request)
    state: State = {}
    for key, item in request.items():
        if not isinstance(item, ShardedObject):
            state[key] = loaded[key]
        elif plugin and item.key == convert.ARITHMETIC:
            state[item.key] = loaded[key]
        else:
            item.data = loaded[key]
            state[key] = item
    return state, {key: value for key, value in common.items() if key not in RUN_STATE}


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
        elif key == convert.ARITHMETIC:
            sharded[key] = ShardedObject(key, value, (1,), (0,))
        else:
            sharded[key] = ShardedTensor.from_rank_offsets(key, value)
    folder.mkdir(parents=True)
    dist_checkpointing.save(sharded, str(folder), content_metadata=metadata)


def rank_files(folder: Path) -> list[tuple[Path, list[tuple[str, int]]]]:
    """The files of a torch checkpoint, each with its model chunks and their first layers (0-based)."""
    sizes: dict[tuple[int, int], int] = {}
    found = []
    for file in sorted(folder.glob(f"mp_rank_*/{FILE}")):
        saved = torch.load(file, map_location="cpu", weights_only=False, mmap=True)
        pipeline = getattr(saved.get("args"), "pipeline_model_parallel_size", None)
        if pipeline is None:
            raise ValueError(f"{file} holds no arguments: its pipeline stage is unknown")
        stage = int(file.parent.name.split("_")[3]) if pipeline > 1 else 0
        chunks = sorted(key for key in saved if key == "model" or key[:5] == "model" and key[5:].isdecimal())
        for chunk in chunks:
            at = int(chunk.removeprefix("model") or 0)
            sizes[at, stage] = 1 + max(
                (int(key.split(".")[2]) for key in saved[chunk] if key.startswith("decoder.layers.")),
                default=-1,
            )
        found.append((file, [(chunk, int(chunk.removeprefix("model") or 0), stage) for chunk in chunks]))
    first, total = {}, 0
    for at in sorted(sizes):  # layers run over all stages of a virtual stage, then on to the next one
        first[at] = total
        total += sizes[at]
    return [(file, [(chunk, first[at, stage]) for chunk, at, stage in chunks]) for file, chunks in found]


def convert_torch(folder: Path, into: Path | None, change: Callable[[State, int], State]) -> None:
    """Apply `change(entries, first layer)` to every model chunk of a torch checkpoint."""
    for file, chunks in rank_files(folder):
        saved = torch.load(file, map_location="cpu", weights_only=False)
        for chunk, first_layer in chunks:
            saved[chunk] = change(saved[chunk], first_layer)
        if into is not None:
            target = into / file.parent.name / FILE
            target.parent.mkdir(parents=True)
            torch.save({key: value for key, value in saved.items() if key not in RUN_STATE}, target)


def read_published(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of a .safetensors or .pt/.bin file, or of all of them in a folder."""
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors")) or sorted(path.glob("*.bin"))
    if not files:
        raise ValueError(f"{path}: no file, and no folder of *.safetensors or *.bin")
    out: dict[str, torch.Tensor] = {}
    for file in files:
        if file.suffix == ".safetensors":
            out.update(_safetensors().load_file(file))
        else:
            out.update(torch.load(file, map_location="cpu", weights_only=True))
    return out


def write_published(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Save a .safetensors file, or torch.save's under any other ending."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        _safetensors().save_file(tensors, path)
    else:
        torch.save(tensors, path)


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ValueError("*.safetensors: `pip install safetensors`, or use a .pt file") from error
    return safetensors.torch


def options_of(folder: Path, text: str | None) -> MHCConfig:
    """Options given, or those that a plugin checkpoint was trained under."""
    if text is not None:
        return MHCConfig.from_options(text)
    if format_of(folder) == "torch_dist":
        return convert.read_arithmetic(read_torch_dist(folder)[0])
    for file, chunks in rank_files(folder):
        saved = torch.load(file, map_location="cpu", weights_only=False, mmap=True)
        for chunk, _ in chunks:
            if convert.ARITHMETIC in saved[chunk]:
                return convert.read_arithmetic(saved[chunk])
    raise ValueError(f"{folder}: no {convert.ARITHMETIC}; is it a plugin's? Else give --options")


def main() -> None:
    """Convert by the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--from", dest="source", required=True, choices=convert.SOURCES)
    parser.add_argument("--to", dest="target", required=True, choices=convert.TARGETS)
    parser.add_argument("--load", type=Path, required=True, help="checkpoint folder, or published file")
    parser.add_argument("--save", type=Path, required=True, help="new checkpoint folder, or published file")
    parser.add_argument("--into", type=Path, help="checkpoint that published mappings are put into")
    parser.add_argument(
        "--options", help="mHC options key=value,... or a .yaml file; default: the checkpoint's"
    )
    given = parser.parse_args()
    cpu.install()  # Megatron's writer synchronises a GPU; here everything happens in memory
    cpu.patch_megatron()
    try:
        convert_files(given)
    except ValueError as error:
        sys.exit(f"convert_checkpoint.py: {error}")


def convert_files(given: argparse.Namespace) -> None:
    """Do what the command line asks.

    Raises:
        ValueError: naming what is wrong and the remedy.
    """
    source, target = given.source, given.target
    if given.save.exists() and (given.save.is_file() or any(given.save.iterdir())):
        raise ValueError(f"--save {given.save} is there already: give another")
    if (source in convert.PUBLISHED) != (given.into is not None):
        raise ValueError("--into belongs to --from transformers and --from deepseek, and both need it")
    if source in convert.PUBLISHED and target != "plugin":
        raise ValueError(f"--from {source} --to {target}: convert to plugin, and from there to {target}")
    if source == "plugin" and given.options is not None:
        raise ValueError("--options with --from plugin: drop it, the checkpoint says its own")
    base = given.into or given.load
    folder = iteration_folder(base)
    kind = format_of(folder)
    with single_process():
        if given.options is None and source not in ("plain", "plugin") and given.into is None:
            raise ValueError(f"--from {source} needs --options: its checkpoints do not say them")
        plain = source == "plain"
        mhc = MHCConfig.from_options(given.options or "") if plain else options_of(folder, given.options)
        convert.check(mhc, source, target)
        collected: dict[str, torch.Tensor] = {}
        published = read_published(given.load) if source in convert.PUBLISHED else {}

        def change(state: State, first_layer: int) -> State:
            if plain:
                return convert.from_plain(state, mhc, first_layer)
            if source in convert.PUBLISHED:
                return convert.from_published(published, source, mhc, state, first_layer)
            if target in convert.PUBLISHED:
                collected.update(convert.to_published(state, target, mhc, first_layer))
                return state
            return convert.rename(state, source, target, mhc)

        into = None if target in convert.PUBLISHED else given.save / folder.name
        if kind == "torch":
            convert_torch(folder, into, change)
        else:
            state, common = read_torch_dist(folder)
            state = change(state, 0)
            if into is not None:
                write_torch_dist(state, common, into)
        if into is None:
            write_published(collected, given.save)
        elif (base / TRACKER).exists():
            (given.save / TRACKER).write_text((base / TRACKER).read_text())
    print(f"{source} -> {target} ({kind}): {given.save}")
    for line in convert.differences(mhc, target if source in ("plain", "plugin") else source):
        print(f"  {line}")


if __name__ == "__main__":
    main()

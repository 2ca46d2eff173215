"""Checkpoints on disk: torch_dist, torch, and published tensors; what is read is data, unless it is trusted.

A torch_dist checkpoint's `.metadata` is a pickle and torch's files hold one each. Here they are read by
PyTorch's weights_only, with the classes that Megatron-Core registers for it, and by an unpickler that
knows the classes of DCP's metadata alone.
"""

from __future__ import annotations

import itertools
import json
import math
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata

from megatron_mhc.checkpoint_keys import FINAL_NORMS, is_arithmetic
from megatron_mhc.convert.published import is_mapping

TRACKER = "latest_checkpointed_iteration.txt"
FILE = "model_optim_rng.pt"
# What belongs to the run that saved, not to the model.
RUN_STATE = ("optimizer", "opt_param_scheduler", "rng_state", "rerun_state_machine")
State = dict[str, Any]
_CODE = "it holds {}, which loading would run as code: pass --trust if you trust where it is from"


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Make of any error inside one ValueError that begins with `what`, a file and where known its key."""
    try:
        yield
    # A broken file raises whatever its parser runs into, and DCP what is no Exception.
    except (Exception, CheckpointException) as error:
        cause: BaseException = error
        if isinstance(error, CheckpointException):  # of DCP, around the error of this one process
            cause = next(iter(error.failures.values()))[0]
        line = (str(cause).splitlines() or [""])[0]
        reason = line if isinstance(cause, ValueError) else f"{type(cause).__name__}: {line}"
        raise ValueError(f"{what}: {reason}") from error


def iteration_folder(folder: Path) -> Path:
    """The folder of the last iteration under a checkpoint's folder, or `folder` if it is one itself.

    Raises:
        ValueError: the tracker holds no iteration, or one that is not there.
    """
    tracker = folder / TRACKER
    if not tracker.exists():
        return folder
    with naming(str(tracker)):
        last = tracker.read_text().strip()
    if last != "release" and not (last.isascii() and last.isdecimal()):
        raise ValueError(f"{tracker} holds {last[:40]!r}, neither a number nor release")
    found = folder / ("release" if last == "release" else f"iter_{int(last):07d}")
    if not found.is_dir():
        raise ValueError(f"{tracker} names {last}, but {found} is absent")
    return found


def format_of(folder: Path) -> str:
    """torch_dist or torch.

    Raises:
        ValueError: neither, or another distributed format.
    """
    described = folder / "metadata.json"
    if described.exists():
        with naming(str(described)):
            backend = json.loads(described.read_text())["sharded_backend"]
        if backend != "torch_dist":
            raise ValueError(f"{described}: sharded_backend is {backend!r}, only torch_dist is read")
        return "torch_dist"
    if any(folder.glob(f"mp_rank_*/{FILE}")):
        return "torch"
    raise ValueError(f"{folder} has neither metadata.json (torch_dist) nor mp_rank_*/{FILE} (torch)")


def load_torch(file: Path, trust: bool) -> Any:
    """What torch.save wrote.

    Raises:
        ValueError: not readable, or not data alone and not trusted.
    """
    import megatron.core  # noqa: F401 - registers the classes that its checkpoints hold

    with naming(str(file)):
        return _load(file, trust, mmap=is_zipfile(file))


def _load(file: Path | BytesIO, trust: bool, **how: Any) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=not trust, **how)
    except pickle.UnpicklingError as error:
        if not is_zipfile(file):
            raise ValueError("it is damaged, or more than data and saved in torch's old format") from error
        if isinstance(file, BytesIO):
            file.seek(0)
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        reason = _CODE.format(", ".join(sorted(foreign))) if foreign else "it is damaged"
        raise ValueError(reason) from error


class _MetadataUnpickler(pickle.Unpickler):
    """Reads DCP's `.metadata`: its dataclasses, sizes and dtypes, and nothing else."""

    _CLASSES = {
        "torch.distributed.checkpoint.metadata": {
            "Metadata",
            "TensorStorageMetadata",
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "TensorProperties",
            "MetadataIndex",
            "StorageMeta",
            "_MEM_FORMAT_ENCODING",
        },
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
        "torch.serialization": {"_get_layout"},
        "torch": {"Size"},
        "collections": {"OrderedDict"},
        "pathlib": {"PosixPath"},
    }

    def find_class(self, module: str, name: str) -> Any:
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if dtype or name in self._CLASSES.get(module, ()):
            return super().find_class(module, name)
        raise ValueError(_CODE.format(f"{module}.{name}"))


class _Reader(dcp.FileSystemReader):
    """DCP's reader with the metadata read once, and as data."""

    def __init__(self, folder: Path, trust: bool):
        super().__init__(folder)
        file = folder / ".metadata"
        with naming(str(file)), open(file, "rb") as stream:
            self.metadata: Metadata = (pickle.Unpickler if trust else _MetadataUnpickler)(stream).load()
            _check_metadata(self.metadata)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.metadata


class _Planner(dcp.DefaultLoadPlanner):
    """DCP's planner with objects read as data."""

    def load_bytes(self, read_item: Any, value: BytesIO) -> None:
        self.state_dict[read_item.dest_index.fqn] = _load(value, trust=False)


def _check_metadata(metadata: Any) -> None:
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise ValueError(f"it holds a {type(metadata).__name__}, not a checkpoint's metadata")
    for index, info in metadata.storage_data.items():
        at = getattr(info, "offset", None), getattr(info, "length", None)
        if not isinstance(getattr(info, "relative_path", None), str) or {*map(type, at)} != {int}:
            raise ValueError(f"{getattr(index, 'fqn', index)}: it does not say where in which file it is")
    for key, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            inside = all(
                0 <= at and at + size <= limit
                for chunk in entry.chunks
                for at, size, limit in zip(chunk.offsets, chunk.sizes, entry.size, strict=True)
            )
            if not inside or sum(math.prod(chunk.sizes) for chunk in entry.chunks) != math.prod(entry.size):
                raise ValueError(f"{key}: its shards do not make up {list(entry.size)}")
        elif not isinstance(entry, BytesStorageMetadata):
            raise ValueError(f"{key} is neither a tensor nor an object")


def read_torch_dist(folder: Path, trust: bool = False) -> tuple[State, State]:
    """A model's tensors and objects, put together from their shards, and the checkpoint's common state.

    Raises:
        ValueError: naming the file and the key.
    """
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    reader = _Reader(folder, trust)
    entries = reader.metadata.state_dict_metadata

    def read(key: str) -> Any:
        files = {
            info.relative_path for index, info in reader.metadata.storage_data.items() if index.fqn == key
        }
        with naming(f"{folder}: {key} in {', '.join(sorted(files)) or 'no file'}"):
            entry = entries[key]
            if isinstance(entry, BytesStorageMetadata):
                state: State = {key: BytesIO()}
            else:
                state = {key: torch.empty(entry.size, dtype=entry.properties.dtype)}
            kind = dcp.DefaultLoadPlanner if trust else _Planner
            planner = kind(flatten_state_dict=False, flatten_sharded_tensors=False)
            dcp.load(state, storage_reader=reader, planner=planner, no_dist=True)
            if isinstance(entry, TensorStorageMetadata):
                return state[key]
            [value] = state[key]  # Megatron stores an object as a list of one
            return value

    plugin = any(final.is_ours(key) for key in entries for final in FINAL_NORMS)
    state: State = {}
    for key, entry in entries.items():
        if key.startswith((*RUN_STATE, "chained_", "common_state")):  # chained_0.optimizer. ...
            continue
        if isinstance(entry, TensorStorageMetadata):
            state[key] = read(key)
        # A plain model's final norm, by Transformer Engine, has its own extra state in this place.
        elif plugin and is_arithmetic(name := key.split("/")[0]):
            state[name] = read(key)
        else:
            with naming(f"{folder / '.metadata'}: {key}"):
                state[key] = ShardedObject.empty_from_unique_key(key)
            state[key].data = read(key)
    legacy = folder / "common.pt"
    if legacy.exists():
        common = load_torch(legacy, trust)
    else:
        common = read("common_state/shard_0_1")
    if not isinstance(common, dict):
        raise ValueError(f"{folder}: common_state is a {type(common).__name__}, not a dict")
    return state, {key: value for key, value in common.items() if key not in RUN_STATE}


def rank_files(folder: Path, trust: bool = False) -> tuple[list[tuple[Path, list[tuple[str, int]]]], int]:
    """The files of a torch checkpoint, each with its model chunks and their first layers (0-based).

    Returns:
        the files, and how many layers all stages have together.

    Raises:
        ValueError: naming the file that is absent, unreadable or no checkpoint's.
    """
    sizes: dict[tuple[int, int], int] = {}
    found, ranks, stages = [], set(), 1
    first: dict[tuple[int, int], int] = {}
    total = 0
    for file in sorted(folder.glob(f"mp_rank_*/{FILE}")):
        saved = load_torch(file, trust)
        with naming(str(file)):
            rank = tuple(int(part) for part in file.parent.name.split("_")[2:])
            stages = getattr(saved.get("args"), "pipeline_model_parallel_size", 0)
            if not isinstance(stages, int) or stages < 1:
                raise ValueError("it holds no arguments: its pipeline stage is unknown")
            stage = rank[1] if stages > 1 else 0
            chunks = sorted(
                key for key in saved if key == "model" or key[:5] == "model" and key[5:].isdecimal()
            )
            if not chunks:
                raise ValueError("it holds no model")
            for chunk in chunks:
                at = int(chunk.removeprefix("model") or 0)
                numbers = [
                    int(key.split(".")[2]) for key in saved[chunk] if key.startswith("decoder.layers.")
                ]
                count = 1 + max(numbers, default=-1)
                if sizes.setdefault((at, stage), count) != count:
                    raise ValueError(
                        f"{chunk} has {count} layers, another file of its stage {sizes[at, stage]}"
                    )
        ranks.add(rank)
        found.append((file, [(chunk, int(chunk.removeprefix("model") or 0), stage) for chunk in chunks]))
    _check_ranks(folder, ranks, stages)
    for place in sorted(sizes):  # layers run over all stages of a virtual stage, then on to the next one
        first[place] = total
        total += sizes[place]
    files = [(file, [(chunk, first[at, stage]) for chunk, at, stage in chunks]) for file, chunks in found]
    return files, total


def _check_ranks(folder: Path, ranks: set[tuple[int, ...]], stages: int) -> None:
    """mp_rank_T, mp_rank_T_P or mp_rank_T_P_E: every T, P and E with every other."""
    with naming(f"{folder}/mp_rank_*, of several layouts"):
        axes = [range(max(axis) + 1) for axis in zip(*ranks, strict=True)]
    if stages > 1:
        axes[1] = range(stages)
    for rank in itertools.product(*axes):
        if rank not in ranks:
            name = "mp_rank_" + "_".join(f"{part:0{3 if i else 2}d}" for i, part in enumerate(rank))
            raise ValueError(f"{folder / name / FILE} is absent")


def read_published(path: Path, trust: bool = False) -> State:
    """mHC's tensors of a .safetensors or .pt/.bin file, or of all of them in a folder.

    Raises:
        ValueError: naming the file and what is wrong.
    """
    out: State = {}
    for file in published_files(path):
        if file.suffix == ".safetensors":
            with naming(str(file)), import_safetensors().safe_open(file, "pt") as opened:
                tensors = {key: opened.get_tensor(key) for key in opened.keys() if is_mapping(key)}
        else:
            loaded = load_torch(file, trust)
            if not isinstance(loaded, dict) or not all(isinstance(key, str) for key in loaded):
                raise ValueError(f"{file} holds a {type(loaded).__name__}, not tensors by their names")
            tensors = {key: value for key, value in loaded.items() if is_mapping(key)}
        if twice := out.keys() & tensors.keys():
            raise ValueError(f"{file}: {min(twice)} is in another file too")
        out.update(tensors)
    return out


def published_files(path: Path) -> list[Path]:
    """The files of a folder's tensors, all of those that its index names; or the file itself.

    Raises:
        ValueError: naming the file that is absent, or a folder without any.
    """
    if path.is_file():
        return [path]
    for kind in ("*.safetensors", "*.bin"):
        files = sorted(path.glob(kind))
        for index in path.glob(f"{kind}.index.json"):
            with naming(str(index)):
                placed = json.loads(index.read_text())["weight_map"]
                for key, name in placed.items():
                    if not isinstance(name, str):
                        raise ValueError(f"{key} is in {name!r:.80}, which is no name of a file")
                names = set(placed.values())
            if missing := sorted(names - {file.name for file in files}):
                raise ValueError(f"{path / missing[0]} is absent, which {index.name} names")
        if files:
            return files
    raise ValueError(f"{path}: no file, and no folder of *.safetensors or *.bin")


def import_safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ValueError("*.safetensors: `pip install safetensors`, or use a .pt file") from error
    return safetensors

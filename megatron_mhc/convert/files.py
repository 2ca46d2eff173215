"""A checkpoint on disk converted into another one."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from megatron_mhc.checkpoint_keys import ARITHMETIC
from megatron_mhc.config import MHCConfig
from megatron_mhc.convert.check import count_layers, refuse_hybrid
from megatron_mhc.convert.names import PUBLISHED, check, check_state, differences, read_arithmetic, rename
from megatron_mhc.convert.plain import from_plain
from megatron_mhc.convert.published import check_left_over, from_published, to_published
from megatron_mhc.convert.read import (
    TRACKER,
    State,
    format_of,
    iteration_folder,
    load_torch,
    naming,
    rank_files,
    read_published,
    read_torch_dist,
)
from megatron_mhc.convert.write import staged, write_published, write_torch, write_torch_dist


def convert_files(
    source: str,
    target: str,
    load: Path,
    save: Path,
    *,
    options: str | None = None,
    into: Path | None = None,
    trust: bool = False,
) -> list[str]:
    """Convert a checkpoint; nothing is written unless all of it could be read and converted.

    Args:
        source, target: of `SOURCES` and `TARGETS`.
        load: a checkpoint's folder, or published tensors: a file or a folder of them.
        save: a new folder, or a published file.
        options: mHC options, key=value,... or a .yaml file; default: the checkpoint's own.
        into: the plugin checkpoint that published mappings are put into.
        trust: run what a checkpoint's pickles hold.

    Returns:
        what to tell the user: what was done, and what to set on the other side.

    Raises:
        ValueError: naming the flag, or the file and the key, what is wrong and the remedy.
    """
    if save.exists() and (save.is_file() or any(save.iterdir())):
        raise ValueError(f"--save {save} is there already: give another")
    if (source in PUBLISHED) != (into is not None):
        raise ValueError("--into belongs to --from transformers and --from deepseek, and both need it")
    if source in PUBLISHED and target != "plugin":
        raise ValueError(f"--from {source} --to {target}: convert to plugin, and from there to {target}")
    if source == "plugin" and options is not None:
        raise ValueError("--options with --from plugin: drop it, the checkpoint says its own")
    if options is None and source not in ("plain", "plugin") and into is None:
        raise ValueError(f"--from {source} needs --options: its checkpoints do not say them")
    base = into or load
    folder = iteration_folder(base)
    opened = (_TorchDist if format_of(folder) == "torch_dist" else _Torch)(folder, trust)
    if options is not None or source == "plain":
        mhc = MHCConfig.from_options(options or "")
    else:
        mhc = opened.options()
    check(mhc, source, target)
    published: State = {}
    if source in PUBLISHED:
        published = read_published(load, trust)
        with naming(str(load)):
            check_left_over(published, source, opened.layers, mhc)
    collected: dict[str, Tensor] = {}

    def change(state: State, first_layer: int) -> State:
        refuse_hybrid(state)
        if source == "plain":
            return from_plain(state, mhc, first_layer)
        if source in PUBLISHED:
            check_state(state, "plugin", mhc)  # here, so that its errors name its file and not --load
            with naming(str(load)):
                return from_published(published, source, mhc, state, first_layer)
        if target not in PUBLISHED:
            return rename(state, source, target, mhc)
        for key, value in to_published(state, target, mhc, first_layer).items():
            if not torch.equal(collected.setdefault(key, value), value):
                raise ValueError(f"{key} differs from that of another tensor-parallel rank")
        return state

    with staged(save) as path:
        if target in PUBLISHED:
            opened.convert(change, None)
            write_published(collected, path)
        else:
            opened.convert(change, path / folder.name)
            if (base / TRACKER).exists():
                (path / TRACKER).write_text((base / TRACKER).read_text())
    done = f"{source} -> {target} ({opened.kind}): {save}"
    return [done, *differences(mhc, target if source in ("plain", "plugin") else source)]


class _TorchDist:
    """A torch_dist checkpoint, read whole."""

    kind = "torch_dist"

    def __init__(self, folder: Path, trust: bool):
        self.folder = folder
        self.state, self.common = read_torch_dist(folder, trust)
        with naming(str(folder)):
            self.layers = count_layers(self.state)

    def options(self) -> MHCConfig:
        with naming(str(self.folder)):
            refuse_hybrid(self.state)
            return read_arithmetic(self.state)

    def convert(self, change: Callable[[State, int], State], into: Path | None) -> None:
        with naming(str(self.folder)):
            state = change(self.state, 0)
        if into is not None:
            with single_process():
                write_torch_dist(state, self.common, into)


class _Torch:
    """A torch checkpoint, read file by file."""

    kind = "torch"

    def __init__(self, folder: Path, trust: bool):
        self.folder, self.trust = folder, trust
        self.files, self.layers = rank_files(folder, trust)

    def options(self) -> MHCConfig:
        for file, chunks in self.files:
            saved = load_torch(file, self.trust)
            for chunk, _ in chunks:
                with naming(str(file)):
                    refuse_hybrid(saved[chunk])
                if ARITHMETIC in saved[chunk]:
                    with naming(str(file)):
                        return read_arithmetic(saved[chunk])
        raise ValueError(f"{self.folder}: no {ARITHMETIC}; is it a plugin's? Else give --options")

    def convert(self, change: Callable[[State, int], State], into: Path | None) -> None:
        for file, chunks in self.files:
            saved = load_torch(file, self.trust)
            for chunk, first_layer in chunks:
                with naming(f"{file}: {chunk}"):
                    saved[chunk] = change(saved[chunk], first_layer)
            if into is not None:
                write_torch(saved, into / file.parent.name / file.name)


@contextmanager
def single_process() -> Iterator[None]:
    """The process group of one rank that Megatron's writer asks for; one that exists is used."""
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

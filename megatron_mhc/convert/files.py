"""A checkpoint on disk converted into another one."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_mhc.checkpoint_keys import ARITHMETIC, FINAL_NORMS
from megatron_mhc.config import MHCConfig
from megatron_mhc.convert import pairs
from megatron_mhc.convert.check import check_finite, count_layers
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
    model: str | None = None,
    trust: bool = False,
) -> list[str]:
    """Convert a checkpoint; nothing is written unless all of it could be read and converted.

    Args:
        source, target: of `SOURCES` and `TARGETS`.
        load: a checkpoint's folder, or published tensors: a file or a folder of them.
        save: a new folder, or a published file.
        options: mHC options, key=value,... or a .yaml file; default: the checkpoint's own.
        into: the plugin checkpoint that published mappings are put into.
        model: of `pairs.MODELS`, which the checkpoint becomes; default: what it is.
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
    built = opened.model()
    model = model or built
    if options is not None or source == "plain":
        mhc = MHCConfig.from_options(options or "")
    else:
        mhc = opened.options()
    moves = model != built
    if not (moves and source == target == "plugin"):
        check(mhc, source, target)
    foreign = built == "hybrid" and source not in ("plain", "plugin")
    if foreign or model == "hybrid" and (target != "plugin" or into is not None):
        first = "by --from plugin --to plugin --model gpt first" if foreign or into else "by --model gpt"
        raise ValueError(
            f"--from {source} --to {target} is for a GPT's checkpoint, not a HybridModel's: make a GPT of "
            f"one of pairs (*-, *E, +-, +E) {first}"
        )
    pattern = opened.pattern(built) if moves else ""
    if moves and model == "gpt":
        pairs.check_pairs(pattern)
    published: State = {}
    if source in PUBLISHED:
        published = read_published(load, trust)
        with naming(str(load)):
            check_left_over(published, source, opened.layers, mhc)
    collected: dict[str, Tensor] = {}
    std = getattr(opened.args(), "init_method_std", 0.02) if source == "plain" else 0.02  # reads a file

    def change(state: State, first_layer: int) -> State:
        if moves and model == "gpt":
            state, first_layer = pairs.to_gpt(state, opened.stacks), first_layer // 2
        state = named(state, first_layer)
        return pairs.to_hybrid(state) if moves and model == "hybrid" else state

    def named(state: State, first_layer: int) -> State:
        if source == "plain":
            hybrid = model == built == "hybrid"
            return from_plain(state, mhc, first_layer, init_method_std=std, hybrid=hybrid)
        if source == target:
            if mhc.is_gated or mhc.parts:
                check_state(state, "plugin", mhc)
            else:
                check_finite(state)
            return state
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

    def becomes(args: Any) -> Any:
        return pairs.to_model(args, model, pattern) if moves else args

    with staged(save) as path:
        if target in PUBLISHED:
            opened.convert(change, None)
            write_published(collected, path)
        else:
            opened.convert(change, path / folder.name, becomes)
            if (base / TRACKER).exists():
                (path / TRACKER).write_text((base / TRACKER).read_text())
    done = f"{source} -> {target} ({opened.kind}): {save}"
    lines = [f"a {pairs.NAMES[model]}: {pairs.settings(model, pattern)}"] if moves else []
    return [done, *lines, *differences(mhc, target if source in ("plain", "plugin") else source)]


class _TorchDist:
    """A torch_dist checkpoint, read whole."""

    kind = "torch_dist"

    def __init__(self, folder: Path, trust: bool):
        self.folder = folder
        self.state, self.common = read_torch_dist(folder, trust)
        with naming(str(folder)):
            self.layers = count_layers(self.state)

    @property
    def stacks(self) -> bool:
        """Whether Megatron asks for a GPT's layers as one tensor where they are alike, as this was saved."""
        saved = self.common.get("content_metadata") or {}
        return not (saved.get("singleton_local_shards") or saved.get("non_homogeneous_layers"))

    def model(self) -> str:
        """Which of `pairs.MODELS` it is."""
        return pairs.model_of(self.state) or "gpt"

    def pattern(self, model: str) -> str:
        """The hybrid pattern of its layers."""
        with naming(str(self.folder)):
            return pairs.pattern_of(self.state, model)

    def args(self) -> Any:
        """Of the run that saved it."""
        return self.common.get("args")

    def options(self) -> MHCConfig:
        with naming(str(self.folder)):
            return read_arithmetic(self.state)

    def convert(
        self,
        change: Callable[[State, int], State],
        into: Path | None,
        becomes: Callable[[Any], Any] = lambda args: args,
    ) -> None:
        with naming(str(self.folder)):
            state = change(self.state, 0)
        if into is not None:
            common = self.common | {key: becomes(args) for key, args in self.common.items() if key == "args"}
            with single_process():
                write_torch_dist(state, common, into)


class _Torch:
    """A torch checkpoint, read file by file."""

    kind = "torch"

    def __init__(self, folder: Path, trust: bool):
        self.folder, self.trust = folder, trust
        self.files, self.layers = rank_files(folder, trust)

    stacks = False

    def model(self) -> str:
        """As `_TorchDist.model`, by the last stage."""
        found = (pairs.model_of(saved[chunk]) for _, saved, chunk, _ in self._chunks())
        return next(filter(None, found), "gpt")

    def pattern(self, model: str) -> str:
        """As `_TorchDist.pattern`, with `|` between the stages."""
        parts: dict[int, str] = {}
        for file, saved, chunk, first_layer in self._chunks():
            with naming(f"{file}: {chunk}"):
                part = pairs.pattern_of(saved[chunk], model)
                if not part:
                    raise ValueError("a pipeline stage without layers: save as torch_dist")
                parts[first_layer] = part
        return "|".join(parts[first] for first in sorted(parts))

    def args(self) -> Any:
        """As `_TorchDist.args`."""
        return load_torch(self.files[0][0], self.trust).get("args")

    def options(self) -> MHCConfig:
        for file, saved, chunk, _ in self._chunks():
            if any(final.arithmetic in saved[chunk] for final in FINAL_NORMS):
                with naming(str(file)):
                    return read_arithmetic(saved[chunk])
        raise ValueError(f"{self.folder}: no {ARITHMETIC}; is it a plugin's? Else give --options")

    def convert(
        self,
        change: Callable[[State, int], State],
        into: Path | None,
        becomes: Callable[[Any], Any] = lambda args: args,
    ) -> None:
        for file, chunks in self.files:
            saved = load_torch(file, self.trust)
            for chunk, first_layer in chunks:
                with naming(f"{file}: {chunk}"):
                    saved[chunk] = change(saved[chunk], first_layer)
            if into is not None:
                saved["args"] = becomes(saved.get("args"))
                write_torch(saved, into / file.parent.name / file.name)

    def _chunks(self) -> Iterator[tuple[Path, State, str, int]]:
        for file, chunks in self.files:
            saved = load_torch(file, self.trust)
            for chunk, first_layer in chunks:
                yield file, saved, chunk, first_layer


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

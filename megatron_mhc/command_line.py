"""Read a launch of Megatron as Megatron would, without building a model; a CPU will do."""

from __future__ import annotations

import argparse
import io
import os
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

from megatron_mhc.config import MHCConfig


class Command(NamedTuple):
    """The words of a launch, taken apart.

    environment: of the assignments in front. program: script or modules that are run, in their order.
    world: torchrun's number of processes, None if it is not said.
    """

    environment: dict[str, str]
    program: tuple[str, ...]
    arguments: list[str]
    world: int | None


def recipe(path: str) -> list[str]:
    """The words of a recipe's file, for argparse, which prints what an ArgumentTypeError says."""
    try:
        return shlex.split(Path(path).read_text(), comments=True)
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{path} cannot be read: {error}") from None


def take_apart(words: list[str]) -> Command:
    """Find the arguments of Megatron in a command line, which may be nothing but them."""
    environment = {}
    for word in words:
        if not (found := re.fullmatch(r"([A-Za-z_]\w*)=(.*)", word, re.DOTALL)):
            break
        environment[found[1]] = found[2]
    words = words[len(environment) :]
    start, program = 0, []
    for i, word in enumerate(words):
        if word == "-m" and i + 1 < len(words):
            start = i + 2
        elif word.endswith(".py") and not word.startswith("-"):
            start = i + 1
        else:
            continue
        program.append(words[start - 1])
    launcher: dict[str, str] = {}
    for i, word in enumerate(words[:start]):
        name, _, value = word.partition("=")
        launcher[name.replace("_", "-")] = value or words[i + 1] if i + 1 < start else value
    world = None
    if (processes := launcher.get("--nproc-per-node", "")).isdigit():
        nodes = launcher.get("--nnodes", "1")
        world = int(processes) * int(nodes) if nodes.isdigit() else None
    return Command(environment, tuple(program), words[start:], world)


def parse(words: list[str], world: int | None, hybrid: bool = False) -> tuple[Any, Any, MHCConfig]:
    """Megatron's arguments, checked by Megatron, its transformer config and the mHC options.

    Args:
        hybrid: whether the caller knows what to do with a HybridModel's.

    Raises:
        ValueError: what mHC refuses of them, or a HybridModel.
    """
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    args, config, mhc = read(words, world)
    from megatron_mhc.parallel import validate
    from megatron_mhc.refusals import HYBRID, refuse

    if config.is_hybrid_model and not hybrid:
        raise ValueError("--hybrid-layer-pattern: this is for a GPT's layers; drop it")
    validate(config, mhc)
    if config.is_hybrid_model:
        refuse(HYBRID, config, mhc)
    return args, config, mhc


def read(words: list[str], world: int | None, ignore_unknown: bool = False) -> tuple[Any, Any, MHCConfig]:
    """`parse` without mHC's refusals; `ignore_unknown` lets a script's own flags pass."""
    import torch

    if not torch.cuda.is_available():
        from megatron_mhc.testing import cpu

        cpu.install(pretend_cuda=True)  # Megatron's checks ask for a GPU's properties
    from megatron.training.arguments import core_transformer_config_from_args, parse_args, validate_args

    from megatron_mhc.pretrain_gpt import add_args

    sys.argv = [sys.argv[0], *words]
    args = parse_args(add_args, ignore_unknown)  # exits on a word that it does not know, with its own message
    sizes = (args.tensor_model_parallel_size, args.pipeline_model_parallel_size, args.context_parallel_size)
    smallest = sizes[0] * sizes[1] * sizes[2] * args.expert_model_parallel_size
    args.rank, args.world_size = 0, world or smallest
    with _transformer_engine():
        with redirect_stdout(io.StringIO()):  # the list of all arguments
            validate_args(args, {})
        return args, core_transformer_config_from_args(args), MHCConfig.from_args(args)


@contextmanager
def _transformer_engine() -> Iterator[None]:
    """Let Megatron's checks find what a recipe asks of TransformerEngine; nothing is run with it."""
    from unittest import mock

    from megatron.core.extensions.transformer_engine import HAVE_TE
    from megatron.core.models.common.embeddings import rope_utils
    from megatron.core.transformer import transformer_config
    from megatron.core.transformer.moe import moe_utils

    if HAVE_TE:  # it answers for itself
        yield
        return
    kernels = [(moe_utils, name) for name in vars(moe_utils) if name.startswith("fused_")]
    kernels += [(rope_utils, name) for name in vars(rope_utils) if name.startswith("fused_apply_")]
    with ExitStack() as stack:
        for module, name in kernels:
            if getattr(module, name) is None:
                stack.enter_context(mock.patch.object(module, name, object()))
        stack.enter_context(mock.patch.object(transformer_config, "is_te_min_version", lambda _: True))
        yield

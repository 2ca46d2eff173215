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


# What runs another program behind options of its own: which of these take a value.
_TORCHRUN = "torch.distributed.run"
_RUNNERS: dict[str, frozenset[str]] = {
    "python": frozenset(("-W", "-X", "--check-hash-based-pycs")),
    _TORCHRUN: frozenset(),  # see `_takes_value`
    "torch.distributed.launch": frozenset(),
    "megatron_mhc.launch": frozenset(),
    "megatron_mhc.testing.cpu": frozenset(),
    "cProfile": frozenset(("-o", "-s", "--outfile", "--sort")),
    "debugpy": frozenset(("--listen", "--connect", "--log-to")),
    "pdb": frozenset(("-c",)),
}
_PYTHON = re.compile(r"python[\d.]*")
_OF_UV = "--python -p --with --with-editable --extra --group --env-file --directory --project".split()


def take_apart(words: list[str]) -> Command:
    """Find the arguments of Megatron in a command line, which may be nothing but them.

    What starts the program (srun, uv, torchrun, python, a module that runs another) is passed over. Behind
    the program every word is its argument, whatever it ends in.
    """
    environment: dict[str, str] = {}
    launcher: dict[str, str] = {}
    runner, rest = _first(words, environment)
    program: list[str] = []
    while runner is not None:
        at, is_module = _target(rest, runner, launcher)
        if at is None:
            break
        if not is_module and _PYTHON.fullmatch(os.path.basename(rest[at])):  # of torchrun --no-python
            runner = "python"
        else:
            program.append(rest[at])
            runner = rest[at] if is_module and rest[at] in _RUNNERS else None
        rest = rest[at + 1 :]
    world = None
    if (processes := launcher.get("--nproc-per-node", "")).isdigit():
        nodes = launcher.get("--nnodes", "1")
        world = int(processes) * int(nodes) if nodes.isdigit() else None
    return Command(environment, tuple(program), rest, world)


def _first(words: list[str], environment: dict[str, str]) -> tuple[str | None, list[str]]:
    """What runs a program first, and the words behind it; None and all words where nothing does.

    Args:
        environment: gets the assignments in front of it.
    """
    uv, start = False, 0
    for i, word in enumerate(words):
        name = os.path.basename(word)
        modules = ("-m", "--module") if uv else ("-m",) if i == start else ()
        if found := re.fullmatch(r"([A-Za-z_]\w*)=(.*)", word, re.DOTALL):
            environment[found[1]] = found[2]
            start += i == start
        elif i == start and word.startswith("-") and word != "-m":
            break  # arguments alone
        elif uv and words[i - 1] in _OF_UV:
            continue
        elif name == "torchrun":
            return _TORCHRUN, words[i + 1 :]
        elif _PYTHON.fullmatch(name):
            return "python", words[i + 1 :]
        elif name.endswith(".py") and not word.startswith("-") or word in modules:
            return "python", words[i:]
        else:
            uv |= name == "uv"
    return None, words[start:]


def _target(words: list[str], runner: str, launcher: dict[str, str]) -> tuple[int | None, bool]:
    """Where among the words behind a runner that is which it runs, and whether it is a module.

    Args:
        launcher: gets the runner's options and their values.
    """
    is_module, at = False, 0
    while at < len(words):
        word, following = words[at], words[at + 1 : at + 2]
        name, given, value = word.partition("=")
        name = name.replace("_", "-")
        if not word.startswith("-"):
            return at, is_module
        at += 1
        if word in ("-m", "--module"):
            is_module = True
        elif word == "-c" and runner == "python":
            break
        elif not given and _takes_value(name, runner, following):
            launcher[name] = following[0]
            at += 1
        else:
            launcher[name] = value
    return None, is_module


def _takes_value(option: str, runner: str, following: list[str]) -> bool:
    """Whether the word that follows an option is its value; an unknown option's is, unless it is a script."""
    if not following:
        return False
    if not runner.startswith("torch.distributed."):
        return option in _RUNNERS[runner]
    from torch.distributed.run import get_args_parser

    for action in get_args_parser()._actions:
        if option in (name.replace("_", "-") for name in action.option_strings):
            return action.nargs != 0
    return not following[0].startswith("-") and not following[0].endswith(".py")


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

"""What is installed, what a launch would run by, and what is in its way: the text to paste into an issue.

    python -m megatron_mhc doctor
    python -m megatron_mhc doctor -- torchrun --nproc-per-node 8 pretrain_gpt.py <arguments> \\
        --spec megatron_mhc.specs gpt_mhc_spec
    python -m megatron_mhc doctor --config recipe.txt
    python -m megatron_mhc doctor -- --num-layers 24 --hidden-size 2560 <arguments of pretrain_gpt>

Assignments in front of the launch count (MEGATRON_MHC=... torchrun ...). Nothing is trained or built, the
command line itself is not printed, and a CPU will do. Exit status: 1 where something is in the way.
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout

from megatron_mhc import __version__, command_line
from megatron_mhc.doctor.launch import Launch
from megatron_mhc.doctor.machine import Machine
from megatron_mhc.doctor.part import Part, shortened


def main() -> None:
    """Print the report."""
    own, given = sys.argv[1:], []
    if "--" in own:
        own, given = own[: own.index("--")], own[own.index("--") + 1 :]
    parser = argparse.ArgumentParser(
        prog="python -m megatron_mhc doctor",
        usage="%(prog)s [-h] [--config FILE] [-- COMMAND]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=command_line.recipe, help="file with a launch or its arguments")
    text, healthy = report((parser.parse_args(own).config or []) + given)
    print(text)
    sys.exit(not healthy)


def report(words: list[str]) -> tuple[str, bool]:
    """The text, and whether nothing is in the way.

    Args:
        words: of a launch; none to report of the machine alone.
    """
    command = command_line.take_apart(words)
    os.environ.update(command.environment)
    with _quiet():
        machine = Machine()
        examined: list[Part] = [machine, Launch(command, machine.gpus)] if words else [machine]
    lines = [f"megatron-mhc {__version__} doctor"]
    for part in examined:
        lines += ["", part.title]
        lines += [f"  {name:<20} {shortened(text)}" for name, text in part.rows]
    lines += ["", "in the way"]
    found = list(dict.fromkeys(shortened(text) for part in examined for text in part.in_the_way))
    lines += [f"  {i}. {text}" for i, text in enumerate(found, 1)] or ["  nothing found"]
    return "\n".join(lines), not found


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what imports and Megatron's checks print out of the report."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)

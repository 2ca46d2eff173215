"""Memory of a recipe's decoder layers on every pipeline rank, without building the model.

    python -m megatron_mhc.recompute --config recipe.txt
    python -m megatron_mhc.recompute -- --num-layers 24 --hidden-size 2048 ... --mhc-num-residual-streams 4

The file holds Megatron's arguments, or a whole command line that ends in them, as
`DATA=mock DRY_RUN=1 bash examples/train.sh 27b mhc` prints it; `#` starts a comment. Printed are the
activations of the decoder layers, in GiB: what they keep for the backward passes in flight under the
schedule (vanilla: under Megatron's), plus the one block that is replayed. Not counted: weights, gradients,
optimizer, embedding, loss, and what a backward pass needs while it runs. See `inventory` for the layers that
are assumed.
"""

from __future__ import annotations

import argparse
import io
import os
import shlex
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_mhc.config import MHCConfig
from megatron_mhc.pipeline.plans import passes_in_flight
from megatron_mhc.recompute import inventory, plan
from megatron_mhc.stages import layers_of_rank


@dataclass(frozen=True)
class Rank:
    """The decoder layers of one pipeline rank.

    Args:
        layers: of each model chunk.
        in_flight: passes of chunks held at once under mHC's schedule.
        vanilla: bytes without mHC, at the peak, under Megatron's schedule.
        stored: the largest chunk's sub-layers under mHC without replay; replayed: with.
    """

    layers: list[int]
    in_flight: int
    vanilla: int
    stored: list[plan.SubLayerBytes]
    replayed: list[plan.SubLayerBytes]

    def mhc(self) -> int:
        """Bytes with mHC and nothing dropped."""
        return plan.without_replay(self.stored, self.in_flight)

    def blocks(self, setting: str) -> list[int]:
        """The blocks of `--mhc-recompute-layer-num`."""
        return plan.choose(setting, self.replayed, self.in_flight)

    def with_blocks(self, setting: str) -> int:
        """Bytes with mHC and these blocks."""
        return plan.peak(self.replayed, self.blocks(setting), self.in_flight)


def ranks(config: Any, mhc: MHCConfig, sequence: int, micro_batch: int, micro_batches: int) -> list[Rank]:
    """Count every pipeline rank of a TransformerConfig.

    Args:
        sequence, micro_batch: tokens of a sequence, and sequences of a micro-batch.
        micro_batches: of one step on one data-parallel rank.
    """
    n = mhc.num_residual_streams
    tokens = sequence * micro_batch // config.context_parallel_size
    if config.sequence_parallel:
        tokens //= config.tensor_model_parallel_size
    one = tokens * config.hidden_size * inventory.itemsize(config)
    found = []
    for rank in range(config.pipeline_model_parallel_size):
        chunks = layers_of_rank(config, rank)
        held = passes_in_flight(config, mhc, rank, micro_batches)
        plain = passes_in_flight(config, MHCConfig(), rank, micro_batches)
        facts = [f for layer in max(chunks, key=len) for f in _sublayers(config, layer)]
        inside = dict(one=one, tokens=tokens, n=n)
        stored = [inventory.sublayer(**inside, norm=m, inside=i, replayed=False) for m, i in facts]
        again = dict(replayed=True, coefficients=mhc.recompute_coefficients)
        replayed = [inventory.sublayer(**inside, norm=m, inside=i, **again) for m, i in facts]
        vanilla = plain * sum(one * (1 + norm) + tokens * saved for norm, saved in facts)
        found.append(Rank([len(c) for c in chunks], held, vanilla, stored, replayed))
    return found


def _sublayers(config: Any, layer: int) -> list[tuple[bool, int]]:
    """Of attention and MLP of a layer: whether a norm of its own stands in front, and bytes inside."""
    pattern = config.moe_layer_freq
    is_moe = config.num_moe_experts is not None and (
        bool(pattern[layer]) if isinstance(pattern, list) else layer % pattern == 0
    )
    mine = not (
        config.recompute_granularity == "selective" and "layernorm" in (config.recompute_modules or [])
    )
    return [
        (mine and config.multi_latent_attention, inventory.attention(config)),
        (mine and is_moe, inventory.mlp(config, is_moe)),
    ]


def table(found: list[Rank], sizes: list[int], n: int) -> str:
    """The printed table: a row for each setting, a column for each pipeline rank, in GiB."""

    def row(name: str, cells: list[str]) -> str:
        return f"{name:<24}" + "".join(f"{cell:>14}" for cell in cells)

    def gib(values: list[int]) -> list[str]:
        return [f"{value / plan.GIB:.3f}" for value in values]

    if not any(r.stored for r in found):
        raise ValueError("--num-layers: no pipeline rank has a decoder layer")
    columns = [(i, r) for i, r in enumerate(found) if r.stored]  # a stage may hold the loss alone
    found = [r for _, r in columns]
    lines = [
        row("pipeline rank", [str(i) for i, _ in columns]),
        row("layers", ["+".join(map(str, r.layers)) for r in found]),
        row("passes in flight", [str(r.in_flight) for r in found]),
        row("vanilla", gib([r.vanilla for r in found])),
        row("mHC", gib([r.mhc() for r in found])),
    ]
    for size in sizes:
        lines.append(row(f"mHC, blocks of {size}", gib([r.with_blocks(str(size)) for r in found])))
    lines.append(row("mHC, auto", gib([r.with_blocks("auto") for r in found])))
    lines.append(
        row("  over vanilla", [f"{100 * (r.with_blocks('auto') / r.vanilla - 1):.1f} %" for r in found])
    )
    for i, r in columns:
        rule = plan.closed_form(n, len(r.replayed))
        lines.append(
            f"rank {i}: auto takes blocks of {', '.join(map(str, r.blocks('auto')))} sub-layers; best equal "
            f"blocks {plan.best_uniform(r.replayed, r.in_flight)}; Eq. (20) {rule:.1f}"
        )
    return "\n".join(lines)


def recipe(path: str) -> list[str]:
    """The words of a recipe's file, for argparse, which prints what an ArgumentTypeError says."""
    try:
        return shlex.split(Path(path).read_text(), comments=True)
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{path} cannot be read: {error}") from None


def megatron_arguments(words: list[str]) -> tuple[list[str], int | None]:
    """Split a command line: what follows the script or module, and torchrun's number of processes."""
    start, world = 0, None
    for i, word in enumerate(words):
        if word == "-m" and i + 1 < len(words):
            start = i + 2
        elif word.endswith(".py") and not word.startswith("-"):
            start = i + 1
    launcher = dict(zip(words[:start], words[1:start], strict=False))
    if "--nproc-per-node" in launcher:
        world = int(launcher["--nproc-per-node"]) * int(launcher.get("--nnodes", 1))
    return words[start:], world


def parse(words: list[str], world: int | None) -> tuple[Any, Any, MHCConfig]:
    """Megatron's arguments, checked by Megatron, its transformer config and the mHC options."""
    import torch

    if not torch.cuda.is_available():
        from megatron_mhc.testing import cpu

        cpu.install(pretend_cuda=True)  # Megatron's checks ask for a GPU's properties
    from megatron.training.arguments import core_transformer_config_from_args, parse_args, validate_args

    from megatron_mhc.parallel import validate
    from megatron_mhc.pretrain_gpt import add_args

    sys.argv = [sys.argv[0], *words]
    args = parse_args(add_args)  # exits on a word that it does not know, with its own message
    sizes = (args.tensor_model_parallel_size, args.pipeline_model_parallel_size, args.context_parallel_size)
    smallest = sizes[0] * sizes[1] * sizes[2] * args.expert_model_parallel_size
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    args.rank, args.world_size = 0, world or smallest
    with redirect_stdout(io.StringIO()):  # the list of all arguments
        validate_args(args, {})
    config, mhc = core_transformer_config_from_args(args), MHCConfig.from_args(args)
    validate(config, mhc)
    return args, config, mhc


def main() -> None:
    """Print the table of a recipe."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_mhc.recompute", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--config", type=recipe, help="file with Megatron's arguments, or a command line")
    parser.add_argument("--world-size", type=int, help="ranks; default: torchrun's, or the fewest possible")
    parser.add_argument("--sizes", default="1,2,3,4,6,8,12,16", help="block sizes to print")
    own = sys.argv[1:]
    extra = own[own.index("--") + 1 :] if "--" in own else []
    options = parser.parse_args(own[: len(own) - len(extra) - 1] if "--" in own else own)
    words, world = megatron_arguments(options.config or [])
    if not words + extra:
        parser.error("give --config FILE, or Megatron's arguments behind --")
    args, config, mhc = parse(words + extra, options.world_size or world)
    mhc = replace(mhc, recompute_layer_num="auto")
    micro_batches = args.global_batch_size // (args.micro_batch_size * args.data_parallel_size)
    found = ranks(config, mhc, args.seq_length, args.micro_batch_size, micro_batches)
    longest = max(len(r.replayed) for r in found)
    sizes = [s for s in map(int, options.sizes.split(",")) if s <= longest]
    layout = f"TP {args.tensor_model_parallel_size}, PP {args.pipeline_model_parallel_size}, "
    layout += f"CP {args.context_parallel_size}, {args.world_size} ranks"
    print(
        f"activations of the decoder layers at their peak, GiB: n = {mhc.num_residual_streams}, "
        f"{args.micro_batch_size} x {args.seq_length} tokens a micro-batch, {layout}"
    )
    print(table(found, sizes, mhc.num_residual_streams))

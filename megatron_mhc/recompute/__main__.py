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
import sys
from dataclasses import replace

from megatron_mhc import command_line
from megatron_mhc.recompute.estimate import ranks, table


def main() -> None:
    """Print the table of a recipe."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_mhc.recompute", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument(
        "--config", type=command_line.recipe, help="file with Megatron's arguments or a launch"
    )
    parser.add_argument("--world-size", type=int, help="ranks; default: torchrun's, or the fewest possible")
    parser.add_argument("--sizes", default="1,2,3,4,6,8,12,16", help="block sizes to print")
    own = sys.argv[1:]
    extra = own[own.index("--") + 1 :] if "--" in own else []
    options = parser.parse_args(own[: len(own) - len(extra) - 1] if "--" in own else own)
    command = command_line.take_apart(options.config or [])
    if not command.arguments + extra:
        parser.error("give --config FILE, or Megatron's arguments behind --")
    world = options.world_size or command.world
    args, config, mhc = command_line.parse(command.arguments + extra, world, hybrid=True)
    mhc = replace(mhc, recompute_layer_num="auto")
    micro_batches = args.global_batch_size // (args.micro_batch_size * args.data_parallel_size)
    batch = (args.seq_length, args.micro_batch_size, micro_batches)
    found = ranks(config, mhc, *batch, args.hybrid_layer_pattern)
    longest = max(len(r.replayed) for r in found)
    sizes = [s for s in map(int, options.sizes.split(",")) if s <= longest]
    layout = f"TP {args.tensor_model_parallel_size}, PP {args.pipeline_model_parallel_size}, "
    layout += f"CP {args.context_parallel_size}, {args.world_size} ranks"
    print(
        f"activations of the decoder layers at their peak, GiB: n = {mhc.num_residual_streams}, "
        f"{args.micro_batch_size} x {args.seq_length} tokens a micro-batch, {layout}"
    )
    print(table(found, sizes, mhc.num_residual_streams))


if __name__ == "__main__":
    main()

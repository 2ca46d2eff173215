"""Convert a checkpoint's mHC parameters to other names, or start mHC from a plain checkpoint.

    # a trained plain GPT becomes an mHC checkpoint that --load takes (with --finetune)
    python -m megatron_mhc.convert --from plain --to plugin --load plain/ --save mhc/ \\
        --options num_residual_streams=4
    # for Megatron-LM's own mHC branches, and back
    python -m megatron_mhc.convert --from plugin --to megatron-dev --load mhc/ --save dev/
    python -m megatron_mhc.convert --from megatron-dev --to plugin --load dev/ --save from_dev/ \\
        --options num_residual_streams=4
    # mapping parameters alone, by the names of transformers' DeepSeek-V4; back into a plugin checkpoint
    python -m megatron_mhc.convert --from plugin --to transformers --load mhc/ --save hc.safetensors
    python -m megatron_mhc.convert --from transformers --to plugin --load hc.safetensors --into mhc/ \\
        --save new/

    # a GPT, plain or with mHC, as a HybridModel of its layers, one symbol for each sub-layer; and back
    python -m megatron_mhc.convert --from plugin --to plugin --load mhc/ --save hybrid/ --model hybrid
    python -m megatron_mhc.convert --from plugin --to plugin --load hybrid/ --save gpt/ --model gpt

Megatron's formats torch_dist and torch are read and written as they are found, by one process on a CPU,
which holds all weights (of one file for torch) in memory. Weights and arguments are kept; optimizer and
random states are dropped, so load the result with --finetune, or --no-load-optim --no-load-rng.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_mhc.testing import cpu


def main() -> None:
    """Convert by the command line."""
    cpu.install()  # Megatron's writer synchronises a GPU; here everything happens in memory
    cpu.patch_megatron()
    from megatron_mhc.convert import SOURCES, TARGETS
    from megatron_mhc.convert.files import convert_files
    from megatron_mhc.convert.pairs import MODELS

    parser = argparse.ArgumentParser(
        prog="python -m megatron_mhc.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--from", dest="source", required=True, choices=SOURCES)
    parser.add_argument("--to", dest="target", required=True, choices=TARGETS)
    parser.add_argument("--load", type=Path, required=True, help="checkpoint folder, or published file")
    parser.add_argument("--save", type=Path, required=True, help="new checkpoint folder, or published file")
    parser.add_argument("--into", type=Path, help="checkpoint that published mappings are put into")
    parser.add_argument(
        "--model",
        choices=MODELS,
        help="which model the checkpoint becomes, where it is of the other: a GPT, or a HybridModel of pairs "
        "of attention and MLP (*-, *E, +-, +E); its pattern is printed",
    )
    parser.add_argument(
        "--options", help="mHC options key=value,... or a .yaml file; default: the checkpoint's"
    )
    parser.add_argument(
        "--trust", action="store_true", help="let a checkpoint run the code that its pickles name"
    )
    given = vars(parser.parse_args())
    source, target, load, save = (given.pop(name) for name in ("source", "target", "load", "save"))
    try:
        done, *settings = convert_files(source, target, load, save, **given)
    except ValueError as error:
        sys.exit(f"{parser.prog}: {error}")
    print(done, *(f"  {line}" for line in settings), sep="\n")


if __name__ == "__main__":
    main()

"""Make an mHC checkpoint of Megatron of a Hugging Face folder.

    # what `python -m megatron_mhc.export` wrote, back again
    python -m megatron_mhc.import_hf --load folder/ --save checkpoints/
    # a dense model (Llama, Mistral, Qwen2, Qwen3, Qwen3-MoE, DeepSeek-V3) starts with mHC
    python -m megatron_mhc.import_hf --load llama/ --save mhc/ --options num_residual_streams=4
    torchrun ... -m megatron_mhc.pretrain_gpt $(cat mhc/model.args train.args) --load mhc/ --finetune

Reads config.json and safetensors, and runs no code of the folder. Writes torch_dist, which loads into every
parallel layout, and beside it `model.args`: the flags of the model for the training's command line. One
process without a GPU will do; it holds all weights in memory.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_mhc.testing import cpu


def main() -> None:
    """Import by the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_mhc.import_hf",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--load", type=Path, required=True, help="Hugging Face folder")
    parser.add_argument("--save", type=Path, required=True, help="new checkpoint folder")
    parser.add_argument(
        "--options", help="mHC options key=value,... or a .yaml file, of a dense model; default: the paper's"
    )
    parser.add_argument(
        "--transformer-impl",
        choices=("transformer_engine", "local"),
        default="transformer_engine",
        help="whose names the checkpoint has: that of the training (default: transformer_engine)",
    )
    given = vars(parser.parse_args())
    cpu.install(pretend_cuda=True)  # Megatron's model and its writer ask for a GPU; all happens in memory
    cpu.patch_megatron()
    cpu.use_local_modules()
    from megatron_mhc.import_hf import import_folder

    try:
        print(*import_folder(given.pop("load"), given.pop("save"), **given), sep="\n  ")
    except ValueError as error:
        sys.exit(f"{parser.prog}: {error}")


if __name__ == "__main__":
    main()

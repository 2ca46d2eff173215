"""Write a trained model as a folder that Hugging Face transformers loads.

    python -m megatron_mhc.export --load checkpoints/ --out folder/

    AutoModelForCausalLM.from_pretrained("folder/", trust_remote_code=True)

The folder has the weights (safetensors), config.json, the tokenizer where the training used a Hugging Face
one, and the model as one Python file of plain torch, which needs neither Megatron nor this package. One
process without a GPU will do; it holds all weights in memory.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main() -> None:
    """Export by the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_mhc.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--load", type=Path, required=True, help="checkpoint folder, of torch_dist or torch")
    parser.add_argument("--out", type=Path, required=True, help="new folder")
    parser.add_argument("--tokenizer", help="Hugging Face name or folder; default: that of the training")
    parser.add_argument(
        "--trust", action="store_true", help="let a checkpoint run the code that its pickles name"
    )
    given = vars(parser.parse_args())
    from megatron_mhc.export import export

    try:
        print(*export(given.pop("load"), given.pop("out"), **given), sep="\n  ")
    except ValueError as error:
        sys.exit(f"{parser.prog}: {error}")


if __name__ == "__main__":
    main()

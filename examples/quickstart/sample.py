"""Continue a line of Python by an exported model whose tokens are bytes, as quickstart's are.

python sample.py FOLDER LINE.txt        FOLDER: of `python -m megatron_mhc.export`
"""

from __future__ import annotations

import argparse
from pathlib import Path

from prepare_text import END_OF_DOCUMENT

PROMPT = "        return "
END_OF_LINE = 10


def sample(folder: Path) -> str:
    """One line, drawn with a fixed seed; `?` stands for what a terminal would not print."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    said = model.generate(
        torch.tensor([list(PROMPT.encode())]),
        max_new_tokens=72,
        do_sample=True,
        temperature=0.5,
        eos_token_id=[END_OF_LINE, END_OF_DOCUMENT],
        pad_token_id=END_OF_DOCUMENT,
    )
    line = bytes(token for token in said[0].tolist() if token < END_OF_DOCUMENT).decode(errors="replace")
    return "".join(letter if letter.isprintable() else "?" for letter in line.strip())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("line", type=Path)
    given = parser.parse_args()
    given.line.write_text(sample(given.folder))


if __name__ == "__main__":
    main()

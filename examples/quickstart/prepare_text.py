"""Turn the Python standard library's sources into a Megatron dataset of bytes.

    python prepare_text.py PREFIX        writes PREFIX.bin and PREFIX.idx

Every machine that can train has this text (10 MB). A token is a byte; 256 ends a document. The tests
that some distributions ship along are left out. Train with `--tokenizer-type NullTokenizer
--vocab-size 257`.
"""

from __future__ import annotations

import argparse
import random
import sysconfig
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

END_OF_DOCUMENT = 256
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}


def sources() -> list[Path]:
    """The library's .py files, in an order that is shuffled (Megatron cuts the validation set off the
    end) and the same on every machine with this Python."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = [p for p in root.rglob("*.py") if not LEFT_OUT & set(p.relative_to(root).parts)]
    paths = sorted(paths, key=lambda p: p.relative_to(root).as_posix())
    random.Random(0).shuffle(paths)
    if len(paths) < 100:
        raise SystemExit(
            f"{root} holds {len(paths)} .py files: this Python comes without its library's sources"
        )
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("prefix", type=Path)
    prefix = parser.parse_args().prefix
    prefix.parent.mkdir(parents=True, exist_ok=True)
    # Written under other names first, so that an interrupted run leaves no half dataset.
    part = prefix.with_name(prefix.name + ".part")
    builder = IndexedDatasetBuilder(f"{part}.bin", dtype=np.uint16)
    tokens = files = 0
    for path in sources():
        document = np.append(np.fromfile(path, dtype=np.uint8).astype(np.uint16), END_OF_DOCUMENT)
        builder.add_document(document, [document.size])
        tokens, files = tokens + document.size, files + 1
    builder.finalize(f"{part}.idx")
    for suffix in (".bin", ".idx"):
        Path(f"{part}{suffix}").rename(f"{prefix}{suffix}")
    print(f"{files} files, {tokens / 1e6:.1f} million tokens in {prefix}.bin")


if __name__ == "__main__":
    main()

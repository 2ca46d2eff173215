"""The programs of the package by one name each; those of one process, which need no torchrun.

    python -m megatron_mhc doctor [-- COMMAND]     what is installed, what would run, what is in the way
    python -m megatron_mhc memory --config FILE    activations of every pipeline rank
    python -m megatron_mhc convert ...             checkpoints of other implementations, and plain ones
    python -m megatron_mhc export ...              a trained model as a Hugging Face folder
    python -m megatron_mhc import_hf ...           a Hugging Face folder as a checkpoint
    python -m megatron_mhc generate ...            text of a trained model
    python -m megatron_mhc simulate ...            a pipeline step in time
    python -m megatron_mhc plot ...                pictures of training runs

`megatron-mhc` is the same. Each says more by --help.
"""

from __future__ import annotations

import sys
from importlib import import_module

PROGRAMS = {
    "doctor": "megatron_mhc.doctor",
    "convert": "megatron_mhc.convert.__main__",
    "export": "megatron_mhc.export.__main__",
    "import_hf": "megatron_mhc.import_hf.__main__",
    "generate": "megatron_mhc.generate",
    "memory": "megatron_mhc.recompute.__main__",
    "simulate": "megatron_mhc.pipeline.simulate",
    "plot": "megatron_mhc.plot",
}


def main() -> None:
    """Run the program that the first word names."""
    words = sys.argv[1:]
    if not words or words[0] not in PROGRAMS:
        wanted = words[:1] in ([], ["-h"], ["--help"])
        print(__doc__ if wanted else f"no program {words[0]!r}: give one of {', '.join(PROGRAMS)}")
        sys.exit(0 if words and wanted else 2)
    sys.argv[:] = [f"megatron_mhc {words[0]}", *words[1:]]
    import_module(PROGRAMS[words[0]]).main()


if __name__ == "__main__":
    main()

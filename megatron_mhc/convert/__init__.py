"""mHC checkpoints under other projects' names, and plain checkpoints turned into mHC ones.

    names.py       Megatron's conventions: plain, this package's, those of Megatron-LM's mHC branches
    published.py   the names of Hugging Face's DeepSeek-V4 and of DeepSeek's own files
    gated.py       the names of Hugging Face's Qwen4-Exp, for the gated residual
    plain.py       initial mappings for a plain checkpoint
    pairs.py       a GPT's layers as a HybridModel's, and back
    check.py       what a state dict must hold before it is converted
    read.py, write.py, files.py    checkpoints on disk; `python -m megatron_mhc.convert`

The functions here work on state dicts of any Megatron format.
"""

from megatron_mhc.convert.names import (
    MEGATRON,
    PUBLISHED,
    SOURCES,
    TARGETS,
    check,
    differences,
    read_arithmetic,
    rename,
)
from megatron_mhc.convert.orientation import transpose_res
from megatron_mhc.convert.pairs import to_gpt, to_hybrid
from megatron_mhc.convert.plain import from_plain
from megatron_mhc.convert.published import from_published, to_published

__all__ = [
    "MEGATRON",
    "PUBLISHED",
    "SOURCES",
    "TARGETS",
    "check",
    "differences",
    "from_plain",
    "from_published",
    "read_arithmetic",
    "rename",
    "to_gpt",
    "to_hybrid",
    "to_published",
    "transpose_res",
]

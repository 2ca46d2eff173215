"""Megatron on a CPU for every test but tests/gpu; the patches must precede the first import of megatron."""

import os

import pytest
import torch

from megatron_mhc.testing import cpu, ranks

if os.environ.get("MEGATRON_MHC_GPU_TESTS"):
    collect_ignore = ["distributed", "megatron"]  # a process has either its GPU or the patches
else:
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported: tests/ops run in its interpreter
    cpu.install()
torch.set_num_threads(1)  # ranks are forked, and share few cores


@pytest.fixture
def run_ranks():
    """`run_ranks(world, fn, *args, timeout=120)` -> fn's result on each rank; see `testing.ranks`."""
    return ranks.run_ranks

"""Megatron on a CPU for every test; the patches must come before the first import of megatron."""

import os

from megatron_mhc.testing import cpu

if not os.environ.get("MEGATRON_MHC_GPU_TESTS"):  # tests/gpu, the only ones that want a real device
    cpu.install()

import pytest  # noqa: E402
import torch  # noqa: E402

from megatron_mhc.testing import ranks  # noqa: E402

torch.set_num_threads(1)  # ranks are forked, and share few cores


@pytest.fixture
def run_ranks():
    """`run_ranks(world, fn, *args, timeout=120)` -> fn's result on each rank; see `testing.ranks`."""
    return ranks.run_ranks

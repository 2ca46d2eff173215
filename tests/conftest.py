"""Megatron on a CPU for every test but tests/gpu; the patches must precede the first import of megatron.

MEGATRON_MHC_GPU_TESTS=1 leaves the patches out, for tests/gpu and tests/ops. With =nccl the layouts of
tests/distributed run on GPUs, as many as there are; tests that need more are skipped.

MEGATRON_MHC_TEST_REPORT is a file that keeps what the tests of the support matrix did, see support_runs.py.
"""

import os
import sys
from pathlib import Path

MODE = os.environ.get("MEGATRON_MHC_GPU_TESTS", "")
NCCL = MODE == "nccl"
if NCCL:
    # Ranks are forked: until then nothing may initialise the driver, as asking it for devices would.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    os.environ["TORCH_COMPILE_DISABLE"] = "1"  # it would compile on every rank of every test
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # no NVLink multicast
    sys.modules["transformer_engine"] = None  # its router in TF32, and what it does to CUDA at its import

import interpreter  # noqa: E402
import pytest  # noqa: E402
import support_runs  # noqa: E402
import torch  # noqa: E402

from megatron_mhc.testing import cpu, ranks  # noqa: E402

if NCCL:
    ranks.backend = "nccl"
    kept = {"harness.py", "pipeline.py", "test_parity.py", "test_pipeline_schedule.py"}
    others = {file.name for file in Path(__file__).with_name("distributed").glob("*.py")} - kept
    collect_ignore = ["megatron", *(f"distributed/{name}" for name in sorted(others))]
elif MODE:
    collect_ignore = ["distributed", "megatron"]  # a process has either its GPU or the patches
else:
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported: tests/ops run in its interpreter
    cpu.install()
    interpreter.speed_up()
torch.set_num_threads(1)  # ranks are forked, and share few cores


def pytest_configure(config):
    path = os.environ.get("MEGATRON_MHC_TEST_REPORT")
    if path and not hasattr(config, "workerinput"):  # of pytest-xdist, whose workers report to this process
        config.pluginmanager.register(support_runs.Recorder(Path(path), support_runs.kind(Path(path), MODE)))


@pytest.fixture
def run_ranks():
    """`run_ranks(world, fn, *args, timeout=120)` -> fn's result on each rank; see `testing.ranks`."""

    def run(world, *args, **kwargs):
        if NCCL and world > torch.cuda.device_count():
            pytest.skip(f"needs {world} GPUs")
        return ranks.run_ranks(world, *args, **kwargs)

    return run

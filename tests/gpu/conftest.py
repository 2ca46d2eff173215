"""One NCCL process for each file of this folder; where they are skipped, nothing is imported."""

import os

import pytest


@pytest.fixture(scope="module", autouse=True)
def one_process():
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29712", RANK="0", WORLD_SIZE="1")
    dist.init_process_group("nccl", device_id=torch.device("cuda:0"))
    parallel_state.initialize_model_parallel()
    yield
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()

"""One NCCL process for each file of this folder; where they are skipped, nothing is imported."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def one_process():
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state

    dist.init_process_group(
        "nccl", store=dist.HashStore(), rank=0, world_size=1, device_id=torch.device("cuda:0")
    )
    parallel_state.initialize_model_parallel()
    yield
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()

"""Megatron-FSDP and torch's FSDP2 give the loss and the gradients of one process."""

import pytest
import torch
from harness import Iteration, Layout, build, iterate, reference
from megatron.core.distributed import DistributedDataParallelConfig, TorchFullyShardedDataParallel
from megatron.core.distributed.fsdp.mcore_fsdp_adapter import FullyShardedDataParallel
from megatron.core.distributed.torch_fully_sharded_data_parallel_config import (
    TorchFullyShardedDataParallelConfig,
)

from megatron_mhc import MHCConfig
from megatron_mhc.testing import fsdp
from megatron_mhc.testing.parameters import shard
from megatron_mhc.testing.parity import one_against_one

pytest.importorskip("einops", reason="Megatron-FSDP makes its meshes by it")
LIMITS = {torch.float64: 1e-10, torch.float32: 1e-5}
STRATEGIES = "optim", "optim_grads", "optim_grads_params"
MHC = MHCConfig(contract="learned_head")  # the contraction has parameters too


def wrapped_by(sharding, **more):
    """What wraps model chunks as `fsdp2` or a strategy of Megatron-FSDP says; `more` of its configuration."""

    def wrap(chunks, config, ddp_config):
        if sharding == "fsdp2":
            return [
                TorchFullyShardedDataParallel(config, TorchFullyShardedDataParallelConfig(**more), chunk)
                for chunk in chunks
            ]
        settings = DistributedDataParallelConfig(
            use_distributed_optimizer=True,
            use_megatron_fsdp=True,
            data_parallel_sharding_strategy=sharding,
            gradient_reduce_div_fusion=False,
            **dict(overlap_grad_reduce=True, overlap_param_gather=True) | more,
        )
        chunks = [FullyShardedDataParallel(config, settings, chunk) for chunk in chunks]
        if settings.overlap_grad_reduce:  # as megatron.training does
            syncs = [chunk.no_sync for chunk in chunks]
            config.no_sync_func = syncs if len(syncs) > 1 else syncs[0]
        return chunks

    return wrap


def compare(layout, kind, mhc, expected, sharding, settings, more):
    """The loss of one iteration, and for each parameter of this rank its gradient's relative error."""
    fsdp.install()
    layout.initialize()
    config = layout.config(kind, transformer_impl="local", **settings)
    chunks = build(layout, config, kind, mhc, wrap=wrapped_by(sharding, **more))
    loss = iterate(chunks, config)
    found, wanted = {}, {}
    for name, parameter, gradient in fsdp.full_gradients(chunks):
        found[name], wanted[name] = gradient, shard(expected.gradients[name], parameter)
    return one_against_one(Iteration(loss, found), Iteration(expected.loss, wanted), config.params_dtype)


def check(run_ranks, sharding, world=2, layout=Layout(), kind="dense", mhc=MHC, settings=None, **more):
    """Compare all ranks with one process; more: of the wrapper's configuration."""
    # Neither Megatron-FSDP nor kernels know float64.
    dtype = torch.float64 if sharding == "fsdp2" and mhc.backend == "auto" else torch.float32
    expected = reference(kind, mhc, dtype)
    settings = dict(params_dtype=dtype) | (settings or {})
    results = run_ranks(world, compare, layout, kind, mhc, expected, sharding, settings, more)
    assert set().union(*(result.gradients for result in results)) == set(expected.gradients)
    for result in results:
        print(f"loss error {result.loss:.1e}, worst gradient {result.worst}")
        assert result.loss <= LIMITS[dtype]
        assert result.worst[0] <= LIMITS[dtype]


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("sharding", [*STRATEGIES, "fsdp2"])
def test_sharded_parameters_train_as_one_process_does(run_ranks, sharding, world):
    check(run_ranks, sharding, world)

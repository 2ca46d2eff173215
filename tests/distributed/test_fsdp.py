"""Megatron-FSDP and torch's FSDP2 give the loss and the gradients of one process."""

import dataclasses

import pytest
import torch
import torch.distributed as dist
from harness import Iteration, Layout, build, global_parameters, iterate, reference
from megatron.core import dist_checkpointing
from megatron.core import parallel_state as ps
from megatron.core.distributed import DistributedDataParallelConfig, TorchFullyShardedDataParallel
from megatron.core.distributed.fsdp.mcore_fsdp_adapter import FullyShardedDataParallel
from megatron.core.distributed.torch_fully_sharded_data_parallel_config import (
    TorchFullyShardedDataParallelConfig,
)
from ops_chains import AHEAD
from test_checkpoint import start, step

from megatron_mhc import MHCConfig
from megatron_mhc.ops import kernels
from megatron_mhc.testing import fsdp, ranks
from megatron_mhc.testing.parameters import shard
from megatron_mhc.testing.parity import one_against_one

pytest.importorskip("einops", reason="Megatron-FSDP makes its meshes by it")
LIMITS = {torch.float64: 1e-10, torch.float32: 1e-5}
SINGLE = Layout()
GATED = MHCConfig(preset="qwen4_exp", gated_rank=8)
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
            suggested_communication_unit_size=1,  # else the whole of a small model is gathered ahead
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
    nodes = settings.pop("overlap_moe_expert_parallel_comm", False)
    config = layout.config(kind, transformer_impl="local", **settings)
    config.overlap_moe_expert_parallel_comm = nodes  # behind Megatron's checks, which ask for bf16
    chunks = build(layout, config, kind, mhc, wrap=wrapped_by(sharding, **more))
    loss = iterate(chunks, config)
    found, wanted = {}, {}
    for name, parameter, gradient in fsdp.full_gradients(chunks):
        found[name], wanted[name] = gradient, shard(expected.gradients[name], parameter)
    return one_against_one(Iteration(loss, found), Iteration(expected.loss, wanted), config.params_dtype)


def check(run_ranks, sharding, world=2, layout=SINGLE, kind="dense", mhc=MHC, settings=None, **more):
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


@pytest.mark.parametrize(
    "sharding, world",
    [*[(sharding, 2) for sharding in (*STRATEGIES, "fsdp2")], ("optim_grads_params", 4), ("fsdp2", 4)],
)
def test_sharded_parameters_train_as_one_process_does(run_ranks, sharding, world):
    check(run_ranks, sharding, world)


SETTINGS = {
    "full recompute": dict(
        settings=dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=2)
    ),
    "selective recompute": dict(
        settings=dict(recompute_granularity="selective", recompute_modules=["layernorm", "core_attn"])
    ),
    # A block's replay reads the norms of all its layers.
    "replay": dict(mhc=MHCConfig(recompute_layer_num="3")),
    "replay of coefficients": dict(mhc=MHCConfig(recompute_layer_num="3", recompute_coefficients=True)),
    "gated residual": dict(mhc=GATED),
    "replay of gated residuals": dict(
        mhc=dataclasses.replace(GATED, recompute_layer_num="3", recompute_coefficients=True)
    ),
    "TP and SP": dict(layout=Layout(tp=2, sp=True), world=4),
    "MoE": dict(kind="moe"),
    "MTP": dict(kind="mtp"),
    "single pass": dict(mhc=MHCConfig(preset="deepseek_v41")),
    "MTP between streams": dict(kind="mtp2", mhc=MHCConfig(preset="deepseek_v4", mtp="multistream")),
}


@pytest.mark.parametrize("sharding", ["optim_grads_params", "fsdp2"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_setting_trains_as_one_process_does(run_ranks, sharding, setting):
    check(run_ranks, sharding, **SETTINGS[setting])


@pytest.mark.parametrize(
    "more",
    [
        dict(kind="moe", layout=Layout(ep=2), world=4),
        dict(kind="tied"),
        dict(fsdp_double_buffer=True),  # parameters that come back elsewhere
        # Each module gathers its own.
        SETTINGS["replay of coefficients"] | dict(megatron_fsdp_enable_fine_grained_param_gather=True),
    ],
    ids=["EP", "tied embeddings", "double buffer", "gathered by modules"],
)
def test_megatron_fsdp_trains_as_one_process_does(run_ranks, more):
    check(run_ranks, "optim_grads_params", **more)


@pytest.mark.parametrize(
    "sharding",
    ["optim_grads_params", *(pytest.param(other, marks=pytest.mark.slow) for other in ("optim", "fsdp2"))],
)
@pytest.mark.parametrize("norm", ["apart", pytest.param("folded", marks=pytest.mark.slow)])
def test_kernels_read_no_parameter_of_a_layer_that_is_not_gathered(run_ranks, monkeypatch, sharding, norm):
    """Where post_res makes the next connection's `pre` too, in layers that are units and in others."""
    monkeypatch.setitem(kernels.BY_NAME, "triton", AHEAD)
    mhc = MHCConfig(backend="triton", sinkhorn_iterations=1, boundary="fused", norm=norm)
    check(run_ranks, sharding, mhc=mhc)


@pytest.mark.parametrize("sharding", ["optim_grads_params", pytest.param("optim", marks=pytest.mark.slow)])
def test_layers_run_in_nodes_train_as_one_process_does(run_ranks, sharding):
    nodes = dict(overlap_moe_expert_parallel_comm=True)
    check(run_ranks, sharding, 4, Layout(ep=2), "moe", MHCConfig(), nodes)


def test_nodes_of_layers_that_fsdp2_gathers_as_a_whole_are_refused(run_ranks):
    nodes = dict(overlap_moe_expert_parallel_comm=True)
    with pytest.raises(ranks.RankError, match="--use-torch-fsdp2 does not support --overlap-moe-expert"):
        check(run_ranks, "fsdp2", 2, Layout(ep=2), "moe", MHCConfig(), nodes)


def train_in_bf16(sharding):
    """The loss, and the dtypes of mapping parameters and of others."""
    fsdp.install()
    layout = Layout()
    layout.initialize()
    config = layout.config("dense", transformer_impl="local", params_dtype=torch.bfloat16, bf16=True)
    chunks = build(layout, config, "dense", MHC, wrap=sharding and wrapped_by(sharding))
    loss = iterate(chunks, config)
    dtypes = {True: set(), False: set()}
    for name, parameter in global_parameters(chunks):
        dtypes["hyper_connection" in name or "norm.head" in name].add(parameter.dtype)
    return loss, dtypes


@pytest.mark.parametrize("sharding", [*STRATEGIES, "fsdp2"])
def test_mapping_parameters_stay_float32_in_a_bf16_model(run_ranks, sharding):
    expected, _ = run_ranks(2, train_in_bf16, None)[0]
    loss, dtypes = run_ranks(2, train_in_bf16, sharding)[0]
    assert loss == expected
    assert dtypes[True] == {torch.float32}


def resume(folder, mhc):
    """Save after a step, load into another model; every tensor of either, and the loss of the next step."""
    fsdp.install()
    options = dict(mhc=mhc, settings=dict(transformer_impl="local"), wrap=wrapped_by("fsdp2"))
    states, losses = [], []
    for saves in (True, False):
        chunks, config, optimizer = start(SINGLE, "dense", torch.bfloat16, **options)
        metadata = {"dp_cp_group": ps.get_data_parallel_group(with_context_parallel=True)}
        if saves:
            step(chunks, config, optimizer, 0)
            if dist.get_rank() == 0:
                folder.mkdir()
            dist.barrier()
        else:
            spoil(chunks, optimizer)
        state = {"model": chunks[0].sharded_state_dict(metadata=metadata)}
        state["optimizer"] = optimizer.sharded_state_dict(state, is_loading=not saves, metadata=metadata)
        if saves:
            dist_checkpointing.save(state, str(folder))
        else:
            dist_checkpointing.load(state, str(folder))  # into the parameters, and those of the optimizer
            for group in optimizer.optimizer.param_groups:
                group["step"] = 1  # which Megatron leaves at 0
        states.append(tensors(chunks, optimizer))
        losses.append(step(chunks, config, optimizer, 1)[0])
    return states, losses


def spoil(chunks, optimizer):
    """What the checkpoint does not restore must not be right by chance."""
    with torch.no_grad():
        for parameter in (p for group in optimizer.optimizer.param_groups for p in group["params"]):
            parameter.zero_()
        for _, parameter in global_parameters(chunks):
            parameter.zero_()


def tensors(chunks, optimizer):
    """This rank's shards of parameters, their fp32 masters and moments."""
    found = [p for _, p in global_parameters(chunks)]
    for group in optimizer.optimizer.param_groups:
        for parameter in group["params"]:
            found += [parameter, *optimizer.optimizer.state[parameter].values()]
    return [tensor.to_local().detach().clone() for tensor in found]


@pytest.mark.parametrize(
    "world, mhc", [(2, MHC), (4, MHCConfig(contract="learned_head", num_residual_streams=2))]
)
def test_fsdp2_resumes_from_its_shards_bit_for_bit(run_ranks, tmp_path, world, mhc):
    for (saved, loaded), (unbroken, resumed) in run_ranks(world, resume, tmp_path / "saved", mhc):
        assert all(torch.equal(one, other) for one, other in zip(saved, loaded, strict=True))
        assert resumed == unbroken

"""Checkpoints saved in one layout and loaded in another continue the unbroken run."""

import functools
import itertools

import pytest
import torch
import torch.distributed as dist
from harness import Layout, build, global_parameters, iterate
from megatron.core import dist_checkpointing
from megatron.core import parallel_state as ps
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

from megatron_mhc import MHCConfig, register
from megatron_mhc.testing import cpu
from megatron_mhc.testing.parameters import fill
from megatron_mhc.testing.ranks import run_ranks as run

FLOAT32_ERROR = 1e-6
BF16_ERROR = 1e-4  # another order of summation, rounded to bf16
MHC = MHCConfig(contract="learned_head")  # the contraction has parameters too
SINGLE = Layout()


def start(layout, kind, dtype, wrap=None, weights=fill, model=None, mhc=MHC, settings=None, **options):
    """A filled model in DDP and its optimizer: (chunks, config, optimizer); options of the optimizer.

    Args:
        wrap, weights, model: of `gpt.build`.
        settings: more of the configuration.
    """
    cpu.use_plain_adam()
    layout.initialize()
    bf16 = dtype == torch.bfloat16
    precision = dict(params_dtype=dtype, bf16=bf16)
    config = layout.config(kind, **precision, **(settings or {}))
    chunks = build(layout, config, kind, mhc, wrap=wrap, weights=weights, model=model)
    settings = dict(
        optimizer="adam",
        lr=1e-2,
        weight_decay=0.1,
        clip_grad=1.0,
        use_distributed_optimizer=layout.distributed_optimizer,
    )
    settings = OptimizerConfig(**settings | precision | options)
    return chunks, config, get_megatron_optimizer(settings, chunks)


def step(chunks, config, optimizer, number):
    """Train on batch `number`; returns its loss and gradient norm."""
    optimizer.zero_grad()
    loss = iterate(chunks, config, seed=number)
    succeeded, norm, _ = optimizer.step()
    assert succeeded
    return loss, float(norm)


def sharded_state(chunks, optimizer, sharding, loading=False):
    metadata = {
        "distrib_optim_sharding_type": sharding,
        "dp_cp_group": ps.get_data_parallel_group(with_context_parallel=True),
        "chained_optim_avoid_prefix": True,
        "singleton_local_shards": False,
    }
    names = [f"model{i}" for i in range(len(chunks))] if len(chunks) > 1 else ["model"]
    pairs = zip(names, chunks, strict=True)
    state = {name: unwrap(chunk).sharded_state_dict(metadata=metadata) for name, chunk in pairs}
    state["optimizer"] = optimizer.sharded_state_dict(state, is_loading=loading, metadata=metadata)
    return state, metadata


def unwrap(chunk):
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk


def save(folder, chunks, optimizer, sharding, fully_parallel=False):
    """With `fully_parallel` the data-parallel ranks share the writing."""
    if dist.get_rank() == 0:
        folder.mkdir()
    dist.barrier()
    state, metadata = sharded_state(chunks, optimizer, sharding)
    group, strategy = metadata.pop("dp_cp_group"), TorchDistSaveShardedStrategy()
    if fully_parallel:
        strategy = FullyParallelSaveStrategyWrapper(strategy, group)
    dist_checkpointing.save(state, str(folder), strategy, content_metadata=metadata)


def load(folder, chunks, optimizer, sharding):
    with torch.no_grad():
        for _, parameter in global_parameters(chunks):
            parameter.zero_()  # what the checkpoint does not restore must not be right by chance
    request, _ = sharded_state(chunks, optimizer, sharding, loading=True)
    state = dist_checkpointing.load(request, str(folder))
    optimizer_state = state.pop("optimizer")
    for name, chunk in zip([key for key in state if key.startswith("model")], chunks, strict=True):
        unwrap(chunk).load_state_dict(state[name])
    optimizer.load_state_dict(optimizer_state)


def train(layout, kind, dtype, steps, load_from=None, save_to=None, sharding="fully_reshardable", **options):
    """Loss and gradient norm of every step in the range `steps`, between a load and a save.

    Args:
        sharding: how the distributed optimizer lays out its checkpoint; `dp_reshardable`, Megatron's
            default, is tied to the model-parallel layout.
        options: of the optimizer.
    """
    chunks, config, optimizer = start(layout, kind, dtype, **options)
    if load_from:
        load(load_from, chunks, optimizer, sharding)
    history = [step(chunks, config, optimizer, number) for number in steps]
    if save_to:
        save(save_to, chunks, optimizer, sharding)
    return history


@functools.cache
def unbroken(kind, steps, world=1, layout=SINGLE, dtype=torch.float32):
    return run(world, train, layout, kind, dtype, range(steps))[0]


def in_legs(run_ranks, tmp_path, kind, legs, train):
    """Loss and gradient norm of two steps in each of the layouts, a checkpoint in between."""
    history = []
    for i, (world, layout) in enumerate(legs):
        folders = tmp_path / str(i - 1) if i else None, tmp_path / str(i)
        steps = range(2 * i, 2 * i + 2)
        history += run_ranks(world, train, layout, kind, torch.float32, steps, *folders)[0]
    return history


def check_chain(run_ranks, tmp_path, kind, legs):
    """`in_legs`, compared with a single process."""
    history = in_legs(run_ranks, tmp_path, kind, legs, train)
    check(history, unbroken(kind, 2 * len(legs)), FLOAT32_ERROR)


def check(history, expected, limit, moved=1e-2):
    """Compare [(loss, norm), ...] of all steps; a norm may be off by ten times as much.

    Args:
        moved: by how much the first step moves the loss, far more than the limit.
    """
    loss, norm = (torch.tensor(history) - torch.tensor(expected)).abs().amax(dim=0).tolist()
    print(f"losses and norms {expected}, worst errors {loss:.1e} and {norm:.1e}")
    assert abs(expected[0][0] - expected[1][0]) > moved
    assert loss <= limit
    assert norm <= 10 * limit


TP2, TP2_SP, PP2, PP2_VPP2 = Layout(tp=2), Layout(tp=2, sp=True), Layout(pp=2), Layout(pp=2, vpp=2)
CHAINS = {
    "tp2_sp-pp2-pp2_vpp2-tp1": ("dense", [(2, TP2_SP), (2, PP2), (2, PP2_VPP2), (1, SINGLE)]),
    "tp1-pp2_vpp2-tp2": ("tied", [(1, SINGLE), (2, PP2_VPP2), (2, TP2)]),
    "moe_pp2-tp2_sp": ("moe_shared", [(2, PP2), (2, TP2_SP)]),
    "ep2-tp2_sp_ep2_etp1": ("moe_shared", [(2, Layout(ep=2)), (2, Layout(tp=2, sp=True, ep=2, etp=1))]),
    "mtp_pp2-tp1": ("mtp", [(2, PP2), (1, SINGLE)]),
    "distributed_optimizer_dp2-pp2-dp2": (
        "dense",
        [
            (2, Layout(distributed_optimizer=True)),
            (2, Layout(pp=2, distributed_optimizer=True)),
            (2, Layout(distributed_optimizer=True)),
        ],
    ),
    "distributed_optimizer_ep2-pp2_ep2": (
        "moe_after_dense",
        [(2, Layout(ep=2, distributed_optimizer=True)), (4, Layout(pp=2, ep=2, distributed_optimizer=True))],
    ),
}


SLOW = ("tp1-pp2_vpp2-tp2", "moe_pp2-tp2_sp")


@pytest.mark.parametrize(
    "chain", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in CHAINS]
)
def test_resharded_training_matches_unbroken_run(run_ranks, tmp_path, chain):
    check_chain(run_ranks, tmp_path, *CHAINS[chain])


def test_fixed_mappings_are_resharded_too(run_ranks, tmp_path, monkeypatch):
    """Nothing but the last stage's final norm tells such a model from a plain one."""
    monkeypatch.setitem(globals(), "MHC", MHCConfig(h_res="identity", h_pre="fixed", h_post="fixed"))
    monkeypatch.setitem(globals(), "unbroken", unbroken.__wrapped__)  # what is cached is of the other options
    check_chain(run_ranks, tmp_path, "dense", [(2, PP2), (2, TP2)])


BF16 = {
    "dp2": SINGLE,
    "dp2_distributed_optimizer": Layout(distributed_optimizer=True),
    "pp2_distributed_optimizer": Layout(pp=2, distributed_optimizer=True),
}


RESUMES = [
    pytest.param("dp2", "fully_reshardable", marks=pytest.mark.slow),
    ("dp2_distributed_optimizer", "fully_reshardable"),
    ("dp2_distributed_optimizer", "dp_reshardable"),
    pytest.param("pp2_distributed_optimizer", "fully_reshardable", marks=pytest.mark.slow),
    ("pp2_distributed_optimizer", "dp_reshardable"),
]


@pytest.mark.parametrize(("layout", "sharding"), RESUMES)
def test_bf16_training_resumed_matches_unbroken_run(run_ranks, tmp_path, layout, sharding):
    where, folder = (BF16[layout], "dense", torch.bfloat16), tmp_path / "checkpoint"
    history = run_ranks(2, train, *where, range(2), None, folder, sharding)[0]
    history += run_ranks(2, train, *where, range(2, 4), folder, None, sharding)[0]
    assert history == unbroken("dense", 4, 2, BF16[layout], torch.bfloat16)


def test_what_ranks_save_in_parts_resumes_bit_for_bit(run_ranks, tmp_path, monkeypatch):
    where, folder = (BF16["dp2_distributed_optimizer"], "dense", torch.bfloat16), tmp_path / "checkpoint"
    monkeypatch.setitem(globals(), "save", functools.partial(save, fully_parallel=True))
    history = run_ranks(2, train, *where, range(2), None, folder)[0]
    history += run_ranks(2, train, *where, range(2, 4), folder)[0]
    assert history == unbroken("dense", 4, 2, where[0], torch.bfloat16)


def test_bf16_resharded_training_matches_unbroken_run(run_ranks, tmp_path):
    dp2, pp2 = BF16["dp2_distributed_optimizer"], BF16["pp2_distributed_optimizer"]
    history = run_ranks(2, train, dp2, "dense", torch.bfloat16, range(2), None, tmp_path / "checkpoint")[0]
    history += run_ranks(2, train, pp2, "dense", torch.bfloat16, range(2, 4), tmp_path / "checkpoint")[0]
    check(history, unbroken("dense", 4, 2, dp2, torch.bfloat16), BF16_ERROR)


def mapping_dtypes(layout):
    """After a step: {name: (dtype, moved)} of the mapping parameters, and the other parameters' dtypes."""
    chunks, config, optimizer = start(layout, "dense", torch.bfloat16)
    before = {name: p.detach().clone() for name, p in global_parameters(chunks)}
    step(chunks, config, optimizer, 0)
    mapping, others = {}, set()
    for name, p in global_parameters(chunks):
        if is_mapping(name):
            mapping[name] = p.dtype, p.main_grad.dtype, not torch.equal(p, before[name])
        else:
            others.add(p.dtype)
    return mapping, others


def is_mapping(name):
    return "hyper_connection" in name or "final_layernorm.head" in name


OPTIMIZERS = {
    "adam": (SINGLE, {}),
    "distributed": (Layout(distributed_optimizer=True), {}),
    "muon": (SINGLE, dict(optimizer="muon", muon_tp_mode="duplicated", muon_fp32_matmul_prec="highest")),
}


def optimizer_of(name):
    layout, options = OPTIMIZERS[name]
    chunks, config, optimizer = start(layout, "dense", torch.float32, **options)
    step(chunks, config, optimizer, 0)
    return chunks, optimizer


def load_of_another(folder, saved, loaded):
    (chunks, optimizer), (other, ours) = optimizer_of(saved), optimizer_of(loaded)
    with pytest.raises(ValueError, match="of another optimizer .*--no-load-optim"):
        ours.load_state_dict(optimizer.state_dict())  # --ckpt-format torch
    if loaded != "distributed":  # whose request Megatron itself cannot make
        save(folder, chunks, optimizer, "fully_reshardable")
        with pytest.raises(ValueError, match="of another optimizer .*--no-load-optim"):
            load(folder, other, ours, "fully_reshardable")


@pytest.mark.parametrize("saved, loaded", list(itertools.permutations(OPTIMIZERS, 2)))
def test_the_state_of_another_optimizer_is_refused_with_a_remedy(run_ranks, tmp_path, saved, loaded):
    if "muon" in (saved, loaded):
        pytest.importorskip("emerging_optimizers")
    run_ranks(1, load_of_another, tmp_path / "checkpoint", saved, loaded)


@pytest.mark.parametrize("layout", BF16)
def test_mapping_parameters_stay_float32_in_bf16_training(run_ranks, layout):
    for mapping, others in run_ranks(2, mapping_dtypes, BF16[layout]):
        assert others == {torch.bfloat16}
        assert mapping
        assert set(mapping.values()) == {(torch.float32, torch.float32, True)}


def weight_decay():
    """{name: wd_mult} of the mapping parameters."""
    chunks, _, optimizer = start(SINGLE, "dense", torch.bfloat16)
    names = {id(p): name for name, p in global_parameters(chunks)}
    decay = {}
    for group in optimizer.param_groups:
        decay |= {names[id(p)]: group["wd_mult"] for p in group["params"] if id(p) in names}
    return {name: value for name, value in decay.items() if is_mapping(name)}


def test_weight_decay_of_mappings_matches_megatron_rule(run_ranks):
    """Biases and alphas are not decayed, projections are."""
    decay = run_ranks(1, weight_decay)[0]
    assert len(decay) == 8 * 2 + 3
    for name, value in decay.items():
        assert value == (1.0 if name.endswith("mapping_proj.weight") else 0.0), name


def offload(fraction, run, *args, **options):
    """`run` with --optimizer-cpu-offload; tensors pass for a GPU's until they are copied to the host."""

    def copying(name):
        original = getattr(torch.Tensor, name)

        def copy(self):
            out = original(self)
            out.on_host = name == "cpu" or getattr(self, "on_host", False)
            return out

        return copy

    register()  # it refuses a symbol that is replaced already
    divide = HybridDeviceOptimizer._get_sub_optimizer_param_groups

    def divide_pretending(self, offload_fraction):
        with pytest.MonkeyPatch.context() as patch:
            for name in ("cpu", "detach", "clone", "float"):
                patch.setattr(torch.Tensor, name, copying(name))
            on_gpu = property(lambda tensor: not getattr(tensor, "on_host", False))
            patch.setattr(torch.Tensor, "is_cuda", on_gpu, raising=False)
            divided = divide(self, offload_fraction)
        cpu, gpu = divided[:2]
        assert bool(cpu) and bool(gpu) == (offload_fraction < 1)
        return divided

    HybridDeviceOptimizer._get_sub_optimizer_param_groups = divide_pretending
    options |= dict(optimizer_cpu_offload=True, use_precision_aware_optimizer=True)
    return run(*args, optimizer_offload_fraction=fraction, **options)


OFFLOADED = BF16["dp2_distributed_optimizer"], "dense", torch.bfloat16


def stepped(*args, **options):
    """Parameters after one step, by name."""
    chunks, config, optimizer = start(*args, **options)
    step(chunks, config, optimizer, 0)
    return {name: p.detach().clone() for name, p in global_parameters(chunks)}


@pytest.mark.parametrize("fraction", [0.25, 1.0])
def test_offloaded_optimizer_steps_as_one_on_the_gpu(run_ranks, fraction):
    want = run_ranks(2, stepped, *OFFLOADED)[0]
    got = run_ranks(2, offload, fraction, stepped, *OFFLOADED)[0]
    for name, parameter in want.items():
        torch.testing.assert_close(got[name], parameter, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("fraction", [0.25, pytest.param(1.0, marks=pytest.mark.slow)])
def test_offloaded_optimizer_resumes_bit_for_bit(run_ranks, tmp_path, fraction):
    """Not from dp_reshardable, whose masters Megatron leaves at their bf16 values, of plain models too."""
    run, folder = functools.partial(run_ranks, 2, offload, fraction, train, *OFFLOADED), tmp_path / "saved"
    history = run(range(2), None, folder)[0] + run(range(2, 4), folder)[0]
    assert history == run(range(4))[0]

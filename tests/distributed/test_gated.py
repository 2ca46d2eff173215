"""The gated residual of Qwen4-Exp in every layout and setting, compared with one process."""

import functools
from dataclasses import replace

import pytest
import test_checkpoint as checkpoints
import test_hybrid as hybrids
import torch
from graphed_steps import PREPROCESS, full, local, te
from graphed_steps import compare as compare_graphed
from harness import Layout, build, compare, differences, global_parameters, iterate, reference
from layout_cases import CORE, UNIFORM
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_submodules
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.identity_op import IdentityOp
from test_recompute_parity import count_replays

from megatron_mhc import MHCConfig, norm
from megatron_mhc.chunk import chunk_of
from megatron_mhc.diagnostics import Sampler
from megatron_mhc.gated import GatedConnection
from megatron_mhc.pipeline import engine
from megatron_mhc.streams import ContractNorm
from megatron_mhc.testing.parameters import gradient

ERROR = 1e-10
RANK = 8


def gated(n=4, **options):
    return MHCConfig(preset="qwen4_exp", num_residual_streams=n, gated_rank=RANK, **options)


def check(run_ranks, world, layout, kind, mhc, overrides=None):
    """Loss and every gradient, against one process with the same n."""
    expected = reference(kind, gated(mhc.num_residual_streams))
    result = run_ranks(world, compare, layout, kind, mhc, expected, overrides)[0]
    assert result.loss <= ERROR
    assert result.worst[0] <= ERROR, result.worst


FAST = {("tp2_sp", "dense"), ("pp2", "moe"), ("pp2_vpp2", "dense"), ("ep2", "moe")}
CASES = [
    pytest.param(layout, kind, n, marks=() if (layout, kind) in FAST else pytest.mark.slow)
    for layout, (ranks, _, *kinds) in CORE.items()
    for kind in kinds
    for n in (2, 4)
    if kind
]


@pytest.mark.parametrize("layout, kind, n", CASES)
def test_gated_layout_matches_single_process(run_ranks, layout, kind, n):
    ranks, sizes, *_ = CORE[layout]
    check(run_ranks, ranks, sizes, kind, gated(n))


def unmark(parameter, name):
    if "hyper_connection" in name or "contraction" in name:
        parameter.sequence_parallel = False


def test_unreduced_gradients_of_the_gates_are_noticed(run_ranks):
    layout, expected = Layout(tp=2, sp=True), reference("dense", gated())
    result = run_ranks(2, compare, layout, "dense", gated(), expected, None, unmark)[0]
    wrong = {name for name, error in result.gradients.items() if error > 1e-3}
    ours = {name for name in expected.gradients if "hyper_connection" in name or "contraction" in name}
    assert wrong == ours and len(ours) == 4 * 2 * 4 + 3


SPLIT = dict(pipeline_schedule="fused", pp_boundary="split")
SETTINGS = {
    "interleaved_pp2_vpp2": (Layout(pp=2, vpp=2), "dense", dict(pipeline_schedule="interleaved"), {}),
    "fused_split_pp2_vpp2": (Layout(pp=2, vpp=2), "moe", SPLIT, {}),
    "full_recompute_pp2": (Layout(pp=2), "dense", {}, UNIFORM),
    "no_mixer_pp2": (Layout(pp=2), "dense", dict(contract="learned_head"), {}),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_gated_setting_matches_plain_single_process(run_ranks, setting):
    layout, kind, options, overrides = SETTINGS[setting]
    plain = {name: value for name, value in options.items() if name == "contract"}
    expected = reference(kind, gated(**plain))

    def run():
        schedule = engine.forward_backward if "pipeline_schedule" in options else None
        layout.initialize()
        config = layout.config(kind, **overrides)
        chunks = build(layout, config, kind, gated(**options))
        return differences(iterate(chunks, config, schedule=schedule), chunks, expected, config.params_dtype)

    result = run_ranks(2, run)[0]
    assert result.loss <= ERROR
    assert result.worst[0] <= ERROR, result.worst


@pytest.mark.parametrize("graphed", [te(), local(), full()], ids=["te", "local", "full_iteration"])
def test_graphs_hold_the_bits_of_steps_without(run_ranks, graphed):
    compare_graphed(run_ranks, 1, Layout(), "dense", gated(), graphed)


def test_router_graphs_hold_the_bits_of_steps_without(run_ranks):
    compare_graphed(run_ranks, 1, Layout(), "moe_shared", gated(), te(*PREPROCESS))


def fp32_streams(layout):
    layout.initialize()
    config = layout.config("dense", params_dtype=torch.bfloat16, bf16=True, fp32_residual_connection=True)
    chunks = build(layout, config, "dense", gated())
    seen = {}

    def see(module, args, output):
        seen[type(module).__name__] = (
            output[0].dtype if isinstance(output, tuple) else output.dtype,
            args[0].dtype,
        )

    for module in checkpoints.unwrap(chunks[0]).modules():
        if isinstance(module, (GatedConnection, ContractNorm)):
            module.register_forward_hook(see)
    return iterate(chunks, config), seen


def test_fp32_streams_are_read_in_the_dtype_of_f(run_ranks):
    loss, seen = run_ranks(1, fp32_streams, Layout())[0]
    expected = torch.bfloat16, torch.float32
    assert seen == {"GatedConnection": expected, "ContractNorm": expected}
    assert loss == pytest.approx(reference("dense", gated()).loss, rel=1e-2)


@pytest.mark.parametrize("kind", ["mtp", "mtp_moe"])
def test_layers_of_mtp_stay_plain(run_ranks, kind):
    check(run_ranks, 2, Layout(pp=2), kind, gated())
    names = reference(kind, gated()).gradients
    assert any(name.startswith("mtp.") and "input_layernorm" in name for name in names)
    assert not any(name.startswith("mtp.") and "hyper_connection" in name for name in names)


def both_ways(layout, kind, overrides):
    """Loss and gradients of this rank with and without recompute, and what was replayed."""
    results = []
    again = gated(recompute_layer_num="3", recompute_coefficients=True)
    with pytest.MonkeyPatch.context() as monkeypatch:
        replayed = count_replays(monkeypatch)
        for mhc in (gated(), again):
            layout.initialize()
            config = layout.config(kind, **overrides)
            chunks = build(layout, config, kind, mhc)
            loss = iterate(chunks, config)
            results.append((loss, {name: gradient(p).clone() for name, p in global_parameters(chunks)}))
    return results, replayed, [chunk_of(chunk).blocks for chunk in chunks]


RECOMPUTED = {
    "tp2_sp": (Layout(tp=2, sp=True), "dense", {}),
    "pp2_vpp2_moe": (Layout(pp=2, vpp=2), "moe", {}),
    "pp2_dropout": (Layout(pp=2), "dense", dict(hidden_dropout=0.1, attention_dropout=0.1)),
}


@pytest.mark.parametrize("case", RECOMPUTED)
def test_recompute_keeps_every_bit(run_ranks, case):
    for ((loss, grads), (other_loss, others)), replayed, blocks in run_ranks(2, both_ways, *RECOMPUTED[case]):
        assert loss == other_loss and grads.keys() == others.keys()
        assert [name for name in grads if not torch.equal(grads[name], others[name])] == []
        assert replayed and all(blocks)


@pytest.mark.parametrize("optimizer", [False, True], ids=["ddp", "distributed_optimizer"])
def test_bf16_training_resumes_bit_for_bit(run_ranks, tmp_path, optimizer):
    layout, folder = Layout(pp=2, distributed_optimizer=optimizer), tmp_path / "checkpoint"
    where = layout, "dense", torch.bfloat16
    train = functools.partial(checkpoints.train, mhc=gated())
    history = run_ranks(2, train, *where, range(2), None, folder)[0]
    history += run_ranks(2, train, *where, range(2, 4), folder)[0]
    assert history == run_ranks(2, train, *where, range(4))[0]


def test_training_is_resharded(run_ranks, tmp_path):
    legs = [(2, Layout(tp=2, sp=True)), (2, Layout(pp=2, vpp=2)), (1, Layout())]
    train = functools.partial(checkpoints.train, mhc=gated())
    history = checkpoints.in_legs(run_ranks, tmp_path, "dense", legs, train)
    whole = run_ranks(1, train, Layout(), "dense", torch.float32, range(6))[0]
    checkpoints.check(history, whole, checkpoints.FLOAT32_ERROR, moved=5e-3)


def loaded(folder, mhc, kind="dense"):
    """The error by which a model refuses a checkpoint of another."""
    layout = Layout()
    chunks, _, optimizer = checkpoints.start(layout, kind, torch.float32, mhc=mhc)
    try:
        checkpoints.load(folder, chunks, optimizer, "fully_reshardable")
    except ValueError as error:
        return str(error)


def test_checkpoints_of_other_options_are_refused(run_ranks, tmp_path):
    train = functools.partial(checkpoints.train, mhc=gated())
    run_ranks(1, train, Layout(), "dense", torch.float32, range(1), None, tmp_path / "gated")
    plain = functools.partial(checkpoints.train, mhc=MHCConfig())
    run_ranks(1, plain, Layout(), "dense", torch.float32, range(1), None, tmp_path / "paper")

    def words(folder, mhc):
        return run_ranks(1, loaded, tmp_path / folder, mhc)[0]

    assert "trained with --mhc-preset qwen4_exp, this run has paper" in words("gated", MHCConfig())
    assert "trained with --mhc-preset paper, this run has qwen4_exp" in words("paper", gated())
    assert "trained with --mhc-gated-rank 8, this run has 4" in words("gated", replace(gated(), gated_rank=4))
    assert words("gated", gated()) is None


def structure(kind):
    """Names of the parameters without a layer's number, and their dtypes under bf16."""
    layout = Layout()
    layout.initialize()
    config = layout.config(kind, params_dtype=torch.bfloat16, bf16=True)
    [chunk] = build(layout, config, kind, gated())
    model = checkpoints.unwrap(chunk)
    return {name.replace("decoder.layers.", "")[2:]: p.dtype for name, p in model.named_parameters()}


@pytest.mark.parametrize("kind", ["dense", "moe", "mla"])
def test_no_norm_stands_between_the_streams_and_f_or_the_output(run_ranks, kind):
    found = run_ranks(1, structure, kind)[0]
    assert set(found.values()) == {torch.bfloat16}
    norms = {name for name in found if "layernorm" in name and "contraction" not in name}
    assert norms == (
        {"self_attention.kv_layernorm.weight", "self_attention.q_layernorm.weight"}
        if kind == "mla"
        else set()
    )


def report_of(layout, kind):
    layout.initialize()
    config = layout.config(kind)
    chunks = build(layout, config, kind, gated())
    with Sampler(chunks, config, tokens=32) as sampler:
        iterate(chunks, config)
    return sampler.report()


def test_diagnostics_are_those_of_one_process(run_ranks):
    report = run_ranks(2, report_of, Layout(pp=2), "dense")[0]
    expected = run_ranks(1, report_of, Layout(), "dense")[0]
    assert report.statistics.keys() == expected.statistics.keys()
    for name, values in expected.statistics.items():
        assert report.statistics[name] == pytest.approx(values, rel=1e-9, abs=1e-12), name
    gains = [name for name in report.statistics if "gain" in name]
    assert len(gains) == 4 and all(set(report.statistics[name]) == {1.0} for name in gains)
    assert not any(name.startswith("alpha") or "logit_res" in name for name in report.statistics)
    for part, least, most in (("h_pre", 0, 1 / 4), ("h_post", 0, 2)):
        assert all(least < value < most for value in report.statistics[part + "_mean"])
    assert min(report.statistics["logit_pre_max"]) > 0 > max(report.statistics["logit_post_min"])


@pytest.mark.parametrize("layout, pattern", [(Layout(), "M*-E"), (Layout(tp=2, sp=True), "*-*E")])
def test_hybrid_layout_matches_single_process(run_ranks, layout, pattern):
    world, sizes = (2, layout) if layout.tp > 1 else (2, Layout(pp=2))
    split = pattern if layout.tp > 1 else f"{pattern[:2]}|{pattern[2:]}"
    hybrids.check(run_ranks, world, sizes, split, gated())


class Inside(ColumnParallelLinear):
    """Stands in for Transformer Engine's linear with a norm inside."""


def of_transformer_engine(wrap_fused):
    """The linears of a layer whose norms are inside of them, once it is built."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(norm.extension, "TELayerNormColumnParallelLinear", Inside)
        monkeypatch.setattr(norm.extension, "TEColumnParallelLinear", ColumnParallelLinear)
        layout = Layout()
        layout.initialize()
        spec = get_gpt_layer_local_submodules()
        spec.self_attention.submodules.linear_qkv = Inside
        inner = replace(spec.mlp.keywords["submodules"], linear_fc1=Inside)
        build = wrap_fused or spec.mlp.func
        mlp = functools.partial(build, **{**spec.mlp.keywords, "submodules": inner})
        parts = replace(spec, input_layernorm=IdentityOp, pre_mlp_layernorm=IdentityOp, mlp=mlp)
        try:
            changed = norm.fold(parts, layout.config("dense"), gated())
        except ValueError as error:
            return str(error)
        qkv = changed.self_attention.submodules.linear_qkv
        return [kind.__name__ for kind in (qkv, changed.mlp.keywords["submodules"].linear_fc1)]


def fused_mlp(**arguments):
    raise AssertionError


def test_norms_inside_of_linears_are_taken_out_or_refused(run_ranks):
    assert run_ranks(1, of_transformer_engine, None)[0] == ["ColumnParallelLinear"] * 2
    error = run_ranks(1, of_transformer_engine, fused_mlp)[0]
    assert error.endswith("and fused_mlp has one inside: drop --use-transformer-engine-op-fuser")

"""HybridModel: one connection a layer, in every layout, compared with one process and with the same GPT."""

import dataclasses
import functools
import re

import pytest
import test_checkpoint as checkpoints
import torch
from harness import Iteration, Layout, build, differences, global_parameters, gradient, iterate
from layout_cases import UNIFORM
from megatron.core import dist_checkpointing
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec

from megatron_mhc import MHCConfig, register
from megatron_mhc.carried import options_of
from megatron_mhc.chunk import ModelChunks
from megatron_mhc.convert.files import convert_files
from megatron_mhc.diagnostics import Sampler
from megatron_mhc.hyper_connection import HyperConnectionModule
from megatron_mhc.pipeline import engine
from megatron_mhc.testing import hybrid, ranks
from megatron_mhc.testing.gpt import SMALL
from megatron_mhc.testing.parameters import fill
from megatron_mhc.testing.parity import one_against_one
from megatron_mhc.wrapping import wrap_layer_spec

ERROR = 1e-10
MHC = MHCConfig()
MIXED, DENSE, MAMBA, DELTA = "*-*E", "*-*-", "M*M-", "G*GE"
OF_DELTA = dict(
    linear_key_head_dim=8, linear_value_head_dim=6, linear_num_key_heads=2, linear_num_value_heads=4
)


def symbols(pattern):
    return pattern.split("/")[0].replace("|", "")


def kind_of(pattern):
    return "mla" if "+" in pattern else "moe" if "E" in pattern else "dense"


def built(layout, pattern, mhc, weights=fill, **settings):
    """(config, chunks) of a HybridModel."""
    layout.initialize()
    depths = pattern.count("/") or None
    of_pattern = dict(num_layers=len(symbols(pattern)), is_hybrid_model=True, mtp_num_layers=depths)
    settings = OF_DELTA | of_pattern | settings
    config = layout.config(kind_of(pattern), **settings)
    model = hybrid.model(pattern, SMALL)
    return config, build(layout, config, kind_of(pattern), mhc, weights=weights, model=model)


def run(layout, pattern, mhc, **settings):
    config, chunks = built(layout, pattern, mhc, **settings)
    stock = mhc is None or config.mhc.pipeline_schedule == "megatron"
    return iterate(chunks, config, schedule=None if stock else engine.forward_backward), chunks


@functools.cache
def alone(pattern, mhc):
    return ranks.run_ranks(1, lambda: Iteration.of(*run(Layout(), pattern, mhc)))[0]


def check(run_ranks, world, layout, pattern, mhc=MHC, plain=None, **settings):
    """Loss and every gradient of a layout, against one process under the options `plain`."""
    expected = alone(pattern.replace("|", ""), plain or mhc)
    result = run_ranks(
        world, lambda: differences(*run(layout, pattern, mhc, **settings), expected, torch.float64)
    )[0]
    error, name = result.worst
    assert result.loss <= ERROR
    assert error <= ERROR, name


LAYOUTS = {
    "tp2": (2, Layout(tp=2), DENSE),
    "tp2_sp": (2, Layout(tp=2, sp=True), MIXED),
    "pp2": (2, Layout(pp=2), "*-*|E"),
    "pp2_vpp2": (2, Layout(pp=2, vpp=2), "*|-|*|E"),
    "ep2": (2, Layout(ep=2), MIXED),
    "tp2_pp2_sp": (4, Layout(tp=2, pp=2, sp=True), "*-|*E"),
    "tp2_sp_mamba": (2, Layout(tp=2, sp=True), MAMBA),
    "pp2_mamba": (2, Layout(pp=2), "M*|M-"),
    "tp2_sp_delta": (2, Layout(tp=2, sp=True), DELTA),
    "pp2_delta": (2, Layout(pp=2), "G*|GE"),
    "ep2_delta": (2, Layout(ep=2), DELTA),
    "cp2_delta": (2, Layout(cp=2), "G-GE"),  # Megatron's local attention refuses CP
    "pp2_mla": (2, Layout(pp=2), "+-|+-"),
    "pp2_mtp": (2, Layout(pp=2), "*-|*-/*-"),
    "pp2_last_stage_without_layers": (2, Layout(pp=2), "*-*-|"),
    "pp2_vpp2_stage_without_layers": (2, Layout(pp=2, vpp=2), "*-||*|E"),  # stock: wrong gradients
}
FEW = {("tp2", 2), ("tp2_pp2_sp", 2), ("tp2_sp_mamba", 2), ("pp2_mla", 2), ("pp2_mtp", 2)}
FEW |= {(f"{layout}_delta", 2) for layout in ("tp2_sp", "pp2", "ep2", "cp2")} | {("ep2_delta", 4)}
FEW |= {("pp2_last_stage_without_layers", 2), ("pp2_vpp2_stage_without_layers", 2), ("pp2_mamba", 2)}


@pytest.mark.parametrize(
    "layout, n",
    [
        pytest.param(layout, n, marks=pytest.mark.slow if (layout, n) in FEW else [])
        for layout in LAYOUTS
        for n in (2, 4)
    ],
)
def test_hybrid_layout_matches_single_process(run_ranks, layout, n):
    world, sizes, pattern = LAYOUTS[layout]
    check(run_ranks, world, sizes, pattern, MHCConfig(num_residual_streams=n))


@pytest.mark.parametrize(
    "options, settings",
    [
        (dict(pipeline_schedule="interleaved"), {}),
        (dict(pipeline_schedule="auto"), {}),
        ({}, UNIFORM),
        (dict(recompute_layer_num="2"), {}),
    ],
    ids=["interleaved", "auto", "full_recompute", "recompute_of_mhc"],
)
def test_hybrid_setting_matches_plain_single_process(run_ranks, options, settings):
    check(run_ranks, 2, Layout(pp=2), "M-*|*E", MHCConfig(**options), MHC, **settings)


def gpt_gradients(folder):
    """Of a GPT with mHC, which is saved; by their names in the hybrid model of its layers."""
    Layout().initialize()
    config = Layout().config("dense", num_layers=2)
    chunks = build(Layout(), config, "dense", MHC)
    loss = iterate(chunks, config)
    dist_checkpointing.save(chunks[0].module.sharded_state_dict(), str(folder))
    return loss, {hybrid_name(name): gradient(p).clone() for name, p in global_parameters(chunks)}


def hybrid_name(name):
    def moved(found):
        return f"layers.{2 * int(found[1]) + (found[2] in ('mlp', 'pre'))}.{found[2]}"

    name = re.sub(r"layers\.(\d+)\.([a-z]+)", moved, name)
    return name.replace("final_layernorm", "final_norm")


def hybrid_gradients(folder):
    """Of the hybrid model that Megatron's own load-time translation makes of the GPT's checkpoint."""
    config, chunks = built(Layout(), DENSE, MHC)
    core = chunks[0].module
    with torch.no_grad():
        for parameter in core.parameters():
            parameter.zero_()
    request = core.sharded_state_dict()
    from megatron.core.dist_checkpointing import gpt_checkpoint_interop

    maps = gpt_checkpoint_interop.gpt_compatible_layer_maps(DENSE)
    gpt_checkpoint_interop.retarget_sharded_state_dict_to_gpt_checkpoint(request, maps)
    core.load_state_dict(dist_checkpointing.load(request, str(folder)))
    return iterate(chunks, config), {name: gradient(p).clone() for name, p in global_parameters(chunks)}


def test_pairs_of_attention_and_mlp_are_the_gpt_whose_checkpoint_they_load(run_ranks, tmp_path):
    pytest.importorskip("megatron.core.dist_checkpointing.gpt_checkpoint_interop")  # 0.18 lacks it
    (loss, gradients), (other_loss, others) = (
        run_ranks(1, part, tmp_path)[0] for part in (gpt_gradients, hybrid_gradients)
    )
    assert loss == other_loss
    assert gradients.keys() == others.keys()
    assert [name for name in gradients if not torch.equal(gradients[name], others[name])] == []


PLAIN = MHCConfig(num_residual_streams=1, h_res="identity", h_pre="fixed", h_post="fixed")


def of_plain_names(mhc, pattern):
    """Loss and gradients by the names of a plain model, whose final norm has other values by its name."""

    def weights(chunks):
        fill(chunks)
        for name, parameter in global_parameters(chunks):
            if "final_norm" in name:
                torch.nn.init.ones_(parameter)

    loss, chunks = run(Layout(), pattern, mhc, weights=weights)
    pairs = ((name.replace("final_norm.norm.", "final_norm."), p) for name, p in global_parameters(chunks))
    return loss, {name: gradient(p).clone() for name, p in pairs}


@pytest.mark.parametrize("pattern", [MIXED, MAMBA, DELTA])
def test_one_hybrid_stream_that_nothing_maps_is_stock_bit_for_bit(run_ranks, pattern):
    stock, one = (run_ranks(1, of_plain_names, mhc, pattern)[0] for mhc in (None, PLAIN))
    assert stock[0] == one[0]
    assert stock[1].keys() == one[1].keys()
    assert [name for name in stock[1] if not torch.equal(stock[1][name], one[1][name])] == []


def test_a_plain_hybrid_model_has_the_same_bits_under_the_hooks(run_ranks):
    def under_hooks():
        with register():
            return of_plain_names(None, MIXED)

    stock, hooked = run_ranks(1, of_plain_names, None, MIXED)[0], run_ranks(1, under_hooks)[0]
    assert stock[0] == hooked[0]
    assert all(torch.equal(stock[1][name], hooked[1][name]) for name in stock[1])


def names_of_layers(layout, pattern):
    config, chunks = built(layout, pattern, MHC)
    with Sampler(chunks, config) as sampler:
        iterate(chunks, config)
    return sampler.report()


def test_diagnostics_name_the_kind_of_every_hybrid_layer(run_ranks):
    report = run_ranks(2, names_of_layers, Layout(pp=2), "M*|E-")[0]
    assert report.sublayers == ["layer_001_mamba", "layer_002_attention", "layer_003_moe", "layer_004_mlp"]
    expected = run_ranks(1, names_of_layers, Layout(), "M*E-")[0]
    for name, values in expected.statistics.items():
        assert report.statistics[name] == pytest.approx(values, rel=1e-9, abs=1e-12), name


def train(layout, pattern, steps, load_from=None, save_to=None, mhc=checkpoints.MHC):
    """As `test_checkpoint.train`, of a HybridModel."""
    settings = OF_DELTA | dict(num_layers=len(symbols(pattern)), is_hybrid_model=True)
    model = hybrid.model(pattern, SMALL)
    chunks, config, optimizer = checkpoints.start(
        layout, kind_of(pattern), torch.float32, model=model, mhc=mhc, settings=settings, lr=3e-2
    )
    if load_from:
        checkpoints.load(load_from, chunks, optimizer, "fully_reshardable")
    history = [checkpoints.step(chunks, config, optimizer, number) for number in steps]
    if save_to:
        checkpoints.save(save_to, chunks, optimizer, "fully_reshardable")
    return history


@pytest.mark.parametrize("mixer", ["M", "G"])
def test_resharded_hybrid_training_matches_unbroken_run(run_ranks, tmp_path, mixer):
    folder = tmp_path / "saved"
    pp2, tp2, pattern = Layout(pp=2), Layout(tp=2, sp=True), mixer + "*-E"
    history = run_ranks(2, train, pp2, mixer + "*|-E", range(2), None, folder)[0]
    history += run_ranks(2, train, tp2, pattern, range(2, 4), folder)[0]
    expected = run_ranks(1, train, Layout(), pattern, range(4))[0]
    checkpoints.check(history, expected, checkpoints.FLOAT32_ERROR, moved=5e-3)


def test_the_stand_in_for_gated_delta_nets_is_megatrons_own_rule_in_torch(run_ranks):
    """Megatron's is of --deterministic-mode and of fp32, beside the one of `testing.delta` in float64."""

    def deterministic():
        return Iteration.of(*run(Layout(), DELTA, MHC, deterministic_mode=True))

    found, expected = run_ranks(1, deterministic)[0], alone(DELTA, MHC)
    assert found.loss == pytest.approx(expected.loss, abs=1e-6)
    error, name = one_against_one(found, expected, torch.float32).worst
    assert error <= 1e-5, name


def test_gated_delta_nets_with_tp_are_refused_without_sequence_parallel(run_ranks):
    def refused():
        with pytest.raises(ValueError, match="gated delta nets .*-size 2: .* add --sequence-par"):
            built(Layout(tp=2), "G-", MHC)

    run_ranks(2, refused)


def core_of(mhc):
    config, chunks = built(Layout(), MIXED, mhc)
    return config, chunks, chunks[0].module


def save_as(mhc, folder):
    """A model in both formats."""
    _, _, core = core_of(mhc)
    (folder / "torch_dist").mkdir(parents=True)
    dist_checkpointing.save(core.sharded_state_dict(), str(folder / "torch_dist"))
    torch.save(core.state_dict(), folder / "torch")


def load_into(core, folder, format):
    if format == "torch":
        core.load_state_dict(torch.load(folder / "torch", weights_only=False), strict=False)
    else:
        core.load_state_dict(dist_checkpointing.load(core.sharded_state_dict(), str(folder / "torch_dist")))


@pytest.mark.parametrize("format", ["torch_dist", "torch"])
def test_hybrid_checkpoints_of_the_other_kind_are_refused_or_taken_by_load_dense(run_ranks, tmp_path, format):

    def both():
        with register():
            save_as(None, tmp_path / "plain")
            save_as(MHC, tmp_path / "mhc")
            with pytest.raises(ValueError, match="add --spec megatron_mhc.specs hybrid_mhc_spec"):
                load_into(core_of(None)[2], tmp_path / "mhc", format)
            with pytest.raises(ValueError, match="--mhc-load-dense"):
                load_into(core_of(MHC)[2], tmp_path / "plain", format)
            with pytest.raises(ValueError, match="trained with --mhc-sinkhorn-iterations 20"):
                load_into(core_of(MHCConfig(sinkhorn_iterations=3))[2], tmp_path / "mhc", format)
            losses = []
            for mhc in (None, MHCConfig(load_dense=True)):
                config, chunks, core = core_of(mhc)
                for module in core.modules():
                    if isinstance(module, HyperConnectionModule):
                        module.reset_parameters()
                load_into(core, tmp_path / "plain", format)
                losses.append(iterate(chunks, config))
            return losses

    plain, dense = run_ranks(1, both)[0]
    assert plain == pytest.approx(dense, abs=1e-3)


def test_a_copied_config_of_a_hybrid_model_gets_its_options_back(run_ranks):
    def copied():
        config, chunks = built(Layout(), MAMBA, MHC)
        copy = dataclasses.replace(config)
        return options_of(chunks, copy), copy.mhc

    assert run_ranks(1, copied)[0] == (MHC, MHC)


def test_what_the_converter_does_not_do_with_a_hybrid_checkpoint_is_refused(run_ranks, tmp_path):
    run_ranks(1, save_as, MHC, tmp_path)
    for source, target, words in (
        ("plain", "plugin", "has mHC parameters already"),
        ("plugin", "plugin", "nothing to convert"),
        ("plugin", "megatron-dev", r"not a HybridModel's: make a GPT of one of pairs \(.*--model gpt"),
        ("plugin", "transformers", "not a HybridModel's"),
    ):
        with pytest.raises(ValueError, match=words):
            convert_files(source, target, tmp_path / "torch_dist", tmp_path / "new")
    options = dict(options="num_residual_streams=4", model="gpt")
    with pytest.raises(ValueError, match="--from megatron-dev --to plugin is for a GPT's checkpoint"):
        convert_files("megatron-dev", "plugin", tmp_path / "torch_dist", tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


def test_specs_that_megatron_copies_to_fuse_mla_keep_their_chunk():
    chunks = ModelChunks(None, MHC, layers=1, each=1)
    wrapped = wrap_layer_spec(hybrid_stack_spec.submodules.mla_layer, MHC, chunks)
    fused = HybridStack._fuse_mla_down_proj(None, HybridStackSubmodules(mla_layer=wrapped))
    assert fused.mla_layer.params["chunks"] is chunks
    assert wrapped.submodules.input_layernorm is not fused.mla_layer.submodules.input_layernorm


def test_a_hybrid_layer_of_attention_and_mlp_is_refused(run_ranks):
    def refused():
        whole = get_gpt_layer_local_spec(normalization="RMSNorm")
        hybrid_stack_spec.submodules.attention_layer = whole
        with pytest.raises(ValueError, match="with both attention and an MLP: give its stack two layers"):
            built(Layout(), DENSE, MHC)

    run_ranks(1, refused)


def with_dropout(recompute, mixer):
    mhc = MHCConfig(recompute_layer_num=recompute)
    loss, chunks = run(Layout(), mixer + "*-E", mhc, hidden_dropout=0.1, attention_dropout=0.1)
    return loss, {name: gradient(p).clone() for name, p in global_parameters(chunks)}


@pytest.mark.parametrize("mixer", ["M", "G"])
@pytest.mark.parametrize("recompute", ["2", "auto"])
def test_recompute_keeps_every_bit_of_a_hybrid_model(run_ranks, recompute, mixer):
    stored, replayed = (run_ranks(1, with_dropout, setting, mixer)[0] for setting in ("off", recompute))
    assert stored[0] == replayed[0]
    assert all(torch.equal(stored[1][name], replayed[1][name]) for name in stored[1])


def of_frozen_embedding(**settings):
    def weights(chunks):
        fill(chunks)
        chunks[0].embedding.requires_grad_(False)

    with register():
        loss, chunks = run(Layout(), DENSE, MHC, weights=weights, **settings)
    trained = ((name, p) for name, p in global_parameters(chunks) if p.requires_grad)
    return {name: gradient(p).clone() for name, p in trained}


def test_full_recompute_behind_a_frozen_embedding_trains_a_hybrid_model(run_ranks):
    stored = run_ranks(1, of_frozen_embedding)[0]
    replayed = run_ranks(1, lambda: of_frozen_embedding(**UNIFORM))[0]
    assert stored.keys() == replayed.keys()
    assert [name for name in stored if not torch.equal(stored[name], replayed[name])] == []

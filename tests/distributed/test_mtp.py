"""`--mhc-mtp multistream`: loss and every gradient in parallel layouts, compared with a single process."""

import functools

import pytest
import torch
from harness import (
    Iteration,
    Layout,
    build,
    compare,
    differences,
    global_parameters,
    gradient,
    iterate,
)
from layout_cases import BLOCK, UNIFORM, selective
from pipeline import BOUNDARIES, SCHEDULES, compare_all, interleaved
from test_checkpoint import start, step, train

from megatron_mhc import MHCConfig
from megatron_mhc.diagnostics import Sampler
from megatron_mhc.testing.ranks import run_ranks as run

ERROR = 1e-10
ONE, TP2, TP2_SP, PP2 = Layout(), Layout(tp=2), Layout(tp=2, sp=True), Layout(pp=2)


def multistream(**options):
    return MHCConfig(mtp="multistream", **options)


V4 = multistream(preset="deepseek_v4")


def one_process(kind, mhc, settings):
    ONE.initialize()
    config = ONE.config(kind, **settings)
    chunks = build(ONE, config, kind, mhc)
    return Iteration.of(iterate(chunks, config), chunks)


@functools.cache
def expected(kind, mhc, **settings):
    return run(1, one_process, kind, mhc, settings)[0]


def check(result, error=ERROR):
    worst, name = result.worst
    print(f"loss error {result.loss:.1e}, worst gradient error {worst:.1e} ({name})")
    assert result.loss <= error
    assert worst <= error, name


LAYOUTS = {
    "tp2": (2, TP2, "mtp"),
    "tp2_sp": (2, TP2_SP, "mtp2"),
    "pp2": (2, PP2, "mtp2"),
    "tp2_tied": (2, TP2, "tied_mtp"),
    "pp2_vpp2": (2, Layout(pp=2, vpp=2), "mtp"),
    "ep2": (2, Layout(ep=2), "mtp_moe"),
    "dp2_distributed_optimizer": (2, Layout(distributed_optimizer=True), "mtp"),
    "tp2_pp2_sp": (4, Layout(tp=2, pp=2, sp=True), "mtp2"),
}


@pytest.mark.parametrize("streams", [2, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_matches_single_process(run_ranks, layout, streams):
    ranks, sizes, kind = LAYOUTS[layout]
    mhc = multistream(num_residual_streams=streams)
    check(run_ranks(ranks, compare, sizes, kind, mhc, expected(kind, mhc))[0])


def of_context_ranks(layout, mhc, wanted):
    """An iteration whose context ranks each have as many tokens with a loss: a depth's is a mean of its own.

    Returns:
        the iteration, or where `wanted` is one its comparison.
    """
    layout.initialize()
    config = layout.config("token_local_mtp")
    chunks = build(layout, config, "token_local_mtp", mhc)

    def mask(module, args, kwargs):
        # The roll takes the last position, of rank 0; this one becomes 7, of rank 1.
        kwargs["loss_mask"][args[1] == 8] = 0

    chunks[0].register_forward_pre_hook(mask, with_kwargs=True)
    loss = iterate(chunks, config)
    return Iteration.of(loss, chunks) if wanted is None else differences(loss, chunks, wanted, torch.float64)


@pytest.mark.parametrize("streams", [2, 4])
def test_context_parallel_matches_single_process(run_ranks, streams):
    mhc = multistream(num_residual_streams=streams)
    wanted = run_ranks(1, of_context_ranks, ONE, mhc, None)[0]
    check(run_ranks(2, of_context_ranks, Layout(cp=2), mhc, wanted)[0])


VARIANTS = {
    "one_stream": dict(num_residual_streams=1),
    "deepseek_v4": dict(preset="deepseek_v4"),
    "hc": dict(h_res="unconstrained"),
    "identity": dict(h_res="identity", h_pre="fixed", contract="sum"),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_matches_single_process(run_ranks, variant):
    mhc = multistream(**VARIANTS[variant])
    check(run_ranks(2, compare, TP2_SP, "mtp2", mhc, expected("mtp2", mhc))[0])


def test_every_parameter_of_a_depth_learns():
    gradients = expected("mtp2", multistream(preset="deepseek_v4")).gradients
    for depth in range(2):
        of_depth = {name: g for name, g in gradients.items() if name.startswith(f"mtp.layers.{depth}.")}
        for part in ("enorm", "hnorm", "e_proj", "h_proj", "self_attention_hyper_connection.mapping_proj"):
            assert any(part in name for name in of_depth)
        assert any("final_layernorm.head.mapping_proj" in name for name in of_depth)
        assert not any("eh_proj" in name for name in of_depth)
        for name, found in of_depth.items():
            assert found.abs().max() > 1e-9, name


def what_depths_read_and_say(mhc):
    """By hooks: the decoder's streams, and of each depth what is embedded, read, made and said."""
    ONE.initialize()
    config = ONE.config("mtp2")
    chunks = build(ONE, config, "mtp2", mhc)
    model, seen = chunks[0].module, {}

    def note(name, take):
        def hook(module, args, kwargs, output):
            seen.setdefault(name, []).append(take(args, kwargs, output).detach().clone())

        return dict(hook=hook, with_kwargs=True)

    model.decoder.final_layernorm.register_forward_hook(**note("decoder", lambda args, kwargs, out: args[0]))
    for depth in model.mtp.layers:
        depth.enorm.register_forward_hook(**note("embedded", lambda args, kwargs, out: out))
        inner = depth.mtp_model_layer
        inner.register_forward_hook(**note("read", lambda args, kwargs, out: kwargs["hidden_states"]))
        inner.register_forward_hook(**note("made", lambda args, kwargs, out: out[0]))
        depth.register_forward_hook(**note("said", lambda args, kwargs, out: out[0]))
    iterate(chunks, config, count=1)
    return seen, {name: p.detach().clone() for name, p in model.named_parameters()}


def rms_norm(x, weight):
    return torch.nn.functional.rms_norm(x, weight.shape, weight, 1e-5)


def test_a_depth_is_what_deepseek_v4_defines(run_ranks):
    """h_proj of each normalised stream and e_proj of the normalised embedding; its own head and norm."""
    seen, weights = run_ranks(1, what_depths_read_and_say, V4)[0]
    streams = seen["decoder"][0]
    for depth in range(2):
        embedded, read, made, said = (seen[name][depth] for name in ("embedded", "read", "made", "said"))
        start = f"mtp.layers.{depth}."
        of = {name.removeprefix(start): w for name, w in weights.items() if name.startswith(start)}
        normed = rms_norm(streams.unflatten(2, (4, -1)), of["hnorm.weight"])
        wanted = normed @ of["h_proj.weight"].T + (embedded @ of["e_proj.weight"].T).unsqueeze(2)
        torch.testing.assert_close(read, wanted.flatten(2), rtol=0, atol=1e-12)
        head = {name: of[f"final_layernorm.head.{name}"] for name in ("mapping_proj.weight", "alpha", "bias")}
        flat = made / (made.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        logits = flat @ head["mapping_proj.weight"].T * head["alpha"] + head["bias"]
        one = ((torch.sigmoid(logits) + 1e-6).unsqueeze(-1) * made.unflatten(2, (4, -1))).sum(2)
        torch.testing.assert_close(said, rms_norm(one, of["final_layernorm.norm.weight"]), rtol=0, atol=1e-12)
        streams = made


def test_streams_reach_the_depth():
    """Its gradient of the decoder is not what the contracted streams would give: equal for all streams."""
    both = [expected("mtp", MHCConfig(mtp=form)).gradients for form in ("single", "multistream")]
    name = "decoder.layers.3.mlp_hyper_connection.affine"
    assert not torch.allclose(both[0][name], both[1][name], rtol=1e-3)


# What must not change the result: (ranks, layout, kind, settings).
SETTINGS = {
    "uniform_recompute_pp2": (2, PP2, "mtp2", UNIFORM),
    "uniform_recompute_tp2_sp": (2, TP2_SP, "mtp2", UNIFORM),
    "block_recompute_pp2": (2, PP2, "mtp", BLOCK),
    "distributed_activations_tp2": (2, TP2, "mtp", UNIFORM | dict(distribute_saved_activations=True)),
    "selective_recompute_tp2_sp": (2, TP2_SP, "mtp", selective("core_attn", "mlp", "layernorm")),
    "moe_recompute_ep2": (2, Layout(ep=2), "mtp_moe", selective("moe", "layernorm")),
    "variable_lengths_pp2": (
        2,
        PP2,
        "mtp",
        dict(variable_seq_lengths=True, moe_token_dispatcher_type="alltoall"),
    ),
    "stages_pp4": (4, Layout(pp=4), "mtp", dict(pipeline_model_parallel_layout="Ett|t||tmL")),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_setting_matches_plain_single_process(run_ranks, setting):
    ranks, layout, kind, settings = SETTINGS[setting]
    check(run_ranks(ranks, compare, layout, kind, multistream(), expected(kind, multistream()), settings)[0])


# Stages without a decoder layer that predict, alone or beside the loss.
STAGES = {
    "beside_the_loss": (PP2, 2, "Etttt|mL"),
    "beside_the_loss_pp4": (Layout(pp=4), 4, "Ett|t|t|mL"),
    "alone": (Layout(pp=4), 4, "Ett|tt|m|L"),
    "behind_a_layer": (Layout(pp=4), 4, "Et|t|ttm|L"),
    "virtual": (Layout(pp=2, vpp=2), 2, "Et|tt|t|mL"),
}


def compare_stages(layout, kind, mhc, wanted, stages):
    """`compare`, where embeddings are also reduced with the rank of a stage of MTP."""
    at = next(i for i, stage in enumerate(stages.split("|")) if "m" in stage) % layout.pp
    groups = dict(get_embedding_ranks=lambda ranks: sorted({ranks[0], ranks[at]}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Layout, "initialize", functools.partialmethod(Layout.initialize, **groups))
        return compare(layout, kind, mhc, wanted, dict(pipeline_model_parallel_layout=stages))


@pytest.mark.parametrize("form", ["single", "multistream"])
@pytest.mark.parametrize("where", STAGES)
def test_stage_of_prediction_matches_single_process(run_ranks, where, form):
    layout, ranks, stages = STAGES[where]
    mhc = MHCConfig(mtp=form)
    check(run_ranks(ranks, compare_stages, layout, "mtp", mhc, expected("mtp", mhc), stages)[0])


# What is another model: settings of both sides.
MODELS = {
    "repeated_layer": dict(mtp_use_repeated_layer=True),
    "detached_heads": dict(mtp_detach_heads=True),
    "repeated_and_recomputed": dict(mtp_use_repeated_layer=True) | UNIFORM,
}


@pytest.mark.parametrize("model", MODELS)
def test_other_form_of_megatrons_matches_single_process(run_ranks, model):
    settings = MODELS[model]
    unchanged = {key: value for key, value in settings.items() if "recompute" not in key}
    wanted = expected("mtp2", multistream(), **unchanged)
    check(run_ranks(2, compare, PP2, "mtp2", multistream(), wanted, settings)[0])


@pytest.mark.parametrize("options", [dict(), dict(recompute_layer_num="2")], ids=["kept", "replayed"])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_schedule_matches_single_process(run_ranks, schedule, boundary, options):
    mhc = interleaved(boundary, schedule, mtp="multistream", **options)
    cases = [(mhc, 4, expected("mtp2", multistream()))]
    layout, settings = Layout(pp=2, vpp=2), dict(num_layers=4)
    check(run_ranks(2, compare_all, layout, "mtp2", cases, settings)[0][0])


def gradients_of(layout, kind, mhc, settings):
    layout.initialize()
    config = layout.config(kind, **settings)
    chunks = build(layout, config, kind, mhc)
    loss = iterate(chunks, config)
    return loss, {name: gradient(p).clone() for name, p in global_parameters(chunks)}


REPLAYED = {
    "mtp2": (PP2, "mtp2", {}),
    "repeated": (PP2, "mtp2", dict(mtp_use_repeated_layer=True)),
    "moe": (TP2_SP, "mtp_moe", {}),
}


@pytest.mark.parametrize("coefficients", [False, True])
@pytest.mark.parametrize("case", REPLAYED)
def test_replayed_streams_keep_every_bit(run_ranks, case, coefficients):
    layout, kind, settings = REPLAYED[case]
    again = multistream(recompute_layer_num="auto", recompute_coefficients=coefficients)
    both = [run_ranks(2, gradients_of, layout, kind, mhc, settings) for mhc in (multistream(), again)]
    for (loss, kept), (loss_again, replayed) in zip(*both, strict=True):
        assert loss == loss_again
        assert [name for name in kept if not torch.equal(kept[name], replayed[name])] == []


RUN = functools.partial(train, mhc=V4)


def test_resharded_training_matches_unbroken_run(run_ranks, tmp_path):
    """TP 2 with SP, then PP 2, then one process, two steps each."""
    history = run_ranks(2, RUN, TP2_SP, "mtp2", torch.float32, range(2), None, tmp_path / "0")[0]
    history += run_ranks(2, RUN, PP2, "mtp2", torch.float32, range(2, 4), tmp_path / "0", tmp_path / "1")[0]
    history += run_ranks(1, RUN, ONE, "mtp2", torch.float32, range(4, 6), tmp_path / "1")[0]
    unbroken = run_ranks(1, RUN, ONE, "mtp2", torch.float32, range(6))[0]
    loss, norm = (torch.tensor(history) - torch.tensor(unbroken)).abs().amax(dim=0).tolist()
    assert loss <= 1e-6 and norm <= 1e-5


@pytest.mark.parametrize("layout", [PP2, Layout(distributed_optimizer=True)], ids=["pp2", "dp2"])
def test_bf16_training_resumes_bit_for_bit(run_ranks, tmp_path, layout):
    where = layout, "mtp2", torch.bfloat16
    history = run_ranks(2, RUN, *where, range(2), None, tmp_path / "saved")[0]
    history += run_ranks(2, RUN, *where, range(2, 4), tmp_path / "saved")[0]
    assert history == run_ranks(2, RUN, *where, range(4))[0]


def refusal(layout, kind, mhc, folder):
    """What a model of these options says to a checkpoint."""
    try:
        train(layout, kind, torch.float32, range(0), folder, mhc=mhc)
    except Exception as error:
        return str(error)
    return None


def test_checkpoints_of_the_other_form_are_refused(run_ranks, tmp_path):
    for form, other in (("single", "multistream"), ("multistream", "single")):
        folder = tmp_path / form
        saved = functools.partial(train, mhc=MHCConfig(mtp=form))
        run_ranks(1, saved, ONE, "mtp", torch.float32, range(1), None, folder)
        said = run_ranks(1, refusal, ONE, "mtp", MHCConfig(mtp=other), folder)[0]
        assert f"trained with --mhc-mtp {form}, this run has {other}: pass --mhc-mtp {form}" in said


def dtypes(mhc):
    chunks, config, optimizer = start(ONE, "mtp", torch.bfloat16, mhc=mhc)
    step(chunks, config, optimizer, 0)
    return {name: p.dtype for name, p in global_parameters(chunks) if name.startswith("mtp.")}


def test_mappings_of_a_depth_stay_float32_in_bf16_training(run_ranks):
    for name, dtype in run_ranks(1, dtypes, V4)[0].items():
        mapping = "hyper_connection" in name or ".head." in name
        assert dtype == (torch.float32 if mapping else torch.bfloat16), name


def report_of(layout, kind, mhc):
    layout.initialize()
    config = layout.config(kind)
    chunks = build(layout, config, kind, mhc)
    with Sampler(chunks, config, 64) as sampler:
        iterate(chunks, config)
    return sampler.report()


def test_diagnostics_have_the_connections_of_depths(run_ranks):
    """Last, with composites of their own, and the same on two stages as in one process."""
    whole = run_ranks(1, report_of, ONE, "mtp2", V4)[0]
    assert whole.sublayers[7:] == [
        "layer_004_mlp",
        *(f"mtp_00{d}_{f}" for d in (1, 2) for f in ("attention", "mlp")),
    ]
    for first in (0, 8, 10):
        assert whole.composite[first] == whole.h_res[first]
    assert whole.composite[9] != whole.h_res[9]
    for found in run_ranks(2, report_of, PP2, "mtp2", V4):
        for name, values in whole.statistics.items():
            assert found.statistics[name] == pytest.approx(values, rel=1e-10), name


def of_prediction_alone(mhc):
    """What a block of MTP says where the streams were lost, and a depth to speculative decoding."""
    ONE.initialize()
    config = ONE.config("mtp")
    model = build(ONE, config, "mtp", mhc)[0].module
    said = []
    hidden = torch.zeros(16, 2, 32, dtype=torch.float64)
    calls = lambda: model.mtp(None, None, hidden, None), model.mtp.layers[0].forward_single_position
    for call in calls:
        try:
            call()
        except (RuntimeError, ValueError) as error:
            said.append(str(error))
    return said


def test_what_would_predict_from_contracted_states_is_refused(run_ranks):
    lost, speculative = run_ranks(1, of_prediction_alone, V4)[0]
    assert "came without its streams" in lost and "use --mhc-mtp single" in lost
    assert "num_speculative_tokens" in speculative and "train with --mhc-mtp single" in speculative

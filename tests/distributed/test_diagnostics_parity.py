"""Reduced diagnostics: of hand-made mappings on two pipeline stages against products in float64 by hand,
and of a GPT in every parallel layout against the single process. Tolerance: 1e-10, relative."""

import functools
import math

import harness
import pytest
import torch
from harness import Layout, build, global_parameters, gradient, iterate
from thinned import each_value

from megatron_mhc import MHCConfig
from megatron_mhc.diagnostics import Report, Sampler
from megatron_mhc.diagnostics.report import reduce_samples
from megatron_mhc.diagnostics.sampler import Sample
from megatron_mhc.testing.ranks import run_ranks as run

ERROR = 1e-10
MHC, HC = MHCConfig(), MHCConfig(h_res="unconstrained")

# Two tokens, two layers (four sub-layers), n = 2. Sub-layers 0 and 1 lie on the first stage.
KNOWN = [
    [[[2.0, 1.0], [0.0, 1.0]], [[1.0, 0.0], [0.5, 0.5]]],
    [[[1.0, -1.0], [1.0, 1.0]], [[0.0, 1.0], [1.0, 0.0]]],
    [[[0.0, 3.0], [1.0, 0.0]], [[0.25, 0.75], [0.75, 0.25]]],
    [[[1.0, 2.0], [2.0, 1.0]], [[1.0, 1.0], [0.0, 1.0]]],
]


def known_on_two_stages(capacity):
    from megatron.core import parallel_state

    layout = Layout(pp=2)
    layout.initialize()
    stage = parallel_state.get_pipeline_model_parallel_rank()
    mhc = MHCConfig(num_residual_streams=2)
    ones = torch.ones(2, 2, dtype=torch.float64)
    eye = torch.eye(2, dtype=torch.float64).expand(2, 2, 2)
    samples = {
        i: Sample(ones, ones, torch.tensor(KNOWN[i], dtype=torch.float64), eye, {}, {})
        for i in (2 * stage, 2 * stage + 1)
    }
    return reduce_samples(samples, layout.config("dense", num_layers=2), mhc, capacity)


@pytest.mark.parametrize("capacity", [2, 5])
def test_known_product_over_two_pipeline_stages(run_ranks, capacity):
    reports = run_ranks(2, known_on_two_stages, capacity)
    assert reports[0].composite == reports[1].composite
    values = reports[1].statistics
    for name in ("gain_forward", "composite_gain_forward", "composite_gain_backward"):
        assert reports[0].statistics[name] == values[name]
    # By hand. Token 0: H1 H0 = [2 0; 2 2], H2 H1 H0 = [6 6; 2 0], H3 H2 H1 H0 = [10 6; 14 12]:
    # row sums (2 4), (12 2), (16 26). Token 1: [.5 .5; 1 0], [.875 .125; .625 .375],
    # [1.5 .5; .625 .375]: row sums (1 1), (1 1), (2 1).
    assert values["composite_gain_forward"] == pytest.approx([(3 + 1) / 2, 2.5, 6.5, 14.0], rel=1e-14)
    # Token 0: H3 = [1 2; 2 1], H3 H2 = [2 3; 1 6], H3 H2 H1 = [5 1; 7 5], with H0 [10 6; 14 12]:
    # column sums (3 3), (3 9), (12 6), (24 18). Token 1: [1 1; 0 1], [1 1; .75 .25], [1 1; .25 .75],
    # [1.5 .5; .625 .375]: (1 2), (1.75 1.25), (1.25 1.75), (2.125 .875).
    assert values["composite_gain_backward"] == pytest.approx([13.0625, 6.875, 5.375, 2.5], rel=1e-14)
    assert values["gain_forward"] == pytest.approx([2.0, 1.5, 2.0, 2.5], rel=1e-14)
    composite = torch.tensor(reports[1].composite[3])
    torch.testing.assert_close(composite, torch.tensor([[5.75, 3.25], [7.3125, 6.1875]]))


def sampled(layout, kind, mhc, tokens, first=0, overrides=None, off=False, options=None):
    """One iteration in `layout` that begins with micro-batch `first`: report and this rank's gradients."""
    layout.initialize()
    config = layout.config(kind, **(overrides or {}))
    chunks = build(layout, config, kind, mhc)
    original = harness.tokens
    harness.tokens = lambda count, seed=0: original(count, seed).roll(-first, 0)
    if off:
        iterate(chunks, config)
        report = None
    else:
        with Sampler(chunks, config, tokens) as sampler:
            iterate(chunks, config, **(options or {}))
        report = sampler.report()
    return report, {name: gradient(p).clone() for name, p in global_parameters(chunks)}


@functools.cache
def single(kind, mhc, tokens, first=0) -> Report:
    return run(1, sampled, Layout(), kind, mhc, tokens, first)[0][0]


def pooled_std(stds: tuple[float, ...], means: tuple[float, ...]) -> float:
    square = sum(s * s + m * m for s, m in zip(stds, means, strict=True)) / len(stds)
    return math.sqrt(square - (sum(means) / len(means)) ** 2)


def average(reports: list[Report]) -> dict[str, list[float]]:
    """What the union of the reports' equally many tokens has."""
    merged = {}
    for name in reports[0].statistics:
        columns = list(zip(*(r.statistics[name] for r in reports), strict=True))
        if name.endswith("_error") or (name.startswith("logit") and name.endswith("max")):
            merged[name] = [max(column) for column in columns]
        elif name.startswith("logit"):
            merged[name] = [min(column) for column in columns]
        elif name.endswith("_std"):
            means = list(zip(*(r.statistics[name[:-3] + "mean"] for r in reports), strict=True))
            merged[name] = [pooled_std(*pair) for pair in zip(columns, means, strict=True)]
        else:
            merged[name] = [sum(column) / len(column) for column in columns]
    return merged


def check(world, layout, kind, mhc=MHC, tokens=256, dp=1, **overrides):
    got = run(world, sampled, layout, kind, mhc, tokens, 0, overrides)
    compare_reports(got, [single(kind, mhc, tokens, first) for first in range(dp)])


def compare_reports(results, references):
    """The report of every rank with that of the references' tokens together."""
    expected = average(references)
    for report, _ in results:
        assert report.statistics.keys() == expected.keys()
        for name, values in expected.items():
            assert report.statistics[name] == pytest.approx(values, rel=ERROR, abs=ERROR), name
        for field in ("h_res", "composite"):
            wanted = torch.tensor([getattr(r, field) for r in references], dtype=torch.float64).mean(0)
            torch.testing.assert_close(
                torch.tensor(getattr(report, field), dtype=torch.float64), wanted, rtol=ERROR, atol=ERROR
            )


TWO = {
    "tp2": (Layout(tp=2), "dense", 1),
    "tp2_sp": (Layout(tp=2, sp=True), "dense", 1),
    "tp2_sp_moe": (Layout(tp=2, sp=True), "moe", 1),
    "pp2": (Layout(pp=2), "dense", 1),
    "pp2_vpp2": (Layout(pp=2, vpp=2), "moe", 1),
    "cp2": (Layout(cp=2), "token_local", 1),
    "dp2": (Layout(), "dense", 2),
    "dp2_distributed_optimizer": (Layout(distributed_optimizer=True), "dense", 2),
    "ep2": (Layout(ep=2), "moe", 2),
}
FOUR = {
    "pp4": (Layout(pp=4), "dense", 1),
    "tp2_sp_pp2_vpp2": (Layout(tp=2, pp=2, vpp=2, sp=True), "dense", 1),
    "tp2_sp_cp2": (Layout(tp=2, sp=True, cp=2), "token_local", 1),
    "pp2_cp2": (Layout(pp=2, cp=2), "token_local", 1),
    "pp2_dp2": (Layout(pp=2), "dense", 2),
    "tp2_dp2": (Layout(tp=2), "dense", 2),
    "pp2_ep2": (Layout(pp=2, ep=2), "moe", 2),
}


# 32 tokens in a micro-batch: all of them, and 8, of which each shard takes its part.
@pytest.mark.parametrize("name, tokens", each_value(TWO, [8, 256]))
def test_two_rank_layout_reports_what_the_single_process_does(name, tokens):
    layout, kind, dp = TWO[name]
    check(2, layout, kind, tokens=tokens, dp=dp)


@pytest.mark.parametrize("name", FOUR)
def test_four_rank_layout_reports_what_the_single_process_does(name):
    layout, kind, dp = FOUR[name]
    check(4, layout, kind, tokens=8, dp=dp)


def test_plain_hyper_connections_on_two_stages():
    check(2, Layout(pp=2, vpp=2), "dense", HC)


def test_a_stage_without_layers_takes_part():
    """The last of four stages holds the loss alone."""
    check(4, Layout(pp=4), "three_layers", tokens=8, account_for_loss_in_pipeline_split=True)


def test_uneven_stages():
    check(2, Layout(pp=2), "dense", tokens=8, num_layers_in_first_pipeline_stage=1)


FULL = dict(recompute_granularity="full", recompute_num_layers=1, recompute_method="uniform")
SELECTIVE = dict(recompute_granularity="selective", recompute_modules=["core_attn", "layernorm", "mlp"])


@pytest.mark.parametrize("overrides", [FULL, SELECTIVE], ids=["full", "selective"])
@pytest.mark.parametrize("layout", [Layout(), Layout(pp=2)], ids=["single", "pp2"])
def test_recomputation_is_not_counted(layout, overrides):
    check(layout.pp, layout, "dense", **overrides)


@pytest.mark.parametrize(
    "layout", [Layout(), Layout(pp=2, vpp=2), Layout(tp=2, sp=True)], ids=["single", "pp2_vpp2", "tp2_sp"]
)
def test_block_recomputation_is_not_counted(layout):
    mhc = MHCConfig(recompute_layer_num="2")  # the same arithmetic, so the same oracle
    compare_reports(
        run(layout.tp * layout.pp, sampled, layout, "dense", mhc, 256), [single("dense", MHC, 256)]
    )


@pytest.mark.parametrize("boundary", ["whole", "split"])
def test_interleaved_schedule_samples_the_same_micro_batch(boundary):
    from megatron_mhc.pipeline import engine

    mhc = MHCConfig(pipeline_schedule="interleaved", pp_boundary=boundary)
    options = dict(schedule=engine.forward_backward)
    got = run(2, sampled, Layout(pp=2, vpp=2), "dense", mhc, 256, 0, None, False, options)
    compare_reports(got, [single("dense", MHC, 256)])


def test_another_micro_batch_would_be_seen():
    """The oracle of `dp2` and of `only the first call`: micro-batches differ by far more than ERROR."""
    one, other = (single("dense", MHC, 256, first) for first in (0, 1))
    for name in ("composite_gain_backward", "h_pre_mean", "effective_rank"):
        assert one.statistics[name] != pytest.approx(other.statistics[name], rel=1e-6), name


def test_gradients_are_the_same_bit_for_bit(run_ranks):
    layout = Layout(pp=2, vpp=2)
    with_, without = (run_ranks(2, sampled, layout, "dense", MHC, 8, 0, FULL, off) for off in (False, True))
    for rank in range(2):
        assert with_[rank][1].keys() == without[rank][1].keys()
        for name, expected in without[rank][1].items():
            assert torch.equal(with_[rank][1][name], expected), name

"""Dropping and replaying changes no bit of loss and gradients, in every parallel layout and setting."""

import pytest
import torch
from harness import MICRO_BATCHES, Layout, build, global_parameters, gradient, iterate, reference
from layout_cases import CORE, CORE_CASES, FOUR_RANKS, SETTINGS, TWO_RANKS

from megatron_mhc import MHCConfig
from megatron_mhc.chunk import chunk_of
from megatron_mhc.recompute.block import Block


def count_replays(monkeypatch):
    """A list that grows by the number of sub-layers of every replay that did something."""
    replayed, original = [], Block.replay

    def replay(block):
        if block.sublayers:
            replayed.append(len(block.sublayers))
        original(block)

    monkeypatch.setattr(Block, "replay", replay)
    return replayed


def both_ways(layout, kind, options, overrides):
    """Whether loss and every gradient of this rank have the same bits with and without; what was replayed."""
    results, replayed, blocks = [], [], []
    with pytest.MonkeyPatch.context() as monkeypatch:
        replayed = count_replays(monkeypatch)
        kept = {name: value for name, value in options.items() if not name.startswith("recompute")}
        for mhc in (MHCConfig(**kept), MHCConfig(**options)):
            layout.initialize()
            config = layout.config(kind, **overrides)
            chunks = build(layout, config, kind, mhc)
            loss = iterate(chunks, config)
            grads = {name: gradient(p).clone() for name, p in global_parameters(chunks)}
            results.append((loss, grads))
        for chunk in chunks:
            found = chunk_of(chunk)
            blocks.append([] if found is None else found.blocks)
    (loss, grads), (again, grads_again) = results
    wrong = [name for name in grads if not torch.equal(grads[name], grads_again[name])]
    return loss == again and grads.keys() == grads_again.keys(), wrong, replayed, blocks


def check(run_ranks, world, layout, kind, overrides=None, **options):
    options = dict(recompute_layer_num="3") | options
    for same, wrong, replayed, blocks in run_ranks(world, both_ways, layout, kind, options, overrides or {}):
        assert same and not wrong, wrong
        # Each block of each micro-batch once; a data-parallel rank has its share of the micro-batches.
        passes = MICRO_BATCHES // (world // (layout.tp * layout.pp * layout.cp))
        assert sorted(replayed) == sorted(size for sizes in blocks for size in sizes * passes)
        assert any(blocks) or overrides


FAST = {
    "tp2_dense": dict(recompute_coefficients=True),
    "tp2_sp_moe": {},
    "pp2_dense": dict(recompute_layer_num="auto"),
    "pp2_vpp2_moe": {},
    "ep2_moe": {},
    "cp2_token_local": {},
    "dp2_distributed_optimizer_dense": {},
}


def slow_unless(fast, cases):
    names = [(case, "_".join(case) if isinstance(case, tuple) else case) for case in cases]
    return [
        pytest.param(case, id=name, marks=() if name in fast else pytest.mark.slow) for case, name in names
    ]


@pytest.mark.parametrize("case", slow_unless(FAST, CORE_CASES))
def test_core_layout_keeps_every_bit(run_ranks, case):
    layout, kind = case
    ranks, sizes, *_ = CORE[layout]
    check(run_ranks, ranks, sizes, kind, **FAST.get("_".join(case), {}))


@pytest.mark.parametrize("layout", slow_unless({"pp2_vpp2_mla", "pp2_mtp"}, TWO_RANKS))
def test_two_rank_layout_keeps_every_bit(run_ranks, layout):
    check(run_ranks, 2, *TWO_RANKS[layout])


@pytest.mark.slow
@pytest.mark.parametrize("layout", FOUR_RANKS)
def test_four_rank_layout_keeps_every_bit(run_ranks, layout):
    check(run_ranks, 4, *FOUR_RANKS[layout], recompute_layer_num="auto")


COMBINED = [name for name, (*_, o) in SETTINGS.items() if o.get("recompute_granularity") != "full"]


@pytest.mark.parametrize(
    "setting", slow_unless({"all_selective_recompute_pp2_vpp2", "moe_layernorm_recompute_ep2"}, COMBINED)
)
@pytest.mark.parametrize("coefficients", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_setting_keeps_every_bit(run_ranks, setting, coefficients):
    layout, kind, overrides = SETTINGS[setting]
    check(run_ranks, 2, layout, kind, overrides, recompute_coefficients=coefficients)


@pytest.mark.parametrize("layout, kind", [(Layout(tp=2, sp=True), "biased"), (Layout(pp=2, vpp=2), "biased")])
def test_dropout_keeps_every_bit(run_ranks, layout, kind):
    check(run_ranks, 2, layout, kind, dict(hidden_dropout=0.1, attention_dropout=0.1))


def test_wrong_bits_are_noticed(run_ranks):
    """The comparison is a real one: a replay that adds to the layer inputs changes gradients."""

    def spoiled():
        from megatron_mhc.recompute.sublayer import DroppingSubLayer

        original = DroppingSubLayer.read_again

        def add(self, x, coefficients, out):
            original(self, x, coefficients, out)
            out.add_(1e-6)

        DroppingSubLayer.read_again = add
        return both_ways(Layout(pp=2), "dense", dict(recompute_layer_num="3"), {})

    for same, wrong, *_ in run_ranks(2, spoiled):
        assert same and wrong


def test_gradients_match_a_single_process(run_ranks):
    """Not only equal to the same layout without recompute: right."""
    from harness import compare

    mhc, layout = MHCConfig(recompute_layer_num="auto"), Layout(pp=2, vpp=2)
    result = run_ranks(2, compare, layout, "moe", mhc, reference("moe", MHCConfig()))[0]
    assert result.loss <= 1e-10 and result.worst[0] <= 1e-10

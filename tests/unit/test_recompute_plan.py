"""Sizes of the blocks: the memory expression against a walk through it, the choices against all others."""

import itertools
import random

import pytest
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import TransformerConfig

from megatron_mhc import MHCConfig, parallel, specs
from megatron_mhc.recompute import plan
from megatron_mhc.recompute.plan import SubLayerBytes


def partitions(count):
    """Every way to cut `count` sub-layers into blocks."""
    for cuts in itertools.product([False, True], repeat=count - 1):
        blocks = [1]
        for cut in cuts:
            if cut:
                blocks.append(1)
            else:
                blocks[-1] += 1
        yield blocks


def walked_peak(sublayers, blocks, in_flight):
    """The peak by walking through a backward pass with lists of what is held, as an oracle."""
    starts = list(itertools.accumulate([0, *blocks]))[:-1]
    whole = sum(sublayers[s].streams for s in starts) + sum(s.kept + s.inside for s in sublayers)
    most = 0
    for k, (start, size) in reversed(list(enumerate(zip(starts, blocks, strict=True)))):
        held = [sublayers[s].streams for s in starts[: k + 1]]
        held += [s.kept + s.inside for s in sublayers[: start + size]]
        held += [s.streams for s in sublayers[start + 1 : start + size]]
        held += [s.read for s in sublayers[start : start + size]]
        most = max(most, sum(held))
    return most + (in_flight - 1) * whole


def random_sublayers(seed, count):
    draw = random.Random(seed).randint
    return [SubLayerBytes(40, draw(5, 25), draw(5, 15), draw(0, 120)) for _ in range(count)]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("in_flight", [1, 3])
def test_best_blocks_match_a_search_over_all(seed, in_flight):
    sublayers = random_sublayers(seed, 9)
    every = {tuple(b): plan.peak(sublayers, b, in_flight) for b in partitions(9)}
    assert all(walked_peak(sublayers, b, in_flight) == peak for b, peak in every.items())
    best = plan.best(sublayers, in_flight)
    assert every[tuple(best)] == min(every.values())


@pytest.mark.parametrize("layers, size", [(12, 4), (18, 4), (30, 6), (60, 8)])
@pytest.mark.parametrize("in_flight", [1, 4])
def test_equal_blocks_minimise_eq_20(layers, size, in_flight):
    """Read = 2C and nothing inside F is the paper's expression, less a constant; so is its minimum."""
    n, C, L = 4, 1, 2 * layers
    sublayers = [SubLayerBytes(n * C, 2 * C)] * L
    paper = {b: n * C * -(-L // b) + (n + 2) * C * b for b in range(1, L + 1)}
    for b, value in paper.items():
        if L % b == 0:
            assert plan.peak(sublayers, plan.uniform(L, b)) == value - n * C
    best = plan.best_uniform(sublayers, in_flight)
    if in_flight == 1:
        # Blocks whose last is shorter may beat the expression, which rounds up.
        assert plan.peak(sublayers, plan.uniform(L, best)) <= min(paper.values()) - n * C
        assert paper[size] == min(paper.values())
        assert abs(plan.closed_form(n, L) - size) < 1
        assert abs(plan.closed_form(n, L) - best) <= 1.5
    else:  # each micro-batch in flight keeps its blocks' first streams, but only one is replayed
        assert best > plan.best_uniform(sublayers)


def test_blocks_shrink_towards_the_output_where_f_holds_memory():
    """What F has saved is gone by the time an early block is replayed, so early blocks may be longer."""
    sublayers = [SubLayerBytes(4, 2, 1, 9)] * 32
    blocks = plan.best(sublayers)
    assert blocks == sorted(blocks, reverse=True) and blocks[0] > 2 * blocks[-1]
    uniform = plan.peak(sublayers, plan.uniform(32, plan.best_uniform(sublayers)))
    extra = 32 * 10  # what is held in any case
    assert plan.peak(sublayers, blocks) - extra < 0.7 * (uniform - extra)


def test_settings():
    sublayers = [SubLayerBytes(4, 2)] * 10
    assert plan.choose("4", sublayers) == [4, 4, 2]
    assert plan.choose("99", sublayers) == [10]
    assert sum(plan.choose("auto", sublayers)) == 10
    with pytest.raises(ValueError, match="do not make 10"):
        plan.peak(sublayers, [4, 4])


def config(**settings):
    return TransformerConfig(num_layers=4, hidden_size=16, num_attention_heads=2, **settings)


@pytest.mark.parametrize("value", ["0", "-1", "many", 0, "1.5", ""])
def test_a_wrong_block_size_is_refused(value):
    with pytest.raises(
        ValueError, match="--mhc-recompute-layer-num=.*: give auto, off, or a whole number, at least 1"
    ):
        MHCConfig(recompute_layer_num=value)


def test_options_are_read_from_text_and_leave_checkpoints_alone():
    mhc = MHCConfig.from_options("recompute_layer_num=6,recompute_coefficients=true")
    assert (mhc.recompute_layer_num, mhc.recompute_coefficients) == ("6", True)
    assert MHCConfig(recompute_layer_num=6) == MHCConfig(recompute_layer_num="6")
    assert mhc.arithmetic() == MHCConfig().arithmetic()


def test_coefficients_alone_are_refused():
    with pytest.raises(ValueError, match="add --mhc-recompute-layer-num=auto"):
        MHCConfig(recompute_coefficients=True)


def test_full_recompute_beside_it_is_refused():
    full = dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    parallel.validate(config(**full), MHCConfig())
    with pytest.raises(ValueError, match="--mhc-recompute-layer-num auto with --recompute-granularity full"):
        parallel.validate(config(**full), MHCConfig(recompute_layer_num="auto"))


def test_a_layer_wrapped_alone_is_refused():
    with pytest.raises(ValueError, match="wrap them by wrap_block_spec"):
        specs.wrap_layer_spec(get_gpt_layer_local_spec(), MHCConfig(recompute_layer_num="auto"))

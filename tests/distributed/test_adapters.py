"""Only mappings are trained, only adapters, or both: gradients in every layout, and resumed training."""

import functools

import pytest
import torch
from adapters import ADAPTERS, MAPPINGS, train_alone
from harness import Iteration, Layout, build, differences, iterate
from layout_cases import UNIFORM
from test_checkpoint import FLOAT32_ERROR, SINGLE, check, train
from thinned import each_value

from megatron_mhc import MHCConfig
from megatron_mhc.pipeline import engine
from megatron_mhc.testing import ranks

ERROR = 1e-10
TRAINED = {
    "mappings": (MAPPINGS,),
    "adapters": (ADAPTERS,),
    "both": (MAPPINGS, ADAPTERS),
    "adapters_and_biases": (r"hyper_connection\.affine", ADAPTERS),
}


def run(layout, kind, mhc, trained, **settings):
    """One iteration, by the schedule of the options; the loss, and the chunks with their gradients."""
    layout.initialize()
    config = layout.config(kind, **settings)
    weights = functools.partial(train_alone, *TRAINED[trained])
    chunks = build(layout, config, kind, mhc, weights=lambda chunks: weights(chunks=chunks))
    schedule = None if mhc.pipeline_schedule == "megatron" else engine.forward_backward
    return iterate(chunks, config, schedule=schedule), chunks


@functools.cache
def alone(kind, trained):
    return ranks.run_ranks(1, lambda: Iteration.of(*run(SINGLE, kind, MHCConfig(), trained)))[0]


def compare(layout, kind, mhc, trained, settings):
    return differences(*run(layout, kind, mhc, trained, **settings), alone(kind, trained), torch.float64)


PP2, PP2_VPP2 = Layout(pp=2), Layout(pp=2, vpp=2)
CASES = {
    "tp2": (Layout(tp=2), "dense", MHCConfig(), {}),
    "dp2": (SINGLE, "dense", MHCConfig(), {}),
    "dp2_full_recompute": (SINGLE, "dense", MHCConfig(), UNIFORM),
    "ep2": (Layout(ep=2), "moe_after_dense", MHCConfig(), {}),
    "pp2": (PP2, "dense", MHCConfig(), {}),
    "pp2_vpp2_auto": (PP2_VPP2, "dense", MHCConfig(recompute_layer_num="auto"), {}),
    "pp2_interleaved_split": (
        PP2,
        "dense",
        MHCConfig(pipeline_schedule="interleaved", pp_boundary="split"),
        {},
    ),
    "pp2_vpp2_fused": (PP2_VPP2, "moe_after_dense", MHCConfig(pipeline_schedule="fused"), {}),
}


@pytest.mark.parametrize("case, trained", each_value(CASES, TRAINED))
def test_what_is_trained_gets_the_gradients_of_one_process(run_ranks, case, trained):
    layout, kind, mhc, settings = CASES[case]
    alone(kind, trained)
    result = run_ranks(2, compare, layout, kind, mhc, trained, settings)[0]
    error, name = result.worst
    assert result.gradients and set(result.gradients) == set(alone(kind, trained).gradients)
    assert result.loss <= ERROR
    assert error <= ERROR, name


def options_of(trained):
    weights = functools.partial(train_alone, *TRAINED[trained])
    return dict(weights=lambda chunks: weights(chunks=chunks))


BF16 = {"dp2": SINGLE, "dp2_distributed_optimizer": Layout(distributed_optimizer=True)}


@pytest.mark.parametrize("layout, trained", each_value(BF16, ["mappings", "both", "adapters"]))
def test_bf16_training_resumed_matches_unbroken_run_bit_for_bit(run_ranks, tmp_path, layout, trained):
    def part(steps, *folders):
        return run_ranks(
            2, lambda: train(BF16[layout], "dense", torch.bfloat16, steps, *folders, **options_of(trained))
        )[0]

    folder = tmp_path / "saved"
    history = part(range(2), None, folder) + part(range(2, 4), folder)
    assert history == part(range(4))
    assert len({loss for loss, _ in history}) == 4


@pytest.mark.parametrize("trained", ["mappings", "both"])
def test_resharded_training_matches_unbroken_run(run_ranks, tmp_path, trained):
    def part(world, layout, steps, *folders):
        run = functools.partial(train, layout, "dense", torch.float32, **options_of(trained))
        return run_ranks(world, lambda: run(steps=steps, load_from=folders[0], save_to=folders[1]))[0]

    folder = tmp_path / "saved"
    history = part(2, PP2, range(2), None, folder) + part(2, PP2_VPP2, range(2, 4), folder, None)
    check(history, part(1, SINGLE, range(4), None, None), FLOAT32_ERROR)

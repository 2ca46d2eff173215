"""A model whose config was copied trains as mHC, or is stopped; it never passes for a plain model."""

import copy
import dataclasses

import pytest
from harness import Layout, build, iterate, reference
from megatron.core.transformer import TransformerConfig
from pipeline import differences, interleaved
from thinned import each_value

from megatron_mhc import MHCConfig
from megatron_mhc.carried import options_of
from megatron_mhc.diagnostics import Sampler
from megatron_mhc.hooks import train_step
from megatron_mhc.hooks.schedule import by_model
from megatron_mhc.pipeline import engine
from megatron_mhc.testing import gpt, ranks
from megatron_mhc.testing.ranks import RankError

ERROR = 1e-10
MHC = MHCConfig()


def field_by_field(config):
    """As frameworks that turn a config of theirs into Megatron's."""
    fields = [f.name for f in dataclasses.fields(config) if f.init]
    return TransformerConfig(**{name: getattr(config, name) for name in fields})


COPIES = {
    "replace": dataclasses.replace,
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "field_by_field": field_by_field,
}


def copy_between(make):
    """Let `gpt.build` copy the config between `wrap_block_spec` and `GPTModel`, and go on with the copy."""
    model, ddp = gpt.GPTModel, gpt.DistributedDataParallel
    gpt.GPTModel = lambda config, *args, **kwargs: model(make(config), *args, **kwargs)
    gpt.DistributedDataParallel = lambda _, ddp_config, chunk, **kwargs: ddp(
        chunk.config, ddp_config, chunk, **kwargs
    )


def copy_for_ddp(make):
    """Give the wrapper alone a copy."""
    ddp = gpt.DistributedDataParallel
    gpt.DistributedDataParallel = lambda config, *args, **kwargs: ddp(make(config), *args, **kwargs)


def train(layout, mhc, expected, make, place=copy_between, schedule=None, stages=None):
    place(make)
    layout.initialize()
    config = layout.config("dense", pipeline_model_parallel_layout=stages)
    chunks = build(layout, config, "dense", mhc)
    for chunk in chunks:
        chunk.config.finalize_model_grads_func = config.finalize_model_grads_func
    return differences(iterate(chunks, config, schedule=schedule), chunks, expected, config.params_dtype)


def matches(result):
    error, name = result.worst
    assert result.loss <= ERROR
    assert error <= ERROR, name


LAYOUTS = {
    "pp1": (Layout(), None),
    "pp2": (Layout(pp=2), None),
    "pp2_vpp2": (Layout(pp=2, vpp=2), None),
    "empty_stage": (Layout(pp=4), "Ett|t||tL"),
}


@pytest.mark.parametrize("layout, kind", each_value(LAYOUTS, COPIES, also=[("pp2", "field_by_field")]))
def test_a_copy_between_the_spec_and_the_model_trains(run_ranks, layout, kind):
    layout, stages = LAYOUTS[layout]
    arguments = (COPIES[kind], copy_between, None, stages)
    matches(run_ranks(layout.pp, train, layout, MHC, reference("dense", MHC), *arguments)[0])


def unexpected(**_):
    raise AssertionError("Megatron's schedule ran")


@pytest.mark.parametrize("kind", ["replace", "field_by_field"])
@pytest.mark.parametrize("place", [copy_between, copy_for_ddp])
@pytest.mark.parametrize("run", [by_model(unexpected), engine.forward_backward], ids=["chosen", "called"])
def test_a_copy_is_run_by_the_schedule_that_its_model_asks_for(run_ranks, kind, place, run):
    arguments = (COPIES[kind], place, run)
    expected = reference("dense", MHC)
    matches(run_ranks(2, train, Layout(pp=2), interleaved("split"), expected, *arguments)[0])


@pytest.mark.parametrize("kind", ["replace", "field_by_field"])
def test_megatrons_schedule_under_a_copy_for_the_wrapper_is_stopped(run_ranks, kind):
    """It sees the wrapper's config alone."""
    with pytest.raises(RankError, match="ValueError: pipeline message with shape .* the model's own config"):
        run_ranks(2, train, Layout(pp=2), MHC, reference("dense", MHC), COPIES[kind], copy_for_ddp)


@pytest.mark.parametrize("kind", ["copy", "deepcopy"])
def test_megatrons_schedule_under_a_faithful_copy_for_the_wrapper_trains(run_ranks, kind):
    matches(run_ranks(2, train, Layout(pp=2), MHC, reference("dense", MHC), COPIES[kind], copy_for_ddp)[0])


def sampled(layout, make, stages=None):
    """Statistics from a Sampler and from Megatron's hooked step, each given a copy of the config."""
    copy_between(make)
    layout.initialize()
    mhc, config = MHC, layout.config("dense", pipeline_model_parallel_layout=stages)
    model = build(layout, config, "dense", mhc)
    with Sampler(model, make(config)) as sampler:
        iterate(model, config)
    seen = []
    train_step.write = lambda report, *_: seen.append(report)
    for module in model[0].modules():
        if hasattr(submodules := getattr(module, "submodules", None), "mhc"):
            submodules.mhc = dataclasses.replace(mhc, log_interval=1)
    fresh = field_by_field(config)
    train_step.sample_steps(lambda *_, **__: (iterate(model, config),))(
        None, None, model, None, None, fresh, None, iteration=0
    )
    return sampler.report().statistics, len(seen)


@pytest.fixture(scope="module")
def statistics_of_one():
    return ranks.run_ranks(1, sampled, Layout(), lambda config: config)[0][0]


@pytest.mark.parametrize(
    "kind, pp, stages",
    [(kind, 2, None) for kind in COPIES] + [("replace", 1, None), ("field_by_field", 2, "Etttt|L")],
)
def test_diagnostics_see_the_model_of_a_copied_config(run_ranks, statistics_of_one, pp, stages, kind):
    expected = statistics_of_one
    for statistics, written in run_ranks(pp, sampled, Layout(pp=pp), COPIES[kind], stages):
        assert written == 1
        for name, values in expected.items():
            assert statistics[name] == pytest.approx(values, rel=1e-6, abs=1e-9), name


def test_a_plain_model_has_no_options(run_ranks):
    def plain():
        layout = Layout()
        layout.initialize()
        config = layout.config("dense")
        chunks = build(layout, config, "dense", None)
        assert options_of(chunks, config) is None and not hasattr(config, "mhc")
        with pytest.raises(ValueError, match="the model has no mHC"):
            iterate(chunks, config, schedule=engine.forward_backward)

    run_ranks(1, plain)

"""`--mhc-pipeline-schedule auto` over gloo: ranks choose alike, and train as under the schedule's name."""

import logging

import pytest
import torch
from harness import Layout, build, get_forward_backward_func, iterate
from pipeline import gradients

from megatron_mhc import MHCConfig
from megatron_mhc.hooks.schedule import by_model
from megatron_mhc.pipeline import auto, links
from megatron_mhc.pipeline.forms import FORMS, STOCK, Decision, Form
from megatron_mhc.pipeline.layer_times import Launch

AUTO, LAUNCH = MHCConfig(pipeline_schedule="auto"), Launch(16, 2, 4)
EXPERTS = Layout(pp=2, vpp=2, ep=2)


def train(layout, kind, mhc, launch=None):
    """One iteration under the schedule of the options, or of what `auto` makes of them."""
    layout.initialize()
    config = layout.config(kind)
    chunks = build(layout, config, kind, auto.resolved(config, mhc, launch) if launch else mhc)
    return (
        iterate(chunks, config, schedule=by_model(get_forward_backward_func())),
        gradients(chunks),
        config.mhc,
    )


def both(layout, kind, form):
    """The same form by its name and by `auto`, whose choice is made here, of what was measured."""
    named = train(layout, kind, form.of(AUTO))
    records = []
    watching = logging.Handler()
    watching.emit = lambda record: records.append(record.getMessage())
    for module in (auto, links):
        module.logger.addHandler(watching)
        module.logger.setLevel(logging.INFO)
    auto.fastest = lambda config, mhc, launch, obstacles, way: Decision(form, f"{way()} {obstacles[form]}")
    return named, train(layout, kind, AUTO, LAUNCH), auto.decisions(), records


def check(results, form):
    for (loss, expected, mhc), (chosen_loss, got, chosen), said, _ in results:
        assert chosen == mhc == form.of(AUTO)
        assert chosen_loss == loss
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[name], expected[name]) for name in got)
        assert len(said) == 1 and said[0].endswith("None")
    assert len({said[0] for *_, said, _ in results}) == 1  # rates too
    first, *others = [records for *_, records in results]
    assert first[0] == results[0][2][0] and not any(others)
    # How messages travel is said where the plugin sends them.
    assert ["messages are" in record for record in first[1:]] == ([] if form == STOCK else [True])


@pytest.mark.parametrize("form", FORMS[:3], ids=str)
def test_auto_trains_as_the_schedule_that_it_takes(run_ranks, form):
    check(run_ranks(2, both, Layout(pp=2, vpp=2), "dense", form), form)


@pytest.mark.parametrize("form", [pytest.param(FORMS[3], marks=pytest.mark.slow), FORMS[4]], ids=str)
def test_so_it_does_with_experts_on_two_ranks(run_ranks, form):
    check(run_ranks(4, both, EXPERTS, "moe", form), form)


def free():
    """What ranks choose by themselves, without a schedule, and in a loop whose microbatches nobody knows."""
    layout = Layout(pp=2, vpp=2)
    layout.initialize()
    chosen = auto.resolved(layout.config("dense"), AUTO, LAUNCH)
    again = auto.resolved(layout.config("dense"), AUTO, LAUNCH)  # of what was measured the first time
    assert again == chosen and len(auto.decisions()) == 1
    _, _, unknown = train(layout, "dense", AUTO)
    return chosen, unknown, auto.decisions()


def test_ranks_choose_alike(run_ranks):
    results = run_ranks(2, free)
    assert results[0] == results[1]
    chosen, unknown, said = results[0]
    assert Form(chosen.pipeline_schedule, chosen.pp_boundary) in FORMS[:3]
    assert unknown == STOCK.of(AUTO) and "microbatches are not known" in said[1]
    assert "over gloo at " in said[0]

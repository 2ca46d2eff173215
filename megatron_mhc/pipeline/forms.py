"""Which pipeline schedule is fastest for a launch and its link: the simulator, and what it does not know."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from megatron_mhc import refusals
from megatron_mhc.config import MHCConfig
from megatron_mhc.pipeline import comm
from megatron_mhc.pipeline.layer_times import Launch, Machine, layer_of, times_of
from megatron_mhc.pipeline.megatron_order import megatron_programs
from megatron_mhc.pipeline.options import refusals_of
from megatron_mhc.pipeline.simulate import simulate
from megatron_mhc.refusals import refused
from megatron_mhc.schedule.plans import AUTO, FUSED, MEGATRON, OVERLAPPED, plan_for
from megatron_mhc.schedule.program import SPLIT, WHOLE
from megatron_mhc.schedule.stages import layer_counts

MARGIN = 0.02  # of a step, by which a form must be faster than a plainer one
GROUPS = 8  # of microbatches that are simulated; with more, a step over Megatron's moves by about 1 %
# Compute is slower beside NCCL's receives, which hold SMs from the moment that they are posted until their
# sender has sent. Profiles of two H200s have 303.6 ms of compute kernels a step without receives, 306.1 under
# Megatron's schedule and 334.9 under interleaved, over NCCL (docs/experiments/2026-11-30_push_transport/
# schedules.json). In eight others, over NVLink and sockets, interleaved has 1.03 to 1.09 of Megatron's, in
# the median 1.07 (docs/results/multi_gpu_*.json at commit cec2cd9).
POSTED_AHEAD, POSTED_BY_MEGATRON = 1.08, 1.008
GBS_OF_A_CTA = 32.0  # a message of 335 MB takes 2.57 ms with 4 CTAs, one of 268 MB 4.25 with 2; same commit
# Fitted to the steps of the same runs over NVLink, where messages are short: beside whole interleaved, split
# takes 0.3 to 0.8 % of Megatron's step longer with chunks of one layer, fused 1.6 to 3.4 %.
NODE_BY_NODE = 1.02
CUT = 0.02  # of a layer, for each chunk


class Form(NamedTuple):
    """What may be named: --mhc-pipeline-schedule and --mhc-pp-boundary."""

    schedule: str
    boundary: str

    def __str__(self) -> str:
        return self.schedule if self == STOCK else f"{self.schedule} {self.boundary}"

    def of(self, mhc: MHCConfig) -> MHCConfig:
        return replace(mhc, pipeline_schedule=self.schedule, pp_boundary=self.boundary)


STOCK = Form(MEGATRON, WHOLE)
# From the plainest on.
FORMS = (STOCK, *(Form(schedule, boundary) for schedule in OVERLAPPED for boundary in (WHOLE, SPLIT)))
PLAINEST = FORMS[1]  # of the plugin's


class Link(NamedTuple):
    """How the plugin's messages travel: pushed, or as receives that hold SMs, or neither; and in words."""

    pushes: bool
    holds_sms: bool
    words: str


class Decision(NamedTuple):
    """The form that is taken, and why."""

    form: Form
    why: str


def nothing_to_choose(config: Any, launch: Launch | None) -> str | None:
    """Why a launch gets Megatron's schedule whatever a simulation would say."""
    if config.pipeline_model_parallel_size == 1:
        return "one stage, no pipeline"
    if getattr(config, "is_hybrid_model", False):
        return "the layers of a HybridModel are not simulated"
    if not config.virtual_pipeline_model_parallel_size:
        return "no virtual stages, without which Megatron's order is not simulated"
    return None if launch else "the training loop's microbatches are not known where the model is built"


def obstacle(config: Any, mhc: MHCConfig, launch: Launch, form: Form) -> str | None:
    """What keeps a configuration from a form, or None."""
    if form == STOCK and config.overlap_moe_expert_parallel_comm:
        return "Megatron's combined 1F1B is not simulated"
    pp, counts = config.pipeline_model_parallel_size, (launch.micro_batches, *launch.others)
    group = max(pp, config.microbatch_group_size_per_vp_stage or 0)
    if form == STOCK:
        for count in counts:
            if 0 < count % group < pp:
                return f"{count} microbatches leave a group of {count % group}, fewer than {pp} ranks"
    elif pp < group > min(counts):
        return f"--microbatch-group-size-per-virtual-pipeline-stage {group} of {min(counts)} microbatches"
    elif mhc.pp_boundary not in (AUTO, form.boundary):
        return f"--mhc-pp-boundary {mhc.pp_boundary}"
    elif form != PLAINEST and getattr(config, "heterogeneous_block_specs", False):
        return "a layer may lack its attention or MLP"
    elif form.schedule == FUSED and (config.expert_model_parallel_size == 1 or not config.num_moe_experts):
        return "no all-to-all of experts to hide"
    named = form.of(mhc)
    rows = refusals.MODEL + refusals_of(config, named)
    return next(map(str, refused(rows, config, named)), None)


def fastest(
    config: Any,
    mhc: MHCConfig,
    launch: Launch,
    obstacles: dict[Form, str | None],
    way: Callable[[], tuple[Link, Machine]],
) -> Decision:
    """The plainest form that nothing is in the way of and no other beats by MARGIN.

    Args:
        obstacles: of all FORMS.
        way: what messages take and how fast everything is, asked where there is a choice.
    """
    best, *others = [form for form in FORMS if not obstacles[form]] or [STOCK]
    if best == STOCK and not others:
        return Decision(STOCK, obstacles[PLAINEST] or "")
    link, machine = way()
    steps = {form: step_of(config, form.of(mhc), launch, link, machine) for form in (best, *others)}
    for form in others:
        if steps[form] < (1 - MARGIN) * steps[best]:
            best = form
    size = mhc.num_residual_streams * layer_of(config, launch).stream / 1e6
    said = ", ".join(f"{form} {step:.1f}" for form, step in steps.items())
    by = f"messages of {size:.0f} MB {link.words} at {machine.message:.3g} GB/s"
    by += f", GEMMs at {machine.flops / 1e12:.3g} TFLOP/s"
    return Decision(best, f"simulated steps in ms: {said}; a plainer one is kept within {MARGIN:.0%} ({by})")


def step_of(config: Any, named: MHCConfig, launch: Launch, link: Link, machine: Machine) -> float:
    """Milliseconds of a simulated step under the schedule and boundary that the options name."""
    pp, chunks = config.pipeline_model_parallel_size, config.virtual_pipeline_model_parallel_size or 1
    most = GROUPS * max(pp, config.microbatch_group_size_per_vp_stage or 0)
    count = launch.micro_batches
    if count > most:
        count = most + count % pp  # a remainder stays one
    plan = replace(plan_for(config, named, pp, chunks, count), layers=layer_counts(config))
    stock = named.pipeline_schedule == MEGATRON
    slower = 1.0
    if link.holds_sms and stock:
        slower *= POSTED_BY_MEGATRON
    elif link.holds_sms and not link.pushes:
        slower *= POSTED_AHEAD
        machine = machine._replace(message=min(machine.message, GBS_OF_A_CTA * comm.CTAS))
    if plan.fused:
        slower *= NODE_BY_NODE
    if plan.boundary == SPLIT:
        slower *= 1 + CUT * plan.stages / config.num_layers
    full = config.recompute_granularity == "full"
    times = times_of(layer_of(config, launch), named.num_residual_streams, machine, slower, full)
    return simulate(plan, times, megatron_programs(plan) if stock else None).step

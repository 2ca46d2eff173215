"""What `--mhc-pipeline-schedule auto` would take of a command, which measures where the model is built."""

from __future__ import annotations

from typing import Any

from megatron_mhc.config import MHCConfig
from megatron_mhc.doctor.part import Row
from megatron_mhc.pipeline import links
from megatron_mhc.pipeline.forms import (
    FORMS,
    PLAINEST,
    STOCK,
    Decision,
    Link,
    fastest,
    nothing_to_choose,
    obstacle,
)
from megatron_mhc.pipeline.layer_times import Launch, Machine
from megatron_mhc.pipeline.queues import check_variable
from megatron_mhc.specs import launch_of

# (link, whether messages are pushed, rates): docs/experiments/2026-11-30_push_transport.md, and hosts that
# have 400 Gbit/s for each GPU.
H200 = (
    ("pushed", True, Machine(723e12, 375.0, 375.0)),
    ("over NCCL", False, Machine(723e12, 364.0, 375.0)),
    ("several hosts", False, Machine(723e12, 45.0, 375.0)),
)


def guesses(args: Any, config: Any, mhc: MHCConfig) -> tuple[list[Row], MHCConfig]:
    """A row for each link that is assumed, and the options with what the first of them takes."""
    launch = launch_of(args)
    if (why := nothing_to_choose(config, launch)) is not None or launch is None:
        return [("schedule", f"auto takes {STOCK}: {why}")], STOCK.of(mhc)
    found = {
        name: _guess(config, mhc, launch, pushes, machine)
        for name, pushes, machine in H200
        if mhc.pipeline_transport in (links.AUTO, links.PUSH if pushes else links.NCCL)
    }
    rows = [("schedule", "auto, chosen where the model is built; of H200s it would be")]
    rows += [(f"  {name}", f"{form}: {why}") for name, (form, why) in found.items()]
    return rows, next(iter(found.values())).form.of(mhc)


def _guess(config: Any, mhc: MHCConfig, launch: Launch, pushes: bool, machine: Machine) -> Decision:
    obstacles = {form: obstacle(config, mhc, launch, form) for form in FORMS}
    if not pushes:
        try:
            check_variable(PLAINEST.schedule, "where messages are not pushed")
        except ValueError as error:
            for form in set(FORMS) - {STOCK}:
                obstacles[form] = obstacles[form] or str(error)
    link = Link(pushes, True, "pushed" if pushes else "over nccl")
    return fastest(config, mhc, launch, obstacles, lambda: (link, machine))

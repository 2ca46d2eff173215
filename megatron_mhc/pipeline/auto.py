"""`--mhc-pipeline-schedule auto`: where a model is built, all ranks choose the form that is fastest.

They choose alike: from the configuration, and from what they measured and told each other.
"""

from __future__ import annotations

import logging
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.utils import log_single_rank

from megatron_mhc.config import MHCConfig, flag
from megatron_mhc.pipeline import links, loading, probe
from megatron_mhc.pipeline.forms import (
    FORMS,
    STOCK,
    Decision,
    Form,
    Link,
    fastest,
    nothing_to_choose,
    obstacle,
)
from megatron_mhc.pipeline.layer_times import Launch, Machine, layer_of
from megatron_mhc.pipeline.queues import check_queues
from megatron_mhc.schedule.plans import AUTO

logger = logging.getLogger(__name__)

_said: list[str] = []


def decisions() -> list[str]:
    """What was chosen for the models of this process, and why."""
    return list(_said)


def resolved(config: Any, mhc: MHCConfig, launch: Launch | None) -> MHCConfig:
    """The options, with a schedule and boundary in the place of `auto`; every rank of the world must call.

    Args:
        config: a TransformerConfig; where it has such options, they are returned.
        launch: None where a step's sizes are not known.
    """
    if mhc.pipeline_schedule != AUTO:
        return mhc
    known = getattr(config, "mhc", None)
    if known is not None and Form(known.pipeline_schedule, known.pp_boundary).of(mhc) == known:
        return known
    form, why = _decide(config, mhc, launch)
    said = f"mHC pipeline schedule: {form}, by {flag('pipeline_schedule')} {AUTO}: {why}"
    if said not in _said:
        _said.append(said)
        log_single_rank(logger, logging.INFO, said)
    return form.of(mhc)


def _decide(config: Any, mhc: MHCConfig, launch: Launch | None) -> Decision:
    if (why := nothing_to_choose(config, launch)) is not None or launch is None:
        return Decision(STOCK, why or "")
    group = parallel_state.get_pipeline_model_parallel_group(check_initialized=False)
    if group is None:
        return Decision(STOCK, "there are no process groups where the model is built")
    told = probe.everywhere([_obstacle(config, mhc, launch, form, group) for form in FORMS])
    found = {form: next(filter(None, said), None) for form, *said in zip(FORMS, *told, strict=True)}

    def way() -> tuple[Link, Machine]:
        backend, pushes = dist.get_backend(group), links.choose(group, mhc, say=False).pushes
        link = Link(pushes, loading.pends_on_device(backend), "pushed" if pushes else f"over {backend}")
        layer = layer_of(config, launch)
        return link, probe.machine_of(group, layer, mhc.num_residual_streams, config.params_dtype)

    return fastest(config, mhc, launch, found, way)


def _obstacle(config: Any, mhc: MHCConfig, launch: Launch, form: Form, group: Any) -> str | None:
    """`forms.obstacle`, and what is in the way of this rank's messages."""
    if (found := obstacle(config, mhc, launch, form)) is not None or form == STOCK:
        return found
    try:
        check_queues(form.of(mhc), group, say=False)
    except ValueError as error:
        return str(error)
    return None

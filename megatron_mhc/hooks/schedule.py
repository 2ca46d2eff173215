"""Which schedule a model is trained with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron_mhc.carried import options_of
from megatron_mhc.schedule.plans import OVERLAPPED


def choose_schedule(get_forward_backward_func: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap Megatron's `get_forward_backward_func`.

    Without a pipeline it returns what that returns. On a pipeline, models that were built for
    --mhc-pipeline-schedule interleaved or fused go to `engine.forward_backward`, and all others, with all
    of their arguments, to Megatron's own function.
    """

    def get_schedule(*args: Any, **kwargs: Any) -> Callable[..., Any]:
        from megatron.core.pipeline_parallel.schedules import forward_backward_no_pipelining

        stock = get_forward_backward_func(*args, **kwargs)
        return stock if stock is forward_backward_no_pipelining else by_model(stock)

    return get_schedule


def by_model(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Run a step by the schedule that its model asks for; `stock` is Megatron's."""

    def forward_backward_func(**kwargs: Any) -> Any:
        from megatron.core.utils import get_model_config

        model = kwargs["model"]
        mhc = options_of(model, get_model_config(model[0] if isinstance(model, list) else model))
        if mhc is None or mhc.pipeline_schedule not in OVERLAPPED:
            return stock(**kwargs)
        from megatron_mhc.pipeline.engine import forward_backward

        return forward_backward(**kwargs)

    return forward_backward_func

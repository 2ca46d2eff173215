"""One training iteration of a tiny GPT in any parallel layout, compared with one process.

The model and the comparison are those of `megatron_mhc.testing`; here they run on forked ranks: on a CPU over
gloo, or on GPUs over NCCL, see conftest.py.
"""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo  # optimizers and recompute import it lazily: here once, not on every forked rank
from torch import Tensor

from megatron_mhc import MHCConfig
from megatron_mhc.testing import cpu, ranks

ON_GPU = ranks.backend == "nccl"
if not ON_GPU:
    cpu.install()

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    if not ON_GPU:
        cpu.patch_megatron()
    cpu.use_local_modules()
    from megatron.core import parallel_state as ps  # noqa: F401
    from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: F401
    from megatron.core.transformer import TransformerConfig

    from megatron_mhc.testing import gpt
    from megatron_mhc.testing.gpt import SMALL, Layout, build, tokens  # noqa: F401
    from megatron_mhc.testing.parameters import global_parameters, gradient  # noqa: F401
    from megatron_mhc.testing.parity import Comparison, Iteration, differences

logging.getLogger("megatron").setLevel(logging.ERROR)

SEQUENCE, MICRO_BATCH, MICRO_BATCHES = SMALL.sequence, SMALL.micro_batch, 4


@functools.cache
def reference(kind: str, mhc: MHCConfig | None, dtype: torch.dtype = torch.float64) -> Iteration:
    """One iteration in a world of one; `mhc` None is Megatron's own model."""
    return ranks.run_ranks(1, _reference, kind, mhc, dtype)[0]


def _reference(kind: str, mhc: MHCConfig | None, dtype: torch.dtype) -> Iteration:
    layout = Layout()
    layout.initialize()
    config = layout.config(kind, params_dtype=dtype)
    chunks = build(layout, config, kind, mhc)
    return Iteration.of(iterate(chunks, config), chunks)


def compare(
    layout: Layout,
    kind: str,
    mhc: MHCConfig | None,
    expected: Iteration,
    overrides: dict[str, Any] | None = None,
    spoil: Callable[[Tensor, str], None] | None = None,
) -> Comparison:
    """Run one iteration on this rank of `layout`; the result covers all ranks, see `differences`.

    Args:
        overrides: config settings that must not change the result (recompute, dispatcher, ...).
        spoil: called on every (parameter, name), to break what a test wants to see detected.
    """
    layout.initialize()
    config = layout.config(kind, **(overrides or {}))
    chunks = build(layout, config, kind, mhc)
    if spoil:
        for name, parameter in global_parameters(chunks):
            spoil(parameter, name)
    return differences(iterate(chunks, config), chunks, expected, config.params_dtype)


def iterate(
    chunks: list[Any],
    config: TransformerConfig,
    seed: int = 0,
    count: int = MICRO_BATCHES,
    **options: Any,
) -> float:
    """One forward and backward pass through Megatron's schedule; returns the mean loss of the batch.

    Args:
        count: micro-batches of the whole batch.
        options: of `gpt.forward_backward`: `schedule`, another forward_backward_func, and its arguments.
    """
    run = functools.partial(gpt.iterate, chunks, config, tokens(count, seed), **options)
    if ON_GPU and options.get("schedule") is not None:
        run()  # over NCCL the first step's messages go by way of the hosts
    return run()

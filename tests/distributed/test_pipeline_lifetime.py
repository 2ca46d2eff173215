"""A step that is over, or that failed, lets go of all it had by reference counting alone."""

import gc
import itertools
import weakref
from datetime import timedelta

import pytest
from harness import Layout, build, gpt, tokens
from pipeline import BOUNDARIES, SCHEDULES, interleaved, pipeline_rank
from thinned import each_value

from megatron_mhc.pipeline import comm, engine
from megatron_mhc.pipeline.step import observers
from megatron_mhc.schedule import program


class Data:
    """An iterator that can be watched, as a data loader's with its processes."""

    def __init__(self, batches):
        self.batches = iter(batches)

    def __next__(self):
        return next(self.batches)


def run(layout, kind, mhc, failing):
    """What is alive after a step, with the garbage collector off: names of kinds of objects."""
    comm.timeout_of = lambda group: timedelta(seconds=2)  # for the rank that waits for the failed one
    layout.initialize()
    config = layout.config(kind)
    chunks = build(layout, config, kind, mhc)
    gpt.forward_backward(chunks, config, tokens(4), schedule=engine.forward_backward)
    gc.collect()
    gc.disable()
    watched = {}

    def observe(op, step):
        if "step" not in watched:
            data = step.iterators = [Data(list(iterator)) for iterator in step.iterators[: len(chunks)]]
            watched.update(step=weakref.ref(step), transport=weakref.ref(step.transport))
            watched.update({f"data {at}": weakref.ref(one) for at, one in enumerate(data)})
        if failing and op.kind == failing and pipeline_rank() == 0 and op.microbatch == 1:
            raise InterruptedError

    observers[:] = [observe]
    try:
        gpt.forward_backward(chunks, config, tokens(4), schedule=engine.forward_backward)
        ended = "whole"
    except (InterruptedError, comm.PipelineError) as error:
        ended = type(error).__name__
    observers.clear()
    return ended, [name for name, one in watched.items() if one() is not None]


FAILING = (program.BACKWARD, program.FORWARD)
ENDS = [(*pair, None) for pair in itertools.product(SCHEDULES, BOUNDARIES)]
ENDS += each_value(SCHEDULES, BOUNDARIES, FAILING)


@pytest.mark.parametrize("schedule, boundary, failing", ENDS)
def test_a_step_frees_itself(run_ranks, schedule, boundary, failing):
    mhc = interleaved(boundary, schedule, recompute_layer_num="2")
    (ended, alive), *_ = run_ranks(2, run, Layout(pp=2, vpp=2), "moe_shared", mhc, failing)
    assert ended == ("InterruptedError" if failing else "whole")
    assert alive == []

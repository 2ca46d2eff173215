"""What a rank of the overlapping schedule does, in which order, and what it holds meanwhile."""

import time
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from harness import MICRO_BATCH, SEQUENCE, Layout, build, iterate, tokens
from harness import get_forward_backward_func as stock_schedule
from pipeline import gradients, interleaved, pipeline_rank
from thinned import each_value

from megatron_mhc import MHCConfig
from megatron_mhc.pipeline import comm, engine
from megatron_mhc.pipeline.step import observers
from megatron_mhc.recompute.block import Block
from megatron_mhc.schedule import program
from megatron_mhc.schedule.program import Op, Plan, build_program


class Work:
    """A transfer's handle that notes who waits for it."""

    def __init__(self, work, waited):
        self.work, self.waited = work, waited

    def wait(self, *args):
        self.waited()
        return self.work.wait(*args)

    def is_completed(self):
        return self.work.is_completed()


def watch(layout, mhc, count):
    """Run one step; returns the operations and, by number of operations run before, what else happened."""
    layout.initialize()
    config = layout.config("dense", num_layers=4 * layout.pp)
    chunks = build(layout, config, "dense", mhc)
    trace, events, held, steps = [], [], [], []

    def note(what):
        events.append((len(trace), what))

    def observe(op, step):
        trace.append(op)
        held.append(len({*step.outputs, *step.exits, *getattr(step, "tapes", ())}))
        steps[:] = [step]

    observers[:] = [observe]
    send, replay = dist.isend, Block.replay

    def watched_send(tensor, target, group=None):
        return Work(send(tensor, target, group=group), lambda: note("waits for a send"))

    def watched_replay(block):
        if block.sublayers:
            note("replays")
        replay(block)

    dist.isend, Block.replay = watched_send, watched_replay
    for chunk in chunks:
        layer = chunk.module.decoder.layers[-1]
        stage = (chunk.module.vp_stage or 0) * layout.pp + pipeline_rank()
        layer.mlp.register_forward_pre_hook(lambda *_, stage=stage: note(("runs its last MLP", stage)))
        layer.mlp.linear_fc2.weight.register_hook(lambda g, s=stage: note(("has MLP gradients", s)))
        weight = layer.self_attention.linear_proj.weight
        weight.register_hook(lambda g, s=stage: note(("has attention gradients", s)))
    iterate(chunks, config, count=count, schedule=engine.forward_backward)
    step = steps[0]
    left = [step.received, step.to_send, step.inputs, step.entries, step.exits, step.outputs, step.blocks]
    left += [step.transport.coming, step.transport.leaving, getattr(step, "tapes", ())]
    return trace, events, max(held), [len(x) for x in left]


CASES = [
    pytest.param(
        Layout(pp=2, vpp=2), interleaved(boundary, schedule, **options), 5, id=f"{schedule}-{boundary}-{name}"
    )
    for schedule in ("interleaved", "fused")
    for boundary in ("whole", "split")
    for name, options in {"stored": {}, "replayed": dict(recompute_layer_num="2")}.items()
]


@pytest.mark.parametrize("layout, mhc, count", CASES)
def test_the_trace_is_the_program(run_ranks, layout, mhc, count):
    replayed = mhc.recompute_layer_num != "off"
    fused = mhc.pipeline_schedule == "fused"
    plan = Plan(2, 2, count, boundary=mhc.pp_boundary, replay=replayed, fused=fused, layers=2)
    for rank, (trace, events, held, left) in enumerate(run_ranks(2, watch, layout, mhc, count)):
        assert trace == build_program(plan, rank)
        assert held <= plan.in_flight(rank)
        assert not any(left)
        # Only at the end of the step, when all that could be computed was.
        assert {at for at, what in events if what == "waits for a send"} == {len(trace)}

        last = {at: trace[at - 1] for at, _ in events}
        if replayed:
            real = [last[at] for at, what in events if what == "replays"]
            early = [op for op in trace if op.kind == program.REPLAY]
            assert early and set(early) <= set(real)  # each brought something back before the gradient's wait
        split = mhc.pp_boundary == "split"
        for at, what in events:
            if not isinstance(what, tuple):
                continue
            name, stage = what
            cut = split and stage < plan.stages - 1
            op = last[at]
            assert op.stage == stage
            tail, head = (program.TAIL, program.HEAD) if cut else (program.ALL, program.ALL)
            if fused:
                tail, head = "experts", "attention"
            if name == "runs its last MLP":
                assert op[:2] == (program.FORWARD, tail)
                early = Op(program.SEND, "mixed", op.microbatch, stage)
                assert not cut or early in trace[:at]
            elif name == "has MLP gradients":
                assert op[:2] == (program.BACKWARD, tail)
                bulk = Op(program.WAIT, "d_streams", op.microbatch, stage + 1)
                assert not cut or bulk not in trace[:at]  # df was enough
            else:
                assert op[:2] == (program.BACKWARD, head)
        assert len([1 for _, what in events if what[0] == "has MLP gradients"]) == 2 * count


def train(layout, kind, mhc, schedule, config_options, per_token, count=4):
    """Reports and gradients of one step with a loss function of Megatron's three kinds."""
    layout.initialize()
    config = layout.config(kind, num_layers=4, **config_options)
    chunks = build(layout, config, kind, mhc)
    started = []
    config.grad_scale_func = lambda loss: loss * 8
    config.timers = lambda name, **_: SimpleNamespace(
        start=lambda **_: started.append(name), stop=lambda: started.remove(name)
    )
    mask = torch.ones(SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)[None, None]
    positions = torch.arange(SEQUENCE).expand(MICRO_BATCH, -1)

    def forward_step(iterator, model):
        batch = next(iterator)
        labels = batch[:, 1:].contiguous()
        output = model(batch[:, :-1].contiguous(), positions, mask, labels=labels)

        def loss_func(losses, non_loss_data=False):
            if non_loss_data:
                return losses.detach().clone()
            counted = torch.ones_like(losses)
            counted[:, : int(batch[0, 0]) % 5] = 0  # as many tokens as the data has it
            total, number = (losses * counted).sum(), counted.sum().to(torch.int)
            report = {"loss": total.detach().clone()}
            return (total, number, report) if per_token is not None else (total / number, report)

        return output, loss_func

    reports, data = [], list(tokens(count))
    for only in (False, True):
        for chunk in chunks:
            if not only:
                chunk.zero_grad_buffer()
        with torch.set_grad_enabled(not only):
            reports += schedule()(
                forward_step_func=forward_step,
                data_iterator=[iter(data) for _ in chunks] if len(chunks) > 1 else iter(data),
                model=chunks if len(chunks) > 1 else chunks[0],
                num_microbatches=count,
                seq_length=SEQUENCE,
                micro_batch_size=MICRO_BATCH,
                decoder_seq_length=SEQUENCE,
                forward_only=only,
                collect_non_loss_data=only,
            )
    assert started == []
    return reports, gradients(chunks)


MODELS = {"moe_auxiliary_loss": Layout(pp=2, vpp=2), "tied": Layout(pp=2)}


@pytest.mark.parametrize("kind, per_token", each_value(MODELS, [True, None, False]))
def test_whole_messages_train_as_megatrons_schedule_does_bit_for_bit(run_ranks, kind, per_token):
    """Loss scale, auxiliary losses, tokens, timers, reports and non-loss data."""
    layout, options = MODELS[kind], dict(calculate_per_token_loss=bool(per_token))
    ours = run_ranks(
        2, train, layout, kind, interleaved(), lambda: engine.forward_backward, options, per_token
    )
    stock = run_ranks(2, train, layout, kind, MHCConfig(), stock_schedule, options, per_token)
    for (reports, found), (expected_reports, expected) in zip(ours, stock, strict=True):
        assert str(reports) == str(expected_reports)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert len(ours[1][0]) == 8 and ours[0][0] == []


def fail(how):
    """Rank 1 stops answering in its third forward step; returns rank 0's error and the seconds it took."""
    comm.timeout_of = lambda group: timedelta(seconds=1)
    layout = Layout(pp=2)
    layout.initialize()
    config = layout.config("dense", num_layers=4)
    chunks = build(layout, config, "dense", interleaved("split"))
    seen = []

    def observe(op, step):
        if pipeline_rank() == 1 and op.kind == program.FORWARD and op.what == program.ALL:
            seen.append(op)
            if len(seen) == 3:
                raise InterruptedError

    observers[:] = [observe]
    try:
        iterate(chunks, config, count=6, schedule=engine.forward_backward)
    except InterruptedError:
        if how == "failed":
            for group in comm.channels_of(layout_group()).groups.values():
                dist.destroy_process_group(group)
        time.sleep(2.5)
        return None
    except comm.PipelineError as error:
        return str(error)
    return "no error"


def layout_group():
    from megatron.core import parallel_state

    return parallel_state.get_pipeline_model_parallel_group()


@pytest.mark.parametrize("how", ["failed", "slow"])
def test_a_silent_peer_is_named_within_the_timeout(run_ranks, how):
    start = time.monotonic()
    error, _ = run_ranks(2, fail, how)
    assert time.monotonic() - start < 60
    assert "pipeline rank 0: message d_" in error or "pipeline rank 0: message mixed" in error
    assert "pipeline rank 1 (global rank 1) has failed or was silent for 1 s" in error
    assert "--distributed-timeout-minutes" in error


def refuse(name):
    """On rank 0, what gloo says of a peer whose process is gone; returns the step's error."""
    comm.timeout_of = lambda group: timedelta(seconds=1)
    layout = Layout(pp=2)
    layout.initialize()
    config = layout.config("dense")
    chunks = build(layout, config, "dense", interleaved())
    if pipeline_rank() == 0:

        def gone(*args, **kwargs):
            raise RuntimeError("Connection closed by peer")

        setattr(comm.dist, name, gone)
    try:
        iterate(chunks, config, count=6, schedule=engine.forward_backward)
    except comm.PipelineError as error:
        return str(error)
    except RuntimeError:
        return "the other rank's"


@pytest.mark.parametrize("name", ["recv", "irecv", "isend"])
def test_a_peer_that_is_gone_is_named_wherever_it_is_asked_for(run_ranks, name):
    """While groups are connected, when a receive is posted, when something is sent."""
    error, _ = run_ranks(2, refuse, name)
    assert "pipeline rank 1 (global rank 1) has failed or was silent for 1 s" in error

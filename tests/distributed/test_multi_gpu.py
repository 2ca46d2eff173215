"""What a router in TF32 does to parity, and what NCCL alone would punish: the order of first messages."""

import itertools
import types

import pytest
import torch
from harness import MICRO_BATCH, MICRO_BATCHES, SEQUENCE, Layout, build, iterate, ps

from megatron_mhc import MHCConfig
from megatron_mhc.hyper_connection import HyperConnectionModule
from megatron_mhc.pipeline import comm, links
from megatron_mhc.pipeline.links import Choice
from megatron_mhc.schedule.program import POST, SEND, Plan, build_program, channel
from megatron_mhc.testing import gpt
from megatron_mhc.testing.parity import Iteration, Routing, compare_routing, differences

# What Transformer Engine's GEMM does to a float32 router, and what a token that changes its expert does.


def tf32(x):
    """Rounded to 11 significant bits."""
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def tf32_gemm(a, b, dtype, layout, bias=None, grad=False):
    a, b = tf32(a), tf32(b)
    return [{"TN": lambda: b @ a.T, "NN": lambda: b @ a, "NT": lambda: b.T @ a}[layout]()]


def routed(layout, exact, bump=0.0, expected=None):
    """An iteration in float32: what one rank computed, or how far `layout` is from that."""
    gpt._router_gemm = tf32_gemm
    gpt.exact_router(exact)
    layout.initialize()
    config = layout.config("moe", params_dtype=torch.float32)
    chunks = build(layout, config, "moe", MHCConfig(num_residual_streams=4))
    routing = Routing.record(chunks)
    if bump:
        with torch.no_grad():  # the last layer's first expert gets more tokens, of both ranks
            chunks[0].module.decoder.layers[-1].mlp.router.weight[0] += bump
    loss = iterate(chunks, config)
    if expected is None:
        return Iteration.of(loss, chunks), routing.of_last(MICRO_BATCHES)
    iteration, wanted = expected
    return differences(loss, chunks, iteration, torch.float32), compare_routing(routing, wanted, layout.sp)


@pytest.mark.parametrize("layout", [Layout(ep=2), Layout(tp=2, sp=True)], ids=["ep2", "tp2_sp"])
def test_a_router_in_tf32_spoils_gradients_but_moves_no_token(run_ranks, layout):
    errors = {}
    for exact in (True, False):
        expected = run_ranks(1, routed, Layout(), exact)[0]
        assert expected[1].gap() > 1e-5
        found, routing = run_ranks(2, routed, layout, exact, 0.0, expected)[0]
        assert routing.moved == 0 and routing.tokens == 4 * MICRO_BATCHES * MICRO_BATCH * SEQUENCE
        errors[exact] = found.worst[0], routing.scores
    print(errors)
    assert errors[True][0] <= 1e-5 and 10 * errors[True][0] < errors[False][0] < 1e-3
    assert errors[True][1] <= 1e-6 and 5e-5 < errors[False][1] < 1e-3  # of a score


def test_a_token_that_changes_its_expert_is_counted(run_ranks):
    expected = run_ranks(1, routed, Layout(), True)[0]
    found, routing = run_ranks(2, routed, Layout(ep=2), True, 0.5, expected)[0]
    _, alone = run_ranks(1, routed, Layout(), True, 0.5)[0]
    chosen = zip(alone.chosen[3], expected[1].chosen[3], strict=True)
    assert routing.moved == sum(int((a != b).any(-1).sum()) for a, b in chosen) > 0
    assert found.worst[0] > 1e-3


# A message's first use of a link waits, on the host, for the other end: so does NCCL.

PLANS = [
    Plan(pp, vpp, microbatches, boundary=boundary, fused=fused, layers=2)
    for pp, vpp, microbatches in ((2, 1, 2), (2, 2, 4), (2, 3, 5), (3, 2, 6), (4, 2, 8))
    for boundary, fused in itertools.product(("whole", "split"), (False, True))
]


def first_uses(plan, rank):
    """The links of a rank in the order of their first message."""
    used = [channel(plan, op.message) for op in build_program(plan, rank) if op.kind in (POST, SEND)]
    return list(dict.fromkeys(used))


def meet(orders):
    """Whether ranks that wait for each other on every link in turn all come to their end."""
    left = [list(order) for order in orders]
    while any(left):
        ready = [
            link
            for rank, mine in enumerate(left)
            for link in mine[:1]
            if all(left[end][:1] == [link] for end in link[1:])
        ]
        if not ready:
            return False
        for end in ready[0][1:]:
            left[end].pop(0)
    return True


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_links_are_all_that_programs_use(plan):
    for rank in range(plan.pp):
        assert set(first_uses(plan, rank)) <= set(comm.links(plan.pp))


def test_programs_alone_may_wait_for_ever_on_their_first_messages():
    plan = Plan(2, 2, 4, ahead=2)
    assert not meet([first_uses(plan, rank) for rank in range(2)])


def connect(layout):
    """The links that this rank connects when the channels are made, in order."""
    layout.initialize()
    used, send, recv = [], comm.dist.send, comm.dist.recv

    def note(function, sends):
        def noted(tensor, peer, group):
            used.append((group.group_desc, sends, peer))
            return function(tensor, peer, group=group)

        return noted

    comm.dist.send, comm.dist.recv = note(send, True), note(recv, False)
    comm.channels_of(ps.get_pipeline_model_parallel_group())
    return used


@pytest.mark.parametrize("pp", [2, 4])
def test_channels_are_connected_in_one_order_by_all_ranks(run_ranks, pp):
    orders = []
    for rank, used in enumerate(run_ranks(pp, connect, Layout(pp=pp))):
        names = [desc.removeprefix("MHC_PIPELINE_").lower() for desc, *_ in used]
        ends = [(rank, peer) if sends else (peer, rank) for _, sends, peer in used]
        orders.append([(name, *pair) for name, pair in zip(names, ends, strict=True)])
        assert orders[-1] == [link for link in comm.links(pp) if rank in link[1:]]
    assert meet(orders)


@pytest.mark.parametrize(
    "options, pp, backend, chosen, limit, sms",
    [
        (dict(pipeline_schedule="interleaved"), 4, "nccl", "nccl", None, 8),
        (dict(pipeline_schedule="fused"), 2, "nccl", "nccl", "16", 32),
        (dict(pipeline_schedule="interleaved"), 4, "nccl", "push", None, 0),
        (dict(pipeline_schedule="interleaved"), 4, "gloo", "nccl", None, 0),
        (dict(pipeline_schedule="interleaved"), 1, "nccl", "nccl", None, 0),
        ({}, 4, "nccl", "nccl", None, 0),
    ],
)
def test_a_models_kernels_leave_sms_to_the_receives_of_its_own_schedule(
    monkeypatch, options, pp, backend, chosen, limit, sms
):
    """Without process groups: a GPU that would show it has another test, benchmarks.multi_gpu."""
    monkeypatch.setattr(links.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(links.dist, "get_backend", lambda group: backend)
    monkeypatch.setattr(links, "choose", lambda *_: Choice(chosen, ""))
    monkeypatch.delenv("NCCL_MAX_CTAS", raising=False)
    if limit:
        monkeypatch.setenv("NCCL_MAX_CTAS", limit)
    config = types.SimpleNamespace(pipeline_model_parallel_size=pp)
    assert links.sms_of_receives(config, MHCConfig(**options)) == sms


def reserved(layout):
    """The SMs that each of two models leaves, built one after the other."""
    layout.initialize()
    links.dist = types.SimpleNamespace(is_initialized=lambda: True, get_backend=lambda group: "nccl")
    links.choose = lambda *_: Choice("nccl", "")
    found = []
    for schedule in ("interleaved", "megatron"):
        chunks = build(layout, layout.config("dense"), "dense", MHCConfig(pipeline_schedule=schedule))
        modules = [m for chunk in chunks for m in chunk.modules() if isinstance(m, HyperConnectionModule)]
        found.append({module.options.reserved_sms for module in modules})
    return found


def test_a_model_beside_one_whose_receives_wait_leaves_no_sms(run_ranks):
    assert run_ranks(2, reserved, Layout(pp=2)) == [[{8}, {0}]] * 2

"""Megatron's combined 1F1B (--overlap-moe-expert-parallel-comm) on gloo: against one process, in float64.

Its CUDA streams are stand-ins here, and its nodes run in the order of the host.
"""

import functools
import gc
import types
import weakref
from dataclasses import replace

import delayed
import pytest
import torch
from harness import Layout, build, differences, iterate, reference, tokens
from layout_cases import selective
from megatron.core.extensions import transformer_engine
from megatron.core.pipeline_parallel import fine_grained_activation_offload as offload
from pipeline import ERROR, compare_partly_trained, gradients
from thinned import each_value

from megatron_mhc import MHCConfig, hooks
from megatron_mhc.chunk import chunk_of
from megatron_mhc.hooks import installed, uses
from megatron_mhc.sublayer import SubLayer

NODE = uses.Use("megatron.core.models.common.utils:TransformerLayerNode.__init__", None)
PLAIN = MHCConfig()
LAYOUTS = {"ep2": (2, Layout(ep=2)), "pp2_vpp2_ep2": (4, Layout(pp=2, vpp=2, ep=2))}


def start(layout, kind, mhc, overlap=True, make=build, **settings):
    layout.initialize()
    config = layout.config(kind, **settings)
    # Behind Megatron's own checks, which ask for bf16.
    config.overlap_moe_expert_parallel_comm = overlap
    return config, make(layout, config, kind, mhc)


def compare(layout, kind, mhc, count, expected, make=build, **settings):
    config, chunks = start(layout, kind, mhc, make=make, **settings)
    if config.fine_grained_activation_offloading:
        for _ in range(2):  # what is offloaded is known behind a warm-up
            iterate(chunks, config, count=count)
    loss = iterate(chunks, config, count=count)
    return differences(loss, chunks, expected, config.params_dtype), chunks


def check(run_ranks, where, kind, mhc=PLAIN, plain=None, count=4, run=compare, **settings):
    """plain: the options of the single process."""
    world, layout = LAYOUTS[where]
    expected = reference(kind, plain or mhc)

    def on_rank(*case):
        return run(*case, **settings)[0]

    result = run_ranks(world, on_rank, layout, kind, mhc, count, expected)[0]
    error, name = result.worst
    assert result.loss <= ERROR
    assert error <= ERROR, name


@pytest.mark.parametrize("where", LAYOUTS)
def test_megatrons_own_model_trains_as_one_process_does(run_ranks, where):
    check(run_ranks, where, "moe_shared", None)


OPTIONS = {
    "paper": {},
    "two_streams_of_deepseek_v4": dict(num_residual_streams=2, preset="deepseek_v4"),
    "deepseek_v4": dict(preset="deepseek_v4"),
    "two_streams": dict(num_residual_streams=2),
    "one_stream": dict(num_residual_streams=1),
    "single_pass": dict(preset="deepseek_v41"),
    "fixed": dict(h_res="identity", h_pre="fixed", h_post="fixed"),
    "learned_head": dict(contract="learned_head", h_res="unconstrained"),
}
KINDS = "moe_shared", "moe_after_dense"


@pytest.mark.parametrize("where", LAYOUTS)
@pytest.mark.parametrize("options, kind", each_value(list(OPTIONS), KINDS))
def test_trains_as_one_process_does(run_ranks, where, options, kind):
    check(run_ranks, where, kind, MHCConfig(**OPTIONS[options]))


@pytest.mark.parametrize("options", ["paper", "single_pass"])
def test_without_a_pipeline_a_pipelines_schedule_changes_nothing(run_ranks, options):
    plain = MHCConfig(**OPTIONS[options])
    check(run_ranks, "ep2", "moe_shared", replace(plain, pipeline_schedule="fused"), plain)


REPLAYS = [
    dict(recompute_layer_num=num, recompute_coefficients=coefficients)
    for num, coefficients in (("1", True), ("2", False), ("3", True), ("3", False), ("auto", False))
]


@pytest.mark.parametrize("where", LAYOUTS)
@pytest.mark.parametrize("replay, kind", each_value(REPLAYS, KINDS))
def test_replayed_streams(run_ranks, where, replay, kind):
    check(run_ranks, where, kind, MHCConfig(**replay), PLAIN)


SETTINGS = {
    "mtp": ("mtp_moe", {}, {}),
    "auxiliary_loss": ("moe_auxiliary_loss", {}, {}),
    "recompute": ("moe_after_dense", {}, selective("core_attn", "layernorm", "mlp")),
    "recompute_of_shared_experts": ("moe_shared", {}, selective("shared_experts", "layernorm")),
    "recompute_and_replay": (
        "moe_after_dense",
        dict(recompute_layer_num="3"),
        selective("core_attn", "layernorm", "mlp"),
    ),
    "folded_norm": ("moe_shared", dict(norm="folded"), {}),
}


@pytest.mark.parametrize("where, setting", each_value(list(LAYOUTS), list(SETTINGS)))
def test_setting(run_ranks, where, setting):
    kind, options, settings = SETTINGS[setting]
    check(run_ranks, where, kind, MHCConfig(**options), PLAIN, **settings)


TRAINED = {
    "mappings_alone": ["hyper_connection"],
    "second_half": [r"layers\.[23]\.", "final_layernorm", "output_layer"],
    "experts_alone": [r"layers\.\d\.mlp\.experts"],
}


@pytest.mark.parametrize("where", LAYOUTS)
@pytest.mark.parametrize("trained", TRAINED)
def test_behind_a_frozen_embedding(run_ranks, where, trained):
    """Which in stock ends the first step."""
    world, layout = LAYOUTS[where]
    more = dict(schedule=None, prepare=ask_for_nodes)
    case = world, layout, "moe_shared", PLAIN, TRAINED[trained]
    result = compare_partly_trained(run_ranks, *case, more=more)
    error, name = result.worst
    assert result.loss <= ERROR
    assert error <= ERROR, name


def ask_for_nodes(config, chunks):
    config.overlap_moe_expert_parallel_comm = True


def with_early_release(layout, kind, mhc, count, expected):
    config, chunks = start(layout, kind, mhc)
    config.ep_overlap_early_attn_memory_release = True
    return differences(iterate(chunks, config, count=count), chunks, expected, config.params_dtype), chunks


@pytest.mark.parametrize("where", LAYOUTS)
def test_early_attention_memory_release(run_ranks, where):
    check(run_ranks, where, "moe_shared", MHCConfig(recompute_layer_num="3"), PLAIN, run=with_early_release)


@pytest.mark.parametrize("mhc", [None, PLAIN], ids=["megatron", "mhc"])
@pytest.mark.parametrize("where, kind", each_value(list(LAYOUTS), [*KINDS, "mtp_moe"]))
def test_delayed_weight_gradients(run_ranks, where, kind, mhc):
    world, layout = LAYOUTS[where]

    def on_rank(*case):
        result, chunks = compare(*case, make=delayed.build)
        linears = [m for chunk in chunks for m in chunk.modules() if isinstance(m, delayed.Delayed)]
        assert linears and all(linear.wgrad_store.context.empty() for linear in linears)
        assert delayed.events
        return result

    result = run_ranks(world, on_rank, layout, kind, mhc, 4, reference(kind, mhc))[0]
    error, name = result.worst
    assert result.loss <= ERROR
    assert error <= ERROR, name


def offloaded(layout, kind, mhc, count, expected, modules):
    gone = []

    class Handler(offload.ChunkOffloadHandler):
        @staticmethod
        def _can_manage_tensor_for_offload(tensor):
            return not isinstance(tensor, torch.nn.Parameter)

        def offload(self, tensor, *args, **kwargs):
            gone.append(tensor)
            return super().offload(tensor, *args, **kwargs)

    offload.ChunkOffloadHandler = Handler
    transformer_engine.cpu_offload = types.SimpleNamespace()
    settings = dict(fine_grained_activation_offloading=True, offload_modules=modules)
    compared = compare(layout, kind, mhc, count, expected, min_offloaded_tensor_size=1, **settings)
    assert gone
    return compared


@pytest.mark.parametrize(
    "modules", [["core_attn"], ["attn_norm", "mlp_norm"], ["qkv_linear", "core_attn", "attn_proj"]]
)
def test_fine_grained_offloading(run_ranks, modules):
    check(run_ranks, "ep2", "moe_shared", run=functools.partial(offloaded, modules=modules))


def both_ways(layout, kind, options, settings):
    """Loss and gradients without the flag, and with it."""
    found = []
    for mhc, overlap in zip(options, (False, True), strict=True):
        config, chunks = start(layout, kind, mhc, overlap, **settings)
        found.append((iterate(chunks, config), gradients(chunks)))
    return found


def same_bits(one, other):
    (loss, want), (again, got) = one, other
    return loss == again and all(torch.equal(got[name], gradient) for name, gradient in want.items())


INTERPRETED = dict(backend="triton", sinkhorn_iterations=1)


@pytest.mark.parametrize(
    "options",
    [
        dict(boundary="fused"),
        pytest.param(dict(recompute_layer_num="2"), marks=pytest.mark.slow),
        pytest.param(dict(recompute_layer_num="2", recompute_coefficients=True), marks=pytest.mark.slow),
    ],
)
def test_kernels_give_the_bits_that_they_give_without_the_flag(run_ranks, options):
    boundary = dict(boundary=options.get("boundary", "auto"))
    options = MHCConfig(**INTERPRETED, **boundary), MHCConfig(**INTERPRETED, **options)
    settings = dict(num_layers=2, params_dtype=torch.float32, moe_layer_freq=[0, 1])
    for rank in run_ranks(2, both_ways, Layout(ep=2), "moe_after_dense", options, settings):
        assert same_bits(*rank)


def megatrons_bits(layout):
    """Of its own model under the flag: without the hooks, and with them."""
    found = []
    for register in (hooks.revert_all, hooks.require):
        register()
        config, chunks = start(layout, "moe_after_dense", None)
        found.append((iterate(chunks, config), gradients(chunks)))
    return found


def test_a_model_without_mhc_keeps_every_bit(run_ranks):
    for rank in run_ranks(2, megatrons_bits, Layout(ep=2)):
        assert same_bits(*rank)


def trace(layout):
    """What this rank did in a step: ("forward" or "backward", micro-batch, node), or ("post_res", node)."""
    events, numbers, at = [], {}, []

    def watched(name, original):
        def run(node, *args):
            number = numbers.setdefault(id(node.event), len(numbers))
            events.append((name, number, node.name))
            at.append(node.name.replace("attn", DENSE[0]))  # as 0.18 calls it
            try:
                return original(node, *args)
            finally:
                at.pop()

        return run

    Node = hooks._find(installed(NODE).target)[0]
    for name in ("forward", "backward"):
        setattr(Node, name, watched(name, getattr(Node, name)))
    post_res = SubLayer.post_res

    def watched_post_res(*args, **kwargs):
        events.append(("post_res", at[-1]))
        return post_res(*args, **kwargs)

    SubLayer.post_res = watched_post_res
    held = []  # so that no two events have one address
    event = torch.cuda.Event
    torch.cuda.Event = lambda *args, **kwargs: held.append(event(*args, **kwargs)) or held[-1]
    config, chunks = start(layout, "moe_after_dense", PLAIN, num_layers=2, moe_layer_freq=[0, 1])
    iterate(chunks, config, count=6)
    return events


DENSE, EXPERTS = ["pre_dispatch_computation", "mlp"], ["moe_dispatch", "moe_combine"]


def test_a_forward_runs_node_by_node_in_turns_with_a_backward(run_ranks):
    for events in run_ranks(2, trace, Layout(ep=2)):
        ran = [event for event in events if event[0] != "post_res"]
        for number in (1, 2):
            forward = [at for at, event in enumerate(ran) if event[:2] == ("forward", number)]
            beside = [ran[at] for at in range(forward[0], forward[-1]) if at not in forward]
            assert len(forward) == 6
            assert {event[:2] for event in beside} == {("backward", number - 1)} and len(beside) >= 4
        written = [event[1] for event in events if event[0] == "post_res"]
        # attention and MLP of the dense layer, attention and experts
        assert written == [*DENSE, DENSE[0], EXPERTS[1]] * 3


def freed(mhc):
    """Of the streams that connections have read in a forward pass: which are still in memory."""
    settings = dict(num_layers=3, moe_layer_freq=[0, 1, 1])
    _, (chunk,) = start(Layout(ep=2), "moe_after_dense", mhc, **settings)
    streams = []

    def look(module, args, output):
        streams.append(weakref.ref(args[0].untyped_storage()))

    for sublayer in chunk_of(chunk).sublayers:
        sublayer.connection.register_forward_hook(look)
    batch = tokens(1)[0]
    places = torch.arange(batch.shape[1] - 1).expand(len(batch), -1)
    mask = torch.ones(*places.shape[1:], places.shape[1], dtype=torch.bool).triu(1)[None, None]
    words, labels = batch[:, :-1], batch[:, 1:].contiguous()
    plan = chunk.module.build_schedule_plan(words, places, mask, labels=labels)
    gc.disable()  # by counting alone: no cycles that wait for a collector
    output = type(plan).run(plan, None)
    return [bool(found := r()) and found.nbytes() > 0 for r in streams], output


def test_dropped_streams_are_freed_although_nodes_hold_them(run_ranks):
    def kept(options):
        return freed(MHCConfig(**options))[0]

    assert run_ranks(2, kept, {})[0] == [True] * 6
    assert run_ranks(2, kept, dict(recompute_layer_num="3"))[0] == [True, False, False] * 2
    everything = dict(recompute_layer_num="6", recompute_coefficients=True)
    assert run_ranks(2, kept, everything)[0] == [True] + [False] * 5

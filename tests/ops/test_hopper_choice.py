"""That `hopper` calls the kernels of `ops/hopper`, where Triton's stand for them; how channels are cut."""

import functools
import itertools
import types

import pytest
import torch
from megatron.core.transformer import TransformerConfig
from ops_cases import DEVICE, inputs
from ops_chains import apart, chain, connections, optimize, results, same, two_in_a_row

import megatron_mhc.backend
from megatron_mhc import MHCConfig
from megatron_mhc.hyper_connection import HyperConnectionModule
from megatron_mhc.ops import autograd
from megatron_mhc.ops.hopper import compile, pre, pre_backward
from megatron_mhc.ops.kernels import BY_NAME, HOPPER, TRITON
from megatron_mhc.ops.options import Options

BF16 = torch.bfloat16
CASE = (5, 4, 48, BF16)


@pytest.fixture
def calls(monkeypatch):
    """The names of Hopper's functions as they are called; Triton's do the work."""
    made = []

    def counted(original):
        def call(*args, **options):
            assert "parts" not in options
            made.append(original.__name__)
            return original(*args, **options)

        return call

    functions = {name: counted(getattr(TRITON, name)) for name in ("pre_forward", "pre_backward")}
    monkeypatch.setitem(BY_NAME, "hopper", HOPPER._replace(**functions))
    return made


@pytest.fixture
def by_hopper(monkeypatch, calls):
    monkeypatch.setattr(autograd, "pre", functools.partial(autograd.pre, kernels=BY_NAME["hopper"]))


@pytest.mark.parametrize("links", [True, False])
def test_forward_and_backward_are_hoppers(calls, links, request):
    want = two_in_a_row((*CASE, True), linked=links)
    assert not calls
    request.getfixturevalue("by_hopper")
    same(two_in_a_row((*CASE, True), linked=links), want)
    assert calls == ["pre_forward"] * 2 + ["pre_backward"] * 2


def test_a_projection_made_ahead_is_tritons(calls, by_hopper):
    chain(inputs(*CASE), True)
    assert calls == ["pre_forward"] + ["pre_backward"] * 3


def test_the_backward_of_another_dtype_of_f_is_tritons(calls, by_hopper):
    x, weight, affine, f = (t.requires_grad_() for t in inputs(*CASE))
    options = Options(1e-6, 20, False)
    _, mappings = autograd.pre(x, weight, affine, options)
    autograd.post_res(f.float(), mappings).sum().backward()
    assert calls == ["pre_forward"] and x.grad.isfinite().all()


@apart
def test_compiled_graphs_call_hoppers(calls, by_hopper):
    tensors = inputs(*CASE)
    want = results(connections, tensors, False)
    calls.clear()
    same(results(optimize(connections), tensors, False), want)
    assert calls == ["pre_forward"] * 2 + ["pre_backward"] * 2


@pytest.mark.parametrize("backend, count", [("hopper", 1), ("triton", 0)])
def test_a_connection_says_which_it_wants(monkeypatch, calls, backend, count):
    config = TransformerConfig(
        num_layers=1, hidden_size=48, num_attention_heads=2, use_cpu_initialization=True
    )
    connection = HyperConnectionModule(config, MHCConfig(), 0).to(DEVICE)
    monkeypatch.setattr(megatron_mhc.backend, "choose", lambda *args: backend)
    streams = torch.randn(5, 1, 4 * 48).to(DEVICE, BF16).requires_grad_()
    layer_input, mappings = connection(streams)
    connection.post_res(streams, layer_input, mappings).sum().backward()
    assert calls == ["pre_forward", "pre_backward"][: 2 * count]


@pytest.mark.parametrize("tokens", [1, 16, 17, 300, 8192])
@pytest.mark.parametrize("channels", [16, 48, 1040, 2560, 4096, 7168, 16384])
@pytest.mark.parametrize("widest", [pre.WIDEST, pre_backward.WIDEST])
@pytest.mark.parametrize("blocks", [132, 144])
def test_layout_covers_all_channels_once_with_blocks_that_are_there(tokens, channels, widest, blocks):
    width, slices, groups = compile.layout(tokens, channels, widest, blocks, 8)
    assert width % 16 == 0 and 0 < width <= widest
    assert (slices - 1) * width < channels <= slices * width
    assert 1 <= groups <= -(-tokens // 8) and slices * groups <= blocks


def test_layout_uses_most_multiprocessors_where_there_are_tokens_enough():
    for channels in (2560, 4096, 7168):
        _, slices, groups = compile.layout(8192, channels, pre_backward.WIDEST, 132, 8)
        assert slices * groups >= 100


def test_layout_of_more_channels_than_blocks_is_refused():
    with pytest.raises(ValueError, match="4096 channels need more than 31 blocks of 128"):
        compile.layout(100, 4096, 128, 31, 8)
    assert compile.layout(100, 4096, 128, 32, 8).groups == 1


def test_layout_leaves_reserved_sms_to_others():
    free = {channels: compile.layout(8192, channels, 256, 132, 16) for channels in (2560, 4096, 7168)}
    for channels, before in free.items():
        after = compile.layout(8192, channels, 256, 132, 16, reserved=8)
        assert after.slices * after.groups <= 124 and after.groups >= before.groups - 1
    # Where a row takes more than the rest it has what it needs; where it cannot be had, the same error.
    assert compile.layout(100, 16384, 128, 132, 8, 8) == compile.Layout(128, 128, 1)
    with pytest.raises(ValueError, match="4096 channels need more than 31 blocks of 128"):
        compile.layout(100, 4096, 128, 31, 8, 8)


@pytest.mark.parametrize("reserved", [0, 8])
def test_each_launch_leaves_the_sms_that_its_connection_reserves(monkeypatch, reserved):
    """Two connections in one process, of which one is in a pipeline."""
    blocks = []
    plan = types.SimpleNamespace(launch=lambda *_: None)
    launches = types.SimpleNamespace(plan=lambda count, *_: (blocks.append(count), plan)[1])
    for module in (pre, pre_backward):
        monkeypatch.setattr(module, "kernel", lambda *_, **defines: launches)
        monkeypatch.setattr(module, "raw_stream", lambda _: 0)
        monkeypatch.setattr(module, "_plan", module._plan.__wrapped__)
        monkeypatch.setattr(module, "multiprocessors", lambda _: 132)
    x, f = torch.empty(4096, 4, 512, dtype=BF16), torch.empty(4096, 512, dtype=BF16)
    weight, affine = torch.empty(24, 2048), torch.empty(27)
    for options in (Options(1e-6, 20, False, reserved), Options(1e-6, 20, False)):
        _, saved, before, _ = pre.pre_forward(x, weight, affine, options)
        pre.post_res_pre(x, f, before, None, weight, affine, options)
        pre_backward.pre_backward(x, x, f, f, weight, affine, saved, options)
    assert blocks == [132 - reserved] * 3 + [132] * 3


def test_what_a_multiprocessor_takes_is_what_the_obstacle_says():
    assert 2 * HOPPER.channels_per_sm == min(pre.WIDEST, pre_backward.WIDEST)


@pytest.mark.parametrize("width", range(64, 257, 64))
def test_rings_fit_into_shared_memory_and_hold_tiles_enough(width):
    """Of x at least as many tiles as of f; backward more than are fetched ahead."""
    for mix, norm in itertools.product((False, True), repeat=2):
        shared, stages = pre.memory(width, mix=mix, norm=norm)
        assert stages == pre.memory(width, mix=mix, norm=False)[1]  # the norm costs no tile
        assert shared <= compile.SHARED and pre.F_SLOTS <= stages <= pre.MOST_STAGES
    for iterations, norm in itertools.product((1, 20, HOPPER.max_iterations), (False, True)):
        if width <= pre_backward.WIDEST:
            shared, stages = pre_backward.memory(width, iterations, norm=norm)
            assert shared <= compile.SHARED and 4 < stages <= pre_backward.MOST_STAGES


@pytest.mark.parametrize(
    "step, most", [(2, pre.MOST_LOADS), (4, pre_backward.MOST_LOADS), (2, pre.MOST_LOADS // 2), (4, 4)]
)
def test_sums_take_the_fewest_rounds_and_stay_within_what_is_there(step, most):
    for slices in range(1, 133):
        at_once, each = compile.loads(slices, step, most), -(-slices // step)
        assert at_once <= most and -(-each // at_once) == -(-each // most)
        looked_at = -(-each // at_once) * at_once * step
        assert slices <= looked_at < slices + compile.AHEAD

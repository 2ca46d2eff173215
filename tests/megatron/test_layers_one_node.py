"""A model whose connections share nodes of the graph (--mhc-boundary fused) has the bits of one without."""

import functools

import gpt
import pytest
import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from ops_chains import AHEAD
from test_layer import TRITON, VARIANTS

from megatron_mhc import MHCConfig
from megatron_mhc.testing import ranks


def run(joined, mhc, settings, watched=False, without=None):
    """Loss and gradients, and how many connections read by themselves.

    without: the context without gradients that it runs in; it then has a loss alone.
    """
    from megatron_mhc.ops import autograd, kernels

    read, forward = [], autograd._Pre.forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(autograd._Pre, "forward", staticmethod(lambda *a: (read.append(0), forward(*a))[1]))
        if joined:
            patch.setitem(kernels.BY_NAME, "triton", AHEAD)
        model = gpt.build(MHCConfig(**TRITON | mhc), **settings)
        if watched:
            for layer in model.modules():
                if isinstance(layer, TransformerLayer):
                    layer.register_full_backward_hook(lambda *args: None)
        if without is not None:
            with without():
                inputs, labels = gpt.batch(0)
                return (model(*inputs, labels=labels).mean().clone(), {}), len(read)
        results = gpt.forward_backward(model)
    return results, len(read)


@functools.cache
def apart(variant, norm, *settings):
    """Loss and gradients of a model whose connections share nothing."""
    mhc = dict(boundary="apart", norm=norm)
    return ranks.run_ranks(1, run, False, mhc, VARIANTS[variant] | dict(settings))[0][0]


@pytest.mark.parametrize(
    "variant, mhc, settings, alone",
    [
        ("dense", {}, {}, 1),
        ("moe", {}, {}, 1),
        ("dense", {}, dict(add_bias_linear=True), 1),
        ("dense", dict(norm="folded"), dict(hidden_dropout=0.1), 1),
        ("dense", dict(boundary="linked"), {}, 4),
        ("dense", dict(boundary="apart"), {}, 4),
        ("dense", dict(recompute_layer_num="3"), {}, 4),  # whose streams are dropped
        ("dense", dict(recompute_layer_num="3", recompute_coefficients=True), {}, 4 + 4),
        ("recompute", {}, {}, None),
    ],
)
def test_joined_connections_give_the_bits_of_others(run_ranks, variant, mhc, settings, alone):
    got, read = run_ranks(1, run, True, mhc, VARIANTS[variant] | settings)[0]
    gpt.same_bits(got, apart(variant, mhc.get("norm", "apart"), *settings.items()))
    assert alone is None or read == alone


def test_hooks_of_layers_part_their_connections_and_leave_the_bits(run_ranks):
    """torch puts its own nodes around a layer then."""

    def both():
        want, _ = run(False, {}, {}, watched=True)
        return want, *run(True, {}, {}, watched=True)

    want, got, read = run_ranks(1, both)[0]
    gpt.same_bits(got, want)
    assert read == 2


def double(streams):
    streams.mul_(2)


def forward(joined, without, hook=None, train=False):
    """Its loss, and how many of four connections read by themselves.

    hook: behind each layer, with the streams.
    """

    def prepare(model):
        model.train(train)
        for layer in model.modules():
            if isinstance(layer, TransformerLayer) and hook is not None:
                layer.register_forward_hook(lambda _, __, output: hook(output[0]))
        return model

    with pytest.MonkeyPatch.context() as patch:
        build = gpt.build
        patch.setattr(gpt, "build", lambda *a, **k: prepare(build(*a, **k)))
        (loss, _), read = run(joined, {}, {}, without=without)
    return loss.item(), read


@pytest.mark.parametrize(
    "without, hook, train, alone",
    [
        (torch.no_grad, None, False, 1),
        (torch.inference_mode, None, False, 1),
        (torch.no_grad, None, True, 4),  # as in a checkpoint, whose replay would have to do alike
        (torch.no_grad, lambda streams: None, False, 1),
        # Of an inference tensor nobody knows whether a hook has written it.
        (torch.inference_mode, lambda streams: None, False, 2),
        (torch.no_grad, double, False, 2),
        (torch.inference_mode, double, False, 2),
    ],
)
def test_evaluation_and_generation_join_connections_whose_streams_nobody_writes(
    run_ranks, without, hook, train, alone
):
    want, every = run_ranks(1, forward, False, without, hook, train)[0]
    assert run_ranks(1, forward, True, without, hook, train)[0] == (want, alone) and every == 4

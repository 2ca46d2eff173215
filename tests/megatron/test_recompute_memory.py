"""Recompute frees what it says it frees, and `auto` needs the least."""

import gc
import logging
import weakref

import gpt
import pytest
import torch
from live_bytes import LiveBytes
from recompute_cases import LIVELY, losses, replaying

from megatron_mhc import MHCConfig, recompute
from megatron_mhc.chunk import chunk_of
from megatron_mhc.recompute import plan


def test_dropped_tensors_are_freed_and_come_back(run_ranks):
    """Storages by weak reference: streams are gone after the forward pass, layer inputs are empty."""

    def check():
        model = gpt.build(replaying(recompute_layer_num="4"))
        streams, inputs, norms = [], [], []

        def look(module, args, output):
            streams.append(weakref.ref(args[0].untyped_storage()))
            inputs.append(output[0].untyped_storage())

        def look_at_norm(module, args, output):
            norms.append(output.untyped_storage())

        for connection in (sublayer.connection for sublayer in chunk_of(model).sublayers):
            connection.register_forward_hook(look)
        for layer in model.decoder.layers:
            layer.input_layernorm.register_forward_hook(look_at_norm)
            layer.pre_mlp_layernorm.register_forward_hook(look_at_norm)
        loss = losses(model, 0)
        gc.disable()  # by counting alone: no cycles that wait for a collector
        try:
            assert [r() is None for r in streams] == [False, True, True, True]
        finally:
            gc.enable()
        assert [s.nbytes() for s in inputs + norms] == [0] * 8
        recompute.replay(recompute.handle(model))
        one = gpt.SEQ * gpt.BATCH * 32 * 4
        assert [s.nbytes() for s in inputs + norms[:4]] == [one] * 8
        loss.backward()

    run_ranks(1, check)


def forward_bytes(mhc, **settings):
    """Bytes that a forward pass leaves alive for the backward pass, and the chunk."""
    model = gpt.build(mhc, **settings)
    with torch.no_grad():
        losses(model, 0)  # fills what Megatron keeps from the first pass on, which would count
    with LiveBytes() as live:
        loss = losses(model, 0)
        gc.collect()  # Triton's interpreter leaves its last arguments in cycles
        alive = live.now()
    loss.backward()
    return alive, chunk_of(model)


@pytest.mark.parametrize(
    "backend, layers, coefficients",
    [
        ("reference", 3, False),
        ("reference", 3, True),
        ("triton", 1, False),
        pytest.param("triton", 3, False, marks=pytest.mark.slow),
        pytest.param("triton", 3, True, marks=pytest.mark.slow),
    ],
)
def test_freed_bytes_match_the_estimate(run_ranks, backend, layers, coefficients):
    """Counted bytes of real tensors; in fp32, of which the reference makes no copies."""
    T, C, n, size = gpt.SEQ * gpt.BATCH, 32, 4, 4

    def check():
        common = LIVELY | dict(backend=backend)
        stored, _ = forward_bytes(MHCConfig(**common), num_layers=layers)
        mhc = MHCConfig(**common, recompute_layer_num=str(size), recompute_coefficients=coefficients)
        alive, chunk = forward_bytes(mhc, num_layers=layers)
        streams = torch.empty(gpt.SEQ, gpt.BATCH, n * C)
        sublayers = chunk.sublayer_bytes(streams)
        assert (sublayers[0].streams, sublayers[0].read) == (4 * T * n * C, 2 * 4 * T * C)
        kept_streams = sum(sublayers[start].streams for start in range(0, 2 * layers, size))
        dropped = sum(s.streams + s.read for s in sublayers) - kept_streams
        return stored, alive, dropped

    stored, alive, dropped = run_ranks(1, check)[0]
    rows = n * n + 2 * n
    coefficient_bytes = 4 * T * 2 * layers * rows
    print(f"stored {stored}, with blocks {alive}: {stored - alive} freed, {dropped} estimated")
    if backend == "triton" and not coefficients:
        # Without recompute the coefficients die in the forward pass: keeping them is the price of a replay.
        assert stored - alive == dropped - coefficient_bytes
    elif backend == "triton":
        assert stored - alive == dropped + coefficient_bytes + 4 * T * 2 * layers  # `saved` goes, 1/r with it
    elif not coefficients:
        assert stored - alive == dropped  # its graph holds the coefficients in any case
    else:
        assert stored - alive >= dropped + coefficient_bytes


def backward_peak(mhc, layers):
    model = gpt.build(mhc, num_layers=layers, params_dtype=torch.float64, hidden_size=64)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with LiveBytes(peak=True) as live:
        losses(model, 0).backward()
    return live.peak, chunk_of(model)


@pytest.mark.parametrize(
    "layers, settings",
    [
        (5, ("off", "2", "auto")),
        pytest.param(8, ("off", "1", "2", "3", "4", "5", "8", "16", "auto"), marks=pytest.mark.slow),
    ],
    ids=["fast", "all"],
)
def test_auto_needs_the_least_memory_and_as_much_as_estimated(run_ranks, layers, settings):
    """The highest count of live bytes in a training step, for every block size and for auto."""

    def measure():
        peaks = {}
        for setting in settings:
            mhc = MHCConfig(**LIVELY, recompute_layer_num=setting, backend="reference")
            peaks[setting], chunk = backward_peak(mhc, layers)
        streams = torch.empty(gpt.SEQ, gpt.BATCH, 4 * 64, dtype=torch.float64)
        return peaks, chunk.sublayer_bytes(streams), chunk.blocks

    peaks, sublayers, blocks = run_ranks(1, measure)[0]
    estimated = {s: plan.peak(sublayers, plan.choose(s, sublayers)) for s in peaks if s != "off"}
    estimated["off"] = plan.without_replay(sublayers)
    error = {s: (peaks[s] - peaks["off"] - estimated[s] + estimated["off"]) / peaks["off"] for s in peaks}
    print(f"auto: blocks of {blocks}; peak bytes", peaks)
    print("errors of the estimate:", {s: round(e, 4) for s, e in error.items()})
    assert peaks["auto"] <= min(peaks.values()) * 1.03
    assert max(map(abs, error.values())) <= 0.05


def test_the_choice_and_what_it_saves_are_said_once(run_ranks):
    def say():
        lines, handler = [], logging.Handler()
        handler.emit = lambda record: lines.append(record.getMessage())
        logger = logging.getLogger("megatron_mhc.recompute.chunk")
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        model = gpt.build(replaying(recompute_layer_num="auto"), num_layers=3)
        for seed in range(2):
            losses(model, seed).backward()
        return lines, chunk_of(model).blocks

    (line,), blocks = run_ranks(1, say)[0]
    assert f"auto): a chunk's 6 sub-layers in blocks of {', '.join(map(str, blocks))} " in line
    assert "it saves" in line and "GiB" in line

"""The replay of several connections against pre and post_res, bit for bit."""

import pytest
import torch
from test_triton import DEVICE, ON_GPU, inputs

from megatron_mhc.ops.options import Options
from megatron_mhc.ops.triton import replay
from megatron_mhc.ops.triton.post_res import post_res_forward
from megatron_mhc.ops.triton.pre import pre_forward

CASES = [
    (5, 4, 48, torch.bfloat16, 3),
    (5, 4, 48, torch.float32, 1),
    (3, 2, 32, torch.float16, 4),
    (4, 1, 16, torch.bfloat16, 2),
    (2, 8, 16, torch.bfloat16, 2),
    (0, 4, 32, torch.bfloat16, 2),
]
if ON_GPU:
    CASES += [(4096, 4, 2560, torch.bfloat16, 4), (333, 4, 1040, torch.bfloat16, 3)]


def run_forward(tokens, n, channels, dtype, count):
    """Streams in front of each connection and behind the last; coefficients, f and layer input of each."""
    x, weight, bias, *alphas, f = inputs(tokens, n, channels, dtype)
    streams, kept = [x], []
    for k in range(count):
        layer_input, _, mappings = pre_forward(
            x, weight * (k + 1), bias, tuple(alphas), Options(1e-6, 20, False)
        )
        kept.append((mappings, f * (k + 1) + layer_input, layer_input))
        x = post_res_forward(x, kept[-1][1], mappings)
        streams.append(x)
    return streams, kept


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_streams_and_layer_inputs_have_the_bits_of_the_forward_pass(case, behind):
    streams, kept = run_forward(*case)
    outputs = [torch.full_like(layer_input, float("nan")) for *_, layer_input in kept]
    row = [replay.Connection(m, f, out) for (m, f, _), out in zip(kept, outputs, strict=True)]
    got = replay.replay(streams[0], row, behind=behind)
    want = streams[1:] if behind else streams[1:-1]
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
    for out, (*_, layer_input) in zip(outputs, kept, strict=True):
        assert torch.equal(out, layer_input)


def test_a_layer_input_that_nobody_dropped_is_left_out():
    streams, kept = run_forward(4, 4, 32, torch.float32, 3)
    out = torch.full((4, 32), float("nan"), device=DEVICE)
    before = [f.clone() for _, f, _ in kept]
    row = [replay.Connection(m, f, out if k == 1 else None) for k, (m, f, _) in enumerate(kept)]
    got = replay.replay(streams[0], row, behind=False)
    assert torch.equal(out, kept[1][2]) and torch.equal(got[1], streams[2])
    for f, (_, after, _) in zip(before, kept, strict=True):
        assert torch.equal(f, after)

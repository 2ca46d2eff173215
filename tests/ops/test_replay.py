"""The replay of several connections against pre and post_res, bit for bit."""

import pytest
import torch
from ops_cases import DEVICE, ON_GPU
from ops_chains import check_replay, run_forward

from megatron_mhc.ops.triton import replay

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


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_streams_and_layer_inputs_have_the_bits_of_the_forward_pass(case, behind):
    check_replay(case, behind)


def test_a_layer_input_that_nobody_dropped_is_left_out():
    streams, kept = run_forward(4, 4, 32, torch.float32, 3)
    out = torch.full((4, 32), float("nan"), device=DEVICE)
    before = [f.clone() for _, f, _ in kept]
    row = [replay.Connection(m, f, out if k == 1 else None) for k, (m, f, _) in enumerate(kept)]
    got = replay.replay(streams[0], row, behind=False)
    assert torch.equal(out, kept[1][2]) and torch.equal(got[1], streams[2])
    for f, (_, after, _) in zip(before, kept, strict=True):
        assert torch.equal(f, after)

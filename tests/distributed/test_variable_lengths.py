"""Micro-batches of different lengths on a pipeline (variable_seq_lengths), compared with a single process."""

import pytest
import torch
import torch.distributed as dist
from harness import Layout, build, get_forward_backward_func
from pipeline import differences

from megatron_mhc import MHCConfig
from megatron_mhc.testing.parity import Iteration

LENGTHS = (16, 9, 12, 5)
ERROR = 1e-10


def forward_step(iterator, model):
    words = next(iterator)
    length = words.shape[1] - 1
    mask = torch.ones(length, length, dtype=torch.bool, device=words.device).triu(1)[None, None]
    positions = torch.arange(length, device=words.device).expand(len(words), -1)
    output = model(words[:, :-1].contiguous(), positions, mask, labels=words[:, 1:].contiguous())
    return output, lambda losses: (losses.mean(), {"loss": losses.mean().detach().clone()})


def iterate(layout, mhc):
    """The mean loss, and the chunks with their gradients."""
    layout.initialize()
    # Megatron asks variable lengths for this dispatcher, even without experts.
    options = dict(variable_seq_lengths=True, moe_token_dispatcher_type="alltoall")
    config = layout.config("dense", **options)
    chunks = build(layout, config, "dense", mhc)
    generator = torch.Generator().manual_seed(7)
    batch = [torch.randint(0, 64, (2, length + 1), generator=generator).cuda() for length in LENGTHS]
    for chunk in chunks:
        chunk.zero_grad_buffer()
    reports = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(batch) for _ in chunks],
        model=chunks,
        num_microbatches=len(batch),
        seq_length=max(LENGTHS),
        micro_batch_size=2,
        forward_only=False,
    )
    total = torch.tensor(sum(float(report["loss"]) for report in reports), dtype=torch.float64, device="cuda")
    dist.all_reduce(total)
    return total.item() / len(LENGTHS), chunks


def compare(layout, mhc, alone):
    loss, chunks = iterate(layout, mhc)
    return differences(loss, chunks, alone, torch.float64)


@pytest.mark.parametrize("mhc", [None, MHCConfig()], ids=["stock", "mhc"])
@pytest.mark.parametrize("layout", [Layout(pp=2), Layout(pp=2, vpp=2)], ids=["pp2", "pp2_vpp2"])
def test_micro_batches_of_different_lengths_match_a_single_process(run_ranks, layout, mhc):
    alone = run_ranks(1, lambda: Iteration.of(*iterate(Layout(), mhc)))[0]
    result = run_ranks(2, compare, layout, mhc, alone)[0]
    error, name = result.worst
    assert result.loss <= ERROR
    assert error <= ERROR, name

"""--cpu-offloading-num-layers with Transformer Engine's own context, on one GPU.

MEGATRON_MHC_GPU_TESTS=1 python -m pytest tests/gpu/test_offloaded_layers.py -s
"""

import os

import pytest
import torch

if not os.environ.get("MEGATRON_MHC_GPU_TESTS"):
    pytest.skip("set MEGATRON_MHC_GPU_TESTS=1 on a machine with a GPU", allow_module_level=True)
pytest.importorskip("transformer_engine")

from te_cases import BATCH, SEQ, WIDTH
from test_te import run_block
from transformer_engine.pytorch import cpu_offload

from megatron_mhc import MHCConfig

OFFLOADED = dict(cpu_offloading=True, cpu_offloading_num_layers=2)
# Shared experts copy the configuration, in which the block has put the context of the offloading with its
# CUDA streams: Megatron-Core 0.19.2 fails there, without mHC too.
NO_SHARED_EXPERTS = dict(dense={}, moe=dict(moe_shared_expert_intermediate_size=None))


@pytest.mark.parametrize("kind", ["dense", "moe"])
@pytest.mark.parametrize("boundary", ["auto", "apart"])
def test_offloaded_layers_change_no_bit(kind, boundary, monkeypatch):
    monkeypatch.setenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")
    mhc = MHCConfig(boundary=boundary)
    settings = NO_SHARED_EXPERTS[kind]
    outputs, grads, _ = run_block(kind, mhc=mhc, **settings)
    others, other_grads, _ = run_block(kind, mhc=mhc, **settings, **OFFLOADED)
    assert all(torch.equal(a, b) for a, b in zip(outputs, others, strict=True))
    assert [name for name in grads if not torch.equal(grads[name], other_grads[name])] == []


def test_streams_are_among_what_is_offloaded(monkeypatch):
    if not hasattr(cpu_offload, "OffloadableLayerState"):
        pytest.skip("this Transformer Engine offloads what its own layers mark")
    offload, sizes = cpu_offload.OffloadableLayerState.start_offload, []

    def watched(self):
        sizes.extend(tensor.numel() for tensor in self.fwd_gpu_tensor_group.tensor_list)
        return offload(self)

    monkeypatch.setattr(cpu_offload.OffloadableLayerState, "start_offload", watched)
    run_block("dense", **OFFLOADED)
    assert sizes.count(SEQ * BATCH * 4 * WIDTH) >= 2 * 2 * 2  # layers, connections, micro-batches

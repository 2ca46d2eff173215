"""What a thousand steps leave behind on one GPU, and in its host's memory.

MEGATRON_MHC_GPU_TESTS=1 python -m pytest tests/gpu/test_memory.py -s
"""

import gc
import os
import random

import pytest
import torch

if not os.environ.get("MEGATRON_MHC_GPU_TESTS"):
    pytest.skip("set MEGATRON_MHC_GPU_TESTS=1 on a machine with a GPU", allow_module_level=True)
pytest.importorskip("transformer_engine")

from megatron.core import tensor_parallel
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_block import TransformerBlock
from te_cases import BATCH, WIDTH, make_config, te_spec, wake

from megatron_mhc import MHCConfig
from megatron_mhc.ops.hopper import launch, pre, pre_backward
from megatron_mhc.specs import wrap_block_spec

MIB = 2**20
LONGEST, FIRST, STEPS = 1024, 200, 1000


def resident():
    """Bytes of this process in its host's memory."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def held():
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated() / MIB, torch.cuda.memory_reserved() / MIB, resident() / MIB


def grown(mhc):
    """MiB that are allocated, reserved and resident behind STEPS steps more than behind the first of them."""
    tensor_parallel.model_parallel_cuda_manual_seed(3, force_reset_rng=True)
    torch.manual_seed(3)
    config = make_config(num_layers=2)
    spec = te_spec(config, "dense")
    block = TransformerBlock(config, spec if mhc is None else wrap_block_spec(spec, mhc, config))
    wake(block)
    model = Float16Module(config, block.cuda())
    rope = RotaryEmbedding(WIDTH // 4, 1.0)
    lengths = [LONGEST, *(random.Random(5).randrange(1, LONGEST) for _ in range(STEPS))]
    first = None
    for step, length in enumerate(lengths):
        x = torch.randn(length, BATCH, WIDTH, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        out = model(x, None, rotary_pos_emb=rope(length))
        out.float().square().mean().backward()
        for p in model.parameters():
            p.grad = None
        del x, out
        if step == FIRST:
            first = held()
    return [now - then for now, then in zip(held(), first, strict=True)]


@pytest.mark.timeout(120)
def test_a_thousand_steps_of_changing_lengths_grow_no_memory(monkeypatch):
    monkeypatch.setenv("NVTE_FUSED_ATTN", "0")  # cuDNN has a plan for each length
    monkeypatch.setenv("NVTE_FLASH_ATTN", "0")
    ours, vanilla = grown(MHCConfig()), grown(None)
    for what, mhc, stock in zip(("allocated", "reserved", "on the host"), ours, vanilla, strict=True):
        print(f"\n{what}: {mhc:+.1f} MiB from step {FIRST} to {STEPS}, vanilla {stock:+.1f}")
    allocated, reserved, host = (mhc - max(0, stock) for mhc, stock in zip(ours, vanilla, strict=True))
    assert allocated < 0.5 and reserved <= 4 and host < 16
    if not pre._plan.cache_info().misses:
        return  # no Hopper GPU
    plans = [module._plan.cache_info().currsize for module in (pre, pre_backward)]
    assert max(plans) <= 64 and sum(len(w) for w in launch._workspaces.values()) * 4 < 32 * MIB

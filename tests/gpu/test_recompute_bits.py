"""Recompute of mHC changes no bit of a stack's loss and gradients, with Transformer Engine on one GPU.

MEGATRON_MHC_GPU_TESTS=1 python -m pytest tests/gpu
"""

import os

os.environ.setdefault("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")  # equal bits need it, before TE is loaded
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch
from megatron.core import tensor_parallel
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.transformer_block import TransformerBlock
from te_cases import MLA, MOE, make_config  # skips where there is no GPU

from megatron_mhc import MHCConfig, recompute
from megatron_mhc.specs import wrap_block_spec

WIDTH, SEQUENCE, BATCH = 512, 256, 2
DROPOUT = dict(hidden_dropout=0.1, attention_dropout=0.1)


def selective(*modules):
    return dict(recompute_granularity="selective", recompute_modules=list(modules))


KINDS = {
    "dense": {},
    "dense, dropout": DROPOUT,
    "dense, layernorm and mlp recomputed": selective("layernorm", "mlp"),
    "moe": MOE,
    "moe, moe and layernorm recomputed": MOE | selective("moe", "layernorm"),
    "mla, moe": MLA | MOE,
}
WAYS = {
    "blocks of 3": dict(recompute_layer_num="3"),
    "auto": dict(recompute_layer_num="auto"),
    "coefficients replayed": dict(recompute_layer_num="3", recompute_coefficients=True),
    "replay on a second stream": dict(recompute_layer_num="3"),
}


@pytest.fixture(autouse=True)
def deterministic():
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def run(mhc, settings, elsewhere=False):
    """Loss, gradient of the input and all gradients of a stack."""
    tensor_parallel.model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    torch.manual_seed(1)
    kind = "mla" if "kv_lora_rank" in settings else "dense"
    config = make_config(kind, **(dict(hidden_size=WIDTH) | settings))
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=True)
    block = TransformerBlock(config, wrap_block_spec(spec, mhc, config)).cuda()
    for name, parameter in block.named_parameters():
        if name.endswith("mapping_proj.weight"):
            torch.nn.init.normal_(parameter, std=0.02)  # mappings that depend on the token
    torch.manual_seed(0)
    x = torch.randn(SEQUENCE, BATCH, WIDTH, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    rope = None if kind == "mla" else RotaryEmbedding(config.kv_channels, 1.0)(SEQUENCE)
    torch.manual_seed(2)
    out = block(x, None, rotary_pos_emb=rope)
    # Not the mean square, which the last norm makes a constant: gradients would be rounding.
    loss = (out.float() * torch.randn_like(out, dtype=torch.float32)).sum() / SEQUENCE
    if elsewhere:
        with torch.cuda.stream(torch.cuda.Stream()):
            recompute.replay(recompute.handle(block))
    loss.backward()
    return [loss.detach(), x.grad, *(p.grad for p in block.parameters())]


def same(found, wanted):
    return all(a is b or torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_replay_keeps_every_bit(kind):
    wanted = run(MHCConfig(), KINDS[kind])
    if not same(run(MHCConfig(), KINDS[kind]), wanted):
        pytest.skip("not repeatable without recompute either")
    for way, options in WAYS.items():
        found = run(MHCConfig(**options), KINDS[kind], elsewhere=way == "replay on a second stream")
        assert same(found, wanted), way

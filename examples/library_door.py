"""Door 4: mHC in a training loop of your own. Runs on one process, with or without a GPU.

python examples/library_door.py
"""

import argparse
import os

import torch

if not torch.cuda.is_available():
    from megatron_mhc.testing import cpu

    cpu.install()  # before the first import of megatron; a GPU needs neither this nor patch_megatron

from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig

import megatron_mhc
from megatron_mhc.diagnostics import amax_gain, capture_h_res, composite

SEQUENCE, BATCH, VOCABULARY = 64, 8, 64


def build() -> GPTModel:
    """A small GPT whose layers are wrapped; everything else is as without mHC."""
    config = TransformerConfig(
        num_layers=4,
        hidden_size=64,
        num_attention_heads=4,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        normalization="RMSNorm",
    )
    mhc = megatron_mhc.MHCConfig(num_residual_streams=4)
    spec = megatron_mhc.wrap_block_spec(get_gpt_layer_local_spec(normalization="RMSNorm"), mhc, config)
    return GPTModel(config, spec, VOCABULARY, SEQUENCE, position_embedding_type="rope")


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    gpu = torch.cuda.is_available()
    if not gpu:
        cpu.patch_megatron()
    os.environ.setdefault("MASTER_ADDR", "localhost")
    os.environ.setdefault("MASTER_PORT", "29512")
    torch.distributed.init_process_group("nccl" if gpu else "gloo", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    device = torch.device("cuda" if gpu else "cpu")

    model = build().to(device)
    print(megatron_mhc.register().report())  # what wrap_block_spec replaced in Megatron
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    positions = torch.arange(SEQUENCE, device=device).expand(BATCH, -1)
    mask = torch.ones(1, 1, SEQUENCE, SEQUENCE, device=device).triu(1).bool()
    for step in range(1, 31):
        # Text to learn: counting upwards from a random start.
        start = torch.randint(VOCABULARY, (BATCH, 1), device=device)
        tokens = (start + torch.arange(SEQUENCE + 1, device=device)) % VOCABULARY
        loss = model(tokens[:, :-1], positions, mask, labels=tokens[:, 1:]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0:
            print(f"step {step:2}  loss {loss.item():.4f}")

    with torch.no_grad(), capture_h_res(model) as h_res:
        model(tokens[:, :-1], positions, mask)
    forward, backward = amax_gain(composite(h_res))
    print(f"composite gain of {len(h_res)} sub-layers, forward and backward:", end=" ")
    print(f"{forward.mean():.4f}, {backward.mean():.4f}")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()

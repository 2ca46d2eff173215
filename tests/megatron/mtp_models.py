"""A program: multi-token prediction of Megatron's branch dev between n streams, for `test_mtp_native`.

PYTHONPATH=<its checkout>:<this one> python tests/megatron/mtp_models.py <depths> <streams> <file to write>

Writes what `mtp_cases.run` returns, and the weights.
"""

import contextlib
import os
import sys

os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")

from megatron_mhc.testing import cpu  # noqa: E402

cpu.install()

import torch  # noqa: E402

for name in ("range", "range_push", "range_pop"):
    setattr(torch.cuda.nvtx, name, lambda *_, **__: contextlib.nullcontext())

from megatron.core import parallel_state  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import (  # noqa: E402
    get_gpt_layer_local_spec,
    get_gpt_mtp_block_spec,
)
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402
from mtp_cases import SETTINGS, VOCABULARY, S, run  # noqa: E402


def flatten_streams(linear):
    """Hand [s, b, n, C] to Megatron's local linear, whose backward takes three dimensions, as [s, b*n, C]."""
    forward = linear.forward

    def flat(x):
        out, bias = forward(x.flatten(1, 2))
        return out.unflatten(1, x.shape[1:3]), bias

    linear.forward = flat


def main():
    depths, streams, file = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    torch.distributed.init_process_group("gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    cpu.patch_megatron()
    model_parallel_cuda_manual_seed(1)
    own = dict(enable_hyper_connections=True, num_residual_streams=streams)
    config = TransformerConfig(mtp_num_layers=depths, **own, **SETTINGS)
    spec = get_gpt_layer_local_spec(enable_hyper_connection=True, normalization="RMSNorm")
    mtp = get_gpt_mtp_block_spec(config, spec, use_transformer_engine=False)
    model = GPTModel(config, spec, VOCABULARY, S, mtp_block_spec=mtp, position_embedding_type="rope")
    for layer in model.mtp.layers:
        flatten_streams(layer.h_proj)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.5 if "alpha" in name or "hc_head" in name else 0.2
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    torch.save({"weights": model.state_dict(), **run(model)}, file)


main()

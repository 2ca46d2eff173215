"""A program: models of Megatron's branch dev, by its own operations and by those of `native`.

PYTHONPATH=<its checkout>:<this one> python tests/megatron/native_models.py gpt|hybrid
"""

import contextlib
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"
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
    get_gpt_layer_local_submodules,
)
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed  # noqa: E402
from megatron.core.transformer.spec_utils import ModuleSpec  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402
from megatron.core.transformer.transformer_layer import (  # noqa: E402
    TransformerLayer,
    TransformerLayerSubmodules,
)

from megatron_mhc.native import accelerate  # noqa: E402

S, VOCABULARY = 9, 64


def settings(**more):
    return TransformerConfig(
        num_layers=3,
        hidden_size=32,
        num_attention_heads=4,
        enable_hyper_connections=True,
        num_residual_streams=4,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        persist_layer_norm=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        **more,
    )


def gpt(**more):
    spec = get_gpt_layer_local_spec(enable_hyper_connection=True, normalization="RMSNorm")
    return GPTModel(settings(**more), spec, VOCABULARY, S)


def hybrid(**more):
    """Of an attention layer, an MLP and an attention layer, each with a connection of its own."""
    from megatron.core.models.hybrid import hybrid_block
    from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
    from megatron.core.models.hybrid.hybrid_model import HybridModel
    from megatron.core.ssm.mlp_layer import MLPLayer

    def layer(module, *names):
        parts = {name: getattr(local, name) for name in names}
        return ModuleSpec(module=module, submodules=TransformerLayerSubmodules(**parts))

    local = get_gpt_layer_local_submodules(normalization="RMSNorm")
    hybrid_block.TENorm = local.input_layernorm  # the final one, which else needs TransformerEngine
    stack = HybridStackSubmodules(
        attention_layer=layer(TransformerLayer, "input_layernorm", "self_attention", "self_attn_bda"),
        mlp_layer=layer(MLPLayer, "pre_mlp_layernorm", "mlp", "mlp_bda"),
    )
    spec = ModuleSpec(module=HybridStack, submodules=stack)
    return HybridModel(settings(**more), spec, VOCABULARY, S, hybrid_layer_pattern="*-*")


def trained(build, accelerated, **more):
    """The loss of one step and its gradients."""
    torch.manual_seed(0)
    model = build(**more)
    with torch.no_grad():  # at their small start, mappings would have no gradient to speak of
        for name, parameter in model.named_parameters():
            if "alpha_" in name:
                parameter.fill_(0.5)
    if accelerated:
        accelerate(model, "triton")
    tokens = torch.randint(0, VOCABULARY, (2, S), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(1, 1, S, S, dtype=torch.bool).triu(1)
    loss = model(tokens, torch.arange(S).expand(2, S), mask, labels=tokens.roll(-1, 1)).mean()
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def main():
    torch.distributed.init_process_group("gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    cpu.patch_megatron()
    model_parallel_cuda_manual_seed(1)
    build = {"gpt": gpt, "hybrid": hybrid}[sys.argv[1]]
    of_theirs, theirs = trained(build, False)
    of_ours, ours = trained(build, True)
    assert abs(of_ours - of_theirs) <= 1e-6, (of_ours, of_theirs)
    scale = max(gradient.abs().max() for gradient in theirs.values())
    for name, gradient in theirs.items():
        assert (ours[name] - gradient).abs().max() <= 1e-5 * scale, name
    selective = dict(recompute_granularity="selective", recompute_modules=["mhc"], mhc_recompute_layer_num=2)
    whole = dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    for more in (selective, whole):
        loss, gradients = trained(build, True, **more)
        assert torch.equal(loss, of_ours), more
        assert all(torch.equal(gradients[name], ours[name]) for name in ours), more
    print("equal")


main()

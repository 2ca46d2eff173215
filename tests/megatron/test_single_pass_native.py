"""`--mhc-preset deepseek_v41` against NeMo Automodel's DeepSeek-V4.1, with weights converted both ways.

Skipped without its classes: `pip install --no-deps nemo-automodel==0.7.0`. Attention and experts are theirs
on both sides; the streams, the mappings, what is handed on and every gradient are compared in fp32.
"""

import copy
import os

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_mhc import MHCConfig, convert
from megatron_mhc.handed_on import first_weights
from megatron_mhc.hyper_connection import HyperConnectionModule
from megatron_mhc.ops import reference
from megatron_mhc.sublayer import SubLayer

BATCH, SEQ, WIDTH, LAYERS = 2, 12, 32, 3
CLOSE = dict(rtol=1e-4, atol=2e-5)  # fp32 against fp32, six sub-layers deep: the two sum in another order


@pytest.fixture(scope="module")
def automodel():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "TORCHDYNAMO_DISABLE", "1")
        yield pytest.importorskip("nemo_automodel.components.models.deepseek_v41.model")


def tiny(automodel, n, iterations):
    """A random DeepSeek-V4.1 of three layers: sliding windows, a source of keys, a layer that shares them."""
    from nemo_automodel.components.models.common.utils import BackendConfig

    config = automodel.DeepseekV41Config(
        dtype="float32",
        vision_config=dict(num_hidden_layers=0),
        text_config=dict(
            vocab_size=64,
            hidden_size=WIDTH,
            moe_intermediate_size=16,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            head_dim=16,
            qk_rope_head_dim=8,
            q_lora_rank=16,
            o_lora_rank=8,
            o_groups=2,
            n_routed_experts=4,
            num_experts_per_tok=2,
            sliding_window=8,
            compress_ratios=[0, 2, 2],
            kv_source_layer_ids=[1],
            index_source_layer_ids=[1],
            index_n_heads=2,
            index_head_dim=16,
            index_topk=4,
            candidate_source_layer_id=-1,
            engram_layer_ids=[],
            num_nextn_predict_layers=0,
            dspark_target_layer_ids=[],
            dtype="float32",
            hc_mult=n,
            hc_sinkhorn_iters=iterations,
            max_position_embeddings=64,
        ),
    )
    experts = automodel.MoEConfig(
        dim=WIDTH,
        inter_dim=16,
        moe_inter_dim=16,
        n_routed_experts=4,
        n_shared_experts=1,
        n_activated_experts=2,
        n_expert_groups=0,
        n_limited_groups=0,
        train_gate=True,
        gate_bias_update_factor=0.0,
        aux_loss_coeff=0.0,
        score_func="sqrtsoftplus",
        route_scale=1.5,
        norm_topk_prob=True,
        router_weights_fp32=True,
        force_e_score_correction_bias=True,
        swiglu_limit=10.0,
        dtype=torch.float32,
    )
    model = automodel.DeepseekV41Model(config, BackendConfig(rope="torch"), experts)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith((".base", ".scale")):
                parameter.normal_(1.0 if name.endswith("scale") else 0.0, 0.7)
            elif name.endswith(".fn"):
                parameter.normal_(0.0, 0.3)
            elif name.endswith("norm.weight"):
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, 0.2)
        for buffer in model.buffers():
            if buffer.is_floating_point() and not buffer.isfinite().all():
                buffer.zero_()
    return model


class PluginModel(torch.nn.Module):
    """The plugin's connections, by its names."""

    def __init__(self, mhc):
        super().__init__()
        config = TransformerConfig(
            num_layers=1, hidden_size=WIDTH, num_attention_heads=1, use_cpu_initialization=True
        )
        self.decoder = torch.nn.Module()
        self.decoder.layers = torch.nn.ModuleList()
        for i in range(LAYERS):
            layer = torch.nn.Module()
            layer.self_attention_hyper_connection = HyperConnectionModule(config, mhc, 2 * i)
            layer.mlp_hyper_connection = HyperConnectionModule(config, mhc, 2 * i + 1)
            self.decoder.layers.append(layer)

    def mappings(self):
        return {name: value.clone() for name, value in self.state_dict().items()}

    def gradients(self):
        """By the names of a checkpoint."""
        twin = copy.deepcopy(self)
        for own, other in zip(self.parameters(), twin.parameters(), strict=True):
            other.data.copy_(own.grad)
        return twin.mappings()


def around(connection, streams, h_pre, f):
    """One sub-layer f of [b, s, C]: the streams behind it, and what it hands on."""
    sublayer = SubLayer(connection, f, None, 0)
    visit = sublayer.pre(streams, h_pre)
    out = f(visit.layer_input.transpose(0, 1).contiguous()).transpose(0, 1)
    return connection.post_res(streams, out, visit.mappings), visit.handed_on


def plugin_forward(automodel, model, plugin, tokens):
    """DeepseekV41Model.forward with the plugin's residual connections."""
    n = model.config.hc_mult
    streams = reference.expand(model.embed_tokens(tokens).transpose(0, 1), n)
    h_pre, state = first_weights(streams, n), automodel.DeepseekV41AttentionState()
    positions, before = torch.arange(SEQ).expand(BATCH, SEQ), []
    for block, ours in zip(model.layers.values(), plugin.decoder.layers, strict=True):
        before.append(streams)

        def attention(x, block=block):
            nonlocal state
            found = block.attn(block.attn_norm(x), position_ids=positions, state=state, attention_mask=None)
            state = found.state
            return found.hidden_states

        def experts(x, block=block):
            return block.ffn(block.ffn_norm(x), None)

        streams, h_pre = around(ours.self_attention_hyper_connection, streams, h_pre, attention)
        streams, h_pre = around(ours.mlp_hyper_connection, streams, h_pre, experts)
    s, b, _ = streams.shape
    hidden = reference.pre(streams.view(s * b, n, -1), h_pre).view(s, b, -1)
    return before, model.norm(hidden.transpose(0, 1))


@pytest.mark.parametrize("n, iterations", [(4, 20), (2, 7)])
def test_streams_and_gradients_match_automodel(automodel, n, iterations):
    model = tiny(automodel, n, iterations)
    mhc = MHCConfig(
        preset="deepseek_v41",
        num_residual_streams=n,
        sinkhorn_iterations=iterations,
        norm_eps=model.config.rms_norm_eps,
    )
    plugin = PluginModel(mhc)
    published = {"model." + name: value for name, value in model.state_dict().items() if "_hc." in name}
    plugin.load_state_dict(convert.from_published(published, "transformers", mhc, plugin.mappings()))
    tokens = torch.randint(0, 64, (BATCH, SEQ), generator=torch.Generator().manual_seed(1))
    weights = torch.randn(BATCH, SEQ, WIDTH, generator=torch.Generator().manual_seed(2))

    expected, streams = model(tokens, output_hidden_states=True)
    (expected * weights).sum().backward()
    theirs = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    before, got = plugin_forward(automodel, model, plugin, tokens)
    (got * weights).sum().backward()

    for wanted, found in zip(streams, before, strict=True):
        torch.testing.assert_close(found.transpose(0, 1).unflatten(-1, (n, -1)), wanted, **CLOSE)
    torch.testing.assert_close(got, expected, **CLOSE)
    # Names and orientation are linear in the values: gradients convert like weights.
    gradients = convert.to_published(plugin.gradients(), "transformers", mhc)
    found = {name.removeprefix("model."): value for name, value in gradients.items()}
    found |= {name: p.grad for name, p in model.named_parameters() if "_hc." not in name}
    assert sum("_hc." in name for name in theirs) == 2 * 3 * LAYERS
    for name, wanted in theirs.items():
        scale = wanted.abs().max().item()
        tolerance = dict(rtol=CLOSE["rtol"], atol=CLOSE["rtol"] * scale + 1e-7)
        torch.testing.assert_close(found[name], wanted, **tolerance, msg=lambda m, n=name: f"{n}: {m}")
    back = convert.to_published(plugin.mappings(), "transformers", mhc)
    assert back.keys() == published.keys()
    assert all(torch.equal(back[key], published[key]) for key in back)

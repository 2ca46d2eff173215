"""Hugging Face's DeepSeek-V4 against this plugin's connections, with weights converted both ways.

Skipped where transformers is absent or has no DeepSeek-V4. Attention and experts are theirs on both
sides; the streams, the mappings, the head and every gradient are compared in fp32.
"""

import pytest
import torch
from published_models import CLOSE, PluginModel, around, run_theirs

from megatron_mhc import MHCConfig, convert
from megatron_mhc.ops import reference

pytest.importorskip("transformers")
v4 = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")

BATCH, SEQ = 2, 24


def tiny(n=4, iterations=20, eps=1e-6):
    """A random DeepSeek-V4 of four layers: its three kinds of attention, hash and top-k experts."""
    torch.manual_seed(0)
    config = v4.DeepseekV4Config(
        vocab_size=64,
        hidden_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=4,
        num_attention_heads=4,
        head_dim=16,
        q_lora_rank=16,
        num_experts_per_tok=2,
        n_routed_experts=4,
        max_position_embeddings=64,
        sliding_window=8,
        o_groups=2,
        o_lora_rank=8,
        index_n_heads=2,
        index_head_dim=16,
        index_topk=4,
        partial_rotary_factor=0.5,
        layer_types=[
            "sliding_attention",
            "heavily_compressed_attention",
            "compressed_sparse_attention",
            "sliding_attention",
        ],
        compress_rates={"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
        mlp_layer_types=["hash_moe", "moe", "moe", "moe"],
        hc_mult=n,
        hc_sinkhorn_iters=iterations,
        hc_eps=eps,
        attn_implementation="eager",
    )
    model = v4.DeepseekV4ForCausalLM(config).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "hc" in name and name.endswith(("base", "scale")):
                parameter.normal_(1.0 if name.endswith("scale") else 0.0, 0.7)
            elif name.endswith("fn"):
                parameter.normal_(0.0, 0.3)
    return model.train()


def plugin_forward(model, plugin, tokens, inside):
    """DeepseekV4Model.forward with the plugin's residual connections; `inside` are its layers' arguments."""
    n = model.config.hc_mult
    streams = reference.expand(model.model.embed_tokens(tokens).transpose(0, 1), n)
    after = []
    for layer, ours, kwargs in zip(model.model.layers, plugin.decoder.layers, inside, strict=True):
        ids = kwargs.pop("input_ids")

        def attention(x, layer=layer, kwargs=kwargs):
            return layer.self_attn(layer.input_layernorm(x), **kwargs)[0]

        def experts(x, layer=layer, ids=ids):
            return layer.mlp(layer.post_attention_layernorm(x), input_ids=ids)

        streams = around(ours.self_attention_hyper_connection, streams, attention)
        streams = around(ours.mlp_hyper_connection, streams, experts)
        after.append(streams)
    s, b, _ = streams.shape
    hidden = plugin.decoder.final_layernorm.head(streams.view(s * b, n, -1)).view(s, b, -1)
    return after, model.model.norm(hidden.transpose(0, 1))


@pytest.mark.parametrize(
    "preset, n, iterations",
    [("deepseek_v4", 4, 20), ("deepseek_v4", 2, 7), ("paper", 4, 20)],
)
def test_hidden_states_and_gradients_match_transformers(preset, n, iterations):
    """The paper's arithmetic has no eps: it is compared with theirs at hc_eps = 0."""
    model = tiny(n, iterations, eps=1e-6 if preset == "deepseek_v4" else 0.0)
    options = dict(num_residual_streams=n, sinkhorn_iterations=iterations, norm_eps=model.config.rms_norm_eps)
    mhc = MHCConfig(preset=preset, contract="learned_head", **options)
    plugin = PluginModel(model.config, mhc)
    converted = convert.from_published(model.state_dict(), "transformers", mhc, plugin.mappings())
    plugin.load_state_dict(converted)
    tokens = torch.randint(0, 64, (BATCH, SEQ), generator=torch.Generator().manual_seed(1))
    weights = torch.randn(BATCH, SEQ, 32, generator=torch.Generator().manual_seed(2))

    streams, hidden, arguments = run_theirs(model.model, tokens)
    (hidden * weights).sum().backward()
    theirs = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    ours, got = plugin_forward(model, plugin, tokens, arguments)
    (got * weights).sum().backward()

    assert len(streams) == 4
    for expected, found in zip(streams, ours, strict=True):
        torch.testing.assert_close(found.transpose(0, 1).unflatten(-1, (n, -1)), expected, **CLOSE)
    torch.testing.assert_close(got, hidden, **CLOSE)

    # Names and orientation are linear in the values: gradients convert like weights.
    gradients = convert.to_published(plugin.gradients(), "transformers", mhc)
    for name, parameter in model.named_parameters():
        if "hc" not in name.split(".")[-1] and ".attn_hc." not in name and ".ffn_hc." not in name:
            gradients[name] = parameter.grad
    assert {name for name, value in gradients.items() if value is not None} == set(theirs)
    assert sum("_hc." in name or "hc_head" in name for name in theirs) == 4 * 2 * 3 + 3
    for name, expected in theirs.items():
        scale = expected.abs().max().item()
        assert scale > 0 or "mlp" in name, name  # an expert that no token chose
        tolerance = dict(rtol=CLOSE["rtol"], atol=CLOSE["rtol"] * scale + 1e-7)
        torch.testing.assert_close(gradients[name], expected, **tolerance, msg=lambda m, n=name: f"{n}: {m}")


def test_conversion_to_transformers_and_back_is_exact():
    model = tiny()
    mhc = MHCConfig(preset="deepseek_v4")
    plugin = PluginModel(model.config, mhc)
    published = {k: v for k, v in model.state_dict().items() if "_hc." in k or "hc_head" in k}
    into = convert.from_published(published, "transformers", mhc, plugin.mappings())
    back = convert.to_published(into, "transformers", mhc)
    assert back.keys() == published.keys()
    assert all(torch.equal(back[key], published[key]) for key in back)

"""Hugging Face's GLM-5.3-Flash and HY-V4 against this plugin's presets, with weights converted both ways.

Skipped where transformers is absent or has no such model. Attention and experts are theirs on both sides; the
streams, the mappings, the output and every gradient are compared in fp32.
"""

import pytest
import torch
from published_models import CLOSE, PluginModel, around, run_theirs

from megatron_mhc import MHCConfig, convert
from megatron_mhc.ops import reference

pytest.importorskip("transformers")
BATCH, SEQ, WIDTH = 2, 24, 32
SIZES = dict(
    vocab_size=64,
    hidden_size=WIDTH,
    intermediate_size=48,
    moe_intermediate_size=16,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=4,
    n_routed_experts=4,
    num_experts_per_tok=2,
    max_position_embeddings=64,
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    v_head_dim=8,
    index_topk=4,
    index_n_heads=2,
    index_head_dim=8,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    rms_norm_eps=1e-5,
    mlp_layer_types=["dense", "sparse", "sparse", "sparse"],
    attn_implementation="eager",
)


def glm(n, **own):
    """The text model of a random GLM-5.3-Flash: linear and indexed attention, a dense MLP and experts."""
    theirs = pytest.importorskip("transformers.models.glm5_next.modeling_glm5_next")
    sizes = dict(SIZES, linear_head_dim=8, linear_num_heads=4, index_kpool=2, qk_rope_head_dim=0)
    return theirs.Glm5NextTextModel(theirs.Glm5NextTextConfig(**sizes, hc_mult=n, **own))


def hy(n, **own):
    """The decoder of a random HY-V4."""
    theirs = pytest.importorskip("transformers.models.hy_v4.modeling_hy_v4")
    sizes = dict(SIZES, qk_rope_head_dim=8, head_dim=16)
    return theirs.HYV4Model(theirs.HYV4Config(**sizes, hc_mult=n, **own))


def glm_attention(layer, x, kwargs):
    if layer.block_type == "linear_attention":
        taken = {key: value for key, value in kwargs.items() if key in ("attention_mask",)}
        return layer.self_attn(hidden_states=x, cache_params=None, **taken)
    return layer.self_attn(hidden_states=x, **kwargs)[0]


def hy_attention(layer, x, kwargs):
    return layer.self_attn(hidden_states=x, **kwargs)[0]


MODELS = {"glm_5_3": (glm, glm_attention), "hy_v4": (hy, hy_attention)}
HEAD = {"glm_5_3": 0, "hy_v4": 3}  # parameters
CASES = [
    ("glm_5_3", 4, dict(hc_sinkhorn_iters=20), {}),
    ("glm_5_3", 2, dict(hc_sinkhorn_iters=7), dict(sinkhorn_iterations=7)),
    ("hy_v4", 4, {}, {}),
    ("hy_v4", 3, dict(hc_magnitude=1.5), dict(post_magnitude=1.5)),
]


def drawn(preset, n, own):
    """A model whose mappings differ from token to token, in training mode."""
    torch.manual_seed(0)
    model = MODELS[preset][0](n, **own).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "hc" in name and name.endswith(("base", "scale")):
                parameter.normal_(1.0 if name.endswith("scale") else 0.0, 0.7)
            elif name.endswith("fn"):
                parameter.normal_(0.0, 0.3)
    return model.train()


def options(preset, n, more):
    return MHCConfig(preset=preset, num_residual_streams=n, norm_eps=SIZES["rms_norm_eps"], **more)


def whole(preset, name):
    """A parameter's name in the model with a head, as `convert` writes it."""
    return ("model.language_model." if preset == "glm_5_3" else "model.") + name


def plugin_forward(preset, model, plugin, tokens, arguments):
    """Their decoder's forward pass with the plugin's residual connections."""
    n, attend = model.config.hc_mult, MODELS[preset][1]
    streams = reference.expand(model.embed_tokens(tokens).transpose(0, 1), n)
    after = []
    for layer, ours, kwargs in zip(model.layers, plugin.decoder.layers, arguments, strict=True):

        def attention(x, layer=layer, kwargs=kwargs):
            return attend(layer, layer.input_layernorm(x), kwargs)

        def mlp(x, layer=layer):
            return layer.mlp(layer.post_attention_layernorm(x))

        streams = around(ours.self_attention_hyper_connection, streams, attention)
        streams = around(ours.mlp_hyper_connection, streams, mlp)
        after.append(streams)
    s, b, _ = streams.shape
    x = streams.view(s * b, n, -1)
    end = plugin.decoder.final_layernorm
    hidden = end.head(x) if hasattr(end, "head") else reference.contract(x, "mean")
    return after, model.norm(hidden.view(s, b, -1).transpose(0, 1))


@pytest.mark.parametrize("preset, n, own, more", CASES)
def test_hidden_states_and_every_gradient_match_transformers(preset, n, own, more):
    model, mhc = drawn(preset, n, own), options(preset, n, more)
    plugin = PluginModel(model.config, mhc)
    plugin.load_state_dict(convert.from_published(model.state_dict(), "transformers", mhc, plugin.mappings()))
    tokens = torch.randint(3, 64, (BATCH, SEQ), generator=torch.Generator().manual_seed(1))
    weights = torch.randn(BATCH, SEQ, WIDTH, generator=torch.Generator().manual_seed(2))

    streams, hidden, arguments = run_theirs(model, tokens)
    (hidden * weights).sum().backward()
    theirs = {whole(preset, k): p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    ours, got = plugin_forward(preset, model, plugin, tokens, arguments)
    (got * weights).sum().backward()

    assert len(streams) == 4
    for (expected, *_), found in zip(streams, ours, strict=True):
        torch.testing.assert_close(found.transpose(0, 1).unflatten(-1, (n, -1)), expected, **CLOSE)
    torch.testing.assert_close(got, hidden, **CLOSE)

    # Names and orientation are linear in the values: gradients convert like weights.
    gradients = convert.to_published(plugin.gradients(), "transformers", mhc)
    mappings = set(gradients)
    for name, parameter in model.named_parameters():
        if (name := whole(preset, name)) not in mappings:
            gradients[name] = parameter.grad
    assert {name for name, value in gradients.items() if value is not None} == set(theirs)
    assert len(mappings) == 4 * 2 * 3 + HEAD[preset]
    for name, expected in theirs.items():
        scale = expected.abs().max().item()
        assert scale > 0 or "hc" not in name, name
        tolerance = dict(rtol=CLOSE["rtol"], atol=CLOSE["rtol"] * scale + 1e-7)
        torch.testing.assert_close(gradients[name], expected, **tolerance, msg=lambda m, n=name: f"{n}: {m}")


def one_connection(preset, n, own, more):
    """Their connection and ours with the same weights, streams [s, b, n*C], and an output of F."""
    model, mhc = drawn(preset, n, own), options(preset, n, more)
    plugin = PluginModel(model.config, mhc)
    plugin.load_state_dict(convert.from_published(model.state_dict(), "transformers", mhc, plugin.mappings()))
    generator = torch.Generator().manual_seed(3)
    streams = torch.randn(SEQ, BATCH, n * WIDTH, generator=generator)
    f = torch.randn(SEQ, BATCH, WIDTH, generator=generator)
    ours = plugin.decoder.layers[1].mlp_hyper_connection
    return model.layers[1].ffn_hc, ours, streams, f


@pytest.mark.parametrize("preset, n, own, more", CASES[:1] + CASES[2:])
def test_signs_and_orientation_are_those_of_transformers(preset, n, own, more):
    """One connection; what a mistake in sign, order or orientation would give is far from it."""
    theirs, ours, streams, f = one_connection(preset, n, own, more)
    layer_input, mappings = ours(streams)
    got = ours.post_res(streams, f, mappings)
    x = streams.transpose(0, 1).unflatten(-1, (n, WIDTH))
    post, *comb, read = theirs(x)
    residual = comb[0].transpose(-1, -2) @ x if comb else x
    want = (residual + post.unsqueeze(-1) * f.transpose(0, 1).unsqueeze(-2)).flatten(2).transpose(0, 1)
    torch.testing.assert_close(layer_input.transpose(0, 1), read, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)

    def missed(**wrong):
        changed = mappings._replace(**wrong)
        return (ours.post_res(streams, f, changed) - want).abs().max().item()

    h_pre, h_post, h_res = mappings
    assert missed(h_post=-h_post) > 1
    assert missed(h_post=h_post.flip(-1)) > 1e-1
    assert missed(h_post=h_pre) > 1e-1
    turned = missed(h_res=h_res.transpose(-1, -2))
    assert turned > 1e-1 if preset == "glm_5_3" else turned < 1e-4
    assert missed(h_res=h_res.flip(-1)) > 1e-1
    wrong = reference.pre(streams.reshape(-1, n, WIDTH), h_pre.flip(-1)).view_as(layer_input)
    assert (wrong - layer_input).abs().max() > 1e-1


def test_eps_of_hy_v4_stands_behind_both_sigmoids_and_magnitude_in_front_of_the_second():
    theirs, ours, streams, _ = one_connection("hy_v4", 4, dict(hc_magnitude=1.5), dict(post_magnitude=1.5))
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            parameter.fill_(-200.0 if name == "affine" else 0.0)  # sigmoids of zero: what is left is eps
        theirs.fn.zero_(), theirs.base.fill_(-200.0)
        _, mappings = ours(streams)
        post, _ = theirs(streams.transpose(0, 1).unflatten(-1, (4, WIDTH)))
    assert torch.equal(mappings.h_pre, torch.full_like(mappings.h_pre, 1e-6))
    assert torch.equal(mappings.h_post, torch.full_like(mappings.h_post, 1e-6)) and (post == 1e-6).all()
    with torch.no_grad():
        ours.affine.fill_(200.0), theirs.base.fill_(200.0)
        _, mappings = ours(streams)
        post, _ = theirs(streams.transpose(0, 1).unflatten(-1, (4, WIDTH)))
    assert torch.equal(mappings.h_post.flatten(), post.transpose(0, 1).flatten())
    assert (mappings.h_post - 1.5).abs().max() < 1e-5


@pytest.mark.parametrize("n", [1, 2, 4])
def test_hy_v4_starts_as_transformers_starts_it(n):
    torch.manual_seed(0)
    model, mhc = hy(n), MHCConfig(preset="hy_v4", num_residual_streams=n)
    start = convert.to_published(PluginModel(model.config, mhc).mappings(), "transformers", mhc)
    assert len(start) == 4 * 2 * 3 + 3
    for name, value in start.items():
        theirs = model.state_dict()[name.removeprefix("model.")]
        if name.endswith("fn"):  # drawn: normal, of a standard deviation that each model sets by itself
            assert value.shape == theirs.shape and value.std() == pytest.approx(0.02, rel=0.5)
        else:
            assert torch.equal(value, theirs), name
    read = start["model.layers.0.attn_hc.base"][:n].sigmoid()
    assert read.tolist() == pytest.approx([1 / n if n > 1 else 0.5] * n)


@pytest.mark.parametrize("preset, n, own, more", CASES)
def test_conversion_to_transformers_and_back_is_exact(preset, n, own, more):
    model, mhc = drawn(preset, n, own), options(preset, n, more)
    published = {whole(preset, k): v for k, v in model.state_dict().items() if "_hc." in k or "hc_head" in k}
    into = convert.from_published(published, "transformers", mhc, PluginModel(model.config, mhc).mappings())
    back = convert.to_published(into, "transformers", mhc)
    assert back.keys() == published.keys()
    assert all(torch.equal(back[key], published[key]) for key in back)

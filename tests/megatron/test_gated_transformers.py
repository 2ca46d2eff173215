"""Hugging Face's Qwen4-Exp against this plugin's gated residual, with weights converted both ways.

Skipped where transformers is absent or has no Qwen4-Exp. Attention and experts are theirs on both sides; the
streams, the gates, the exit mixer and every gradient are compared in fp32.
"""

import copy

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_mhc import MHCConfig, convert
from megatron_mhc.gated import ExitMixer, GatedConnection
from megatron_mhc.ops import reference

pytest.importorskip("transformers")
qwen = pytest.importorskip("transformers.models.qwen4_exp.modeling_qwen4_exp")

BATCH, SEQ, WIDTH, RANK = 2, 24, 32, 8
# fp32 against fp32, four layers deep: the two sum in another order.
CLOSE = dict(rtol=1e-4, atol=2e-5)


def tiny(n=4):
    """A random Qwen4-Exp of four layers, linear attention and full attention in turn, all with experts."""
    torch.manual_seed(0)
    config = qwen.Qwen4ExpTextConfig(
        vocab_size=64,
        hidden_size=WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=64,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        num_experts_per_tok=2,
        num_experts=4,
        hc_count=n,
        hc_lowrank=RANK,
        indexer_n_heads=2,
        indexer_kv_heads=1,
        indexer_head_dim=16,
        indexer_budget=32,  # of all tokens, so that none is chosen by the last bit of a score
        indexer_compress_ratio=4,
        layer_types=["linear_attention", "indexed_attention"] * 2,
        pad_token_id=0,
        eos_token_id=1,
        attn_implementation="eager",
    )
    model = qwen.Qwen4ExpForCausalLM(config).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "hyper_connection" in name:
                parameter.normal_(0.0, 0.5 if "norm" in name or "_up" in name else 0.3)
    return model.train()


def options(model, **more):
    sizes = dict(num_residual_streams=model.config.hc_count, gated_rank=model.config.hc_lowrank)
    return MHCConfig(preset="qwen4_exp", norm_eps=model.config.rms_norm_eps, **sizes, **more)


def megatron_config(**more):
    sizes = dict(num_layers=1, hidden_size=WIDTH, num_attention_heads=1)
    return TransformerConfig(**sizes, use_cpu_initialization=True, **more)


class PluginModel(torch.nn.Module):
    """The plugin's connections and exit mixer, numbered by the plugin's names."""

    def __init__(self, layers, mhc):
        super().__init__()
        config = megatron_config()
        self.decoder = torch.nn.Module()
        self.decoder.layers = torch.nn.ModuleList()
        for i in range(layers):
            layer = torch.nn.Module()
            layer.self_attention_hyper_connection = GatedConnection(config, mhc, 2 * i)
            layer.mlp_hyper_connection = GatedConnection(config, mhc, 2 * i + 1)
            self.decoder.layers.append(layer)
        self.decoder.final_layernorm = torch.nn.Module()
        self.decoder.final_layernorm.contraction = ExitMixer(config, mhc)

    def entries(self):
        return {name: value.clone() for name, value in self.state_dict().items()}

    def gradients(self):
        """By the names of a checkpoint."""
        twin = copy.deepcopy(self)
        for own, other in zip(self.parameters(), twin.parameters(), strict=True):
            other.data.copy_(own.grad)
        return twin.entries()


def around(connection, streams, sublayer):
    """One sub-layer F of [b, s, C] between the plugin's streams [s, b, n*C]."""
    hidden, mappings = connection(streams)
    f = sublayer(hidden.transpose(0, 1).contiguous())
    return connection.post_res(streams, f.transpose(0, 1), mappings)


def plugin_forward(model, plugin, tokens, inside):
    """Qwen4ExpTextModel.forward with the plugin's residuals; `inside` are its layers' arguments."""
    streams = reference.expand(model.model.embed_tokens(tokens).transpose(0, 1), model.config.hc_count)
    after = []
    for layer, ours, given in zip(model.model.layers, plugin.decoder.layers, inside, strict=True):

        def attention(x, layer=layer, given=given):
            if layer.layer_type == "linear_attention":
                return layer.linear_attn(x, attention_mask=given["conv_mask"])
            positions, mask = given["position_embeddings"], given["attention_mask"]
            return layer.self_attn(x, positions, attention_mask=mask, past_key_values=None)[0]

        streams = around(ours.self_attention_hyper_connection, streams, attention)
        streams = around(ours.mlp_hyper_connection, streams, layer.mlp)
        after.append(streams)
    return after, plugin.decoder.final_layernorm.contraction(streams).transpose(0, 1)


def run_theirs(model, tokens):
    """Their streams behind each layer, last hidden state, and the arguments that each layer got."""
    streams, arguments, hooks = [], [], []
    for layer in model.model.layers:
        hooks.append(
            layer.register_forward_pre_hook(
                lambda module, args, kwargs: arguments.append(dict(kwargs)), with_kwargs=True
            )
        )
        hooks.append(layer.register_forward_hook(lambda module, args, out: streams.append(out)))
    hidden = model.model(tokens, use_cache=False).last_hidden_state
    for hook in hooks:
        hook.remove()
    return streams, hidden, arguments


def tokens_and_weights():
    tokens = torch.randint(0, 64, (BATCH, SEQ), generator=torch.Generator().manual_seed(1))
    return tokens, torch.randn(BATCH, SEQ, WIDTH, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("n", [2, 4])
def test_hidden_states_and_gradients_match_transformers(n):
    model = tiny(n)
    mhc = options(model)
    plugin = PluginModel(4, mhc)
    plugin.load_state_dict(convert.from_published(model.state_dict(), "transformers", mhc, plugin.entries()))
    tokens, weights = tokens_and_weights()

    streams, hidden, arguments = run_theirs(model, tokens)
    (hidden * weights).sum().backward()
    theirs = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    ours, got = plugin_forward(model, plugin, tokens, arguments)
    (got * weights).sum().backward()

    assert len(streams) == 4
    for expected, found in zip(streams, ours, strict=True):
        torch.testing.assert_close(found.transpose(0, 1), expected, **CLOSE)
    torch.testing.assert_close(got, hidden, **CLOSE)

    # Names are linear in the values: gradients convert like weights.
    gradients = convert.to_published(plugin.gradients(), "transformers", mhc)
    assert len(gradients) == 4 * 2 * 4 + 3
    assert gradients.keys() == {name for name in theirs if "hyper_connection" in name}
    for name, parameter in model.named_parameters():
        if "hyper_connection" not in name:
            gradients[name] = parameter.grad
    assert {name for name, value in gradients.items() if value is not None} == set(theirs)
    for name, expected in theirs.items():
        scale = expected.abs().max().item()
        assert scale > 0, name
        tolerance = dict(rtol=CLOSE["rtol"], atol=CLOSE["rtol"] * scale + 1e-7)
        torch.testing.assert_close(gradients[name], expected, **tolerance, msg=lambda m, n=name: f"{n}: {m}")


def test_conversion_to_transformers_and_back_is_exact():
    model = tiny()
    mhc = options(model)
    plugin = PluginModel(4, mhc)
    published = {name: value for name, value in model.state_dict().items() if "hyper_connection" in name}
    into = convert.from_published(published, "transformers", mhc, plugin.entries())
    back = convert.to_published(into, "transformers", mhc)
    assert back.keys() == published.keys()
    assert all(torch.equal(back[key], published[key]) for key in back)
    of_a_larger_model = {"model.language_model." + key.removeprefix("model."): v for key, v in back.items()}
    again = convert.from_published(of_a_larger_model, "transformers", mhc, plugin.entries())
    assert all(torch.equal(again[key], into[key]) for key in into)


def theirs_and_ours(n=4):
    """One gated residual of theirs, and ours with its weights."""
    model = tiny(n)
    mhc = options(model)
    theirs = model.model.layers[1].mlp_hyper_connection
    plugin = PluginModel(4, mhc)
    plugin.load_state_dict(convert.from_published(model.state_dict(), "transformers", mhc, plugin.entries()))
    return theirs, plugin.decoder.layers[1].mlp_hyper_connection


# A layout that the shapes allow and the model has not: channels outside, streams inside; or streams turned.
TURNED = {
    "stream_norm": lambda w: w.view(4, WIDTH).t().reshape(-1),
    "read_down": lambda w: w.unflatten(1, (4, WIDTH)).transpose(1, 2).flatten(1),
    "read_up": lambda w: w.unflatten(0, (4, WIDTH)).transpose(0, 1).flatten(0, 1),
    "inject": lambda w: w.flip(0),
}


@pytest.mark.parametrize("name", TURNED)
@torch.no_grad()
def test_a_parameter_the_other_way_round_is_noticed(name):
    theirs, ours = theirs_and_ours()
    streams = torch.randn(SEQ, BATCH, 4 * WIDTH)
    f = torch.randn(SEQ, BATCH, WIDTH)

    def both():
        layer_input, mappings = ours(streams)
        return layer_input, ours.post_res(streams, f, mappings)

    layer_input, _, inject = theirs(streams)
    after = streams + (f.unsqueeze(-2) * inject.unsqueeze(-1)).flatten(-2)
    for found, expected in zip(both(), (layer_input, after), strict=True):
        torch.testing.assert_close(found, expected, **CLOSE)
    weight = getattr(ours, name).weight
    weight.copy_(TURNED[name](weight))
    worst = max((found - e).abs().max().item() for found, e in zip(both(), (layer_input, after), strict=True))
    assert worst > 0.1


@torch.no_grad()
def test_signs_are_theirs():
    """A larger logit reads more, and writes more; streams stay as they are where nothing is written."""
    theirs, ours = theirs_and_ours()
    streams = torch.randn(SEQ, BATCH, 4 * WIDTH)
    f = torch.ones(SEQ, BATCH, WIDTH)
    _, mappings = ours(streams)
    torch.testing.assert_close(mappings.h_post.view(SEQ, BATCH, 4), theirs(streams)[2], **CLOSE)
    added = (ours.post_res(streams, f, mappings) - streams).view(SEQ * BATCH, 4, WIDTH)
    torch.testing.assert_close(added, mappings.h_post[..., None].expand_as(added), **CLOSE)
    assert 0 < added.min() and added.max() < 2
    logits = ours.logits(streams.view(SEQ * BATCH, 4, WIDTH))["post"]
    assert torch.equal(logits.argsort(), mappings.h_post.argsort())
    assert torch.equal(ours.post_res(streams, 0 * f, mappings), streams)


@torch.no_grad()
def test_initial_values_are_theirs():
    torch.manual_seed(0)
    sizes = dict(hidden_size=256, hc_count=4, hc_lowrank=64)
    config = qwen.Qwen4ExpTextConfig(**sizes, num_hidden_layers=1, layer_types=["linear_attention"])
    theirs = qwen.Qwen4ExpTextGatedResidual(config)
    for module in theirs.modules():
        qwen.Qwen4ExpPreTrainedModel._init_weights(_Initial(config), module)
    mhc = MHCConfig(preset="qwen4_exp", gated_rank=64)
    own = TransformerConfig(
        num_layers=1,
        hidden_size=256,
        num_attention_heads=1,
        use_cpu_initialization=True,
        init_method_std=0.02,
    )
    ours = GatedConnection(own, mhc, 0)
    names = dict(zip(convert.gated.PARTS, convert.gated.PARTS.values(), strict=True))
    for name, parameter in ours.named_parameters():
        other = theirs.get_parameter(names[name])
        assert parameter.shape == other.shape
        assert parameter.mean().item() == pytest.approx(other.mean().item(), abs=2e-3)
        assert parameter.std().item() == pytest.approx(other.std().item(), rel=0.05), name
    assert not ours.stream_norm.weight.any()


class _Initial(qwen.Qwen4ExpPreTrainedModel):
    def __init__(self, config):
        torch.nn.Module.__init__(self)
        self.config = config

"""A GPT's layers taken apart into a HybridModel's, and put together; on state dicts."""

import argparse

import pytest
import torch

from megatron_mhc import MHCConfig, convert
from megatron_mhc.convert import pairs

PAIR = {
    "self_attention.linear_qkv.weight": torch.ones(3, 2),
    "self_attention.linear_proj.weight": torch.ones(2, 2),
    "mlp.linear_fc1.weight": torch.ones(4, 2),
    "mlp.linear_fc2.weight": torch.ones(2, 4),
}
LATENT = {"self_attention.linear_kv_up_proj.weight": torch.ones(2, 2)}
LAYERS = {
    "*": dict(list(PAIR.items())[:2]),
    "-": dict(list(PAIR.items())[2:]),
    "E": {
        "mlp.router.weight": torch.ones(2, 2),
        "mlp.experts.experts.linear_fc1.weight": torch.ones(2, 4, 2),
    },
    "+": LATENT,
    "M": {"mixer.in_proj.weight": torch.ones(4, 2), "mixer.out_proj.weight": torch.ones(2, 4)},
    "G": {"self_attention.in_proj.weight": torch.ones(4, 2), "self_attention.A_log": torch.ones(2)},
    "D": LATENT | {"self_attention.core_attention.indexer.linear_wk.weight": torch.ones(2, 2)},
}
NORM = {"decoder.final_layernorm.weight": torch.ones(2)}


def named(number, entries):
    return {f"decoder.layers.{number}.{name}": value for name, value in entries.items()}


def hybrid_state(pattern):
    state = {"decoder.final_norm.weight": torch.ones(2)}
    for i, kind in enumerate(pattern):
        state |= named(i, LAYERS[kind])
    return state


@pytest.mark.parametrize("pattern", ["*-*-", "*E*E", "*-*E", "+-+E", "M*-", "*GD"])
def test_a_pattern_is_read_off_the_weights(pattern):
    assert pairs.pattern_of(hybrid_state(pattern), "hybrid") == pattern


@pytest.mark.parametrize(
    "pattern, words",
    [
        ("M*-", r"pattern M\*-: layer 1 is M, a Mamba layer: a GPT has only pairs of attention and MLP"),
        ("*-G-", r"layer 3 is G, a gated delta net: .* stays a HybridModel"),
        ("*-D-", "layer 3 is D, DeepSeek's sparse attention"),
        ("-*-*", r"pattern -\*-\*: layer 1 is -, out of this order"),
        ("**--", r"layer 2 is \*, out of this order"),
        ("*-+-", r"layer 3 is \+, attention of the other kind"),
        ("*-*", r"pattern \*-\*: it ends between attention and its MLP"),
    ],
)
def test_a_pattern_that_is_no_gpts_is_refused_by_its_layer(pattern, words):
    with pytest.raises(ValueError, match=words):
        convert.to_gpt(hybrid_state(pattern))


def test_what_a_hybrid_layer_has_no_place_for_is_refused():
    entries = {"cross_attention.linear_q.weight": torch.ones(2)}
    with pytest.raises(ValueError, match="0.cross_attention.* is no part of attention or MLP"):
        convert.to_hybrid(named(0, PAIR | entries) | NORM)


@pytest.mark.parametrize("kind, what", [("-", "attention"), ("*", "MLP")])
@pytest.mark.parametrize("convert", [pairs.to_hybrid, lambda state: pairs.pattern_of(state, "gpt")])
def test_a_gpts_layer_that_lacks_one_of_the_pair_is_refused(convert, kind, what):
    """Of --heterogeneous-layers-config-path: a hybrid layer without weights would start anew."""
    state = NORM | named(0, PAIR) | named(1, LAYERS[kind]) | named(2, PAIR)
    with pytest.raises(ValueError, match=f"decoder.layers.1 has no weights of its {what}"):
        convert(state)


def test_norms_of_queries_and_keys_go_with_attention():
    """Under --qk-layernorm a HybridModel has them by the same names."""
    entries = {"self_attention.q_layernorm.weight": torch.ones(2)}
    assert "decoder.layers.0.self_attention.q_layernorm.weight" in convert.to_hybrid(named(0, PAIR | entries))


def test_more_than_layers_of_attention_and_mlp_is_refused_both_ways():
    depth = {"mtp.layers.0.eh_proj.weight": torch.ones(2, 4)}
    states = ((convert.to_hybrid, named(0, PAIR) | NORM), (convert.to_gpt, hybrid_state("*-")))
    for change, state in states:
        with pytest.raises(ValueError, match="mtp.layers.0.eh_proj.weight: .* run without them"):
            change(state | depth)
    with pytest.raises(ValueError, match="layers.0.self_attention is a gated delta net"):
        convert.to_hybrid(named(0, LAYERS["G"] | LAYERS["-"]))
    lacking = {key: value for key, value in hybrid_state("*-*-").items() if ".1." not in key}
    with pytest.raises(ValueError, match="decoder.layers.1 is absent"):
        convert.to_gpt(lacking)


@pytest.mark.parametrize("stack", [False, True])
def test_layers_go_to_pairs_and_back(stack):
    gpt = named(0, PAIR) | named(1, {name: value + 1 for name, value in PAIR.items()})
    if stack:
        gpt = {f"decoder.layers.{name}": torch.stack([value, value + 1]) for name, value in PAIR.items()}
    gpt |= {"decoder.final_layernorm.norm.weight": torch.ones(2), "embedding.x": torch.zeros(1)}
    hybrid = convert.to_hybrid(gpt)
    assert torch.equal(hybrid["decoder.layers.3.mlp.linear_fc2.weight"], PAIR["mlp.linear_fc2.weight"] + 1)
    assert "decoder.final_norm.norm.weight" in hybrid
    back = convert.to_gpt(hybrid, stack)
    assert back.keys() == gpt.keys()
    assert all(torch.equal(back[key], gpt[key]) for key in gpt)


def test_layers_with_and_without_experts_are_not_stacked():
    assert "decoder.layers.1.mlp.router.weight" in convert.to_gpt(hybrid_state("*-*E"), stack=True)


def test_arguments_become_those_of_a_run_of_the_other_model():
    spec = ["megatron_mhc.specs", "gpt_mhc_spec"]
    args = argparse.Namespace(num_layers=2, hybrid_layer_pattern=None, moe_layer_freq=[0, 1], spec=spec)
    there = pairs.to_model(args, "hybrid", "*-|*E")
    assert vars(there) == dict(
        num_layers=4, hybrid_layer_pattern="*-|*E", moe_layer_freq=1, spec=[spec[0], "hybrid_mhc_spec"]
    )
    assert pairs.to_model(there, "gpt", "*-|*E") == args
    assert pairs.settings("gpt", "*-*E").startswith("--num-layers 2 --moe-layer-freq '([0, 1])' in the place")


@pytest.mark.parametrize("std", [0.02, 0.3])
def test_new_mappings_of_a_plain_model_have_its_own_init_method_std(std):
    wide = {"self_attention.linear_proj.weight": torch.zeros(64, 64)}
    state = named(0, wide) | {"decoder.final_layernorm.weight": torch.ones(64)}
    out = convert.from_plain(state, MHCConfig(preset="hy_v4"), init_method_std=std)
    for key in (
        "decoder.layers.0.mlp_hyper_connection.mapping_proj.weight",
        "decoder.final_layernorm.head.mapping_proj.weight",
    ):
        assert out[key].std().item() == pytest.approx(std, rel=0.1)

"""Conversion of mapping parameters; oracles are formulas written out here and exact round trips."""

import pytest
import torch
from torch.nn import functional as F

from megatron_mhc import MHCConfig, convert
from megatron_mhc.checkpoint_keys import ARITHMETIC, encode_arithmetic
from megatron_mhc.convert.published import check_left_over, is_mapping
from megatron_mhc.ops import reference

LAYERS, WIDTH = 3, 8
V4 = MHCConfig(preset="deepseek_v4")
PAPER_HEAD = MHCConfig(contract="learned_head")


GLM, HY = MHCConfig(preset="glm_5_3"), MHCConfig(preset="hy_v4")


def plugin_state(mhc, stacked, seed=0):
    """A plugin's state dict of random fp64 mappings, its norm and one foreign weight."""
    generator = torch.Generator().manual_seed(seed)
    n, c = mhc.num_residual_streams, WIDTH
    rows = sum(mhc.parts.values())
    shapes = {"mapping_proj.weight": (rows, n * c), "bias": (rows,)}
    shapes |= {f"alpha_{part}": (1,) for part in mhc.parts}

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    state = {}
    for sublayer in ("self_attention", "mlp"):
        for part, shape in shapes.items():
            name = f"{sublayer}_hyper_connection.{part}"
            values = random(LAYERS, *shape)
            if stacked:
                state[f"decoder.layers.{name}"] = values
            else:
                state.update({f"decoder.layers.{i}.{name}": values[i] for i in range(LAYERS)})
    state["decoder.final_layernorm.norm.weight"] = random(c)
    state["decoder.layers.0.mlp.linear_fc1.weight"] = random(4, c)
    if mhc.contract == "learned_head":
        state["decoder.final_layernorm.head.mapping_proj.weight"] = random(n, n * c)
        state["decoder.final_layernorm.head.bias"] = random(n)
        state["decoder.final_layernorm.head.alpha"] = random(1)
    state[ARITHMETIC] = encode_arithmetic(mhc)
    return state


def assert_equal(a, b):
    assert a.keys() == b.keys()
    assert [key for key in a if not torch.equal(a[key], b[key])] == []


def deepseek(x, fn, base, scale, iterations=20, eps=1e-6):
    """DeepSeek-V4's mappings of x [T, n, C] by its published names: pre, post, comb[read, written]."""
    n = x.shape[1]
    flat = x.flatten(1)
    mixes = F.linear(flat, fn) * torch.rsqrt(flat.square().mean(-1, keepdim=True) + 1e-6)
    pre = torch.sigmoid(mixes[:, :n] * scale[0] + base[:n]) + eps
    post = 2 * torch.sigmoid(mixes[:, n : 2 * n] * scale[1] + base[n : 2 * n])
    comb = (mixes[:, 2 * n :] * scale[2] + base[2 * n :]).view(-1, n, n).softmax(-1) + eps
    comb = comb / (comb.sum(-2, keepdim=True) + eps)
    for _ in range(iterations - 1):
        comb = comb / (comb.sum(-1, keepdim=True) + eps)
        comb = comb / (comb.sum(-2, keepdim=True) + eps)
    return pre, post, comb


def plugin_mappings(x, state, layer, sublayer, mhc):
    at = f"decoder.layers.{layer}.{sublayer}_hyper_connection."
    alphas = tuple(state[at + "alpha_" + part] for part in ("pre", "post", "res"))
    logits = reference.mapping_logits(x, state[at + "mapping_proj.weight"], alphas, state[at + "bias"], 1e-6)
    return reference.mhc_mappings(
        logits, mhc.num_residual_streams, deepseek_v4=mhc.preset == "deepseek_v4", sinkhorn_iterations=20
    )


# The paper's arithmetic has no eps; with it left out of DeepSeek-V4's, both are the same to rounding.
@pytest.mark.parametrize("mhc, eps", [(V4, 1e-6), (PAPER_HEAD, 0.0)], ids=["deepseek_v4", "paper"])
@pytest.mark.parametrize("names", convert.PUBLISHED)
@pytest.mark.parametrize("stacked", [False, True], ids=["numbered", "stacked"])
def test_published_parameters_give_the_plugins_mappings(mhc, eps, names, stacked):
    out = convert.to_published(plugin_state(mhc, stacked), names, mhc)
    keys = {
        "transformers": ("model.layers.2.attn_hc.{}", "model.layers.2.ffn_hc.{}"),
        "deepseek": ("layers.2.hc_attn_{}", "layers.2.hc_ffn_{}"),
    }[names]
    assert len(out) == LAYERS * 2 * 3 + 3
    x = torch.randn(5, 4, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    numbered = plugin_state(mhc, False)
    for sublayer, key in zip(("self_attention", "mlp"), keys, strict=True):
        parts = (out[key.format(part)] for part in ("fn", "base", "scale"))
        pre, post, comb = deepseek(x, *parts, eps=eps)
        ours = plugin_mappings(x, numbered, 2, sublayer, mhc)
        torch.testing.assert_close(ours.h_pre, pre, rtol=0, atol=1e-12)
        torch.testing.assert_close(ours.h_post, post, rtol=0, atol=1e-12)
        torch.testing.assert_close(ours.h_res, comb.transpose(1, 2), rtol=0, atol=1e-12)
        assert (ours.h_res - comb).abs().max() > 1e-2  # a forgotten transposition would not pass


@pytest.mark.parametrize(
    "mhc, names",
    [
        *((mhc, names) for mhc in (V4, PAPER_HEAD) for names in convert.PUBLISHED),
        (GLM, "transformers"),
        (HY, "transformers"),
    ],
)
@pytest.mark.parametrize("stacked", [False, True], ids=["numbered", "stacked"])
def test_published_round_trip_is_exact(mhc, names, stacked):
    state = plugin_state(mhc, stacked)
    other = plugin_state(mhc, stacked, seed=7)
    for key in ("decoder.final_layernorm.norm.weight", "decoder.layers.0.mlp.linear_fc1.weight"):
        other[key] = state[key]  # what is no mapping comes from the checkpoint that they are put into
    published = convert.to_published(state, names, mhc)
    assert_equal(convert.from_published(published, names, mhc, other), state)


@pytest.mark.parametrize("first", [0, 1])
def test_published_layers_of_a_later_stage_are_counted_from_its_first(first):
    out = convert.to_published(plugin_state(V4, False), "deepseek", V4, first_layer=first)
    assert {int(key.split(".")[1]) for key in out if key.startswith("layers.")} == set(
        range(first, first + LAYERS)
    )


@pytest.mark.parametrize("stacked", [False, True], ids=["numbered", "stacked"])
@pytest.mark.parametrize(
    "branch, mhc",
    [("megatron-dev", V4), ("megatron-dev", PAPER_HEAD), ("megatron-main", MHCConfig())],
    ids=["dev", "dev-paper", "main"],
)
def test_branch_round_trip_is_exact(branch, mhc, stacked):
    state = plugin_state(mhc, stacked)
    renamed = convert.rename(state, "plugin", branch, mhc)
    assert "decoder.final_layernorm.weight" in renamed and ARITHMETIC not in renamed
    heads = [key for key in renamed if "hc_head" in key]
    assert heads == (
        ["decoder.hc_head_fn", "decoder.hc_head_base", "decoder.hc_head_scale"] * (mhc.contract != "mean")
    )
    assert_equal(convert.rename(renamed, branch, "plugin", mhc), state)


@pytest.mark.parametrize("branch", ["megatron-main", "megatron-dev"])
def test_glm_5_3_is_converted_as_the_mean_that_it_is(branch):
    state = plugin_state(GLM, False)
    renamed = convert.rename(state, "plugin", branch, GLM)
    assert_equal(convert.rename(renamed, branch, "plugin", GLM), state)
    convert.check(GLM, "plugin", branch)


def test_a_layer_that_a_smaller_model_would_leave_is_named():
    published = convert.to_published(plugin_state(GLM, False), "transformers", GLM)
    check_left_over(published, "transformers", LAYERS, GLM)
    with pytest.raises(ValueError, match="model.language_model.layers.2.ffn_hc.fn is left over"):
        check_left_over(published, "transformers", LAYERS - 1, GLM)


def test_rows_of_another_form_are_refused():
    with pytest.raises(ValueError, match="24 x 32: not 2n rows of n.C columns"):
        convert.rename(plugin_state(V4, False), "plugin", "megatron-dev", MHCConfig(preset="hy_v4"))
    with pytest.raises(ValueError, match="belongs to 2 streams"):
        convert.rename(plugin_state(HY, False), "plugin", "megatron-dev", V4)


def test_mean_becomes_a_head_of_equal_weights():
    state = plugin_state(MHCConfig(), False)
    out = convert.to_published(state, "transformers", MHCConfig())
    x = torch.randn(5, 4, WIDTH)
    fn, base, scale = (out[f"model.hc_head.hc_{part}"] for part in ("fn", "base", "scale"))
    head = reference.learned_head(x, fn, scale, base, norm_eps=1e-6, deepseek_v4=True)
    torch.testing.assert_close(head, x.mean(1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("contract", ["mean", "sum"])
@pytest.mark.parametrize("other", ["megatron-dev", *convert.PUBLISHED])
def test_mean_and_sum_survive_the_way_there_and_back(other, contract):
    mhc = MHCConfig(contract=contract)
    state = plugin_state(mhc, True)
    if other == "megatron-dev":
        back = convert.rename(convert.rename(state, "plugin", other, mhc), other, "plugin", mhc)
    else:
        back = convert.from_published(convert.to_published(state, other, mhc), other, mhc, state)
    assert_equal(back, state)


@pytest.mark.parametrize("other", ["megatron-dev", *convert.PUBLISHED])
def test_a_learned_head_does_not_become_a_mean(other):
    state = plugin_state(PAPER_HEAD, True)
    if other == "megatron-dev":
        renamed = convert.rename(state, "plugin", other, PAPER_HEAD)
        with pytest.raises(ValueError, match="decoder.hc_head_fn .* give contract=learned_head"):
            convert.rename(renamed, other, "plugin", MHCConfig())
    else:
        published = convert.to_published(state, other, PAPER_HEAD)
        with pytest.raises(ValueError, match="unequally.* convert into a checkpoint with a learned head"):
            convert.from_published(published, other, MHCConfig(), plugin_state(MHCConfig(), True))


@pytest.mark.parametrize(
    "options, source, target, words",
    [
        (dict(h_res="identity"), "plugin", "transformers", "--mhc-h-res=identity has no form"),
        (dict(h_pre="fixed"), "plugin", "megatron-dev", "--mhc-h-pre=fixed has no form"),
        (dict(contract="learned_head"), "plugin", "megatron-main", "averages the streams"),
        (dict(preset="qwen4_exp"), "plugin", "deepseek", "--mhc-preset=qwen4_exp .* only .*=mixer in transf"),
        (dict(preset="qwen4_exp"), "plain", "plugin", "--mhc-preset=qwen4_exp with .* has no form in plain"),
        (dict(contract="library"), "plugin", "deepseek", "--mhc-contract=library has no form in deepseek"),
        (
            dict(preset="hy_v4"),
            "plugin",
            "deepseek",
            "--mhc-preset=hy_v4 has no form in deepseek, only in tr",
        ),
        (dict(preset="hy_v4"), "megatron-dev", "plugin", "--mhc-preset=hy_v4 has no form in megatron-dev"),
        (dict(preset="glm_5_3"), "plugin", "deepseek", "--mhc-preset=glm_5_3 has no form in deepseek"),
        (dict(), "plain", "deepseek", "convert plain -> plugin first"),
        (dict(), "plugin", "plugin", "nothing to convert"),
    ],
)
def test_what_cannot_be_converted_is_refused(options, source, target, words):
    with pytest.raises(ValueError, match=words):
        convert.check(MHCConfig(**options), source, target)


def test_wrong_shapes_and_missing_parts_are_refused():
    state = plugin_state(V4, False)
    with pytest.raises(ValueError, match="give num_residual_streams=4"):
        convert.rename(state, "plugin", "megatron-dev", MHCConfig(num_residual_streams=2))
    published = convert.to_published(state, "transformers", V4)
    del published["model.layers.1.ffn_hc.base"]
    with pytest.raises(ValueError, match="model.layers.1.ffn_hc.base is absent"):
        convert.from_published(published, "transformers", V4, state)
    headless = {key: value for key, value in state.items() if ".head." not in key}
    with pytest.raises(ValueError, match="is absent, though contract=learned_head"):
        convert.rename(headless, "plugin", "megatron-dev", V4)
    state["mtp.layers.0.self_attention_hyper_connection.bias"] = torch.zeros(24)
    with pytest.raises(ValueError, match="no counterpart"):
        convert.rename(state, "megatron-dev", "plugin", V4)
    with pytest.raises(ValueError, match="use --from plugin"):
        convert.from_plain(plugin_state(V4, False), V4)


GATED = MHCConfig(preset="qwen4_exp", num_residual_streams=2, gated_rank=3)


def gated_state(stacked, layers=2, c=5):
    """As `plugin_state`, of gated residuals."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator)

    shapes = dict(zip(convert.gated.PARTS, ((2 * c,), (3, 2 * c), (2 * c, 3), (2, 2 * c)), strict=True))
    state = {}
    for number in [""] if stacked else [f"{i}." for i in range(layers)]:
        prefix, stack = "decoder.layers." + number, (layers,) * stacked
        state[prefix + "self_attention.linear_proj.weight"] = random(*stack, c, c)
        for sublayer in ("self_attention", "mlp"):
            for part, shape in shapes.items():
                state[f"{prefix}{sublayer}_hyper_connection.{part}"] = random(*stack, *shape)
    for part in convert.gated.MIXER:
        state["decoder.final_layernorm.contraction." + part] = random(*shapes[part])
    state[ARITHMETIC] = encode_arithmetic(GATED)
    return state


@pytest.mark.parametrize("stacked", [True, False])
def test_gated_residuals_survive_the_way_to_published_names_and_back(stacked):
    state = gated_state(stacked)
    published = convert.to_published(state, "transformers", GATED)
    assert len(published) == 2 * 2 * 4 + 3
    key = "model.layers.1.mlp_hyper_connection.block_inject_weight.weight"
    ours = state["decoder.layers.mlp_hyper_connection.inject.weight"][1] if stacked else None
    assert torch.equal(published[key], state.get("decoder.layers.1.mlp_hyper_connection.inject.weight", ours))
    empty = {k: torch.zeros_like(v) if v.is_floating_point() else v for k, v in state.items()}
    back = convert.from_published(published, "transformers", GATED, empty)
    assert_equal({k: v for k, v in back.items() if "proj" not in k}, without(state, "proj"))
    second_stage = {k: v for k, v in convert.to_published(state, "transformers", GATED, 6).items()}
    assert "model.layers.7.attn_hyper_connection.hc_norm.weight" in second_stage


def without(state, word):
    return {key: value for key, value in state.items() if word not in key}


def broken(change):
    def state():
        out = gated_state(False)
        change(out)
        return out

    return state


CONNECTION = "decoder.layers.1.mlp_hyper_connection."
BROKEN = {
    "absent_part": (
        lambda s: s.pop(CONNECTION + "inject.weight"),
        "1.mlp_hyper_connection.inject.weight is abs",
    ),
    "absent_mixer": (
        lambda s: s.pop("decoder.final_layernorm.contraction.read_up.weight"),
        "contraction.read_up.weight is absent",
    ),
    "other_rank": (
        lambda s: s.update({CONNECTION + "read_up.weight": torch.zeros(10, 4)}),
        r"read_up.weight is of shape \[10, 4\], expected \[10, 3\]",
    ),
    "of_another_form": (
        lambda s: s.update({CONNECTION + "bias": torch.zeros(8)}),
        "mlp_hyper_connection.bias: unknown parameter of a gated residual",
    ),
    "not_finite": (
        lambda s: s[CONNECTION + "read_down.weight"].fill_(float("nan")),
        "read_down.weight holds NaN",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_gated_residual_is_refused_by_its_key(case):
    change, words = BROKEN[case]
    with pytest.raises(ValueError, match=words):
        convert.to_published(broken(change)(), "transformers", GATED)


def test_published_gated_residuals_are_taken_whole():
    published = convert.to_published(gated_state(False), "transformers", GATED)
    more = published | {"mtp.layers.0.attn_hyper_connection.hc_norm.weight": torch.zeros(10)}
    kept = {key: value for key, value in more.items() if is_mapping(key)}
    assert kept.keys() == published.keys()
    check_left_over(kept, "transformers", 2, GATED)
    with pytest.raises(ValueError, match=r"layers.1.*is left over: the other checkpoint has 1 layers"):
        check_left_over(kept, "transformers", 1, GATED)
    del published["model.hyper_connection_mixer.hc_norm.weight"]
    with pytest.raises(ValueError, match="model.hyper_connection_mixer.hc_norm.weight is absent"):
        convert.from_published(published, "transformers", GATED, gated_state(False))


def with_depth(mhc):
    """A plugin's state with a layer of multi-token prediction between streams."""
    state = plugin_state(mhc, False)
    width = state["decoder.final_layernorm.norm.weight"].shape[0]
    prefix = "mtp.layers.0."
    for name, value in list(state.items()):
        if (part := name.removeprefix("decoder.layers.0.")) != name and "hyper_connection" in part:
            state[f"{prefix}transformer_layer.{part}"] = value + 1
        if (part := name.removeprefix("decoder.final_layernorm.")) != name:
            state[f"{prefix}final_layernorm.{part}"] = value
    state |= {prefix + f"{part}_proj.weight": torch.randn(width, width) for part in "eh"}
    return state | {prefix + f"{part}norm.weight": torch.randn(width) for part in "eh"}


@pytest.mark.parametrize(
    "options", [dict(preset="deepseek_v4"), dict(), dict(contract="learned_head")], ids=str
)
def test_a_depth_between_streams_goes_to_dev_and_back(options):
    mhc = MHCConfig(mtp="multistream", **options)
    state = with_depth(mhc)
    there = convert.rename(state, "plugin", "megatron-dev", mhc)
    assert {"mtp.layers.0.hc_head_fn", "mtp.layers.0.final_layernorm.weight"} <= set(there)
    assert not any("extra_state" in name or "final_layernorm.norm" in name for name in there)
    projection = "mtp.layers.0.transformer_layer.mlp_hyper_connection.mapping_proj.weight"
    turned = convert.transpose_res(state[projection], 4, 0)
    assert torch.equal(there[projection], state[projection] if mhc.preset == "deepseek_v4" else turned)
    assert_equal(convert.rename(there, "megatron-dev", "plugin", mhc), state)


def test_what_a_depth_lacks_or_the_other_side_has_no_form_of_is_refused():
    mhc = MHCConfig(preset="deepseek_v4", mtp="multistream")
    state = with_depth(mhc)
    there = convert.rename(state, "plugin", "megatron-dev", mhc)
    with pytest.raises(ValueError, match=r"mtp.layers.0.*give mtp=multistream"):
        convert.rename(there, "megatron-dev", "plugin", MHCConfig(preset="deepseek_v4"))
    paper = MHCConfig(mtp="multistream")
    with pytest.raises(ValueError, match="no counterpart in megatron-main"):
        convert.rename(with_depth(paper), "plugin", "megatron-main", paper)
    for name in ("hc_head_base", "hnorm.weight", "transformer_layer.mlp_hyper_connection.alpha_res"):
        less = {key: value for key, value in there.items() if key != f"mtp.layers.0.{name}"}
        with pytest.raises(ValueError, match=f"mtp.layers.0.*{name.split('layer.')[-1]} is absent"):
            convert.rename(less, "megatron-dev", "plugin", mhc)
    plain = plugin_state(mhc, False) | {"mtp.layers.0.eh_proj.weight": torch.zeros(2, 4)}
    with pytest.raises(ValueError, match="mtp.layers.0.* give mtp=single"):
        convert.rename(plain, "plugin", "megatron-dev", mhc)
    dense = {"decoder.layers.0.mlp.linear_fc1.weight": torch.zeros(4, 4)}
    dense["mtp.layers.0.eh_proj.weight"] = torch.zeros(4, 8)
    with pytest.raises(ValueError, match="read the final norm's output.*give mtp=single"):
        convert.from_plain(dense, mhc)

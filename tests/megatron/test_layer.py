"""The wrapped model against the plain one, and each preset's layer against its formula."""

import subprocess
import sys

import gpt
import pytest
import torch
from megatron.core.transformer.module import Float16Module

from megatron_mhc import MHCConfig, register
from megatron_mhc.handed_on import taken
from megatron_mhc.hyper_connection import HyperConnectionModule
from megatron_mhc.ops import packed, reference

IDENTITY = MHCConfig(num_residual_streams=1, h_res="identity", h_pre="fixed", h_post="fixed")
# Of tests that compare bits with Triton's own: its interpreter takes its time for every iteration.
TRITON = dict(init="uniform", init_gating_factor=0.5, backend="triton", sinkhorn_iterations=2)
VARIANTS = {
    "dense": {},
    "moe": gpt.MOE,
    "bias and dropout": dict(add_bias_linear=True, hidden_dropout=0.1, attention_dropout=0.1),
    "fused bias dropout": dict(add_bias_linear=True, hidden_dropout=0.1, bias_dropout_fusion=True),
    "layernorm, gqa": dict(normalization="LayerNorm", num_query_groups=2),
    "recompute": dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1),
}


def agree(got, want):
    """Loss and every gradient in fp32, by the same formulas in another order."""
    assert got[0].item() == pytest.approx(want[0].item(), rel=1e-6)
    floor = 1e-3 * max(grad.abs().max() for grad in want[1].values())
    for name, grad in want[1].items():
        assert (got[1][name] - grad).abs().max() <= 1e-4 * max(grad.abs().max(), floor), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_stream_with_identity_mappings_matches_vanilla_bit_for_bit(run_ranks, variant):
    def compare():
        plain = gpt.forward_backward(gpt.build(**VARIANTS[variant]))
        gpt.same_bits(gpt.forward_backward(gpt.build(IDENTITY, **VARIANTS[variant])), plain)

    run_ranks(1, compare)


@pytest.mark.parametrize("variant", ["dense", "moe", "bias and dropout"])
def test_vanilla_with_the_plugin_registered_matches_vanilla_bit_for_bit(run_ranks, variant):
    def compare():
        before = gpt.forward_backward(gpt.build(**VARIANTS[variant]))
        with register():
            gpt.same_bits(gpt.forward_backward(gpt.build(**VARIANTS[variant])), before)

    run_ranks(1, compare)


@pytest.mark.parametrize(
    "mhc", [MHCConfig(), MHCConfig(preset="deepseek_v4"), MHCConfig(h_res="unconstrained")]
)
@pytest.mark.parametrize("variant", ["dense", "moe"])
def test_home_stream_matches_the_plain_models_loss_at_step_0(run_ranks, mhc, variant):
    def losses():
        plain, _ = gpt.forward_backward(gpt.build(**VARIANTS[variant]))
        ours, _ = gpt.forward_backward(gpt.build(mhc, **VARIANTS[variant]))
        return plain.item(), ours.item()

    plain, ours = run_ranks(1, losses)[0]
    # The streams are equal at step 0, so only the scale of a layer's input differs, which its norm
    # takes out but for its epsilon.
    assert ours == pytest.approx(plain, rel=2e-4)


@pytest.mark.parametrize("preset", ["paper", "deepseek_v4"])
@pytest.mark.parametrize("n", [1, 2, 4])
def test_a_layer_matches_its_formula(run_ranks, preset, n):
    """One layer's output from its own attention and MLP, and the preset's formula written out."""

    def compare():
        mhc = MHCConfig(num_residual_streams=n, preset=preset, init="uniform", init_gating_factor=0.7)
        model = gpt.build(mhc, params_dtype=torch.float64)
        layer = model.decoder.layers[1]
        mask = torch.triu(torch.ones(1, 1, 8, 8, dtype=torch.bool), 1)
        streams = torch.randn(8, 2, n * 32, dtype=torch.float64)
        got, _ = layer(streams, mask)

        x = streams.view(16, n, 32)
        branches = (
            (layer.self_attention_hyper_connection, lambda h: layer._forward_attention(h, mask)[0]),
            (layer.mlp_hyper_connection, layer._forward_mlp),
        )
        for connection, branch in branches:
            weight, bias = connection.mapping_proj.weight, connection.bias
            a_pre, a_post, a_res = connection.alphas
            logits = []
            for token in x:
                flat = token.flatten()
                logits.append(weight @ (flat / (flat.square().mean() + mhc.norm_eps).sqrt()))
            logits = torch.stack(logits)
            pre = torch.sigmoid(a_pre * logits[:, :n] + bias[:n])
            post = 2 * torch.sigmoid(a_post * logits[:, n : 2 * n] + bias[n : 2 * n])
            res = (a_res * logits[:, 2 * n :] + bias[2 * n :]).view(16, n, n)
            if preset == "paper":
                h_res = res.exp()
                for _ in range(20):
                    h_res = h_res / h_res.sum(1, keepdim=True)
                    h_res = h_res / h_res.sum(2, keepdim=True)
            else:
                pre, h_res = pre + 1e-6, reference.sinkhorn_deepseek_v4(res, 20).transpose(1, 2)
            f = branch((pre.unsqueeze(-1) * x).sum(1).view(8, 2, 32)).view(16, 32)
            x = h_res @ x + post.unsqueeze(-1) * f.unsqueeze(1)
        torch.testing.assert_close(got.view(16, n, 32), x, rtol=1e-10, atol=1e-11)

    run_ranks(1, compare)


def test_rows_of_h_res_sum_to_one_in_a_model(run_ranks):
    def errors():
        model = gpt.build(MHCConfig(init="uniform", init_gating_factor=1.0))
        found = []

        def look(module, args, output):
            h_res = output[1].h_res
            found.append(((h_res.sum(-1) - 1).abs().max().item(), (h_res.sum(-2) - 1).abs().max().item()))

        for module in model.modules():
            if isinstance(module, HyperConnectionModule):
                module.register_forward_hook(look)
        gpt.forward_backward(model)
        return found

    found = run_ranks(1, errors)[0]
    assert len(found) == 4
    print("max row error", max(r for r, _ in found), "max column error", max(c for _, c in found))
    assert max(rows for rows, _ in found) <= 1e-6


@pytest.mark.parametrize(
    "mhc", [MHCConfig(), MHCConfig(preset="deepseek_v4"), MHCConfig(h_res="unconstrained")]
)
def test_mapping_parameters_stay_fp32_in_a_bf16_model(run_ranks, mhc):
    def dtypes():
        model = gpt.build(mhc, bf16=True, params_dtype=torch.bfloat16)
        phi = model.decoder.layers[0].mlp_hyper_connection.mapping_proj.weight
        phi.data.fill_(1 + 2**-20)  # bf16 cannot hold it
        Float16Module(model.config, model)
        assert (phi == 1 + 2**-20).all()
        return {name: str(p.dtype) for name, p in model.named_parameters()}

    for name, dtype in run_ranks(1, dtypes)[0].items():
        ours = "hyper_connection" in name or "final_layernorm.head" in name
        assert dtype == ("torch.float32" if ours else "torch.bfloat16"), name


def test_home_streams_take_turns(run_ranks):
    def homes():
        model = gpt.build(MHCConfig(num_residual_streams=3))
        modules = [m for m in model.modules() if isinstance(m, HyperConnectionModule)]
        return [m.bias[:3].argmax().item() for m in modules]

    assert run_ranks(1, homes)[0] == [0, 1, 2, 0]


FIXED = dict(h_res="identity", h_pre="fixed", h_post="fixed")


@pytest.mark.parametrize(
    "form, norm, variant",
    [
        (dict(preset="paper"), "apart", "recompute"),
        (dict(preset="deepseek_v4"), "folded", "dense"),
        (dict(preset="hy_v4", post_magnitude=1.5), "folded", "recompute"),
        (dict(num_residual_streams=3, preset="glm_5_3", sinkhorn_iterations=2), "apart", "dense"),
        (dict(h_post="fixed", sinkhorn_iterations=2), "folded", "dense"),
        (FIXED, "folded", "recompute"),
        (FIXED, "apart", "dense"),
    ],
)
def test_triton_backend_matches_the_reference_backend(run_ranks, form, norm, variant):
    """Loss and every gradient of a model, in Triton's interpreter, also where it computes the norms."""

    def both():
        results = []
        for options in (dict(backend="reference"), dict(backend="triton", norm=norm)):
            mhc = MHCConfig(init="uniform", init_gating_factor=0.5, **form, **options)
            results.append(gpt.forward_backward(gpt.build(mhc, **VARIANTS[variant])))
        return results

    want, got = run_ranks(1, both)[0]
    agree(got, want)


@pytest.mark.parametrize(
    "compiler",
    ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)],  # it calls a C++ compiler
)
@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param(dict(backend="reference"), marks=pytest.mark.slow),
        pytest.param(dict(recompute_layer_num="3"), marks=pytest.mark.slow),
    ],
)
def test_a_compiled_layer_gives_the_same(run_ranks, compiler, options):
    """Loss and every gradient with a compiler around each layer."""

    def both():
        results = []
        for compiled in (False, True):
            model = gpt.build(MHCConfig(**TRITON | options))
            for layer in model.decoder.layers if compiled else ():
                # testing.cpu takes torch.compile itself away.
                layer._compiled_call_impl = torch._dynamo.optimize(compiler)(layer._call_impl)
            results.append(gpt.forward_backward(model))
        return results

    want, got = run_ranks(1, both, timeout=400)[0]
    agree(got, want)


@pytest.mark.parametrize(
    "backend, norm, read",
    [
        ("triton", "folded", "current"),
        ("reference", "apart", "current"),
        ("triton", "folded", "previous"),
        ("triton", "apart", "previous"),
    ],
)
def test_what_mhc_adds_to_a_layer_compiles_to_one_graph(run_ranks, backend, norm, read):
    """Megatron's own attention and MLP, in which graphs break, stand aside."""

    def both():
        mhc = MHCConfig(**TRITON | dict(backend=backend, norm=norm, read=read))
        model = gpt.build(mhc)
        layer = model.decoder.layers[1]
        bias = torch.linspace(-1, 1, 32).requires_grad_()
        biased = layer.self_attn_bda(layer.training, False)
        layer._forward_attention = lambda x: (biased((torch.tanh(x), bias), x, 0.0), None)
        layer._forward_mlp = lambda x, *args, **kwargs: x * 0.5
        streams = torch.randn(8, 2, 4 * 32)
        if read == "previous":
            streams = packed.pack(streams, torch.rand(8 * 2, 4))
        results = []
        of_reference, runs_reference = reference.mapping_logits, []
        reference.mapping_logits = lambda *args: (runs_reference.append(args), of_reference(*args))[1]
        for run in (layer, torch._dynamo.optimize("aot_eager", nopython=True)(layer)):
            leaf = streams.clone().requires_grad_()
            output, _ = run(leaf)
            if read == "previous":
                output, h_pre = taken(output, layer.config, mhc, "here")
                output = output + h_pre.sum()
            assert output._base is None  # else a pipeline schedule would refuse it
            layer.zero_grad()
            bias.grad = None
            output.square().sum().backward()
            grads = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
            results.append((output.detach(), {"streams": leaf.grad, "bias": bias.grad, **grads}))
        assert bool(runs_reference) == (backend == "reference")
        return *results, torch._dynamo.utils.counters["stats"]["unique_graphs"]

    want, got, graphs = run_ranks(1, both)[0]
    assert graphs == 1 and len(want[1]) == (8 if norm == "folded" else 6)
    gpt.same_bits(got, want)


@pytest.mark.parametrize(
    "variant, mhc, own",
    [
        ("dense", {}, 1),
        pytest.param("moe", {}, 1, marks=pytest.mark.slow),
        pytest.param("dense", dict(recompute_layer_num="3"), 1, marks=pytest.mark.slow),
        ("dense", dict(recompute_layer_num="3", recompute_coefficients=True), 4),
        ("recompute", {}, 2),  # Megatron's checkpoints cut the graph between layers
    ],
)
def test_connections_in_a_row_are_linked_within_and_across_layers(run_ranks, variant, mhc, own):
    """Same loss and gradients, bit for bit, and only `own` of the four df come from a launch of their own."""

    def both():
        from megatron_mhc.ops import autograd

        options = MHCConfig(**TRITON | mhc)
        calls, results, original, find = [], [], autograd.post_backward, autograd.link_of
        autograd.post_backward = lambda *args: (calls.append(args), original(*args))[1]
        for linked in (False, True):
            autograd.link_of = find if linked else lambda x: None
            calls.clear()
            results.append(gpt.forward_backward(gpt.build(options, **VARIANTS[variant])))
        return *results, len(calls)

    unlinked, linked, launches = run_ranks(1, both)[0]
    gpt.same_bits(linked, unlinked)
    assert launches == own


@pytest.mark.parametrize(
    "mhc, settings, folds",
    [
        ({}, {}, 4),
        (dict(recompute_layer_num="3"), {}, 4),
        (dict(recompute_layer_num="3", recompute_coefficients=True), {}, 4),
        pytest.param({}, VARIANTS["recompute"], 8, marks=pytest.mark.slow),
        ({}, dict(hidden_dropout=0.1), 0),
        (dict(backend="reference"), {}, 0),
    ],
)
def test_post_res_adds_a_linear_bias_with_the_bits_of_an_addition(run_ranks, mhc, settings, folds):
    def both():
        options = TRITON | mhc
        settings_ = dict(add_bias_linear=True) | settings
        from megatron_mhc.sublayer import Left, SubLayer

        added, results, post_res, on = [], [], SubLayer.post_res, Left.on

        def build(**changes):
            model = gpt.build(MHCConfig(**options | changes), **settings_)
            for name, parameter in model.named_parameters():
                if name.endswith(("proj.bias", "fc2.bias")):  # Megatron starts them at zero
                    torch.nn.init.normal_(parameter)
            return model

        def counted(self, visit, *args):
            added.append(getattr(visit.left, "bias", None) is not None)
            return post_res(self, visit, *args)

        Left.on = staticmethod(lambda residual: None)
        results.append(gpt.forward_backward(build(recompute_layer_num="off", recompute_coefficients=False)))
        Left.on, SubLayer.post_res = staticmethod(on), counted
        results.append(gpt.forward_backward(build()))
        return *results, sum(added)

    want, got, added = run_ranks(1, both)[0]
    gpt.same_bits(got, want)
    assert added == folds
    assert all(got[1][name].abs().max() > 0 for name in got[1] if name.endswith(("proj.bias", "fc2.bias")))


@pytest.mark.parametrize(
    "variant, options, own",
    [
        ("dense", {}, 1),
        pytest.param("moe", {}, 1, marks=pytest.mark.slow),
        pytest.param("dense", dict(recompute_layer_num="3"), 1, marks=pytest.mark.slow),
        pytest.param(
            "dense", dict(recompute_layer_num="3", recompute_coefficients=True), 4 + 4, marks=pytest.mark.slow
        ),
        ("recompute", {}, 4 + 4),  # a checkpoint runs everything twice
    ],
)
def test_a_fused_boundary_projects_ahead_within_and_across_layers(run_ranks, variant, options, own):
    """bf16: loss and gradients as by the separate kernels, to rounding; `own` separate projections."""

    def both():
        from megatron_mhc.ops.triton import pre

        calls, results, original = [], [], pre._project
        pre._project = lambda *args: (calls.append(args), original(*args))[1]
        for boundary in ("apart", "fused"):
            mhc = MHCConfig(boundary=boundary, **TRITON | options)
            calls.clear()
            model = gpt.build(mhc, bf16=True, params_dtype=torch.bfloat16, **VARIANTS[variant])
            results.append(gpt.forward_backward(model))
        return *results, len(calls)

    (loss, grads), (fused_loss, fused_grads), launches = run_ranks(1, both)[0]
    assert launches == own
    assert fused_loss.item() == pytest.approx(loss.item(), rel=2e-3)
    whole, difference = (
        torch.cat([t.float().flatten() for t in parts]).norm()
        for parts in (grads.values(), [fused_grads[name] - grad for name, grad in grads.items()])
    )
    assert difference <= 2e-2 * whole


UNDER_META = """
import torch
from megatron.core.transformer import TransformerConfig
from megatron_mhc import MHCConfig
from megatron_mhc.hyper_connection import HyperConnectionModule

sizes = dict(num_layers=1, hidden_size=16, num_attention_heads=1)
config = TransformerConfig(**sizes, use_cpu_initialization=True, perform_initialization=False)
for options in ({}, dict(init="uniform"), dict(h_res="unconstrained")):
    torch.manual_seed(1)
    plain = HyperConnectionModule(config, MHCConfig(**options), 1).state_dict()
    torch.manual_seed(1)
    with torch.device("meta"):
        built = HyperConnectionModule(config, MHCConfig(**options), 1).state_dict()
    assert all(built[name].equal(value) for name, value in plain.items())
"""


def test_a_connection_built_under_the_meta_device_has_its_values():
    """--init-model-with-meta-device; in a process of its own, since the CPU's stand-ins replace devices."""
    subprocess.run([sys.executable, "-c", UNDER_META], check=True)

"""Dropping and replaying changes no bit of a model's loss and gradients, and frees what it says it frees."""

import gpt
import pytest
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer import MLATransformerConfig
from recompute_cases import LIVELY, losses, replaying
from thinned import each_value

from megatron_mhc import MHCConfig, recompute
from megatron_mhc.chunk import chunk_of
from megatron_mhc.layer import InOrder
from megatron_mhc.recompute.sublayer import DroppingSubLayer
from megatron_mhc.specs import wrap_block_spec

MOE = gpt.MOE | dict(moe_layer_freq=[0, 1, 1, 1])
DROPOUT = dict(add_bias_linear=True, hidden_dropout=0.1, attention_dropout=0.1)


def selective(*modules):
    return dict(recompute_granularity="selective", recompute_modules=list(modules))


# options of mHC, settings of Megatron
CASES = {
    "dense": ({}, {}),
    "one sub-layer": (dict(recompute_layer_num="1"), {}),
    "one block": (dict(recompute_layer_num="8"), {}),
    "auto": (dict(recompute_layer_num="auto"), {}),
    "float64": ({}, dict(params_dtype=torch.float64)),
    "bf16": ({}, dict(params_dtype=torch.bfloat16, bf16=True)),
    "moe": ({}, MOE),
    "dropout": ({}, DROPOUT),
    "moe, dropout": ({}, MOE | dict(hidden_dropout=0.1, attention_dropout=0.1)),
    "layernorm": ({}, dict(normalization="LayerNorm", num_query_groups=2)),
    "megatron's layernorm": ({}, selective("layernorm")),
    "megatron's core_attn, mlp": ({}, selective("core_attn", "mlp")),
    "megatron's moe, layernorm": ({}, MOE | selective("moe", "layernorm") | dict(hidden_dropout=0.1)),
    "deepseek_v4": (dict(preset="deepseek_v4"), {}),
    "single pass": (dict(preset="deepseek_v41"), MOE),
    "plain hc": (dict(h_res="unconstrained"), {}),
    "fixed": (dict(h_res="identity", h_pre="fixed"), {}),
    "one stream": (dict(num_residual_streams=1, h_pre="fixed"), {}),
    "three streams": (dict(num_residual_streams=3), {}),
    "folded norms": (dict(norm="folded"), MOE),
    "folded norms, bf16": (dict(norm="folded"), dict(params_dtype=torch.bfloat16, bf16=True)),
    "triton": (dict(backend="triton", norm="folded", sinkhorn_iterations=2), dict(num_layers=1)),
    "triton hy_v4": (dict(backend="triton", norm="folded", preset="hy_v4"), dict(num_layers=1)),
    "triton, fixed": (dict(backend="triton", h_pre="fixed", h_post="fixed"), dict(num_layers=2)),
    "triton, nothing learned": (
        dict(backend="triton", h_res="identity", h_pre="fixed", h_post="fixed"),
        dict(num_layers=2),
    ),
    "triton, two blocks": (dict(backend="triton"), DROPOUT | dict(num_layers=2)),
    "triton, deepseek_v4": (dict(backend="triton", preset="deepseek_v4"), dict(num_layers=2)),
    "triton, single pass": (dict(backend="triton", preset="deepseek_v41"), dict(num_layers=2)),
    "triton, single pass, fused": (
        dict(backend="triton", read="previous", boundary="fused", sinkhorn_iterations=2),
        dict(num_layers=2, params_dtype=torch.bfloat16, bf16=True),
    ),
}
SLOW = [case for case in CASES if case.startswith("triton,")]  # Triton's interpreter
HOW = ("kept", "replayed")
REPLAYS = each_value(
    [case for case in CASES if case not in SLOW],
    HOW,
    also=[("dense", "replayed"), ("bf16", "kept"), ("triton", "replayed")],
)
# A replay of coefficients has each connection project by itself, in other bits than Triton's fused ones.
REPLAYS += [
    pytest.param(case, how, marks=pytest.mark.slow)
    for case in SLOW
    for how in HOW
    if how == "kept" or "fused" not in case
]


@pytest.mark.parametrize("case, coefficients", REPLAYS)
def test_replay_matches_no_recompute_bit_for_bit(run_ranks, case, coefficients):
    options, settings = CASES[case]
    settings = dict(num_layers=4) | settings

    def compare():
        stored = MHCConfig(**(LIVELY | options | dict(recompute_layer_num="off")))
        want = gpt.forward_backward(gpt.build(stored, **settings))
        mhc = replaying(**options, recompute_coefficients=coefficients == "replayed")
        gpt.same_bits(gpt.forward_backward(gpt.build(mhc, **settings)), want)

    run_ranks(1, compare)


@pytest.mark.slow
def test_blocks_longer_than_a_launch_match_bit_for_bit(run_ranks):
    """Five connections in a block, two in a launch of the Triton replay."""

    def compare():
        from megatron_mhc.ops.triton import replay

        replay.at_once = lambda n: 2
        options = LIVELY | dict(backend="triton")
        want = gpt.forward_backward(gpt.build(MHCConfig(**options), num_layers=3))
        mhc = MHCConfig(**options, recompute_layer_num="5")
        gpt.same_bits(gpt.forward_backward(gpt.build(mhc, num_layers=3)), want)

    run_ranks(1, compare)


def test_mla_matches_no_recompute_bit_for_bit(run_ranks):
    def run(mhc):
        gpt.start()
        config = MLATransformerConfig(
            num_layers=4,
            hidden_size=32,
            num_attention_heads=4,
            ffn_hidden_size=64,
            q_lora_rank=16,
            kv_lora_rank=16,
            qk_head_dim=8,
            qk_pos_emb_head_dim=8,
            v_head_dim=12,
            rope_type="rope",
            apply_rope_fusion=False,
            hidden_dropout=0.1,
            bias_dropout_fusion=False,
            masked_softmax_fusion=False,
            gradient_accumulation_fusion=False,
            qk_layernorm=True,
        )
        spec = wrap_block_spec(get_gpt_decoder_block_spec(config, use_transformer_engine=False), mhc, config)
        return gpt.forward_backward(
            GPTModel(config, spec, gpt.VOCAB, gpt.SEQ, position_embedding_type="none")
        )

    run_ranks(1, lambda: gpt.same_bits(run(replaying()), run(MHCConfig(**LIVELY))))


def count(monkeypatch, owner, name):
    """Count the calls of a method; returns the list that grows."""
    calls, original = [], getattr(owner, name)

    def counted(*args, **kwargs):
        calls.append(args[0])
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)
    return calls


def test_f_runs_once_and_every_block_is_replayed_once(run_ranks, monkeypatch):
    def check():
        model = gpt.build(replaying(), num_layers=4)
        attention = count(monkeypatch, type(model.decoder.layers[0].self_attention), "forward")
        mlp = count(monkeypatch, type(model.decoder.layers[0].mlp), "forward")
        read = count(monkeypatch, DroppingSubLayer, "read_again")
        written = count(monkeypatch, DroppingSubLayer, "write_again")
        gpt.forward_backward(model)
        assert (len(attention), len(mlp)) == (4, 4)
        # Blocks of 3, 3 and 2: all are read again, and the output of each block is there already.
        assert chunk_of(model).blocks == [3, 3, 2]
        assert [c.position for c in read] == [6, 7, 3, 4, 5, 0, 1, 2]
        assert [c.position for c in written] == [6, 3, 4, 0, 1]

    run_ranks(1, check)


def test_replay_before_the_gradient_arrives_is_the_only_one(run_ranks, monkeypatch):
    def check():
        want = gpt.forward_backward(gpt.build(MHCConfig(**LIVELY)))
        model = gpt.build(replaying(recompute_layer_num="2"))
        read = count(monkeypatch, DroppingSubLayer, "read_again")
        backward = torch.Tensor.backward

        def after_replay(loss, *args, **kwargs):
            block = recompute.handle(model)
            assert recompute.handle(model) is None and not read
            recompute.replay(block)
            recompute.replay(block)
            assert [c.position for c in read] == [2, 3]
            return backward(loss, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, "backward", after_replay)
        gpt.same_bits(gpt.forward_backward(model), want)
        assert [c.position for c in read] == [2, 3, 0, 1]
        recompute.replay(None)

    run_ranks(1, check)


def test_several_micro_batches_in_flight_and_an_evaluation_between(run_ranks):
    """As under 1F1B: forward, forward, backward, forward, backward, backward; gradients add up."""

    def run(mhc):
        model = gpt.build(mhc, num_layers=3)
        first, second = losses(model, 0), losses(model, 1)
        blocks = [recompute.handle(model)]
        first.backward()
        with torch.no_grad():
            evaluated = losses(model, 5)
        third = losses(model, 2)
        for block in blocks:
            recompute.replay(block)
        second.backward()
        third.backward()
        total = torch.stack([first, second, third, evaluated]).detach()
        return total, {name: p.grad for name, p in model.named_parameters()}

    run_ranks(1, lambda: gpt.same_bits(run(replaying()), run(MHCConfig(**LIVELY))))


class Exit(InOrder):
    """Runs a chunk's last MLP outside of its block, as a split pipeline boundary does."""

    def sublayer(self, sublayer, layer, streams, h_pre, call):
        if not sublayer.chunk.is_last(sublayer):
            return super().sublayer(sublayer, layer, streams, h_pre, call)
        layer_input, mappings = sublayer.connection(streams, h_pre)
        sublayer.chunk.leave(streams)
        return sublayer.connection.post_res(streams, layer._forward_mlp(layer_input), mappings), None


@pytest.mark.parametrize("size", ["1", "3", "5", "6"])
def test_last_sublayer_in_parts_matches_no_recompute(run_ranks, size):
    def run(mhc):
        model = gpt.build(mhc, num_layers=3)
        chunk = chunk_of(model)
        chunk.leave = getattr(chunk, "leave", lambda streams: None)  # without recompute there are no blocks
        with chunk.run_by(Exit()):
            loss = losses(model, 0)
        recompute.replay(recompute.handle(model))
        loss.backward()
        return loss.detach(), {name: p.grad for name, p in model.named_parameters()}

    run_ranks(1, lambda: gpt.same_bits(run(replaying(recompute_layer_num=size)), run(MHCConfig(**LIVELY))))


def test_frozen_parts_match_no_recompute(run_ranks):
    def run(mhc):
        model = gpt.build(mhc, num_layers=3)
        for name, parameter in model.named_parameters():
            frozen = "embedding" in name or "layers.0." in name or "layers.1.self_attention" in name
            parameter.requires_grad_(not frozen)
        loss = losses(model, 0)
        loss.backward()
        return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}

    run_ranks(1, lambda: gpt.same_bits(run(replaying()), run(MHCConfig(**LIVELY))))


@pytest.mark.parametrize("trained", ["hyper_connection", "layers.1"])
@pytest.mark.parametrize("method", ["uniform", "block"])
def test_full_recompute_behind_a_frozen_embedding_gives_the_gradients_of_none(run_ranks, trained, method):
    full = dict(recompute_granularity="full", recompute_method=method, recompute_num_layers=1)

    def run(**settings):
        model = gpt.build(MHCConfig(**LIVELY), num_layers=3, **settings)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained in name)
        loss = losses(model, 0)
        loss.backward()
        return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}

    run_ranks(1, lambda: gpt.same_bits(run(**full), run()))


def test_parameters_are_the_same_as_without(run_ranks):
    def check():
        stored, model = gpt.build(MHCConfig(**LIVELY)), gpt.build(replaying())
        assert model.state_dict().keys() == stored.state_dict().keys()
        want = gpt.forward_backward(stored)
        gpt.forward_backward(model, seed=7)
        model.load_state_dict(stored.state_dict())
        model.zero_grad()
        gpt.same_bits(gpt.forward_backward(model), want)

    run_ranks(1, check)


def test_layers_out_of_order_are_noticed(run_ranks):
    def check():
        model = gpt.build(replaying(), num_layers=3)
        losses(model, 0)
        streams = torch.randn(gpt.SEQ, gpt.BATCH, 4 * 32)
        with pytest.raises(RuntimeError, match="sub-layer 2 of a model chunk ran out of order"):
            model.decoder.layers[1](streams, gpt.batch(0)[0][2])
        losses(model, 0).backward()  # a pass from the start is right again

    run_ranks(1, check)

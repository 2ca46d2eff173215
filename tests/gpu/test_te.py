"""mHC around Transformer Engine's layers on one GPU; skipped where there is none.

MEGATRON_MHC_GPU_TESTS=1 python -m pytest tests/gpu
"""

import os

import pytest
import torch

if not os.environ.get("MEGATRON_MHC_GPU_TESTS"):
    pytest.skip("set MEGATRON_MHC_GPU_TESTS=1 on a machine with a GPU", allow_module_level=True)
pytest.importorskip("transformer_engine")

from megatron.core import tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.training import global_vars
from te_cases import BATCH, LAYERS, SEQ, WIDTH, make_config, relative, te_spec, wake

from megatron_mhc import MHCConfig
from megatron_mhc.diagnostics import sampler as sampler_module
from megatron_mhc.specs import wrap_block_spec


def run_block(kind="dense", seed=3, mhc=None, **settings):
    """Output, input gradient and all main gradients of a bf16 block in DDP, two micro-batches."""
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    torch.manual_seed(seed)
    config = make_config(kind, **settings)
    spec = wrap_block_spec(te_spec(config, kind), mhc or MHCConfig(), config)
    block = TransformerBlock(config, spec)
    wake(block)
    ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    model = DistributedDataParallel(config, ddp_config, Float16Module(config, block.cuda()))
    model.zero_grad_buffer()
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    rope = None if kind == "mla" else RotaryEmbedding(WIDTH // 4, 1.0)(SEQ)
    outputs = []
    for step in range(2):
        generator = torch.Generator(device="cuda").manual_seed(step)
        x = torch.randn(SEQ, BATCH, WIDTH, device="cuda", dtype=torch.bfloat16, generator=generator)
        x.requires_grad_()
        out = model(x, None, rotary_pos_emb=rope)
        # Not the mean square, which the last norm makes a constant: gradients would be rounding.
        target = torch.randn(out.shape, device="cuda", generator=generator)
        (out.float() * target).sum().div(SEQ).backward()
        outputs += [out.detach().float(), x.grad.float()]
    grads = {name: p.main_grad.clone() for name, p in block.named_parameters()}
    dtypes = {name: p.dtype for name, p in block.named_parameters()}
    return outputs, grads, dtypes


@pytest.mark.parametrize("kind", ["dense", "moe", "mla"])
def test_mapping_parameters_stay_fp32_and_everything_gets_a_gradient(kind):
    outputs, grads, dtypes = run_block(kind)
    assert all(t.isfinite().all() for t in outputs)
    mapping = [name for name in dtypes if "hyper_connection" in name]
    assert len(mapping) == 2 * LAYERS * 2
    assert all(dtypes[name] == torch.float32 for name in mapping)
    assert {dtypes[name] for name in dtypes if name not in mapping} == {torch.bfloat16}
    assert all(grad.isfinite().all() for grad in grads.values())
    assert all(grads[name].abs().max() > 0 for name in mapping)


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_six_layers_are_the_same_with_the_boundary_fused_or_not_and_match_the_reference(kind, monkeypatch):
    monkeypatch.setenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")
    layers = dict(num_layers=6, **(dict(moe_layer_freq=[0, 1, 1, 1, 1, 1]) if kind == "moe" else {}))
    runs = {b: run_block(kind, mhc=MHCConfig(boundary=b), **layers) for b in ("fused", "linked", "apart")}
    outputs, grads, _ = runs.pop("fused")
    for others, other_grads, _ in runs.values():
        assert all(torch.equal(a, b) for a, b in zip(outputs, others, strict=True))
        assert all(torch.equal(grads[name], other_grads[name]) for name in grads)
    want, want_grads, _ = run_block(kind, mhc=MHCConfig(backend="reference"), **layers)
    # Of matrices: while streams are alike, all but rounding cancels in what alphas and biases get.
    matrices = [name for name in grads if grads[name].dim() == 2]
    errors = sorted((relative(grads[name], want_grads[name]), name) for name in matrices)
    middle = errors[len(errors) // 2][0]
    streams = max(relative(a, b) for a, b in zip(outputs, want, strict=True))
    print(f"{kind}: streams {streams:.1e}, gradients {middle:.1e} (median), {errors[-1]}")
    # In bf16 a token near a tie may go to another expert, whose gradients are then others.
    assert streams < (4e-2 if kind == "dense" else 1e-1)
    assert middle < 4e-2 and errors[-1][0] < (1e-1 if kind == "dense" else 5e-1)


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_fused_gradient_accumulation_matches_unfused(kind):
    _, fused, _ = run_block(kind, gradient_accumulation_fusion=True)
    _, plain, _ = run_block(kind, gradient_accumulation_fusion=False)
    # Unfused weight gradients are rounded to bf16 before they reach the fp32 main gradient.
    assert max(relative(fused[name], plain[name]) for name in plain) < 1e-2


@pytest.mark.parametrize(
    "settings",
    [
        dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1),
        dict(recompute_granularity="full", recompute_method="block", recompute_num_layers=2),
        dict(recompute_granularity="selective", recompute_modules=["core_attn"]),
        dict(recompute_granularity="selective", recompute_modules=["layernorm", "mlp"]),
    ],
    ids=["uniform", "block", "core_attn", "layernorm+mlp"],
)
def test_recompute_matches_no_recompute_bit_for_bit(settings, monkeypatch):
    monkeypatch.setenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")
    want, want_grads, _ = run_block()
    got, got_grads, _ = run_block(**settings)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert all(torch.equal(got_grads[name], want_grads[name]) for name in want_grads)


def test_model_loss_matches_plain_model_at_step_0():
    """home_stream and the same weights: the losses agree to bf16 rounding."""
    losses = []
    for mhc in (None, MHCConfig()):
        tensor_parallel.model_parallel_cuda_manual_seed(11, force_reset_rng=True)
        config = make_config()
        spec = te_spec(config, "dense")
        model = GPTModel(
            config,
            spec if mhc is None else wrap_block_spec(spec, mhc, config),
            vocab_size=512,
            max_sequence_length=SEQ,
            position_embedding_type="rope",
        )
        model = Float16Module(config, model.cuda())
        tokens = torch.randint(0, 512, (BATCH, SEQ), generator=torch.Generator().manual_seed(5)).cuda()
        positions = torch.arange(SEQ, device="cuda").expand(BATCH, SEQ)
        losses.append(model(tokens, positions, None, labels=tokens).float().mean().item())
    print(f"plain {losses[0]:.5f}, mHC {losses[1]:.5f}")
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)


def test_sampling_does_not_wait_for_the_gpu(monkeypatch):
    monkeypatch.setattr(global_vars, "_GLOBAL_ARGS", object())  # as in Megatron's own run
    mhc = MHCConfig(log_interval=1, alarm="warn")
    config = make_config()
    tensor_parallel.model_parallel_cuda_manual_seed(5, force_reset_rng=True)
    spec = wrap_block_spec(te_spec(config, "dense"), mhc, config)
    block = Float16Module(config, TransformerBlock(config, spec).cuda())
    x = torch.randn(SEQ, BATCH, WIDTH, device="cuda", dtype=torch.bfloat16)
    take, taken = sampler_module.take, []

    def take_without_waiting(*args):
        torch.cuda.set_sync_debug_mode("error")
        try:
            taken.append(take(*args))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return taken[-1]

    monkeypatch.setattr(sampler_module, "take", take_without_waiting)
    with torch.no_grad(), sampler_module.Sampler(block, config) as sampler:
        block(x, None)
    assert len(taken) == 2 * LAYERS
    report = sampler.report()
    assert max(report.statistics["row_error"]) < 1e-4
    torch.cuda.set_sync_debug_mode("error")  # what the test counts on
    try:
        with pytest.raises(RuntimeError):
            x.sum().item()
    finally:
        torch.cuda.set_sync_debug_mode("default")

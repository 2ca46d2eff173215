"""`--delay-wgrad-compute` under `--mhc-pipeline-schedule fused`, with Transformer Engine on one GPU.

MEGATRON_MHC_GPU_TESTS=1 python -m pytest tests/gpu
"""

import zlib

import pytest
import torch
from megatron.core import tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from te_cases import BATCH, SEQ, make_config, relative, te_spec, wake  # skips where there is no GPU

from megatron_mhc import MHCConfig
from megatron_mhc.ops import packed
from megatron_mhc.pipeline.comm import Transport
from megatron_mhc.pipeline.delayed_weights import DelayedWeights, is_delayed
from megatron_mhc.pipeline.fused import FusedStep
from megatron_mhc.pipeline.streams import streams_for
from megatron_mhc.schedule.program import Plan
from megatron_mhc.specs import wrap_block_spec
from megatron_mhc.testing.gpt import mtp_spec


class Neighbours(Transport):
    """The other ranks of a pipeline: what they send is random and follows from its name alone."""

    def __init__(self, *args):
        super().__init__(*args)
        self.sent = {}

    def post(self, message):
        pass

    def wait(self, message):
        generator = torch.Generator().manual_seed(zlib.crc32(repr(message).encode()))
        return torch.randn(self.shapes[message.name], generator=generator).to(self.device, self.dtype)

    def send(self, message, tensor):
        # A narrow message holds fp32 numbers in bf16's places, and their lower halves may look like NaN.
        narrow = message.name in ("write", "d_write")
        self.sent[message] = (tensor.view(torch.int16) if narrow else tensor).detach().clone()

    def drain(self):
        pass


class FusedStepAlone(FusedStep):
    def _transport(self, sizes):
        width, dtype = self.config.hidden_size, self.config.pipeline_dtype
        n = self.config.mhc.num_residual_streams
        wide, narrow = (*sizes, n * width), (*sizes, packed.width(width, n, dtype))
        shapes = {"streams": wide, "mixed": wide, "d_streams": wide, "write": narrow, "d_write": narrow}
        device = next(self.chunks[0].parameters()).device
        streams = streams_for(device, "nccl")
        return Neighbours(self.plan, self.rank, shapes, dtype, device, streams)


def fused_chunk(kind, mhc, late, whole, overlap, accumulate, settings):
    config = make_config(kind, **settings)
    spec = wrap_block_spec(te_spec(config, kind), mhc, config)
    # Behind the check of this setting: without a pipeline Megatron's schedule would run, not the one below.
    config.delay_wgrad_compute = late
    model = GPTModel(
        config,
        spec,
        vocab_size=512,
        max_sequence_length=SEQ,
        pre_process=whole,
        post_process=whole,
        position_embedding_type="rope",
        mtp_block_spec=mtp_spec(config, None, te=True),
    )
    for module in model.modules():
        # Not by config.gradient_accumulation_fusion, with which the head would ask for apex.
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = accumulate
    if not whole:  # the only stage to Megatron; here one between others
        model.decoder.final_layernorm = None
        for at, layer in enumerate(model.decoder.layers):
            layer.layer_number = 2 + at
    wake(model)
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, overlap_grad_reduce=overlap, delay_wgrad_compute=late
    )
    return DistributedDataParallel(config, ddp, model.cuda())


def fused_step(kind, late, boundary=None, overlap=False, accumulate=True, **settings):
    """What a step of `--mhc-pipeline-schedule fused` leaves: main gradients, what was sent, losses.

    Args:
        late: delay weight gradients.
        boundary: of rank 1 of 4 with two chunks; None for a whole model, a pipeline of one stage.
        overlap: reduce gradients as they come, in a second step; the first finds out which there are.
        accumulate: weight gradients in their GEMM, as --gradient-accumulation-fusion does.
    """
    tensor_parallel.model_parallel_cuda_manual_seed(3, force_reset_rng=True)
    torch.manual_seed(3)
    whole = boundary is None
    mhc = MHCConfig(pipeline_schedule="fused", pp_boundary=boundary or "whole")
    count = 1 if whole else 2
    chunks = [fused_chunk(kind, mhc, late, whole, overlap, accumulate, settings) for _ in range(count)]
    config = chunks[0].config
    delaying = [m for chunk in chunks for m in chunk.modules() if is_delayed(m)]
    assert bool(delaying) == late
    if overlap:
        config.no_sync_func = [chunk.no_sync for chunk in chunks]
    layers = config.num_layers
    plan = Plan(1, 1, 3, fused=True, layers=layers)
    if not whole:
        plan = Plan(4, 2, 4, boundary=boundary, fused=True, layers=layers)
    positions = torch.arange(SEQ, device="cuda").expand(BATCH, SEQ)

    def forward_step(iterator, model):
        if not whole:
            return model(None, None, None), None
        tokens = next(iterator)
        mask = torch.ones(BATCH, SEQ, device="cuda")
        losses = model(tokens, positions, None, labels=tokens.roll(-1, 1), loss_mask=mask)
        return losses, lambda losses: (losses.float().mean(), losses.detach().clone())

    generator = torch.Generator().manual_seed(5)
    batches = [torch.randint(0, 512, (BATCH, SEQ), generator=generator).cuda() for _ in range(3)]
    for _ in range(1 + overlap):
        for chunk in chunks:
            chunk.zero_grad_buffer()
        step = FusedStepAlone(
            plan,
            0 if whole else 1,
            chunks,
            [iter(batches) for _ in chunks],
            forward_step,
            ProcessGroupCollection.use_mpu_process_groups(),
            (SEQ, BATCH),
            collect_non_loss_data=False,
            first_val_step=None,
        )
        step.run()
        for chunk in chunks:
            chunk.finish_grad_sync()
    torch.cuda.synchronize()
    found = {
        f"{at} {name}": parameter.main_grad.clone()
        for at, chunk in enumerate(chunks)
        for name, parameter in chunk.module.named_parameters()
    }
    found |= {str(message): tensor for message, tensor in step.transport.sent.items()}
    return found | {f"loss {at}": loss for at, loss in enumerate(step.reports)}


LATE = {
    "dense": ("dense", {}),
    "biased": ("dense", dict(add_bias_linear=True, add_qkv_bias=True)),
    "moe": ("moe", {}),
    "mla": ("mla", {}),
    "mtp": ("dense", dict(mtp_num_layers=1)),
    "recompute": ("dense", dict(recompute_granularity="selective", recompute_modules=["layernorm", "mlp"])),
    "overlap": ("dense", dict(overlap=True)),
    "overlap-unfused": ("dense", dict(overlap=True, accumulate=False)),
    "unfused": ("moe", dict(accumulate=False)),
    "whole": ("dense", dict(boundary="whole", num_layers=2)),
    "split": ("dense", dict(boundary="split", num_layers=2)),
    "whole-moe": ("moe", dict(boundary="whole", num_layers=3, moe_layer_freq=[0, 1, 1])),
    "split-moe": ("moe", dict(boundary="split", num_layers=3, moe_layer_freq=[0, 1, 1])),
}


@pytest.mark.parametrize("case", LATE)
def test_delayed_weight_gradients_change_nothing(case, monkeypatch):
    """Not a bit, where two steps without delay agree bit for bit; else no more than those differ."""
    monkeypatch.setenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")
    kind, settings = LATE[case]
    plain, again, late = (fused_step(kind, late, **settings) for late in (False, False, True))
    assert plain.keys() == late.keys()
    noise = max(relative(again[name].float(), plain[name].float()) for name in plain)
    changed = {name: relative(late[name].float(), plain[name].float()) for name in plain}
    worst = max(changed, key=changed.get)
    print(f"{case}: {len(plain)} tensors; twice without delay {noise:.1e}, with delay {changed[worst]:.1e}")
    assert all(tensor.isfinite().all() for tensor in late.values())
    assert all(late[name].abs().max() > 0 for name in late if name.endswith("weight"))
    assert changed[worst] <= (max(10 * noise, 1e-2) if noise else 0), worst


def test_a_step_without_its_delayed_weight_gradients_is_an_error(monkeypatch):
    monkeypatch.setattr(DelayedWeights, "compute", lambda self: None)
    with pytest.raises(RuntimeError, match="without the weight gradients of .*linear_fc2"):
        fused_step("dense", True, num_layers=2)

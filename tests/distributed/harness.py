"""One training iteration of a tiny GPT in any parallel layout, compared with a single process.

Parameters get values that depend on their global name alone, so every layout starts from the same
model. `reference` returns the full gradients of a world of one; each rank of a layout then compares
all gradients that it holds, shards and copies alike, with its part of them.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch._dynamo  # optimizers and recompute import it lazily: here once, not on every forked rank
import torch.distributed as dist
from torch import Tensor

from megatron_mhc.testing import cpu, ranks

cpu.install()

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    cpu.patch_megatron()
    cpu.use_local_modules()
    from megatron.core import parallel_state as ps
    from megatron.core import tensor_parallel
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.enums import ModelType
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_decoder_block_spec,
        get_gpt_decoder_layer_specs,
        get_gpt_mtp_block_spec,
    )
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.transformer import MLATransformerConfig, TransformerConfig
    from megatron.core.transformer.module import Float16Module, MegatronModule
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from parameters import fill, global_parameters, gradient, shard  # noqa: E402

from megatron_mhc import MHCConfig  # noqa: E402
from megatron_mhc.specs import wrap_block_spec  # noqa: E402

logging.getLogger("megatron").setLevel(logging.ERROR)

SEQUENCE, MICRO_BATCH, MICRO_BATCHES, VOCABULARY, LAYERS = 16, 2, 4, 64, 4
FLOOR = {torch.float64: 1e-6, torch.float32: 1e-2}

_SWIGLU = dict(gated_linear_unit=True, activation_func=torch.nn.functional.silu, add_bias_linear=False)
_MOE = dict(
    num_moe_experts=4,
    moe_router_topk=2,
    moe_ffn_hidden_size=32,
    moe_router_load_balancing_type="none",
    moe_token_dispatcher_type="alltoall",
    moe_grouped_gemm=False,
)
_MLA = dict(
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_head_dim=8,
    qk_pos_emb_head_dim=8,
    v_head_dim=12,
    rope_type="rope",
    apply_rope_fusion=False,
    qk_layernorm=True,
)
KINDS: dict[str, dict[str, Any]] = {
    "dense": dict(num_query_groups=2),
    "three_layers": dict(num_layers=3),
    "biased": dict(
        normalization="LayerNorm",
        add_bias_linear=True,
        gated_linear_unit=False,
        activation_func=torch.nn.functional.gelu,
        add_qkv_bias=True,
    ),
    "tied": dict(),
    "token_local": dict(num_query_groups=2),  # for CP, which Megatron's local attention refuses
    "token_local_moe": _MOE,
    "moe": _MOE,
    "moe_shared": _MOE | dict(moe_shared_expert_intermediate_size=32),
    "moe_auxiliary_loss": _MOE | dict(moe_router_load_balancing_type="aux_loss", moe_aux_loss_coeff=0.1),
    "moe_after_dense": _MOE | dict(moe_layer_freq=[0, 1, 1, 1]),
    "mla": _MLA,
    "mtp": dict(mtp_num_layers=1),
    "mtp_moe": _MOE | dict(mtp_num_layers=1),
}


@dataclasses.dataclass(frozen=True)
class Layout:
    """Sizes of the parallel groups, and whether DDP shards its buffers as the distributed optimizer needs."""

    tp: int = 1
    pp: int = 1
    vpp: int | None = None
    ep: int = 1
    etp: int | None = None
    cp: int = 1
    sp: bool = False
    distributed_optimizer: bool = False

    def initialize(self) -> None:
        ps.destroy_model_parallel()
        ps.initialize_model_parallel(
            tensor_model_parallel_size=self.tp,
            pipeline_model_parallel_size=self.pp,
            virtual_pipeline_model_parallel_size=self.vpp,
            context_parallel_size=self.cp,
            expert_model_parallel_size=self.ep,
            expert_tensor_parallel_size=self.etp,
        )
        tensor_parallel.model_parallel_cuda_manual_seed(1234, force_reset_rng=True)

    def config(self, kind: str, **overrides: Any) -> TransformerConfig:
        dtype = overrides.get("params_dtype", torch.float64)
        settings = dict(
            num_layers=LAYERS,
            hidden_size=32,
            ffn_hidden_size=64,
            num_attention_heads=4,
            normalization="RMSNorm",
            hidden_dropout=0.0,
            attention_dropout=0.0,
            bias_dropout_fusion=False,
            bias_activation_fusion=False,
            masked_softmax_fusion=False,
            gradient_accumulation_fusion=False,
            use_cpu_initialization=True,
            params_dtype=dtype,
            pipeline_dtype=dtype,
            deallocate_pipeline_outputs=True,  # as megatron.training does
            moe_router_dtype="fp64" if dtype == torch.float64 else "fp32",
            tensor_model_parallel_size=self.tp,
            pipeline_model_parallel_size=self.pp,
            virtual_pipeline_model_parallel_size=self.vpp,
            context_parallel_size=self.cp,
            expert_model_parallel_size=self.ep,
            expert_tensor_parallel_size=self.etp,
            sequence_parallel=self.sp,
            # Two stages exchange wrong tensors when virtual stages batch their messages.
            overlap_p2p_comm=self.vpp is not None,
            batch_p2p_comm=self.vpp is None,
        )
        settings |= _SWIGLU | KINDS[kind] | overrides
        make = MLATransformerConfig if kind == "mla" else TransformerConfig
        return make(**settings)


@dataclasses.dataclass
class Iteration:
    """The mean loss and, by global name, the full gradients of one iteration."""

    loss: float
    gradients: dict[str, Tensor]


@functools.cache
def reference(kind: str, mhc: MHCConfig | None, dtype: torch.dtype = torch.float64) -> Iteration:
    """One iteration in a world of one; `mhc` None is Megatron's own model."""
    return ranks.run_ranks(1, _reference, kind, mhc, dtype)[0]


def _reference(kind: str, mhc: MHCConfig | None, dtype: torch.dtype) -> Iteration:
    layout = Layout()
    layout.initialize()
    config = layout.config(kind, params_dtype=dtype)
    chunks = build(layout, config, kind, mhc)
    loss = iterate(chunks, config)
    return Iteration(loss, {name: gradient(p).clone() for name, p in global_parameters(chunks)})


@dataclasses.dataclass
class Comparison:
    """Where a layout differs from its reference: |loss error| and each gradient's relative error."""

    loss: float
    gradients: dict[str, float]

    @property
    def worst(self) -> tuple[float, str]:
        return max((error, name) for name, error in self.gradients.items())


def compare(
    layout: Layout,
    kind: str,
    mhc: MHCConfig | None,
    expected: Iteration,
    overrides: dict[str, Any] | None = None,
    spoil: Callable[[Tensor, str], None] | None = None,
) -> Comparison:
    """Run one iteration on this rank of `layout`; the result covers all ranks.

    A gradient's error is max|g - e| / max|e|, where max|e| counts as at least FLOOR times the model's
    largest gradient: H_res of equal streams has no gradient at all, and an alpha's is a sum over tokens
    that nearly cancels.

    Args:
        overrides: config settings that must not change the result (recompute, dispatcher, ...).
        spoil: called on every (parameter, name), to break what a test wants to see detected.
    """
    layout.initialize()
    config = layout.config(kind, **(overrides or {}))
    chunks = build(layout, config, kind, mhc)
    if spoil:
        for name, parameter in global_parameters(chunks):
            spoil(parameter, name)
    loss = iterate(chunks, config)
    if layout.distributed_optimizer:
        _restore_sharded_gradients(chunks)
    floor = FLOOR[config.params_dtype] * max(g.abs().max().item() for g in expected.gradients.values())
    mine: dict[str, float] = {}
    for name, parameter in global_parameters(chunks):
        wanted = shard(expected.gradients[name], parameter)
        error = (gradient(parameter) - wanted).abs().max() / max(expected.gradients[name].abs().max(), floor)
        mine[name] = max(error.item(), mine.get(name, 0.0))
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    errors: dict[str, float] = {}
    for part in everyone:
        for name, error in part.items():
            errors[name] = max(error, errors.get(name, 0.0))
    if missing := set(expected.gradients) - set(errors):
        raise AssertionError(f"no rank holds {sorted(missing)}")
    return Comparison(abs(loss - expected.loss), errors)


def build(
    layout: Layout,
    config: TransformerConfig,
    kind: str,
    mhc: MHCConfig | None,
    ddp: dict[str, Any] | None = None,
) -> list[DistributedDataParallel]:
    """This rank's model chunks, filled by `fill` and wrapped in DDP."""
    dtype = torch.bfloat16 if config.bf16 else config.params_dtype
    if dtype == torch.float64:
        keep_float64()
    chunks: list[Any] = []
    for stage in range(layout.vpp or 1):
        vp_stage = stage if layout.vpp else None
        where = dict(ignore_virtual=vp_stage is None, vp_stage=vp_stage)
        model = GPTModel(
            config,
            spec(config, kind, mhc, vp_stage),
            VOCABULARY,
            SEQUENCE,
            pre_process=ps.is_pipeline_first_stage(**where),
            post_process=ps.is_pipeline_last_stage(**where),
            share_embeddings_and_output_weights=kind == "tied",
            position_embedding_type="rope",
            mtp_block_spec=mtp_spec(config, vp_stage),
            vp_stage=vp_stage,
        )
        model.model_type = ModelType.encoder_or_decoder
        chunks.append(model)
    fill(chunks)
    if config.bf16:
        chunks = [Float16Module(config, chunk) for chunk in chunks]
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=dtype == torch.bfloat16,
        use_distributed_optimizer=layout.distributed_optimizer,
        **(ddp or {}),
    )
    config.finalize_model_grads_func = finalize_model_grads
    return [
        DistributedDataParallel(config, ddp_config, chunk, disable_bucketing=i > 0)
        for i, chunk in enumerate(chunks)
    ]


def spec(
    config: TransformerConfig, kind: str, mhc: MHCConfig | None, vp_stage: int | None
) -> TransformerBlockSubmodules:
    """The local block spec of this stage, wrapped unless `mhc` is None."""
    block = get_gpt_decoder_block_spec(
        config, use_transformer_engine=False, normalization=config.normalization, vp_stage=vp_stage
    )
    if kind.startswith("token_local"):
        for layer in block.layer_specs:
            layer.submodules.self_attention.submodules.core_attention = TokenLocalAttention
    return block if mhc is None else wrap_block_spec(block, mhc, config, vp_stage)


def mtp_spec(config: TransformerConfig, vp_stage: int | None) -> Any:
    """The MTP block as megatron.training builds it: plain layers on the contracted streams."""
    if not config.mtp_num_layers:
        return None
    layers = get_gpt_decoder_layer_specs(
        config, use_transformer_engine=False, normalization=config.normalization, vp_stage=vp_stage
    )
    return get_gpt_mtp_block_spec(config, layers[-1], use_transformer_engine=False, vp_stage=vp_stage)


class TokenLocalAttention(MegatronModule):
    """Test-only core attention in which every token sees itself alone, so CP needs no exchange."""

    def __init__(self, config: TransformerConfig, *_: Any, **__: Any):
        super().__init__(config)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        # [s, b, heads, d] and [s, b, groups, d] -> [s, b, heads * d]
        repeat = query.shape[2] // key.shape[2]
        key, value = key.repeat_interleave(repeat, dim=2), value.repeat_interleave(repeat, dim=2)
        gate = torch.sigmoid((query * key).sum(-1, keepdim=True))
        return (gate * value).flatten(2)


def keep_float64() -> None:
    """Test-only: make Megatron's hard-coded casts to fp32 (loss, router) leave float64 as it is.

    Rotary angles stay fp32: they are constants, the same in every layout.
    """
    to_float, softmax = Tensor.float, torch.softmax

    def float_(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self if self.dtype == torch.float64 else to_float(self, *args, **kwargs)

    def softmax_(input: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
        return softmax(input, dim, dtype=torch.float64 if input.dtype == torch.float64 else dtype)

    Tensor.float, torch.softmax = float_, softmax_


def _restore_sharded_gradients(chunks: list[Any]) -> None:
    """All-gather gradients that were reduce-scattered; the rest of each buffer is not valid."""
    for chunk in chunks:
        for buffer in chunk.buffers + chunk.expert_parallel_buffers:
            group = buffer.data_parallel_group
            for bucket in buffer.buckets:
                shards = bucket.grad_data.view(group.size(), -1)
                own = shards[group.rank()].clone()
                bucket.grad_data.zero_()
                shards[group.rank()].copy_(own)
                dist.all_reduce(bucket.grad_data, group=group)


def tokens(count: int, seed: int = 0) -> Tensor:
    """`count` micro-batches of token ids: [count, micro-batch, sequence + 1]."""
    generator = torch.Generator().manual_seed(1234 + seed)
    return torch.randint(0, VOCABULARY, (count, MICRO_BATCH, SEQUENCE + 1), generator=generator)


def iterate(
    chunks: list[Any],
    config: TransformerConfig,
    seed: int = 0,
    count: int = MICRO_BATCHES,
    schedule: Callable[..., Any] | None = None,
    **options: Any,
) -> float:
    """One forward and backward pass through Megatron's schedule; returns the mean loss of the batch.

    Args:
        count: micro-batches of the whole batch.
        schedule: another forward_backward_func.
        options: more of its arguments.
    """
    dp_rank, dp_size = ps.get_data_parallel_rank(), ps.get_data_parallel_world_size()
    micro_batches = list(tokens(count, seed)[dp_rank::dp_size])
    cp_rank, cp_size = ps.get_context_parallel_rank(), ps.get_context_parallel_world_size()
    # A context rank holds one chunk from the front and its mirror from the back, as RoPE expects.
    pieces = torch.arange(SEQUENCE).chunk(2 * cp_size)
    local = torch.cat([pieces[cp_rank], pieces[-1 - cp_rank]])
    mask = torch.ones(SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)[None, None]
    positions = local.expand(MICRO_BATCH, -1).contiguous()

    def forward_step(iterator: Iterator[Tensor], model: Any) -> Any:
        batch = next(iterator)
        labels = batch[:, 1:][:, local].contiguous()
        output = model(
            batch[:, :-1][:, local].contiguous(),
            positions,
            mask,
            labels=labels,
            loss_mask=torch.ones_like(labels, dtype=config.params_dtype),
        )

        def loss_func(losses: Tensor) -> Any:
            # The schedule multiplies by the size of the context group, DDP's mean divides by it.
            loss = losses.sum() / (MICRO_BATCH * SEQUENCE)
            return loss, {"loss": loss.detach().clone()}

        return output, loss_func

    for chunk in chunks:
        chunk.zero_grad_buffer()
    several = len(chunks) > 1
    reports = (schedule or get_forward_backward_func())(
        forward_step_func=forward_step,
        data_iterator=[iter(micro_batches) for _ in chunks] if several else iter(micro_batches),
        model=chunks if several else chunks[0],
        num_microbatches=len(micro_batches),
        seq_length=SEQUENCE,
        micro_batch_size=MICRO_BATCH,
        **(dict(forward_only=False) | options),
    )
    total = torch.tensor([sum(float(r["loss"]) for r in reports), len(reports)], dtype=torch.float64)
    dist.all_reduce(total)
    return (total[0] / total[1]).item() * cp_size

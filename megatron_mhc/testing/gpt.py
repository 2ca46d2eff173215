"""A small GPT whose weights and data are the same in every parallel layout.

Parameters get values that depend on their global name alone (`parameters.fill`), batches follow from a
seed. Runs on CUDA with NCCL, and on a CPU with gloo once `testing.cpu` is installed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
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
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import Tensor

from megatron_mhc import MHCConfig
from megatron_mhc.specs import wrap_block_spec
from megatron_mhc.testing.parameters import fill

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
    "mtp2": dict(mtp_num_layers=2),
    "tied_mtp": dict(mtp_num_layers=1),
    "token_local_mtp": dict(num_query_groups=2, mtp_num_layers=1),
}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What a batch looks like: tokens of a sequence, sequences of a micro-batch, words."""

    sequence: int = 16
    micro_batch: int = 2
    vocabulary: int = 64


SMALL = Sizes()


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

    def initialize(self, **options: Any) -> None:
        """Make Megatron's process groups, and seed its generators; `options` go to Megatron."""
        ps.destroy_model_parallel()
        ps.initialize_model_parallel(
            tensor_model_parallel_size=self.tp,
            pipeline_model_parallel_size=self.pp,
            virtual_pipeline_model_parallel_size=self.vpp,
            context_parallel_size=self.cp,
            expert_model_parallel_size=self.ep,
            expert_tensor_parallel_size=self.etp,
            **options,
        )
        tensor_parallel.model_parallel_cuda_manual_seed(1234, force_reset_rng=True)

    def config(self, kind: str, **overrides: Any) -> TransformerConfig:
        """The model's configuration, float64 unless `params_dtype` says otherwise."""
        dtype = overrides.get("params_dtype", torch.float64)
        settings: dict[str, Any] = dict(
            num_layers=4,
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


def build(
    layout: Layout,
    config: TransformerConfig,
    kind: str,
    mhc: MHCConfig | None,
    ddp: dict[str, Any] | None = None,
    sizes: Sizes = SMALL,
    te: bool = False,
    weights: Callable[[list[Any]], None] = fill,
    wrap: Callable[..., list[DistributedDataParallel]] | None = None,
    model: Callable[..., Any] | None = None,
) -> list[DistributedDataParallel]:
    """This rank's model chunks, filled by `weights` and wrapped in DDP.

    Args:
        mhc: None for Megatron's own model.
        ddp: more of DDP's configuration.
        te: Transformer Engine's layers, not Megatron's local ones.
        wrap: what wraps the chunks instead, given (chunks, config, DDP's configuration).
        model: what builds a stage of the model instead, given (config, mhc, of Megatron's model: pre_process,
            post_process, share_embeddings_and_output_weights, vp_stage).
    """
    dtype = torch.bfloat16 if config.bf16 else config.params_dtype
    if dtype == torch.float64:
        keep_float64()
    chunks: list[Any] = []
    for stage in range(layout.vpp or 1):
        vp_stage = stage if layout.vpp else None
        where = dict(ignore_virtual=vp_stage is None, vp_stage=vp_stage)
        part: dict[str, Any] = dict(
            pre_process=ps.is_pipeline_first_stage(**where),
            post_process=ps.is_pipeline_last_stage(**where),
            share_embeddings_and_output_weights=kind.startswith("tied"),
            vp_stage=vp_stage,
        )
        if model is not None:
            chunks.append(model(config, mhc, **part))
            continue
        chunk = GPTModel(
            config,
            spec(config, kind, mhc, vp_stage, te),
            sizes.vocabulary,
            sizes.sequence,
            position_embedding_type="rope",
            mtp_block_spec=mtp_spec(config, vp_stage, te, kind),
            **part,
        )
        chunk.model_type = ModelType.encoder_or_decoder
        chunks.append(chunk)
    weights(chunks)
    chunks = [chunk.cuda() for chunk in chunks]
    if config.bf16:
        chunks = [Float16Module(config, chunk) for chunk in chunks]
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=dtype == torch.bfloat16,
        use_distributed_optimizer=layout.distributed_optimizer,
        **(ddp or {}),
    )
    config.finalize_model_grads_func = finalize_model_grads
    if wrap is not None:
        return wrap(chunks, config, ddp_config)
    return [
        DistributedDataParallel(config, ddp_config, chunk, disable_bucketing=i > 0)
        for i, chunk in enumerate(chunks)
    ]


def spec(
    config: TransformerConfig, kind: str, mhc: MHCConfig | None, vp_stage: int | None, te: bool = False
) -> TransformerBlockSubmodules:
    """The block spec of this stage, wrapped unless `mhc` is None."""
    block = get_gpt_decoder_block_spec(
        config, use_transformer_engine=te, normalization=config.normalization, vp_stage=vp_stage
    )
    if kind.startswith("token_local"):
        _see_one_token(block.layer_specs)
    return block if mhc is None else wrap_block_spec(block, mhc, config, vp_stage)


def _see_one_token(layers: Any) -> None:
    for layer in layers:
        layer.submodules.self_attention.submodules.core_attention = TokenLocalAttention


def mtp_spec(config: TransformerConfig, vp_stage: int | None, te: bool = False, kind: str = "mtp") -> Any:
    """The MTP block as megatron.training builds it, of plain layers."""
    if not config.mtp_num_layers:
        return None
    layers = get_gpt_decoder_layer_specs(
        config, use_transformer_engine=te, normalization=config.normalization, vp_stage=vp_stage
    )
    if kind.startswith("token_local"):
        _see_one_token(layers)
    return get_gpt_mtp_block_spec(config, layers[-1], use_transformer_engine=te, vp_stage=vp_stage)


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


_router_gemm = moe_utils.te_general_gemm


def exact_router(exact: bool = True) -> None:
    """Test-only: have routers multiply in their own precision, or as Megatron does.

    Where Transformer Engine is installed, Megatron's float32 routers multiply by its GEMM, which rounds
    what it multiplies to TF32. A difference in the last bit of float32 then becomes 5e-4 of a factor where
    it crosses a rounding boundary, and 2e-4 of a gradient; no token changes its expert for that.
    """
    moe_utils.te_general_gemm = None if exact else _router_gemm


_casts = Tensor.float, torch.softmax


def keep_float64() -> None:
    """Test-only: make Megatron's hard-coded casts to fp32 (loss, router) leave float64 as it is.

    Rotary angles stay fp32: they are constants, the same in every layout.
    """
    to_float, softmax = _casts

    def float_(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self if self.dtype == torch.float64 else to_float(self, *args, **kwargs)

    def softmax_(input: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
        return softmax(input, dim, dtype=torch.float64 if input.dtype == torch.float64 else dtype)

    Tensor.float, torch.softmax = float_, softmax_  # type: ignore[assignment, method-assign]


def tokens(count: int, seed: int = 0, sizes: Sizes = SMALL) -> Tensor:
    """`count` micro-batches of random token ids: [count, micro-batch, sequence + 1]."""
    generator = torch.Generator().manual_seed(1234 + seed)
    shape = (count, sizes.micro_batch, sizes.sequence + 1)
    return torch.randint(0, sizes.vocabulary, shape, generator=generator)


def forward_backward(
    chunks: list[Any],
    config: TransformerConfig,
    batch: Tensor,
    schedule: Callable[..., Any] | None = None,
    masked: bool = True,
    **options: Any,
) -> list[dict[str, Tensor]]:
    """Run a batch's forward and backward passes; returns the loss reports of the last stage.

    Args:
        batch: token ids of all data-parallel ranks, [micro-batches, micro-batch, sequence + 1].
        schedule: another forward_backward_func than Megatron's.
        masked: whether attention gets a causal mask, which Transformer Engine's does without.
        options: more arguments of the schedule.
    """
    _, size, length = batch.shape
    sequence = length - 1
    dp_rank, dp_size = ps.get_data_parallel_rank(), ps.get_data_parallel_world_size()
    micro_batches = list(batch[dp_rank::dp_size].cuda())
    cp_rank, cp_size = ps.get_context_parallel_rank(), ps.get_context_parallel_world_size()
    # A context rank holds one chunk from the front and its mirror from the back, as RoPE expects.
    pieces = torch.arange(sequence, device="cuda").chunk(2 * cp_size)
    local = torch.cat([pieces[cp_rank], pieces[-1 - cp_rank]])
    mask = None
    if masked:
        mask = torch.ones(sequence, sequence, dtype=torch.bool, device="cuda").triu(1)[None, None]
    positions = local.expand(size, -1).contiguous()

    def forward_step(iterator: Iterator[Tensor], model: Any, return_schedule_plan: bool = False) -> Any:
        batch = next(iterator)
        labels = batch[:, 1:][:, local].contiguous()
        output = (model.build_schedule_plan if return_schedule_plan else model)(
            batch[:, :-1][:, local].contiguous(),
            positions,
            mask,
            labels=labels,
            loss_mask=torch.ones_like(labels, dtype=config.params_dtype),
        )

        def loss_func(losses: Tensor) -> Any:
            # The schedule multiplies by the size of the context group, DDP's mean divides by it.
            loss = losses.sum() / (size * sequence)
            return loss, {"loss": loss.detach().clone()}

        return output, loss_func

    several = len(chunks) > 1
    return (schedule or get_forward_backward_func())(
        forward_step_func=forward_step,
        data_iterator=[iter(micro_batches) for _ in chunks] if several else iter(micro_batches),
        model=chunks if several else chunks[0],
        num_microbatches=len(micro_batches),
        seq_length=sequence,
        micro_batch_size=size,
        **(dict(forward_only=False) | options),
    )


def iterate(chunks: list[Any], config: TransformerConfig, batch: Tensor, **options: Any) -> float:
    """Clear the gradients, run `forward_backward`, and return the mean loss of the whole batch."""
    for chunk in chunks:
        chunk.zero_grad_buffer()
    reports = forward_backward(chunks, config, batch, **options)
    sums = [sum(float(report["loss"]) for report in reports), len(reports)]
    total = torch.tensor(sums, dtype=torch.float64, device="cuda")
    dist.all_reduce(total)
    return (total[0] / total[1]).item() * ps.get_context_parallel_world_size()

"""How each release's megatron.training chooses layers and is started; `releases` says which has what.

0.17 and 0.18 know no GPTModelConfig: a script hands `pretrain` a function that builds the model, and the
script, not megatron.training, chooses the layers. 0.17 parses the command line inside of `pretrain`.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from megatron.core import mpu
from megatron.core.enums import ModelType
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.models.gpt.experimental_attention_variant_module_specs import (
    get_transformer_block_with_experimental_attention_variant_spec as variant_spec,
)
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.models.gpt.heterogeneous.heterogeneous_layer_specs import get_gpt_heterogeneous_layer_spec
from megatron.core.transformer.heterogeneous.heterogeneous_config import HeterogeneousTransformerConfig
from megatron.core.transformer.multi_token_prediction import mtp_on_this_rank
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_batch_on_this_cp_rank
from torch import Tensor

from megatron_mhc.releases import check_hybrid, release

BATCH_KEYS = ("tokens", "position_ids", "labels", "loss_mask", "attention_mask")
Spec = Callable[..., Any]  # gpt_mhc_spec, called as (args, config, vp_stage)


def stock_layers(args: Namespace, config: TransformerConfig, vp_stage: int | None) -> Any:
    """The spec of the layers that Megatron chooses for a GPT: of one, or of a block."""
    if release().spec_is_called:
        from megatron.training.argument_utils import gpt_config_from_args
        from megatron.training.models.gpt import default_layer_spec

        return default_layer_spec(gpt_config_from_args(args, config), vp_stage)
    if config.transformer_impl == "inference_optimized":
        raise ValueError("--transformer-impl inference_optimized: use transformer_engine or local")
    if config.experimental_attention_variant is not None:
        return variant_spec(config=config, vp_stage=vp_stage)
    with_te = config.transformer_impl == "transformer_engine"
    if isinstance(config, HeterogeneousTransformerConfig) and config.num_moe_experts is None:
        return get_gpt_heterogeneous_layer_spec(config, with_te)
    # Of dense layers, and of dense and MoE layers in turns.
    return gpt_layer_specs.get_gpt_decoder_block_spec(config, vp_stage=vp_stage, **_kind(config))


def _kind(config: TransformerConfig) -> dict[str, Any]:
    """What megatron.core's choices of layers are told beside the config."""
    return dict(
        use_transformer_engine=config.transformer_impl == "transformer_engine",
        normalization=config.normalization,
        qk_l2_norm=config.qk_l2_norm,
    )


def model_config(args: Namespace, spec: Any) -> Any:
    """Megatron's description of the model of these arguments; None where a GPT has none.

    Args:
        spec: that stands for --spec: of a GPT, or of a HybridModel; None for Megatron's own.
    """
    from megatron.training import argument_utils

    if args.hybrid_layer_pattern is not None:
        check_hybrid()
        model = argument_utils.hybrid_config_from_args(args)
        if spec is not None:
            model.hybrid_stack_spec = spec
    elif not release().spec_is_called:
        return None
    else:
        model = argument_utils.gpt_config_from_args(args)
        if spec is not None:
            model.transformer_layer_spec = spec
    return model


def train(
    add_args: Callable[[ArgumentParser], ArgumentParser],
    choose: Callable[[Namespace], Any],
    datasets: Any,
    step: Any,
    embedding_ranks: Any,
) -> None:
    """Read the command line and run Megatron's `pretrain` on its model.

    Args:
        choose: of the parsed arguments, the spec as for `model_config`; it raises what the door refuses.
    """
    from megatron.training import get_args, pretrain

    if release().pretrain_parses:

        def build(*args: Any, **kwargs: Any) -> Any:
            given = get_args()
            return _build(given, choose(given), model_config(given, None), *args, **kwargs)

        pretrain(
            datasets,
            build,
            ModelType.encoder_or_decoder,
            step,
            extra_args_provider=add_args,
            get_embedding_ranks=embedding_ranks,
        )
        return
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args

    args = parse_and_validate_args(extra_args_provider=add_args)
    spec = choose(args)
    model = model_config(args, spec)
    builders = () if release().spec_is_called else (partial(_build, args, spec, model),)
    pretrain(
        pretrain_cfg_container_from_args(args, model),
        datasets,
        *builders,
        ModelType.encoder_or_decoder,
        step,
        get_embedding_ranks=embedding_ranks,
    )


def predicts(config: TransformerConfig, vp_stage: int | None) -> bool:
    """Whether this model chunk holds layers of multi-token prediction."""
    where: dict[str, Any] = dict(ignore_virtual=False, vp_stage=vp_stage)
    if release().pretrain_parses:
        return bool(mtp_on_this_rank(config, **where))
    return bool(mtp_on_this_rank(config.pipeline_model_parallel_layout, config.mtp_num_layers, **where))


def tp_batch(data_iterator: Iterator[dict[str, Any]] | None, config: Any, vp_stage: int | None) -> Any:
    """Read one micro-batch on TP rank 0 and broadcast what this stage reads of it over TP.

    Returns:
        tokens, position_ids, labels, loss_mask: [b, s]; attention_mask: [b, 1, s, s]; None for what is not
        read.
    """
    from megatron.training import get_args

    args, here = get_args(), predicts(config, vp_stage)
    if release().pretrain_parses:
        from megatron.training.utils import get_batch_on_this_tp_rank as read_tp_batch

        return read_tp_batch(data_iterator, mtp_on_this_rank=here)
    from megatron.core.utils import get_batch_on_this_tp_rank

    batch: dict[str, Tensor | None] = dict.fromkeys(BATCH_KEYS)
    tp_rank = mpu.get_tensor_model_parallel_rank()
    if tp_rank == 0:
        assert data_iterator is not None
        sample = next(data_iterator)
        batch = {k: sample[k].cuda(non_blocking=True) if k in sample else None for k in BATCH_KEYS}
    return get_batch_on_this_tp_rank(
        batch,
        **{release().not_packed: False},
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=tp_rank,
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=here,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(),
        is_pipeline_last_stage=mpu.is_pipeline_last_stage(),
    )


def cp_batch(batch: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    """Keep this CP rank's tokens of what `tp_batch` returns."""
    kinds = {} if release().pretrain_parses else dict(is_hybrid_cp=False)
    kept: dict[str, Tensor | None] = get_batch_on_this_cp_rank(
        batch, **kinds, cp_group=mpu.get_context_parallel_group()
    )
    return kept


def _build(
    args: Namespace,
    spec: Spec | None,
    model: Any,
    pre_process: bool,
    post_process: bool,
    vp_stage: int | None = None,
    config: TransformerConfig | None = None,
    pg_collection: Any = None,
) -> Any:
    """A stage of the model, for a `pretrain` that asks for a function; `model`: of a HybridModel."""
    from megatron.training.arguments import core_transformer_config_from_args

    if model is not None:
        from megatron.training.models.hybrid import HybridModelBuilder

        return HybridModelBuilder(model).build_model(pg_collection, pre_process, post_process, vp_stage)
    config = config or core_transformer_config_from_args(args)
    choose = spec or stock_layers
    return GPTModel(
        config=config,
        transformer_layer_spec=choose(args, config, vp_stage),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        fp16_lm_cross_entropy=args.fp16_lm_cross_entropy,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        rope_scaling=args.use_rope_scaling,
        seq_len_interpolation_factor=args.rotary_seq_len_interpolation_factor,
        mtp_block_spec=_plain_mtp(config, vp_stage),
        vp_stage=vp_stage,
        pg_collection=pg_collection,
    )


def _plain_mtp(config: TransformerConfig, vp_stage: int | None) -> Any:
    """The spec of multi-token prediction, whose layers are plain ones."""
    if config.mtp_num_layers is None:
        return None
    kind = _kind(config)
    *_, last = gpt_layer_specs.get_gpt_decoder_layer_specs(config, vp_stage=vp_stage, **kind)
    with_te = kind["use_transformer_engine"]
    return gpt_layer_specs.get_gpt_mtp_block_spec(config, last, with_te, vp_stage=vp_stage)

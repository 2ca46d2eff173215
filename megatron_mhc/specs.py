"""Turn the layer specs that Megatron chooses into mHC specs."""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
from typing import Any

from megatron_mhc.version import check_version

check_version()  # another Megatron may lack what is imported below

from megatron.core.transformer import transformer_block
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import MoETransformerLayer, TransformerLayer
from megatron.core.utils import log_single_rank

from megatron_mhc import hooks, parallel
from megatron_mhc.backend import choose, device_type, norms_in_words
from megatron_mhc.carried import StreamsBlockSubmodules, remember
from megatron_mhc.chunk import ModelChunk, ModelChunks
from megatron_mhc.config import MHCConfig, flag, refuse_environment
from megatron_mhc.diagnostics.training import check_loop, check_writers
from megatron_mhc.hooks.uses import SPEC_USES
from megatron_mhc.layer import (
    HyperConnectionMoELayer,
    HyperConnectionTransformerLayer,
    unsupported_submodule,
)
from megatron_mhc.pipeline import auto
from megatron_mhc.pipeline.layer_times import Launch
from megatron_mhc.pipeline.links import sms_of_receives
from megatron_mhc.pipeline.options import check_config
from megatron_mhc.recompute.chunk import DroppingChunk
from megatron_mhc.refusals import SPEC_DOOR, refuse
from megatron_mhc.schedule.plans import OVERLAPPED
from megatron_mhc.streams import contract_norm_builder
from megatron_mhc.sublayer import bias_dropout

logger = logging.getLogger(__name__)


def wrap_layer_spec(spec: ModuleSpec, mhc: MHCConfig, chunks: ModelChunks | None = None) -> ModuleSpec:
    """Return a copy of a transformer layer's spec with mHC instead of its residual additions.

    Args:
        spec: of a TransformerLayer.
        mhc: mHC options.
        chunks: shared by the layers of a model chunk; `--mhc-recompute-layer-num` needs it, and
            `--mhc-boundary fused` then spans layers too.

    Raises:
        ValueError: a layer class or submodule that mHC cannot wrap, or recompute without `chunks`.
    """
    if mhc.recompute_layer_num != "off" and chunks is None:
        raise ValueError(
            f"{flag('recompute_layer_num')} {mhc.recompute_layer_num} needs to know all layers of a model "
            "chunk: wrap them by wrap_block_spec, not one by one by wrap_layer_spec"
        )
    if spec.module in (HyperConnectionTransformerLayer, HyperConnectionMoELayer):
        return spec
    layer = {
        TransformerLayer: HyperConnectionTransformerLayer,
        MoETransformerLayer: HyperConnectionMoELayer,
    }.get(spec.module)
    if layer is None:
        name = getattr(spec.module, "__name__", spec.module)
        raise ValueError(f"cannot wrap layers of {name}: mHC wraps megatron.core's TransformerLayer")
    if (part := unsupported_submodule(spec.submodules)) is not None:
        raise ValueError(f"cannot wrap a layer with {part}: mHC needs self-attention and an MLP, no more")
    submodules = dataclasses.replace(spec.submodules, self_attn_bda=bias_dropout, mlp_bda=bias_dropout)
    return ModuleSpec(
        module=layer,
        params={**spec.params, "mhc": mhc, "chunks": chunks},
        submodules=submodules,
        metainfo=spec.metainfo,
    )


def wrap_block_spec(
    spec: ModuleSpec | TransformerBlockSubmodules,
    mhc: MHCConfig,
    config: TransformerConfig,
    vp_stage: int | None = None,
) -> TransformerBlockSubmodules:
    """Turn what Megatron would build on this pipeline stage into its mHC form.

    Checks the configuration, remembers `mhc` (the pipeline's message width depends on it, see `carried`)
    and registers the hooks that mHC needs.

    Args:
        spec: a layer's spec, or a block's submodules with one spec per local layer.
        mhc: mHC options.
        config: the model's transformer config.
        vp_stage: virtual pipeline stage, None without them.

    Raises:
        ValueError: an unsupported configuration, layer or Megatron version; `log_interval` outside of
            megatron.training.
    """
    mhc = auto.resolved(config, mhc, launch=None)
    parallel.validate(config, mhc)
    parallel.validate_stages(config)
    check_config(config, mhc)
    check_loop(mhc)
    if isinstance(spec, TransformerBlockSubmodules):
        layers, norm = list(spec.layer_specs or []), spec.layer_norm
    else:
        layers = [spec] * get_num_layers_to_build(config, vp_stage)
        norm = transformer_block.LayerNormImpl
    if norm is None:
        raise ValueError("the block spec has no layer_norm: mHC contracts its streams at the final norm")
    hooks.require(training=mhc.log_interval > 0)
    remember(config, mhc)
    kind = ModelChunk if mhc.recompute_layer_num == "off" else DroppingChunk
    chunks = ModelChunks(config, mhc, len(layers), kind, sms_of_receives(config, mhc))
    return StreamsBlockSubmodules(
        layer_specs=[wrap_layer_spec(layer, mhc, chunks) for layer in layers],
        layer_norm=contract_norm_builder(norm, mhc),  # type: ignore[arg-type]
        mhc=mhc,
    )


class GPTScriptsCallThis:
    """The target of `--spec megatron_mhc.specs gpt_mhc_spec`: the spec Megatron would choose, with mHC.

    Megatron's GPT scripts call it. Scripts that build other models take what --spec names for the spec
    itself; it then says so, where a function would become the model's decoder. (The class has the name
    that Megatron's "specialize for ..." prints.)
    """

    def __call__(
        self, model_config: Any, config: Any = None, vp_stage: int | None = None
    ) -> TransformerBlockSubmodules:
        """Choose and wrap, for Megatron's `(model_config, vp_stage)` or for `(args, config, vp_stage)`.

        Args:
            model_config: Megatron's GPTModelConfig, or its parsed arguments where `config` is given.
            config: the TransformerConfig, as frameworks like slime hand it over; or vp_stage.
            vp_stage: virtual pipeline stage, None without them.

        Raises:
            ValueError: unsupported settings, or options given both as flags and as MEGATRON_MHC.
        """
        hooks.check_uses(SPEC_USES)
        from megatron.training import get_args
        from megatron.training.argument_utils import gpt_config_from_args
        from megatron.training.models.gpt import default_layer_spec

        if isinstance(config, TransformerConfig):
            args, model_config = model_config, gpt_config_from_args(model_config, config)
        else:
            args, vp_stage = get_args(), config if vp_stage is None else vp_stage
        transformer = model_config.transformer
        mhc = auto.resolved(transformer, mhc_options(args), launch_of(args))
        hooks.require(schedule=mhc.pipeline_schedule in OVERLAPPED)
        spec = wrap_block_spec(default_layer_spec(model_config, vp_stage), mhc, transformer, vp_stage)
        backend = choose(mhc, transformer.hidden_size, parallel.streams_dtype(transformer), device_type())
        norm = norms_in_words(transformer, mhc, backend)
        said = f"mHC: {mhc.to_options()}; operations: {backend}; norm in front of F: {norm}"
        log_single_rank(logger, logging.INFO, said)
        return spec

    def __getattr__(self, name: str) -> Any:
        if name in ("layer_specs", "layers", "metainfo", "module", "params", "submodules"):
            raise ValueError(
                "--spec megatron_mhc.specs gpt_mhc_spec is for scripts that build a GPTModel: "
                f"{os.path.basename(sys.argv[0])} takes it for the spec of another model, such as "
                "HybridModel: use pretrain_gpt.py, or drop --spec"
            )
        raise AttributeError(name)

    def __reduce__(self) -> str:
        return "gpt_mhc_spec"


gpt_mhc_spec = GPTScriptsCallThis()


def mhc_options(args: Any = None) -> MHCConfig:
    """Options from the --mhc-* flags of parsed arguments, by default Megatron's own, or from MEGATRON_MHC."""
    from megatron.training import get_args

    args = args or get_args()
    refuse(SPEC_DOOR, args)
    if not hasattr(args, "mhc_num_residual_streams"):
        mhc = MHCConfig.from_environment()
    else:
        refuse_environment()
        mhc = MHCConfig.from_args(args)
    check_writers(args, mhc)
    return mhc


def launch_of(args: Any) -> Launch | None:
    """The sizes of a step in Megatron's parsed arguments; None where a framework leaves some out."""
    names = "seq_length", "micro_batch_size", "global_batch_size", "data_parallel_size"
    sizes: list[Any] = [getattr(args, name, None) for name in names]
    if not all(sizes):
        return None
    sequence, micro_batch, batch, ranks = sizes
    return Launch(sequence, micro_batch, max(1, batch // (micro_batch * ranks)))

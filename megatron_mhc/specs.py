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
from megatron.core.utils import log_single_rank

from megatron_mhc import hooks, parallel, training_doors
from megatron_mhc.backend import choose, device_type, norms_in_words
from megatron_mhc.carried import SpecOfBlock, StreamsBlockSubmodules
from megatron_mhc.config import MHCConfig, refuse_environment
from megatron_mhc.contraction import Contraction
from megatron_mhc.diagnostics.training import check_writers
from megatron_mhc.door_refusals import SPEC_DOOR
from megatron_mhc.hooks.uses import SPEC_USES
from megatron_mhc.pipeline import auto
from megatron_mhc.pipeline.layer_times import Launch
from megatron_mhc.preparation import prepare
from megatron_mhc.refusals import GPT, refuse
from megatron_mhc.releases import check_hybrid, release
from megatron_mhc.schedule.plans import OVERLAPPED
from megatron_mhc.streams import contract_norm_builder, reads_streams
from megatron_mhc.wrapping import model_chunks, wrap_layer_spec

if release().hybrid:
    from megatron.core.models.hybrid.hybrid_block import HybridStackSubmodules
    from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec

    from megatron_mhc.hybrid import HyperConnectionHybridStack, wrap_hybrid_spec

__all__ = ["gpt_mhc_spec", "hybrid_mhc_spec", "wrap_block_spec", "wrap_hybrid_spec", "wrap_layer_spec"]
logger = logging.getLogger(__name__)


def wrap_block_spec(
    spec: ModuleSpec | TransformerBlockSubmodules,
    mhc: MHCConfig,
    config: TransformerConfig,
    vp_stage: int | None = None,
    contraction: Contraction | None = None,
) -> TransformerBlockSubmodules:
    """Turn what Megatron would build on this pipeline stage into its mHC form.

    Checks the configuration, remembers `mhc` and registers the hooks that mHC needs, see
    `preparation.prepare`.

    Args:
        spec: a layer's spec, or a block's submodules with one spec per local layer.
        mhc: mHC options.
        config: the model's transformer config.
        vp_stage: virtual pipeline stage, None without them.
        contraction: what builds the module that contracts the streams, under `--mhc-contract library`, see
            docs/contraction.md.

    Raises:
        ValueError: an unsupported configuration, layer or Megatron version; `log_interval` outside of
            megatron.training; a contraction beside another `--mhc-contract`.
    """
    refuse(GPT, config)
    mhc = auto.resolved(config, mhc, launch=None)
    parallel.validate_stages(config)
    if isinstance(spec, TransformerBlockSubmodules):
        layers, norm = list(spec.layer_specs or []), spec.layer_norm
    else:
        layers = [spec] * get_num_layers_to_build(config, vp_stage)
        norm = transformer_block.LayerNormImpl
    if norm is None:
        raise ValueError("the block spec has no layer_norm: mHC contracts its streams at the final norm")
    prepare(config, mhc)
    chunks = model_chunks(config, mhc, len(layers))
    return StreamsBlockSubmodules(
        layer_specs=[wrap_layer_spec(layer, mhc, chunks) for layer in layers],
        layer_norm=contract_norm_builder(norm, mhc, contraction, hands_on=reads_streams(config, mhc)),  # type: ignore[arg-type]
        mhc=mhc,
        plain_layer=layers[-1] if layers else None,
    )


class GPTScriptsCallThis(SpecOfBlock):
    """The target of `--spec megatron_mhc.specs gpt_mhc_spec`: the spec Megatron would choose, with mHC.

    Megatron's GPT scripts call it; those of 0.18 hand it to the model's block, whose hook does. Scripts that
    build other models take what --spec names for the spec itself; it then says so, where a function would
    become the model's decoder. (The class has the name that Megatron's "specialize for ..." prints.)
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

        if isinstance(config, TransformerConfig):
            args, transformer = model_config, config
            layers = training_doors.stock_layers(args, transformer, vp_stage)
        else:
            from megatron.training.models.gpt import default_layer_spec

            args, vp_stage = get_args(), config if vp_stage is None else vp_stage
            transformer, layers = model_config.transformer, default_layer_spec(model_config, vp_stage)
        mhc = auto.resolved(transformer, mhc_options(args), launch_of(args))
        _require_hooks(args, mhc)
        spec = wrap_block_spec(layers, mhc, transformer, vp_stage)
        log_choice(transformer, mhc)
        return spec

    def of_block(self, config: TransformerConfig, vp_stage: int | None) -> TransformerBlockSubmodules:
        """Choose and wrap for a block that was handed the target itself."""
        from megatron.training import get_args

        return self(get_args(), config, vp_stage)

    def __getattr__(self, name: str) -> Any:
        if name == "layer_specs" and not release().spec_is_called:  # that a GPT's script looks for
            raise AttributeError(name)
        if name in ("layer_specs", "layers", "metainfo", "module", "params", "submodules"):
            raise ValueError(
                "--spec megatron_mhc.specs gpt_mhc_spec is for scripts that build a GPTModel: "
                f"{os.path.basename(sys.argv[0])} takes it for the spec of another model: of a HybridModel "
                "that is --spec megatron_mhc.specs hybrid_mhc_spec; of others there is none, drop --spec"
            )
        raise AttributeError(name)

    def __reduce__(self) -> str:
        return "gpt_mhc_spec"


gpt_mhc_spec = GPTScriptsCallThis()
if not release().spec_is_called:
    hooks.require()  # Megatron imports what --spec names, and calls nothing of it before a block is built


def __getattr__(name: str) -> Any:
    if name == "wrap_hybrid_spec":
        check_hybrid()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class NoHybridModel:
    """What `hybrid_mhc_spec` is where Megatron has no HybridModel: whoever takes it for a spec is told so."""

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("_"):
            check_hybrid()
        raise AttributeError(name)


hybrid_mhc_spec: Any = NoHybridModel()
if release().hybrid:

    class HybridScriptsBuildThis(HyperConnectionHybridStack):
        """The stack of `--spec megatron_mhc.specs hybrid_mhc_spec`, whose options are those of the launch.

        Megatron's hybrid scripts hand the spec to the model, which builds it. (The class has the name that
        Megatron's "specialize for ..." prints where a GPT script takes the spec.)

        Raises:
            ValueError: unsupported settings, or options given both as flags and as MEGATRON_MHC.
        """

        def __init__(self, config: TransformerConfig, submodules: HybridStackSubmodules, **kwargs: Any):
            mhc = auto.resolved(config, mhc_options(), launch=None)
            from megatron.training import get_args

            _require_hooks(get_args(), mhc)
            super().__init__(config, submodules, mhc=mhc, **kwargs)
            log_choice(config, mhc)

    hybrid_mhc_spec = dataclasses.replace(hybrid_stack_spec, module=HybridScriptsBuildThis)


def _require_hooks(args: Any, mhc: MHCConfig) -> None:
    fsdp = getattr(args, "use_megatron_fsdp", False)
    hooks.require(schedule=mhc.pipeline_schedule in OVERLAPPED, fsdp=fsdp)


def log_choice(config: TransformerConfig, mhc: MHCConfig) -> None:
    """Log the options, the back end that serves them, and where norms are computed."""
    backend = choose(mhc, config.hidden_size, parallel.streams_dtype(config), device_type())
    norm = norms_in_words(config, mhc, backend)
    said = f"mHC: {mhc.to_options()}; operations: {backend}; norm in front of F: {norm}"
    log_single_rank(logger, logging.INFO, said)


def mhc_options(args: Any = None) -> MHCConfig:
    """Options from the --mhc-* flags of parsed arguments, by default Megatron's own, or from MEGATRON_MHC."""
    from megatron.training import get_args

    args = args or get_args()
    refuse(SPEC_DOOR, args)
    if not MHCConfig.has_flags(args):
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
    batches = [batch]
    if steps := getattr(args, "step_batch_size_schedule", None):  # and none is --global-batch-size
        from megatron.core.num_microbatches_calculator import StepBatchsizeNumMicroBatchesCalculator

        batches = [size for _, size in StepBatchsizeNumMicroBatchesCalculator._parse_schedule(steps, None)]
    *others, count = (max(1, size // (micro_batch * ranks)) for size in batches)
    if evaluated := getattr(args, "eval_global_batch_size", None):
        others.append(max(1, evaluated // ((args.eval_micro_batch_size or micro_batch) * ranks)))
    return Launch(sequence, micro_batch, count, tuple(others))

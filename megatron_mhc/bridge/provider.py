"""Providers of Megatron-Bridge whose models have mHC."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from megatron.core import parallel_state
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from megatron_mhc import hooks
from megatron_mhc.config import MHCConfig
from megatron_mhc.door_refusals import BRIDGE
from megatron_mhc.refusals import refuse
from megatron_mhc.specs import wrap_block_spec, wrap_hybrid_spec


def use_mhc(provider: Any, mhc: MHCConfig | None = None, **options: Any) -> None:
    """Have a provider of Megatron-Bridge build mHC models; nothing is built here.

    Hugging Face weights that it loads, by `AutoBridge.to_megatron_provider()`, fill what a plain model has;
    the rest keeps its initial values.

    Args:
        provider: a GPTModelProvider or HybridModelProvider, or of one of their classes; changed in place.
        mhc: the options; or name them: `num_residual_streams=4`.

    Raises:
        ValueError: another kind of provider, one that has mHC, an option that Bridge's loop does not serve,
            or another version of Megatron or Bridge.
    """
    if mhc is not None and options:
        raise ValueError(f"use_mhc: give an MHCConfig or options, not both: {', '.join(options)}")
    mhc = mhc or MHCConfig.from_mapping(options, "use_mhc")
    register()
    field, in_mhc_form = _spec_of(provider)
    spec = getattr(provider, field)
    if isinstance(spec, partial) and spec.func is in_mhc_form:
        raise ValueError(
            f"use_mhc: the provider has mHC already, with {spec.keywords['options']}: call it once"
        )
    refuse(BRIDGE, provider, mhc)
    # A partial of a function is what Bridge can write into a checkpoint's run_config.yaml.
    setattr(provider, field, partial(in_mhc_form, plain=spec, options=mhc.to_options()))


def _spec_of(provider: Any) -> tuple[str, Callable[..., Any]]:
    """Where a provider keeps its spec, and what turns that into its mHC form."""
    from megatron.bridge.models.gpt_provider import GPTModelProvider
    from megatron.bridge.models.hybrid.hybrid_provider import HybridModelProvider

    if isinstance(provider, GPTModelProvider):
        return "transformer_layer_spec", mhc_layer_spec
    if isinstance(provider, HybridModelProvider):
        return "hybrid_stack_spec", mhc_stack_spec
    raise ValueError(
        "use_mhc serves providers of a GPTModel or HybridModel, and this is a "
        f"{type(provider).__name__}: take one of AutoBridge.to_megatron_provider(), or wrap the specs by "
        "megatron_mhc.wrap_block_spec and wrap_hybrid_spec"
    )


def register() -> None:
    """Let Bridge load checkpoints of mHC models, in a program that does not call `use_mhc`.

    Raises:
        ValueError: another version of Megatron or Bridge.
    """
    hooks.require(bridge=True)
    from megatron.bridge.utils.instantiate_utils import register_allowed_target_prefix

    register_allowed_target_prefix("megatron_mhc.bridge.")


def mhc_layer_spec(
    config: Any, vp_stage: int | None = None, *, plain: Any, options: str
) -> TransformerBlockSubmodules:
    """A GPTModelProvider's `transformer_layer_spec`, in its mHC form.

    Args:
        config: the provider.
        vp_stage: virtual pipeline stage, None without them.
        plain: what the provider had: a spec, or a function of it.
        options: those of mHC, `MHCConfig.to_options`.

    Raises:
        ValueError: an unsupported configuration, layer or version.
    """
    mhc = _prepared(options)
    spec = plain if isinstance(plain, ModuleSpec) else _called(plain, config, vp_stage)
    if config.attention_backend == AttnBackend.local and isinstance(spec, ModuleSpec):
        # The provider does so with a spec of one layer.
        spec = copy.deepcopy(spec)
        spec.submodules.self_attention.submodules.core_attention = DotProductAttention
    return wrap_block_spec(spec, mhc, config, vp_stage)


def mhc_stack_spec(config: Any, *, plain: Any, options: str) -> ModuleSpec:
    """A HybridModelProvider's `hybrid_stack_spec`, in its mHC form; as `mhc_layer_spec`."""
    mhc = _prepared(options)
    from megatron.bridge.models.hybrid.hybrid_provider import get_default_hybrid_stack_spec

    if not isinstance(plain, ModuleSpec):
        plain = plain or get_default_hybrid_stack_spec
        plain = plain(config) if inspect.signature(plain).parameters else plain()
    return wrap_hybrid_spec(plain, mhc)


def _prepared(options: str) -> MHCConfig:
    """The options, once Bridge is known to be one that can build them."""
    register()
    if not parallel_state.model_parallel_is_initialized():
        raise ValueError(
            "dist.use_decentralized_pg True: mHC asks Megatron's parallel_state for its groups; use False"
        )
    return MHCConfig.from_options(options)


def _called(layer_spec: Callable[..., Any], config: Any, vp_stage: int | None) -> Any:
    """What Bridge's own call of it returns."""
    if "vp_stage" in inspect.signature(layer_spec).parameters:
        return layer_spec(config, vp_stage=vp_stage)
    return layer_spec(config)

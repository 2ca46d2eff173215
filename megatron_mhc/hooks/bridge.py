"""Megatron-Bridge's conversion of Hugging Face weights, and what it does not know about an mHC model."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.utils import get_model_config
from torch import Tensor, nn

from megatron_mhc.carried import options_of
from megatron_mhc.checkpoint_keys import FINAL_NORMS, MAPPING


def keep_what_is_new(lookup: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `MegatronMappingRegistry.megatron_to_hf_lookup`, which names the weights that a parameter is of.

    The final norm is that of the plain model. Mappings and an output head are of none: they keep their
    initial values, and nothing dense is made of them.
    """

    def lookup_or_keep(self: Any, megatron_param_name: str) -> Any:
        for final in FINAL_NORMS:
            if final.norm in megatron_param_name:
                return lookup(self, megatron_param_name.replace(final.norm, final.plain))
        ends = (part for final in FINAL_NORMS for part in (final.head, final.contraction))
        if MAPPING in megatron_param_name or any(part in megatron_param_name for part in ends):
            return _kept()(megatron_param_name, {})
        return lookup(self, megatron_param_name)

    return lookup_or_keep


@functools.cache
def _kept() -> type[Any]:
    from megatron.bridge.models.conversion.param_mapping import MegatronParamMapping

    class KeptMapping(MegatronParamMapping):
        """Of a parameter that only an mHC model has."""

        def hf_to_megatron(self, hf_weights: Any, megatron_module: nn.Module) -> Tensor | None:
            """Its initial values, or None where it has them: Bridge builds without those that are random."""
            mhc = getattr(getattr(megatron_module, "config", None), "mhc", None)
            if not (self.megatron_param.endswith("mapping_proj.weight") and MAPPING in self.megatron_param):
                return None
            if mhc is None or mhc.init != "uniform":
                return None
            weight: Any = megatron_module.weight
            return torch.nn.init.xavier_uniform_(torch.empty_like(weight))

        def megatron_to_hf(self, megatron_weights: Any, megatron_module: Any) -> dict[str, Tensor]:
            raise _no_dense_form(self.megatron_param)

    return KeptMapping


def refuse_dense_export(write: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap what writes a model, or its adapters, as Hugging Face's: an mHC model is refused at once."""

    def write_plain(self: Any, *args: Any, **kwargs: Any) -> Any:
        model = args[0] if args else kwargs.get("model", kwargs.get("megatron_model"))
        chunks = model if isinstance(model, list) else [model]
        if options_of(chunks, get_model_config(chunks[0])) is not None:
            raise _no_dense_form("the model")
        return write(self, *args, **kwargs)

    return write_plain


def _no_dense_form(what: str) -> ValueError:
    return ValueError(
        f"{what} is of an mHC model, whose streams have no place in a dense Hugging Face model or its "
        "adapters: save a checkpoint, and turn it into a folder that transformers loads by `python -m "
        "megatron_mhc.export --load CHECKPOINT --out FOLDER`"
    )


def refuse_fsdp(get_model: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `get_model`, which builds and wraps the chunks of a provider's model."""

    def get_unsharded(*args: Any, **kwargs: Any) -> Any:
        chunks = get_model(*args, **kwargs)
        for name in ("use_megatron_fsdp", "use_torch_fsdp2"):
            if kwargs.get(name) and options_of(chunks, get_model_config(chunks[0])) is not None:
                raise ValueError(
                    f"in Megatron-Bridge mHC does not support dist.{name} True: use "
                    "ddp.use_distributed_optimizer instead"
                )
        return chunks

    return get_unsharded

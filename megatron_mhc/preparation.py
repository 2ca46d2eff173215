"""The checks before a model is built, and the hooks that it needs."""

from __future__ import annotations

from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_mhc import hooks, parallel
from megatron_mhc.carried import remember
from megatron_mhc.config import MHCConfig
from megatron_mhc.diagnostics.training import check_loop
from megatron_mhc.pipeline.options import check_config


def prepare(config: TransformerConfig, mhc: MHCConfig) -> None:
    """Check a model's configuration, remember `mhc` with it and register the hooks that mHC needs.

    The pipeline's message width depends on what is remembered, see `carried`.

    Raises:
        ValueError: an unsupported configuration or Megatron version; `log_interval` outside of
            megatron.training.
    """
    parallel.validate(config, mhc)
    check_config(config, mhc)
    check_loop(mhc)
    hooks.require(training=mhc.log_interval > 0)
    remember(config, mhc)

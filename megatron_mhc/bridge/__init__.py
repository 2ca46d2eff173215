"""Megatron-Bridge 0.6: providers whose models have mHC, Hugging Face weights, diagnostics (docs/bridge.md).

    provider = AutoBridge.from_hf_pretrained(folder).to_megatron_provider()
    use_mhc(provider, num_residual_streams=4)
    pretrain(config, forward_step, callbacks=[MHCDiagnostics(log_interval=100)])

Importing it does not import megatron.bridge.
"""

from megatron_mhc.bridge.diagnostics import MHCDiagnostics
from megatron_mhc.bridge.provider import register, use_mhc

__all__ = ["MHCDiagnostics", "register", "use_mhc"]

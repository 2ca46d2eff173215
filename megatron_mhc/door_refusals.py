"""What the doors refuse: of a script's parsed arguments, and of a provider of Megatron-Bridge."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from megatron_mhc.config import ENVIRONMENT, MHCConfig
from megatron_mhc.refusals import OWN, Refusal, setting_row
from megatron_mhc.releases import release

# Megatron's parsed arguments: of our own pretrain_gpt, and of every script that takes --spec.
ENTRY_POINT = (
    *OWN,
    *(
        setting_row(
            name,
            "run Megatron-LM's own script by `python -m megatron_mhc.launch pretrain_gpt.py ...`",
            what="{flag} is not supported by this entry point",
        )
        for name in ("sft", "fim_data", "hybrid_context_parallel", "dataloader_inter_document_masking")
    ),
    Refusal(
        lambda args, mhc: None if release().hybrid else getattr(args, "hybrid_layer_pattern", None),
        "--hybrid-layer-pattern {value} is of a HybridModel, which Megatron-Core 0.17 does not have",
        "install 0.18 or later, or drop it",
    ),
)


def _own_flag(args: Any, mhc: MHCConfig | None) -> str | None:
    # Of Megatron's own mHC: a script whose parser has our flags reads all of them for us.
    if MHCConfig.has_flags(args):
        return None
    from megatron.core.transformer.transformer_config import TransformerConfig

    values = {f.name: (f.default, getattr(args, f.name, f.default)) for f in fields(TransformerConfig)}
    for name, (default, value) in values.items():
        if name.startswith("mhc_") and value != default:
            return f"--{name.replace('_', '-')} {value}"
    return None


def _sharded_stages(flag: str, why: str) -> Refusal:
    def found(args: Any, mhc: Any) -> int | None:
        stages = getattr(args, "pipeline_model_parallel_size", 1)
        return stages if getattr(args, flag, False) and stages > 1 else None

    return Refusal(
        found,
        f"--{flag.replace('_', '-')} with --pipeline-model-parallel-size {{value}}, without mHC too: {why}",
        "use --use-distributed-optimizer instead, or no pipeline",
    )


SPEC_DOOR = (
    *OWN,
    _sharded_stages("use_megatron_fsdp", "its mesh has no dimension for stages"),
    _sharded_stages("use_torch_fsdp2", "Megatron's arguments refuse it"),
    Refusal(
        _own_flag,
        "{value} is here a flag of Megatron's own mHC, which is off",
        f"give the option in {ENVIRONMENT}, or start the script by `python -m megatron_mhc.launch`",
    ),
)
# Options of a model that Megatron-Bridge builds and trains.
BRIDGE = (
    Refusal(
        lambda provider, mhc: mhc.pipeline_schedule in ("interleaved", "fused"),
        "pipeline_schedule={mhc.pipeline_schedule} in Megatron-Bridge",
        "its loop runs Megatron's schedule; use pipeline_schedule=megatron, or call "
        "megatron_mhc.pipeline.forward_backward in a loop of your own",
    ),
    Refusal(
        lambda provider, mhc: mhc.is_gated,
        "use_mhc: preset={mhc.preset} has no norms in front of attention and MLP, into which Hugging Face "
        "weights of a plain model go",
        "build that model by megatron_mhc.wrap_block_spec, or use preset=paper",
    ),
    Refusal(
        lambda provider, mhc: mhc.log_interval or None,
        "use_mhc: log_interval={value} is the training's, not the model's",
        "give it, and alarm, to Megatron-Bridge's pretrain() as "
        "callbacks=[megatron_mhc.bridge.MHCDiagnostics(log_interval={value})]",
    ),
)

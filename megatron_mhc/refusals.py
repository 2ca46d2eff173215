"""What mHC refuses of Megatron's settings: every row says when, in which words, and what to do instead."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from megatron_mhc import precision
from megatron_mhc.config import ENVIRONMENT, MHCConfig
from megatron_mhc.releases import OWN_SWITCHES, release
from megatron_mhc.schedule.plans import is_combined
from megatron_mhc.schedule.stages import layer_counts


class Refusal(NamedTuple):
    """One combination of settings that is refused, and the two halves of the message."""

    found: Callable[[Any, Any], Any]  # of settings and options: the value to name; None or False to let pass
    what: str  # {value}: what was found; {mhc}: the options
    remedy: str


def refused(rows: Iterable[Refusal], settings: Any, mhc: MHCConfig | None = None) -> Iterator[ValueError]:
    """The rows that are found, each as the error that `refuse` raises: flag, value and remedy.

    Args:
        settings: a TransformerConfig, or Megatron's parsed arguments.
        mhc: for the rows that look at it.
    """
    for row in rows:
        value = row.found(settings, mhc)
        if value is not None and value is not False:
            error = ValueError(f"{row.what}: {row.remedy}".format(value=value, mhc=mhc))
            if "--mhc-" in str(error):
                error.add_note(
                    f"{ENVIRONMENT} and YAML files write --mhc-pp-boundary split as pp_boundary=split"
                )
            yield error


def refuse(rows: Iterable[Refusal], settings: Any, mhc: MHCConfig | None = None) -> None:
    """Raise the first error of `refused`."""
    for error in refused(rows, settings, mhc):
        raise error


# Of a TransformerConfig alone, which no argument of megatron.training sets by this name.
WITHOUT_FLAG = ("variable_seq_lengths", "num_microbatches_with_partial_activation_checkpoints")


def setting_row(
    name: str,
    remedy: str,
    refused: Callable[[Any], Any] = bool,
    what: str = "mHC does not support {flag} {value}",
) -> Refusal:
    """The row of one setting of Megatron's; {flag} in `what` is its spelling on the command line.

    A setting without a flag is spelled name=value, in the place of {flag} and the {value} behind it.
    """

    def found(settings: Any, mhc: MHCConfig) -> Any:
        value = getattr(settings, name, None)
        return value if refused(value) else None

    if name in WITHOUT_FLAG:
        return Refusal(found, what.replace("{flag} ", name + "="), remedy)
    return Refusal(found, what.replace("{flag}", "--" + name.replace("_", "-")), remedy)


def setting_rows(what: str, instead: str, *rows: tuple[Any, ...]) -> tuple[Refusal, ...]:
    """Rows of (name, remedy[, refused]) that all have another way out."""
    return tuple(
        setting_row(name, f"{remedy}, or use {instead}", refused[0] if refused else bool, what)
        for name, remedy, *refused in rows
    )


OWN = tuple(
    setting_row(
        name,
        "drop it, or train by Megatron's own script without this plugin's mHC (no --spec megatron_mhc.specs "
        "..., no wrap_..._spec)",
        what="{flag} turns on Megatron's own mHC, beside this plugin's",
    )
    for name in OWN_SWITCHES
)


def _offloaded(config: Any) -> int | None:
    return config.cpu_offloading_num_layers if config.cpu_offloading else None


def _offloaded_replay(config: Any, mhc: MHCConfig) -> bool:
    # Stock Megatron: what the replay offloads in the midst of backward is asked for by no forward.
    return bool(config.fine_grained_activation_offloading and config.recompute_granularity == "full")


def _offloaded_streams(config: Any, mhc: MHCConfig) -> str | None:
    # Megatron frees what a norm has read. With one stream that nothing maps, that is the streams.
    if not config.fine_grained_activation_offloading or mhc.num_residual_streams > 1 or mhc.h_pre != "fixed":
        return None
    return " ".join(name for name in config.offload_modules or [] if name.endswith("_norm")) or None


def _swapped_messages(config: Any, mhc: MHCConfig) -> bool:
    # Two messages between the same two ranks in one batch may be swapped; stock Megatron
    # checks this on the command line alone, and otherwise trains on the wrong tensors.
    two_with_chunks = config.pipeline_model_parallel_size == 2 and config.virtual_pipeline_model_parallel_size
    apart = config.overlap_p2p_comm and not config.batch_p2p_comm
    return bool(two_with_chunks and mhc.pipeline_schedule == "megatron" and not apart)


def _recomputed_bias(config: Any, mhc: MHCConfig) -> bool:
    # Stock Megatron: the recomputed MLP's output bias re-enters its own backward without end.
    mlp = config.recompute_granularity == "selective" and "mlp" in (config.recompute_modules or [])
    return bool(mlp and config.add_bias_linear)


def _recomputed_twice(config: Any, mhc: MHCConfig) -> str | None:
    twice = mhc.recompute_layer_num != "off" and config.recompute_granularity == "full"
    return mhc.recompute_layer_num if twice else None


def _mtp_of_full_recompute(config: Any, mhc: MHCConfig) -> int | None:
    # Stock Megatron: an assertion of its first step.
    full = config.recompute_granularity == "full" and config.recompute_method == "uniform"
    layers = config.recompute_num_layers
    return layers if full and config.mtp_num_layers and layers != 1 else None


def _shared_out_mtp(config: Any, mhc: MHCConfig) -> int | None:
    # Stock Megatron: the second depth reads what the first one's checkpoint has shared out over TP.
    full = config.recompute_granularity == "full" and config.recompute_method == "uniform"
    several = full and config.distribute_saved_activations and (config.mtp_num_layers or 0) > 1
    return config.mtp_num_layers if several else None


def _low_precision(config: Any, mhc: MHCConfig) -> precision.Lack | None:
    return precision.lacking(config)


def _other_options(config: Any, mhc: MHCConfig) -> str | None:
    known = getattr(config, "mhc", mhc)
    return f"{known.to_options()} and {mhc.to_options()}" if known != mhc else None


def _freed_messages(config: Any, mhc: MHCConfig) -> bool:
    # Stock 0.17; 0.18 waits for the copy. A pipeline of this package sends by its own code.
    overlapped = config.virtual_pipeline_model_parallel_size is not None and config.overlap_p2p_comm
    freed = overlapped and config.deallocate_pipeline_outputs and mhc.pipeline_schedule == "megatron"
    return bool(freed) and not release().keeps_what_it_sends


# A configuration that knows its model's options.
ONE_MODEL = (
    Refusal(
        _other_options,
        "two mHC configurations in one model",
        "{value}; give all layers the same --mhc-num-residual-streams and options",
    ),
)
# A model's configuration, at each of its layers.
MODEL = (
    *OWN,
    Refusal(
        lambda config, mhc: (
            config.cuda_graph_impl if config.cuda_graph_impl != "none" and not release().cuda_graphs else None
        ),
        "mHC does not support --cuda-graph-impl {value} under Megatron-Core 0.17",
        "install 0.18 or later, or drop it",
    ),
    Refusal(
        _freed_messages,
        "virtual pipeline stages with overlapped p2p under Megatron-Core 0.17, whose schedule frees what it "
        "still sends",
        "install 0.18 or later, or use --mhc-pipeline-schedule interleaved, or 1 virtual stage",
    ),
    Refusal(
        lambda config, mhc: (
            mhc.mtp == "multistream" and not release().multistream and bool(config.mtp_num_layers)
        ),
        "--mhc-mtp multistream with --mtp-num-layers under Megatron-Core 0.17",
        "install 0.18 or later, or use --mhc-mtp single",
    ),
    Refusal(
        lambda config, mhc: config.fp32_residual_connection and mhc.backend == "hopper",
        "--mhc-backend hopper does not support --fp32-residual-connection {value}",
        "its kernels take streams of bf16; use --mhc-backend auto, or drop it",
    ),
    Refusal(
        lambda config, mhc: _offloaded(config) if mhc.recompute_layer_num != "off" else None,
        "--mhc-recompute-layer-num {mhc.recompute_layer_num} does not support --cpu-offloading-num-layers "
        "{value}",
        "it empties the layer inputs that are on their way to the host; drop one of them",
    ),
    Refusal(
        lambda config, mhc: _offloaded(config) if config.overlap_moe_expert_parallel_comm else None,
        "--cpu-offloading-num-layers {value} with --overlap-moe-expert-parallel-comm",
        "Megatron runs the nodes of layers outside of what offloads, so nothing would be; drop one of them",
    ),
    Refusal(
        lambda config, mhc: config.fine_grained_activation_offloading and mhc.recompute_layer_num != "off",
        "--mhc-recompute-layer-num {mhc.recompute_layer_num} does not support "
        "--fine-grained-activation-offloading {value}",
        "both take the layer inputs from memory; drop one of them",
    ),
    Refusal(
        _offloaded_replay,
        "--recompute-granularity full with --fine-grained-activation-offloading {value}",
        "use --recompute-granularity selective, or drop one of them",
    ),
    Refusal(
        _offloaded_streams,
        "--offload-modules {value} with --mhc-num-residual-streams 1 and --mhc-h-pre fixed",
        "the norm's input is the stream itself, which post_res reads later; offload other modules",
    ),
    Refusal(
        lambda config, mhc: (
            config.normalization if mhc.norm == "folded" and config.normalization != "RMSNorm" else None
        ),
        "--mhc-norm folded does not support --normalization {value}",
        "its kernels compute RMSNorm; use --normalization RMSNorm, or --mhc-norm auto or apart",
    ),
    setting_row("inference_fuse_tp_communication", "drop it: it adds the residual inside a linear layer"),
    setting_row("transformer_impl", "use transformer_engine or local", lambda v: v == "inference_optimized"),
    Refusal(
        _swapped_messages,
        "--pipeline-model-parallel-size 2 with virtual stages and without overlapped p2p exchanges the wrong "
        "tensors",
        "set overlap_p2p_comm=True and batch_p2p_comm=False (drop --no-overlap-p2p-communication), or use 1 "
        "virtual stage",
    ),
    Refusal(
        _recomputed_bias,
        "--recompute-modules mlp with linear biases hangs in backward",
        "add --disable-bias-linear, or recompute without mlp",
    ),
    Refusal(
        _recomputed_twice,
        "--mhc-recompute-layer-num {value} with --recompute-granularity full, which drops and replays the "
        "streams already",
        "drop --mhc-recompute-layer-num, or use --recompute-granularity selective",
    ),
    Refusal(
        _mtp_of_full_recompute,
        "--recompute-method uniform --recompute-num-layers {value} with --mtp-num-layers, whose layers "
        "Megatron recomputes one by one",
        "use --recompute-num-layers 1",
    ),
    Refusal(
        _shared_out_mtp,
        "--distribute-saved-activations with --mtp-num-layers {value} and --recompute-granularity full",
        "drop --distribute-saved-activations, or use --mtp-num-layers 1",
    ),
    Refusal(
        lambda config, mhc: mhc.load_dense and mhc.mtp == "multistream" and bool(config.mtp_num_layers),
        "--mhc-load-dense with --mhc-mtp multistream and --mtp-num-layers",
        "a plain model's layers of multi-token prediction read the final norm's output and no streams; use "
        "--mhc-mtp single, or drop --mhc-load-dense",
    ),
    Refusal(
        lambda config, mhc: (
            config.mtp_num_layers or None if mhc.mtp == "multistream" and is_combined(config, mhc) else None
        ),
        "--overlap-moe-expert-parallel-comm with --mhc-mtp multistream and --mtp-num-layers {value}",
        "Megatron's combined 1F1B cuts its own layers of MTP alone into nodes; use --mhc-mtp single, "
        "--mhc-pipeline-schedule fused on a pipeline, or drop the overlap",
    ),
    Refusal(_low_precision, "{value.what}", "{value.remedy}"),
    *ONE_MODEL,
)


def _single_layers(config: Any, mhc: MHCConfig) -> str | None:
    impl = config.cuda_graph_impl
    return impl if impl in ("local", "transformer_engine") else None


# A configuration that a GPTModel is built with, and one of a HybridModel.
GPT = (
    Refusal(
        lambda config, mhc: config.is_hybrid_model,
        "--hybrid-layer-pattern is of a HybridModel, and this is the spec of a GPTModel",
        "use pretrain_hybrid.py with --spec megatron_mhc.specs hybrid_mhc_spec, or drop it",
    ),
)
HYBRID = (
    Refusal(
        lambda config, mhc: mhc.mtp if mhc.mtp == "multistream" and config.mtp_num_layers else None,
        "--mhc-mtp {value} does not support a HybridModel, whose depths hold stacks of layers",
        "use --mhc-mtp single",
    ),
    Refusal(
        lambda config, mhc: mhc.pipeline_schedule == "fused" or mhc.pp_boundary == "split",
        "--mhc-pipeline-schedule {mhc.pipeline_schedule} --mhc-pp-boundary {mhc.pp_boundary} does not "
        "support a HybridModel, whose layers are no pairs of attention and MLP",
        "use --mhc-pp-boundary whole, with --mhc-pipeline-schedule interleaved or megatron",
    ),
    Refusal(
        lambda config, mhc: config.overlap_moe_expert_parallel_comm,
        "mHC does not support --overlap-moe-expert-parallel-comm {value} in a HybridModel, whose layers are "
        "no pairs of attention and MLP",
        "drop it",
    ),
    Refusal(
        _single_layers,
        "mHC does not support --cuda-graph-impl {value} in a HybridModel, whose layers are no pairs of "
        "attention and MLP",
        "use --cuda-graph-impl full_iteration, or drop it",
    ),
)
# A built stack of it, without its layers yet.
STACK = (
    Refusal(
        lambda stack, mhc: stack.pre_process and not stack.layer_type_list,
        "mHC expands the embedding in the first layer, but pipeline stage 0 has none",
        "give --hybrid-layer-pattern a layer in front of its first |",
    ),
)
# A configuration whose model --use-torch-fsdp2 wraps.
FSDP2 = (
    setting_row(
        "overlap_moe_expert_parallel_comm",
        "its units are whole layers, and the overlap runs the nodes of one; use --use-megatron-fsdp, or drop "
        "one of them",
        what="--use-torch-fsdp2 does not support {flag} {value}",
    ),
)


def empty_stage(stages: slice) -> Any:
    """A `found` that gives the first without a decoder layer of these stages of a pipeline."""

    def found(config: Any, mhc: MHCConfig) -> int | None:
        if config.pipeline_model_parallel_size == 1:
            return None
        counts = layer_counts(config)
        return next((stage for stage in range(len(counts))[stages] if not counts[stage]), None)

    return found


# The layout of its pipeline: where the streams begin.
STAGES = (
    Refusal(
        empty_stage(slice(1)),
        "mHC expands the embedding in the first decoder layer, but pipeline stage 0 has none",
        "drop --account-for-embedding-in-pipeline-split, or give stage 0 a layer in "
        "--pipeline-model-parallel-layout",
    ),
)

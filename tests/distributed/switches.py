"""Random combinations of what Megatron's users switch on, each the same for the same seed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from typing import Any

from harness import Layout
from layout_cases import ALLTOALL, BLOCK, FULL, UNIFORM, selective
from layout_cases import STAGES as DECODER_STAGES

SEED = 26
LAYOUTS = {
    "tp2": Layout(tp=2),
    "tp2_sp": Layout(tp=2, sp=True),
    "pp2": Layout(pp=2),
    "pp2_vpp2": Layout(pp=2, vpp=2),
    "ep2": Layout(ep=2),
    "cp2": Layout(cp=2),
    "dp2": Layout(),
    "dp2_distributed_optimizer": Layout(distributed_optimizer=True),
    "tp2_pp2_sp": Layout(tp=2, pp=2, sp=True),
    "pp2_ep2": Layout(pp=2, ep=2),
    "pp2_vpp2_ep2": Layout(pp=2, vpp=2, ep=2),
}
FOUR_RANKS = ("tp2_pp2_sp", "pp2_ep2", "pp2_vpp2_ep2")
DENSE = ("dense", "biased", "tied", "mtp", "mla")
MOE = ("moe", "moe_shared", "moe_after_dense", "mtp_moe")
LOCAL = ("token_local", "token_local_moe")
LAYERS = ("lacking", "lacking_first", "empty_first", "linear")  # of test_heterogeneous
MODULES = ("core_attn", "mlp", "layernorm", "moe", "mla_up_proj", "shared_experts")
OFFLOADED = ("core_attn", "attn_norm", "mlp_norm", "qkv_linear", "attn_proj")
# The final norm has a gradient of the order of the loss, by which `differences` judges those that vanish.
TRAINED = {
    "all": (".",),
    "mappings": ("hyper_connection", "final_layernorm", "final_norm"),
    "second_half": (r"layers\.[23]\.", "output"),
}
# What changes the result, and is the twin's too; the rest must not show.
ARITHMETIC: dict[str, tuple[Any, ...]] = {
    "num_residual_streams": (4, 4, 4, 1, 2, 3, 8),
    "h_res": ("sinkhorn", "sinkhorn", "sinkhorn", "identity", "unconstrained"),
    "h_pre": ("dynamic", "dynamic", "dynamic", "fixed"),
    "h_post": ("dynamic", "dynamic", "dynamic", "fixed"),
    "contract": ("mean", "mean", "sum", "learned_head"),
    "preset": ("paper", "paper", "paper", "deepseek_v4"),
    "sinkhorn_iterations": (20, 20, 1, 5),
}
MODEL: tuple[tuple[int, dict[str, Any]], ...] = (
    (10, dict(qk_layernorm=True)),
    (5, dict(attention_output_gate=True)),
    (5, dict(rotary_interleaved=True)),
    (5, dict(no_rope_freq=2)),
    (5, dict(apply_residual_connection_post_layernorm=True)),
    (5, dict(softmax_type="learnable")),
)
MODEL_OF_EXPERTS: tuple[tuple[int, dict[str, Any]], ...] = (
    (10, dict(moe_router_score_function="sigmoid")),
    (2, dict(moe_latent_size=16)),
    (5, dict(moe_router_pre_softmax=True)),
)
MHC: dict[str, tuple[Any, ...]] = {
    "recompute_layer_num": ("off", "off", "1", "2", "auto"),
    "boundary": ("auto", "apart", "fused"),
    "norm": ("apart", "apart", "folded", "auto"),
}
PIPELINE: dict[str, tuple[Any, ...]] = {
    "pipeline_schedule": ("megatron", "megatron", "interleaved", "interleaved", "fused", "fused", "auto"),
    "pipeline_transport": ("auto", "auto", "nccl"),
    "pp_boundary": ("auto", "whole", "split"),
}
# (how often in a hundred, setting); rare are those that are refused for most models
SETTINGS: tuple[tuple[int, dict[str, Any]], ...] = (
    (10, dict(variable_seq_lengths=True) | ALLTOALL),
    (15, dict(moe_token_dispatcher_type="allgather")),
    (10, dict(moe_shared_expert_overlap=True)),
    (7, dict(mlp_chunks_for_training=2)),
    (2, dict(cpu_offloading=True, cpu_offloading_num_layers=1)),
    (10, dict(deallocate_pipeline_outputs=False)),
    (2, dict(inference_fuse_tp_communication=True)),
    (2, dict(fp8="hybrid", fp8_recipe="delayed")),
    (2, dict(fp8="e4m3", fp8_recipe="blockwise")),
)
OF_EXPERTS: tuple[tuple[int, dict[str, Any]], ...] = (
    (5, dict(overlap_moe_expert_parallel_comm=True)),
    (5, dict(overlap_moe_expert_parallel_comm=True, delay_wgrad_compute=True)),
)
OF_STAGES: tuple[tuple[int, dict[str, Any]], ...] = (
    (10, dict(batch_p2p_comm=False)),
    (5, dict(num_microbatches_with_partial_activation_checkpoints=1)),
)
OF_VIRTUAL_STAGES: tuple[tuple[int, dict[str, Any]], ...] = (
    (5, dict(overlap_p2p_comm=False)),
    (10, dict(overlap_p2p_comm_warmup_flush=True)),
    (10, dict(microbatch_group_size_per_vp_stage=4)),
)
STAGES: tuple[dict[str, Any], ...] = (
    {},
    dict(num_layers_in_first_pipeline_stage=1),
    dict(num_layers=3, account_for_embedding_in_pipeline_split=True),
    dict(num_layers=3, account_for_loss_in_pipeline_split=True),
)
DDP = ({}, {}, dict(overlap_grad_reduce=True), dict(average_in_collective=True))
OPTIMIZERS = ("adam", "adam", "muon")  # the layer-wise one has no float32
SAVES = ("whole", "fully_parallel")


@dataclasses.dataclass(frozen=True)
class Combination:
    """One launch, of which nothing has checked the settings.

    Args:
        layout: of LAYOUTS.
        kind: of `testing.gpt.KINDS`; or `hybrid PATTERN`, or `heterogeneous LAYERS`.
        how: what is compared: `iteration`, its loss and gradients in float64; the same of `packed`
            sequences; `fp32_residual`, the same of fp32 streams around bf16; `training`, a step in float32,
            and two more behind a checkpoint with the same two unbroken.
        trained: of TRAINED.
        model: settings of Megatron's that change the result.
        optimizer, save: of `training`.
    """

    layout: str
    kind: str
    how: str
    trained: str
    model: dict[str, Any]
    arithmetic: dict[str, Any]
    mhc: dict[str, Any]
    settings: dict[str, Any]
    ddp: dict[str, Any]
    optimizer: str = ""
    save: str = ""

    def __str__(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @property
    def world(self) -> int:
        """How many ranks it has."""
        return 4 if self.layout in FOUR_RANKS else 2


def combinations(count: int, seed: int = SEED) -> list[Combination]:
    """The first `count` of this seed."""
    choose = random.Random(seed)
    return [_combination(choose) for _ in range(count)]


def digest(count: int = 300) -> str:
    """Of the first `count` combinations: another where the generator is."""
    return hashlib.sha256("\n".join(map(str, combinations(count))).encode()).hexdigest()[:12]


def _some(choose: random.Random, table: dict[str, tuple[Any, ...]]) -> dict[str, Any]:
    return {name: choose.choice(values) for name, values in table.items()}


def _often(choose: random.Random, table: tuple[tuple[int, dict[str, Any]], ...]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for percent, setting in table:
        if choose.random() < percent / 100:
            found |= setting
    return found


def _how(choose: random.Random) -> str:
    # Of twenty; the layout has to fit.
    return choose.choice(("iteration",) * 14 + ("packed",) * 2 + ("fp32_residual",) + ("training",) * 3)


def _layout(choose: random.Random, how: str) -> str:
    layouts = [name for name in LAYOUTS if name not in FOUR_RANKS or choose.random() < 0.5]
    if how == "fp32_residual":  # bf16 sums in another order elsewhere
        layouts = [name for name in ("pp2", "pp2_vpp2", "dp2", "dp2_distributed_optimizer")]
    return choose.choice(layouts)


def _kind(choose: random.Random, layout: str, how: str) -> str:
    # Without sequence parallelism Megatron has no MoE on TP; MLA on TP is inexact in stock's local layers.
    kinds: tuple[str, ...] = {
        "ep2": MOE,
        "pp2_ep2": MOE,
        "pp2_vpp2_ep2": MOE,
        "cp2": LOCAL,
        "tp2": DENSE[:4],
        "tp2_sp": DENSE[:4] + MOE,
        "tp2_pp2_sp": DENSE[:4] + MOE,
    }.get(layout, DENSE + MOE)
    if how == "packed":
        return choose.choice(LOCAL[1:] if "ep2" in layout else LOCAL[:1] if layout == "tp2" else LOCAL)
    if how == "fp32_residual":
        return choose.choice(("dense", "moe", "moe_shared"))
    if layout != "cp2" and how == "iteration" and choose.random() < 0.25:
        if "ep2" not in layout and choose.random() < 0.4:
            # In stock a linear layer gives every rank of sequence parallelism the whole sequence.
            return f"heterogeneous {choose.choice(LAYERS[:3] if '_sp' in layout else LAYERS)}"
        return f"hybrid {_pattern(choose, layout)}"
    return choose.choice(kinds)


def _pattern(choose: random.Random, layout: str) -> str:
    experts = "" if layout == "tp2" else "E"
    latent = "tp2" not in layout and "ep2" not in layout and choose.random() < 0.3
    attention = "+" if latent else "*"  # Megatron has no model of both
    symbols = attention + "-M" + ("" if latent else experts)
    layers = [choose.choice(symbols) for _ in range(4)]
    if "ep2" in layout:
        layers[choose.randrange(4)] = "E"
    stages = LAYOUTS[layout].pp * (LAYOUTS[layout].vpp or 1)
    for at in sorted((choose.randint(0, 4) for _ in range(stages - 1)), reverse=True):
        layers.insert(at, "|")
    return "".join(layers) + (f"/{attention}-" if choose.random() < 0.2 else "")


def _recompute(choose: random.Random, kind: str, layout: str) -> dict[str, Any]:
    of_moe, of_mla = "moe" in kind or "E" in kind, kind == "mla" or "+" in kind
    modules = [name for name in MODULES if of_moe or name not in ("moe", "shared_experts")]
    modules = [name for name in modules if of_mla or name != "mla_up_proj"]
    return choose.choice(
        (
            {},
            {},
            {},
            UNIFORM,
            BLOCK,
            FULL | dict(recompute_method="uniform", recompute_num_layers=2),
            UNIFORM | (dict(distribute_saved_activations=True) if layout == "tp2" else {}),
            selective(*choose.sample(modules, choose.randint(1, 3))),
            selective(*choose.sample(modules, 1)),
        )
    )


def _combination(choose: random.Random) -> Combination:
    how = _how(choose)
    layout = _layout(choose, how)
    kind = _kind(choose, layout, how)
    experts, special = "moe" in kind or "E" in kind, kind.startswith(("hybrid", "heterogeneous"))
    mhc = _some(choose, MHC) | (_some(choose, PIPELINE) if "pp2" in layout else {})
    mhc["recompute_coefficients"] = mhc["recompute_layer_num"] != "off" and choose.random() < 0.3
    settings = _often(choose, SETTINGS) | (_often(choose, OF_STAGES) if "pp2" in layout else {})
    settings |= _often(choose, OF_VIRTUAL_STAGES) if "vpp2" in layout else {}
    settings |= _often(choose, OF_EXPERTS) if "ep2" in layout else {}
    if layout == "pp2" and not special:
        settings |= choose.choice(STAGES)
    if layout == "pp2_vpp2" and not special and "mtp" not in kind and choose.random() < 0.2:
        settings |= dict(pipeline_model_parallel_layout=DECODER_STAGES)
    settings |= _recompute(choose, kind, layout)
    if settings.get("recompute_granularity") == "full" and choose.random() < 0.9:
        mhc |= dict(recompute_layer_num="off", recompute_coefficients=False)
    if choose.random() < 0.06 and how == "iteration":
        # With virtual stages stock loses count of its chunks with the others.
        more = [] if "vpp2" in layout else choose.sample(OFFLOADED[1:], choose.randint(0, 3))
        modules = ["core_attn", *more]
        settings |= dict(fine_grained_activation_offloading=True, offload_modules=modules)
        settings |= dict(min_offloaded_tensor_size=1)
    model = _often(choose, MODEL) | (_often(choose, MODEL_OF_EXPERTS) if experts else {})
    if "tp2" in layout:
        model.pop("softmax_type", None)  # a parameter that is split, and does not say so
    if "mtp" in kind and choose.random() < 0.3:
        model |= dict(mtp_num_layers=2, mtp_use_repeated_layer=choose.random() < 0.5)
    arithmetic = _some(choose, ARITHMETIC) if choose.random() < 0.5 else {}
    if how == "fp32_residual":
        # Of the other, the split post_res rounds otherwise, which bf16 behind it multiplies.
        arithmetic.pop("preset", None)
    trained = choose.choice(("all", "all", "all", "mappings", "second_half"))
    if "layernorm" in settings.get("recompute_modules", ()) and trained == "second_half":
        trained = "all"  # stock replays twice the norm of the first layer that is trained
    if special or how == "training":
        trained = "all" if trained == "second_half" else trained
    training = (choose.choice(OPTIMIZERS), choose.choice(SAVES)) if how == "training" else ("", "")
    if LAYOUTS[layout].distributed_optimizer and training[0]:
        training = ("adam", training[1])  # Muon's is the layer-wise one
    ddp = {} if how == "training" else choose.choice(DDP)
    return Combination(layout, kind, how, trained, model, arithmetic, mhc, settings, ddp, *training)

"""Random combinations of what Megatron's users switch on, each the same for the same seed.

python tests/distributed/switches.py 300     # the list
"""

from __future__ import annotations

import dataclasses
import functools
import json
import random
import re
import sys
import traceback
from typing import Any

import torch
import torch.distributed as dist
from harness import Iteration, Layout, build, differences, global_parameters, iterate
from layout_cases import ALLTOALL, BLOCK, UNIFORM, selective

from megatron_mhc import MHCConfig
from megatron_mhc.pipeline import engine
from megatron_mhc.pipeline.options import check_config
from megatron_mhc.testing import ranks
from megatron_mhc.testing.parameters import fill

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
}
DENSE = ("dense", "biased", "tied", "mtp", "mla")
MOE = ("moe", "moe_shared", "moe_after_dense", "mtp_moe")
MODULES = ("core_attn", "mlp", "layernorm", "moe", "mla_up_proj", "shared_experts")
# The final norm has a gradient of the order of the loss, by which `differences` judges those that vanish.
TRAINED = {
    "all": (".",),
    "mappings": ("hyper_connection", "final_layernorm"),
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
}
MHC: dict[str, tuple[Any, ...]] = {
    "recompute_layer_num": ("off", "off", "1", "2", "auto"),
    "boundary": ("auto", "apart", "fused"),
}
PIPELINE: dict[str, tuple[Any, ...]] = {
    "pipeline_schedule": ("megatron", "interleaved", "fused"),
    "pp_boundary": ("whole", "whole", "split"),
}
# (how often in a hundred, setting); rare are those that are refused for most models
SETTINGS: tuple[tuple[int, dict[str, Any]], ...] = (
    (20, dict(variable_seq_lengths=True) | ALLTOALL),
    (15, dict(moe_token_dispatcher_type="allgather")),
    (10, dict(moe_shared_expert_overlap=True)),
    (3, dict(overlap_moe_expert_parallel_comm=True)),
    (3, dict(overlap_moe_expert_parallel_comm=True, delay_wgrad_compute=True)),
    (10, dict(mlp_chunks_for_training=2)),
    (2, dict(cpu_offloading=True, cpu_offloading_num_layers=1)),
    (10, dict(batch_p2p_comm=False)),
)
STAGES = (
    {},
    dict(num_layers_in_first_pipeline_stage=1),
    dict(num_layers=3, account_for_embedding_in_pipeline_split=True),
    dict(num_layers=3, account_for_loss_in_pipeline_split=True),
)
DDP = ({}, {}, dict(overlap_grad_reduce=True), dict(average_in_collective=True))


@dataclasses.dataclass(frozen=True)
class Combination:
    """One launch: names of LAYOUTS and of `testing.gpt.KINDS`, and settings that nothing has checked."""

    layout: str
    kind: str
    trained: str
    arithmetic: dict[str, Any]
    mhc: dict[str, Any]
    settings: dict[str, Any]
    ddp: dict[str, Any]

    def __str__(self) -> str:
        return json.dumps(dataclasses.asdict(self))


def combinations(count: int, seed: int = SEED) -> list[Combination]:
    """The first `count` of this seed."""
    choose = random.Random(seed)
    return [_combination(choose) for _ in range(count)]


def _combination(choose: random.Random) -> Combination:
    def some(table: dict[str, tuple[Any, ...]]) -> dict[str, Any]:
        return {name: choose.choice(values) for name, values in table.items()}

    layout = choose.choice(list(LAYOUTS))
    # Without sequence parallelism Megatron has no MoE on TP; MLA on TP is inexact in stock's local layers.
    kinds = {
        "ep2": MOE,
        "cp2": ("token_local", "token_local_moe"),
        "tp2": DENSE[:4],
        "tp2_sp": DENSE[:4] + MOE,
    }
    kind = choose.choice(kinds.get(layout, DENSE + MOE))
    mhc = some(MHC) | (some(PIPELINE) if "pp2" in layout else {})
    settings: dict[str, Any] = {}
    for often, setting in SETTINGS:
        if choose.random() < often / 100:
            settings |= setting
    if layout == "pp2":
        settings |= choose.choice(STAGES)
    modules = [name for name in MODULES if "moe" in kind or name not in ("moe", "shared_experts")]
    modules = [name for name in modules if kind == "mla" or name != "mla_up_proj"]
    settings |= choose.choice(
        ({}, {}, UNIFORM, BLOCK, selective(*choose.sample(modules, choose.randint(1, 3))))
    )
    arithmetic = some(ARITHMETIC) if choose.random() < 0.5 else {}
    mhc["recompute_coefficients"] = mhc["recompute_layer_num"] != "off" and choose.random() < 0.3
    trained = choose.choice(("all", "all", "all", "mappings", "second_half"))
    if "layernorm" in settings.get("recompute_modules", ()) and trained == "second_half":
        trained = "all"  # stock replays twice the norm of the first layer that is trained
    return Combination(layout, kind, trained, arithmetic, mhc, settings, choose.choice(DDP))


def _start(case: Combination, layout: Layout, mhc: MHCConfig, settings: dict[str, Any], ddp: Any) -> Any:
    def weights(chunks: list[Any]) -> None:
        fill(chunks)
        for name, parameter in global_parameters(chunks):
            parameter.requires_grad_(any(re.search(p, name) for p in TRAINED[case.trained]))

    config = layout.config(case.kind, **settings)
    chunks = build(layout, config, case.kind, mhc, ddp, weights=weights)
    check_config(config, mhc)
    return config, chunks


@functools.cache
def _twin_of(key: str) -> Iteration:
    case = Combination(**json.loads(key))

    def run() -> Iteration:
        Layout().initialize()
        config, chunks = _start(case, Layout(), MHCConfig(**case.arithmetic), case.settings, None)
        return Iteration.of(iterate(chunks, config), chunks)

    return ranks.run_ranks(1, run)[0]


def twin(case: Combination) -> Iteration:
    """The same model and training on one process, with nothing switched on but what changes the result."""
    layers = {name: value for name, value in case.settings.items() if name == "num_layers"}
    return _twin_of(str(dataclasses.replace(case, layout="dp2", mhc={}, settings=layers, ddp={})))


def outcome(case: Combination, expected: Iteration | None) -> Any:
    """Who refuses to build the model, and why; or how its iteration compares with the twin's."""
    layout = LAYOUTS[case.layout]
    layout.initialize()
    built, why = None, None
    try:
        mhc = MHCConfig(**case.arithmetic, **case.mhc)
        built = _start(case, layout, mhc, case.settings, case.ddp)
    except (AssertionError, ValueError) as error:
        file = traceback.extract_tb(error.__traceback__)[-1].filename
        why = f"{'megatron_mhc' if 'megatron_mhc' in file else 'Megatron'}: {error}"
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, why)
    if built is None or any(everyone):
        return next(reason for reason in everyone if reason)
    config, chunks = built
    megatron = mhc.pipeline_schedule == "megatron" or layout.pp == 1
    if case.ddp.get("overlap_grad_reduce"):
        no_sync = [chunk.no_sync for chunk in chunks]
        config.no_sync_func = no_sync if len(chunks) > 1 else no_sync[0]
    loss = iterate(chunks, config, schedule=None if megatron else engine.forward_backward)
    assert expected is not None
    return differences(loss, chunks, expected, torch.float64)


if __name__ == "__main__":
    for one in combinations(int(sys.argv[1])):
        print(one)

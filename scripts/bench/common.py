"""What layer.py and train.py share: the models, how a step is timed and profiled, and the report."""

from __future__ import annotations

import functools
import gc
import importlib.metadata
import os
import socket
from collections.abc import Callable
from itertools import pairwise
from typing import Any

os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
os.environ.setdefault("TEARDOWN_CUPTI", "0")  # CUDA graphs follow the profiler in one process

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer import MLATransformerConfig, TransformerConfig

ON_GPU = torch.empty(0, device="cuda").is_cuda  # testing.cpu redirects "cuda"
DENSE = dict(hidden_size=4096, ffn_hidden_size=14336, num_attention_heads=32, num_query_groups=8)
MOE = dict(hidden_size=2560, num_attention_heads=32, moe_token_dispatcher_type="alltoall")
MOE |= dict(q_lora_rank=None, kv_lora_rank=512, qk_head_dim=128, qk_pos_emb_head_dim=64, v_head_dim=128)
MOE |= dict(rope_type="rope", qk_layernorm=ON_GPU)  # the local spec refuses it without q_lora_rank
MOE |= dict(num_moe_experts=72, moe_ffn_hidden_size=1536, moe_router_topk=6, moe_grouped_gemm=ON_GPU)
MOE |= dict(moe_shared_expert_intermediate_size=3072, moe_router_load_balancing_type="none")
MOE |= dict(moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True, moe_router_dtype="fp32")
MODELS = {"dense": DENSE, "moe": MOE, "moe_ep8": MOE | dict(num_moe_experts=9)}
TINY = dict(hidden_size=128, ffn_hidden_size=256, num_attention_heads=4)
TINY_MOE = dict(kv_lora_rank=64, qk_head_dim=32, qk_pos_emb_head_dim=32, v_head_dim=32)
TINY_MOE |= TINY | dict(moe_ffn_hidden_size=64, moe_shared_expert_intermediate_size=64)
COMPILE = functools.partial(torch.compile, fullgraph=True, dynamic=False)


def make_config(model: str, layers: int, tiny: bool, **moe_settings: Any) -> TransformerConfig:
    """The bf16 configuration of one of MODELS; `moe_settings` are ignored by the dense one."""
    moe = model != "dense"
    settings = dict(num_layers=layers, normalization="RMSNorm", add_bias_linear=False)
    settings |= dict(gated_linear_unit=True, activation_func=torch.nn.functional.silu)
    settings |= dict(hidden_dropout=0.0, attention_dropout=0.0, gradient_accumulation_fusion=False)
    settings |= dict(bias_activation_fusion=ON_GPU, bias_dropout_fusion=ON_GPU, masked_softmax_fusion=False)
    settings |= dict(bf16=True, params_dtype=torch.bfloat16, pipeline_dtype=torch.bfloat16) | MODELS[model]
    if tiny:
        settings |= TINY_MOE if moe else TINY | dict(num_query_groups=2)
    if not moe:  # Megatron's rope fusion for MLA is for YaRN alone
        return TransformerConfig(apply_rope_fusion=ON_GPU, **settings)
    return MLATransformerConfig(**settings | moe_settings)


def compile_operations(connection: Any) -> None:
    """Run a connection's two operations by torch.compile."""
    connection.forward, connection.post_res = map(COMPILE, (connection.forward, connection.post_res))


def start() -> dict[str, Any]:
    """Process groups of one rank; returns the report's head: device and versions."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    dist.init_process_group("nccl" if ON_GPU else "gloo", address, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    found = {d.name.replace("_", "-"): d.version for d in importlib.metadata.distributions()}
    versions = {p: found.get(p) for p in ("torch", "triton", "transformer-engine", "megatron-core")}
    return {"device": torch.cuda.get_device_name(), "versions": versions}


def intervals(run: Callable[[], Any], steps: int) -> list[float]:
    """Milliseconds between the ends of successive calls."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in pairwise(marks)]


def gpu_work(run: Callable[[], Any], steps: int) -> list[tuple[float, float, str]]:
    """(start, end, name) of the kernels and copies of some calls, by CUPTI, in microseconds and sorted."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(steps):
            run()
        torch.cuda.synchronize()
    on_gpu = (e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA)
    work = (e for e in on_gpu if not e.is_user_annotation and not e.name.endswith(" Sync"))
    found = sorted((e.time_range.start, e.time_range.end, e.name) for e in work)
    assert found, "the profiler saw no kernel"
    return found


def summary(work: list[tuple[float, float, str]], steps: int) -> dict[str, float]:
    """Per step: milliseconds of kernels, milliseconds in which any ran, and their number."""
    busy, reached = 0.0, 0.0
    for begin, end, _ in work:  # kernels on several streams overlap
        busy, reached = busy + max(0.0, end - max(begin, reached)), max(reached, end)
    total, per = sum(end - begin for begin, end, _ in work), 1e3 * steps
    return {"kernels_ms": total / per, "any_ms": busy / per, "launches": len(work) / steps}


def attempt(row: dict[str, Any], stage: str, fn: Callable[..., Any], *args: Any) -> Any:
    """fn(*args); None after a failure, which the row then names: it is a result too."""
    try:
        return fn(*args)
    except Exception as error:
        cause: BaseException | None = error
        reasons = []
        while cause is not None:  # a capture's end hides what ended it
            reasons.append(f"{type(cause).__name__}: {cause}".splitlines()[0][:300])
            cause = cause.__context__
    row.setdefault("failed", {})[stage] = reasons
    print(f"{row['model']} b={row['batch']} n={row['n']} {row['ops']}: {stage}: {reasons}", flush=True)
    clean()
    return None


def clean() -> None:
    """Give back the memory of what is no longer referred to."""
    gc.collect()
    torch.cuda.empty_cache()


def compare(rows: list[dict[str, Any]], keys: tuple[str, ...]) -> None:
    """Add to the rows of one model and batch the busy share, and % over vanilla of each of `keys`."""
    base = next((r for r in rows if r["ops"] == "vanilla"), {})
    for row in rows:
        both = [key for key in keys if row.get(key) and base.get(key)]
        row["overhead_pct"] = {key: 100 * (row[key] / base[key] - 1) for key in both}
        if row.get("any_ms") and row.get("wall_ms"):
            row["busy"] = row["any_ms"] / row["wall_ms"]

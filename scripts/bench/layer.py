"""Time transformer layers with mHC against the same layers without it, forward and backward, on one GPU.

    python scripts/bench/layer.py [--models dense,moe,moe_ep8] [--batches 1,4] [--n 4] [--out layer.json]

Transformer Engine's layers, bf16. dense: 4096/14336, 32 heads, 8 groups. moe: the paper's 27B layer, MLA
with 72 experts of 1536 (top 6) and a shared one of 3072. moe_ep8: what a rank of EP=8 computes of it, 9
experts with the same rows each, no exchange. The layers neither expand nor contract; numbers are per
layer, peak memory (gradients included) of all --layers. compile is torch.compile of the reference; hopper
and triton are the values of --mhc-backend.

wall     median interval between steps, none of which is waited for, the ops taking turns
kernels  GPU time summed over kernels and copies (CUPTI, in steps of their own); launches: their number
busy     part of the wall time in which any of them ran; below 0.95 the host sets the pace
graph    a step replayed as one CUDA graph. MoE gives up dropless routing for it: every expert gets the mean
         load (capacity factor 1, padded), vanilla's too. The pass `dropless` records why.

Without a GPU, to check the program and no speed, on Megatron's local layers:

    python -m megatron_mhc.testing.cpu scripts/bench/layer.py --tiny
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common import (
    MODELS,
    ON_GPU,
    attempt,
    clean,
    compare,
    compile_operations,
    gpu_work,
    intervals,
    make_config,
    start,
    summary,
)
from megatron.core import tensor_parallel
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.tensor_parallel.random import get_all_rng_states
from megatron.core.transformer.spec_utils import build_module

from megatron_mhc import MHCConfig
from megatron_mhc.hyper_connection import HyperConnectionModule
from megatron_mhc.specs import wrap_layer_spec

KERNELS = ("triton", "hopper")
OPS = ("vanilla", "reference", "compile", *KERNELS)
PADDED = dict(moe_expert_capacity_factor=1.0, moe_pad_expert_input_to_capacity=True)


class Stack:
    """The layers of one configuration, with their input and the gradient of their output."""

    def __init__(self, row: dict, options: argparse.Namespace, padded: bool = False):
        tensor_parallel.model_parallel_cuda_manual_seed(1, use_cudagraphable_rng=ON_GPU, force_reset_rng=True)
        torch.manual_seed(1)
        moe = dict(moe_permute_fusion=options.permute_fusion) | (PADDED if padded else {})
        config = make_config(row["model"], options.layers + 1, options.tiny, **moe)
        n = row["n"] or 1
        specs = get_gpt_decoder_block_spec(config, use_transformer_engine=ON_GPU).layer_specs[1:]
        if row["ops"] != "vanilla":
            backend = row["ops"] if row["ops"] in KERNELS else "reference"
            mhc = MHCConfig(num_residual_streams=n, backend=backend)
            specs = [wrap_layer_spec(spec, mhc) for spec in specs]
        # Layer 1 would expand the embedding.
        layers = [build_module(spec, config=config, layer_number=i) for i, spec in enumerate(specs, 2)]
        self.layers = torch.nn.ModuleList(layers).cuda()
        torch.manual_seed(2)
        for module in self.layers.modules():
            if isinstance(module, HyperConnectionModule):  # mappings that depend on the token
                module.mapping_proj.weight.data.normal_(std=0.02)
                for alpha in (module.alpha_pre, module.alpha_post, module.alpha_res):
                    alpha.data.fill_(0.5)
                if row["ops"] == "compile":
                    compile_operations(module)
        shape = (options.seq, row["batch"], n * config.hidden_size)
        self.x, self.g = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        self.leaves = [self.x.requires_grad_(), *self.layers.parameters()]
        dense = row["model"] == "dense"  # MLA makes its own rotary embedding
        self.rope = RotaryEmbedding(config.kv_channels, 1.0)(options.seq) if dense else None

    def forward(self) -> torch.Tensor:
        x = self.x
        for layer in self.layers:
            x, _ = layer(x, attention_mask=None, rotary_pos_emb=self.rope)
        return x

    def step(self):
        return torch.autograd.grad(self.forward(), self.leaves, self.g, allow_unused=True)

    def difference(self, other: Stack) -> float:
        got, want = (stack.forward().detach().float() for stack in (self, other))
        return ((got - want).norm() / want.norm()).item()

    def warm_up(self) -> None:
        for _ in range(3):
            self.step()
        torch.cuda.synchronize()

    def peak(self) -> float:
        """MiB of a step above what is there before it; raises where the result is not finite."""
        self.warm_up()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        gradients = self.step()
        peak = (torch.cuda.max_memory_allocated() - before) / 2**20
        if not all(t.isfinite().all() for t in gradients if t is not None):
            raise FloatingPointError("a gradient is not finite")
        return peak

    def profile(self, steps: int = 3) -> dict[str, float]:
        """Per step: milliseconds of kernels, milliseconds in which any ran, and their number."""
        self.warm_up()
        return summary(gpu_work(self.step, steps), steps)

    def replay(self, steps: int, name: str) -> dict[str, float]:
        """Median milliseconds of a step replayed as a CUDA graph, under `name`."""
        self.warm_up()
        graph = torch.cuda.CUDAGraph()
        for state in get_all_rng_states().values():
            graph.register_generator_state(state)
        # Backward runs on autograd's thread, whose own calls must not end the capture.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self.step()
        return {name: statistics.median(intervals(graph.replay, steps)[1:])}


def time_group(rows: list[dict], options: argparse.Namespace) -> None:
    """Wall time and peak memory, with the stacks of all ops in memory."""
    timed = []
    for row in rows:
        if stack := attempt(row, "build", Stack, row, options):
            row["peak_MiB"] = attempt(row, "peak", stack.peak)
            timed += [(row, stack, [])] if row["peak_MiB"] is not None else []
    for row, stack, _ in timed:  # all ops agree to bf16 rounding, which MoE's routing magnifies
        for other in (t[1] for t in timed if t[0]["ops"] == "reference" and t[0]["n"] == row["n"]):
            row["relative_l2_from_reference"] = attempt(row, "compare", stack.difference, other)
    for _ in range(options.rounds):
        for row, stack, samples in timed:
            samples += (attempt(row, "time", intervals, stack.step, options.steps) or [])[1:]
    for row, _, samples in timed:
        row["wall_ms"] = statistics.median(samples) / options.layers if samples else None


# In this order: CUPTI slows launches from its first use on, and after a failed capture more may fail.
SINGLE = {
    "profile": lambda row, options: Stack(row, options).profile(),
    "graph": lambda row, options: Stack(row, options, padded=True).replay(options.steps, "graph_ms"),
    "dropless": lambda row, options: Stack(row, options).replay(options.steps, "dropless_graph_ms"),
}
PASSES = ("time", *SINGLE)


def run_pass(name: str, rows: list[dict], options: argparse.Namespace) -> None:
    """Add to the rows of one model and batch what the pass finds, per layer, and % over vanilla."""
    torch._dynamo.reset()  # each shape is compiled as if it were the only one
    if name == "time":
        time_group(rows, options)
    for row in rows if name in SINGLE else ():
        clean()
        if name != "dropless" or (row["ops"] == "vanilla" and row["model"] != "dense"):
            found = attempt(row, name, SINGLE[name], row, options) or {}
            row |= {key: value / options.layers for key, value in found.items()}
    clean()
    compare(rows, ("wall_ms", "kernels_ms", "graph_ms", "peak_MiB"))


def table(rows: list[dict]) -> str:
    head = "model | b | n | ops | wall ms | + % | kernels ms | + % | busy | launches | graph ms | + % | MiB"
    lines = [f"| {head} |", "|---" * 13 + "|"]
    columns = {"wall_ms": 2, "kernels_ms": 2, "busy": 2, "launches": 0, "graph_ms": 2, "peak_MiB": 0}
    for row in rows:
        cells = [row["model"], str(row["batch"]), str(row["n"] or "-"), row["ops"]]
        for key, digits in columns.items():
            cells.append("-" if row.get(key) is None else f"{row[key]:.{digits}f}")
            if key.endswith("_ms"):
                more = row.get("overhead_pct", {}).get(key)
                cells.append(f"{more:+.1f}" if more and row["n"] else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    lists = dict(models=",".join(MODELS), batches="1,4", n="4", ops=",".join(OPS), measure=",".join(PASSES))
    for name, default in lists.items():
        parser.add_argument("--" + name, default=default, help=f"any of, or numbers: {default}")
    for name, number in dict(seq=4096, layers=2, steps=10, rounds=2).items():
        parser.add_argument("--" + name, default=number, type=int, help=f"default {number}")
    parser.add_argument("--permute-fusion", action="store_true", help="Megatron's --moe-permute-fusion")
    parser.add_argument("--tiny", action="store_true", help="toy sizes")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    models, ops, measure = (text.split(",") for text in (options.models, options.ops, options.measure))
    if unknown := {*models, *ops, *measure} - {*MODELS, *OPS, *PASSES}:
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join([*MODELS, *OPS, *PASSES])}")
    options.seq = min(options.seq, 64) if options.tiny else options.seq
    report = start()
    print(report, flush=True)
    kinds = [("vanilla", None)] * ("vanilla" in ops)  # no streams: one row for every n
    kinds += [(op, int(n)) for n in options.n.split(",") for op in ops if op != "vanilla"]
    pairs = [(model, int(b)) for model in models for b in options.batches.split(",")]
    groups = [[dict(model=model, batch=b, n=n, ops=op) for op, n in kinds] for model, b in pairs]
    rows = [row for group in groups for row in group]
    report |= {"settings": {k: v for k, v in vars(options).items() if k != "out"}, "rows": rows}
    for name in PASSES if ON_GPU else PASSES[:1]:
        for group in groups if name in measure else ():
            run_pass(name, group, options)
            if options.out:
                options.out.write_text(json.dumps(report, indent=1))
            print(f"\nafter {name}:\n{table(group)}", flush=True)
    print(f"\nall:\n{table(rows)}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

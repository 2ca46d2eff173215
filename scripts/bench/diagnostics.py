"""What --mhc-log-interval costs: the time of a step, and of what a logging step adds to it.

    python scripts/bench/diagnostics.py                                   on one GPU
    python scripts/bench/diagnostics.py --cpu --layers 2 --hidden 64      does it run at all

Forward and backward of --micro-batches micro-batches through a GPT from Megatron's specs (Transformer
Engine's where it is installed), without optimizer and communication: a real step is longer. Four kinds of
step take turns, each timed from an idle device to an idle device:

    plain       Megatron's train_step as it is, which is what --mhc-log-interval 0 runs
    between     under the hook, at a step that is not logged
    sampled     forward hooks only
    logged      a whole logging step: hooks, reduction, copy to the host, TensorBoard

What a logging step adds does not grow with the number of micro-batches, since only the first is sampled; so
step_for_half_a_percent_ms says from which length of a step on the share is below 0.5 %. busy is the part of a
plain step in which the GPU worked (CUPTI, after all times): below 0.95 the host sets the pace.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))


def build(options: argparse.Namespace, gpu: bool) -> tuple[Any, Any]:
    """The model, with mHC, and its config."""
    import torch
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_layer_local_spec,
        get_gpt_layer_with_transformer_engine_spec,
    )
    from megatron.core.transformer.module import Float16Module
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_mhc import MHCConfig, wrap_block_spec

    te = gpu and find_spec("transformer_engine") is not None
    config = TransformerConfig(
        num_layers=options.layers,
        hidden_size=options.hidden,
        num_attention_heads=options.heads,
        ffn_hidden_size=int(options.hidden * 8 / 3) // 64 * 64,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        normalization="RMSNorm",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bf16=gpu,
        params_dtype=torch.bfloat16 if gpu else torch.float32,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
    )
    mhc = MHCConfig(h_res=options.h_res, backend=options.backend)
    layer = (
        get_gpt_layer_with_transformer_engine_spec()
        if te
        else get_gpt_layer_local_spec(normalization="RMSNorm")
    )
    spec = wrap_block_spec(layer, mhc, config)
    model = GPTModel(config, spec, 256, options.sequence, position_embedding_type="rope")
    print(f"{'Transformer Engine' if te else 'local'} layers, {mhc.to_options()}")
    return (Float16Module(config, model.cuda()) if gpu else model), config


def measure(options: argparse.Namespace, gpu: bool) -> dict[str, Any]:
    """Median times in milliseconds."""
    import dataclasses

    import torch
    from torch.utils.tensorboard import SummaryWriter

    from megatron_mhc.diagnostics import Sampler
    from megatron_mhc.diagnostics.training import write
    from megatron_mhc.hooks.train_step import sample_steps

    model, config = build(options, gpu)
    device = torch.device("cuda" if gpu else "cpu")
    shape = (options.micro_batch, options.sequence)
    tokens = torch.randint(0, 256, (shape[0], shape[1] + 1), device=device)
    positions = torch.arange(shape[1], device=device).expand(*shape).contiguous()
    mask = None if gpu else torch.ones(1, 1, shape[1], shape[1], dtype=torch.bool).triu(1)
    labels, tokens = tokens[:, 1:].contiguous(), tokens[:, :-1].contiguous()

    def train_step(*_: Any, **__: Any) -> tuple[Any, ...]:
        for parameter in model.parameters():
            parameter.grad = None
        for _ in range(options.micro_batches):
            model(tokens, positions, mask, labels=labels).float().mean().backward()
        return ({}, 0, False, False, 0, 0.0, 0, 0)

    hooked = sample_steps(train_step)
    every_hundredth = dataclasses.replace(config.mhc, log_interval=100, log_tokens=options.tokens)
    arguments = ("forward", "data", [model], "optimizer", "scheduler", config, "schedule")
    folder = tempfile.TemporaryDirectory()
    writer = SummaryWriter(folder.name)

    def between() -> None:
        plain_mhc, config.mhc = config.mhc, every_hundredth
        hooked(*arguments, iteration=0)
        config.mhc = plain_mhc

    def sampled() -> None:
        with Sampler(model, config, options.tokens):
            train_step()

    def logged() -> None:
        with Sampler(model, config, options.tokens) as sampler:
            train_step()
        write(sampler.report(), 1, writer, None)

    kinds: dict[str, Callable[[], Any]] = dict(
        plain=train_step, between=between, sampled=sampled, logged=logged
    )
    times: dict[str, list[float]] = {name: [] for name in kinds}
    synchronize = torch.cuda.synchronize if gpu else lambda: None
    began = time.perf_counter()
    for repeat in range(options.warmup + options.repeats):
        if repeat > options.warmup + 2 and time.perf_counter() - began > options.limit:
            print(f"--limit {options.limit:.0f}: {repeat - options.warmup} repeats")
            break
        for name, step in kinds.items():
            train_step()  # so that none begins on a GPU that has rested
            synchronize()
            started = time.perf_counter()
            step()
            synchronize()
            if repeat >= options.warmup:
                times[name].append((time.perf_counter() - started) * 1e3)
    writer.close()
    folder.cleanup()
    result: dict[str, Any] = {f"{name}_ms": statistics.median(values) for name, values in times.items()}
    added = result["logged_ms"] - result["plain_ms"]
    result["logging_step_adds_ms"] = added
    result[f"share_at_{options.interval}_percent"] = 100 * added / options.interval / result["plain_ms"]
    result["step_for_half_a_percent_ms"] = added / options.interval / 0.005
    for name, values in times.items():
        quartiles = statistics.quantiles(values, n=4)
        result[f"{name}_quartiles_ms"] = [quartiles[0], quartiles[2]]
    result["repeats"] = len(times["plain"])
    if gpu:
        from common import gpu_work, summary

        result["busy"] = summary(gpu_work(train_step, 1), 1)["any_ms"] / result["plain_ms"]
        result["peak_MiB"] = torch.cuda.max_memory_allocated() / 2**20
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=2560)
    parser.add_argument("--heads", type=int, default=20)
    parser.add_argument("--sequence", type=int, default=4096)
    parser.add_argument("--micro-batch", type=int, default=4, help="sequences")
    parser.add_argument("--micro-batches", type=int, default=2, help="of a step")
    parser.add_argument("--tokens", type=int, default=256, help="--mhc-log-tokens")
    parser.add_argument("--h-res", default="sinkhorn")
    parser.add_argument("--backend", default="auto", choices=("auto", "hopper", "triton", "reference"))
    parser.add_argument("--interval", type=int, default=100, help="K, for the share of the whole")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--limit", type=float, default=300.0, help="seconds; at least three repeats are made")
    parser.add_argument("--cpu", action="store_true", help="on the CPU, to see that it runs")
    parser.add_argument("--out", type=Path, help="write the numbers there as JSON")
    options = parser.parse_args()
    import torch

    gpu = torch.cuda.is_available() and not options.cpu
    if not gpu and not options.cpu:
        raise SystemExit("no GPU here: timings need one; --cpu only shows that it runs")
    if not gpu:
        from megatron_mhc.testing import cpu

        cpu.install()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    if not gpu:
        cpu.patch_megatron()
    os.environ.setdefault("MASTER_ADDR", "localhost")
    os.environ.setdefault("MASTER_PORT", "29517")
    torch.distributed.init_process_group("nccl" if gpu else "gloo", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    result = {
        "device": torch.cuda.get_device_name() if gpu else "cpu",
        "versions": {name: version(name) for name in ("torch", "megatron-core")},
        "settings": {
            name: value for name, value in vars(options).items() if name not in ("cpu", "out", "limit")
        },
        **measure(options, gpu),
    }
    print(json.dumps(result, indent=1))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()

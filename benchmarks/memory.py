"""Peak memory and step time of a stack of layers: vanilla, mHC, and mHC with its recompute by block size.

    python -m benchmarks.memory --out memory.json [--widths 2560,4096] [--layers 8,16] [--sizes 2,4,8]

A TransformerBlock of Megatron's (Transformer Engine's layers where it is installed), bf16, forward and
backward of one micro-batch. peak is what a step takes above weights and their gradients, which are there
before it; `over vanilla` of the same depth. estimate is vanilla's measured peak, and what
`python -m megatron_mhc.recompute` adds to it for mHC; a vanilla layer is both measured, from two depths, and
counted by the same inventory.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
from pathlib import Path
from typing import Any

os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")

import torch
from megatron.core import tensor_parallel
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlock

from benchmarks.harness import ON_GPU, Report, Row, bars, clean, command_line, intervals, numbers, one_rank
from megatron_mhc import MHCConfig
from megatron_mhc.chunk import chunk_of
from megatron_mhc.recompute.estimate import Rank, ranks
from megatron_mhc.specs import wrap_block_spec

GIB = 2**30
STREAMS = 4
SIZES = (1, 2, 3, 4, 5, 6, 8, 12, 16, 32)  # sub-layers of a block


def make_config(width: int, layers: int) -> TransformerConfig:
    return TransformerConfig(
        num_layers=layers,
        hidden_size=width,
        ffn_hidden_size=-(-8 * width // 3 // 256) * 256,
        num_attention_heads=max(1, width // 128),
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        bias_activation_fusion=ON_GPU,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=ON_GPU,
        gradient_accumulation_fusion=False,
        bf16=True,
        params_dtype=torch.bfloat16,
        pipeline_dtype=torch.bfloat16,
    )


class Stack:
    """A block with its gradients in place, so that a step allocates activations and work space alone."""

    def __init__(self, width: int, layers: int, mhc: MHCConfig | None, sequence: int, batch: int):
        tensor_parallel.model_parallel_cuda_manual_seed(1, force_reset_rng=True)
        torch.manual_seed(1)
        config = make_config(width, layers)
        spec = get_gpt_decoder_block_spec(config, use_transformer_engine=ON_GPU)
        self.block = TransformerBlock(config, spec if mhc is None else wrap_block_spec(spec, mhc, config))
        self.block.cuda()
        for parameter in self.block.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.x = torch.randn(sequence, batch, width, device="cuda", dtype=torch.bfloat16)
        self.rope = RotaryEmbedding(config.kv_channels, 1.0)(sequence)
        self.mask = None
        if not ON_GPU:
            self.mask = torch.ones(sequence, sequence, dtype=torch.bool).triu(1)[None, None]

    def step(self) -> None:
        x = self.x.detach().requires_grad_()
        out = self.block(x, self.mask, rotary_pos_emb=self.rope)
        out.float().square().mean().backward()

    def measure(self, steps: int) -> Row:
        """Peak GiB above what is there between steps, and the median milliseconds of a step."""
        self.step()
        clean()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        times = intervals(self.step, steps)
        peak = (torch.cuda.max_memory_allocated() - held) / GIB
        return {"peak": peak, "ms": statistics.median(times)}


def setting(
    name: str, width: int, layers: int, vanilla: Row | None, counted: Rank, options: argparse.Namespace
) -> Row:
    """A row: name is `vanilla`, `off`, `auto` or a block size."""
    mhc = None if name == "vanilla" else MHCConfig(num_residual_streams=STREAMS, recompute_layer_num=name)
    stack = Stack(width, layers, mhc, options.sequence, options.batch)
    row = stack.measure(options.steps)
    if vanilla is None or "peak" not in vanilla:
        return row
    one = 2 * options.sequence * options.batch * width
    taken = counted.mhc() if name == "off" else counted.with_blocks(name)
    # The gradient of the streams is n times as wide.
    row["estimate"] = vanilla["peak"] + (taken - counted.vanilla + (STREAMS - 1) * one) / GIB
    if row["peak"]:
        row["estimate, %"] = 100 * (row["estimate"] / row["peak"] - 1)
        row["peak over vanilla, %"] = 100 * (row["peak"] / vanilla["peak"] - 1)
        row["ms over vanilla, %"] = 100 * (row["ms"] / vanilla["ms"] - 1)
    if name == "auto":
        row["blocks"] = ", ".join(map(str, getattr(chunk_of(stack.block), "blocks", [])))
    return row


def measure(report: Report, width: int, depths: list[int], options: argparse.Namespace) -> None:
    """All settings of one width."""
    section, peaks = f"C={width}", {}
    for layers in depths:
        mhc = MHCConfig(num_residual_streams=STREAMS)
        counted = ranks(make_config(width, layers), mhc, options.sequence, options.batch, 1)[0]
        sizes = [str(size) for size in options.sizes if size <= 2 * layers]
        vanilla = None
        for name in ("vanilla", "off", *sizes, "auto"):
            words = {"vanilla": "vanilla", "off": "mHC", "auto": "mHC, auto"}.get(
                name, f"mHC, blocks of {name}"
            )
            run: Any = functools.partial(setting, name, width, layers, vanilla, counted, options)
            report.run(section, title := f"{2 * layers} sub-layers, {words}", run)
            clean()
            if name == "vanilla":
                vanilla = report.row(section, title)
                peaks[layers] = (vanilla or {}).get("peak"), counted.vanilla / layers
    (shallow, (low, _)), *_, (deep, (high, bytes_)) = peaks.items()
    if low and high and report.wanted(section, "a vanilla layer"):
        measured = (high - low) / (deep - shallow)
        report.add(section, "a vanilla layer", {"peak": measured, "estimate": bytes_ / GIB})


def draw(report: Report, path: Path) -> None:
    shown = {f"{row['section']}, {row['name']}": row for row in report.rows if row.get("peak")}
    if shown:
        series = {name: {k: row[k] for k in ("peak", "estimate") if k in row} for name, row in shown.items()}
        bars(path, f"Activations of a step, {report.head['device']}", "GiB", series)


def main(argv: list[str] | None = None) -> None:
    parser = command_line("memory", __doc__)
    add = parser.add_argument
    add("--out", type=Path, help="JSON; the figure goes beside it")
    add("--widths", type=numbers, default=[2560, 4096])
    add("--layers", type=numbers, default=[8, 16], help="two depths, of which a layer's own follows")
    add("--sizes", type=numbers, default=list(SIZES), help="of blocks")
    for name, default in (("sequence", 4096), ("batch", 1), ("steps", 5)):
        add("--" + name, type=int, default=default, help=f"default {default}")
    add("--tiny", action="store_true", help="toy sizes, for a CPU")
    options = parser.parse_args(argv)
    if options.tiny:
        options.widths, options.layers, options.sizes = [64], [1, 2], [2]
        options.sequence, options.steps = 32, 2
    if len(options.layers) != 2:
        parser.error(f"--layers {options.layers}: give two depths")
    one_rank()
    report = Report(options.out, "memory", {k: v for k, v in vars(options).items() if k != "out"})
    for width in options.widths:
        measure(report, width, sorted(options.layers), options)
    if options.out:
        draw(report, options.out.with_suffix(".png"))
    report.end()


if __name__ == "__main__":
    main()

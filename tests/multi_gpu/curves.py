"""Loss curves of 50 steps in bf16 on several GPUs, against one GPU's and its noise.

On Transformer Engine's layers where it is installed, and the Python standard library's sources. A layout
rounds and adds otherwise than one GPU, and training lets the difference grow. How far, one GPU shows by
itself: NOISE are three runs of it that differ from its first by such things alone. A layout may be FACTOR
times as far from one GPU as the farthest of them, and never farther than MOST. That this notices a fault
is shown too: CONTROL is a run of one GPU with a small one, and has to be farther.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from torch import Tensor

from benchmarks.harness import Report, Row
from megatron_mhc.testing import gpt
from megatron_mhc.testing.gpt import Layout, Sizes
from megatron_mhc.testing.parameters import fill
from multi_gpu.parity import (
    HAVE_TE,
    LAYOUTS,
    MEGATRON,
    NONE,
    fits,
    mhc_of,
    micro_batches,
    schedule_of,
    schedules_of,
    switch,
)

FACTOR, MOST = 3.0, 0.02  # MOST in nats: mean over the steps of |loss - one GPU's loss|
LEAST = 1e-3  # a tolerance is no smaller: on a CPU, runs may be equal to the last bit
# A small rate that rises over the first steps. At 1e-3 from the first step on, the third step's loss rises
# and rounding grows: in a small model on a CPU the noise is 20 times what it is at 3e-4. Routers make it grow
# faster: with experts one GPU's own noise was twice MOST at 3e-4, and such a test can tell nothing.
RATE, RISE = {"dense": 3e-4, "moe": 1e-4}, 10

PLAIN = "plain"
REVERSED = "micro-batches reversed"
HALVED = "micro-batches halved"
ROUNDED = "rounded once more"
NOISE = (REVERSED, HALVED, ROUNDED)
CONTROL = "a micro-batch twice"  # in the place of another, as if data-parallel ranks mistook theirs
WAYS = (PLAIN, *NOISE, CONTROL)

# (layout, kind, schedule), the most wanted first
CURVES = (
    ("tp2_sp", "dense", NONE),
    ("pp2_vpp2", "dense", "interleaved-split"),
    ("pp2_vpp2", "dense", "fused-split"),
    ("pp2_vpp2", "dense", "interleaved-whole"),
    ("pp2_vpp2", "dense", "fused-whole"),
    ("ep2", "moe", NONE),
    ("dp_distributed_optimizer", "dense", NONE),
    ("pp2_vpp2", "dense", MEGATRON),
    ("pp2", "dense", MEGATRON),
    ("tp2", "dense", NONE),
    ("pp2_vpp2", "moe", "fused-split"),
)


@dataclasses.dataclass(frozen=True)
class Scale:
    """Sizes of the model that is trained, the std of its weights, and for how many steps."""

    model: dict[str, int]
    batch: Sizes
    std: float
    steps: int


LARGE = Scale(
    model=dict(num_layers=4, hidden_size=512, ffn_hidden_size=1536, num_attention_heads=8)
    | dict(moe_ffn_hidden_size=512),
    batch=Sizes(sequence=512, micro_batch=4, vocabulary=256),
    std=0.02,
    steps=50,
)
TINY = Scale(
    model=dict(num_layers=4), batch=Sizes(sequence=32, micro_batch=2, vocabulary=256), std=0.1, steps=4
)


def text(sizes: Sizes, step: int, count: int) -> Tensor:
    """`count` micro-batches of bytes of the standard library: [count, micro-batch, sequence + 1]."""
    data = _library()
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(0, len(data) - sizes.sequence - 1, (count, sizes.micro_batch), generator=generator)
    return data[starts[..., None] + torch.arange(sizes.sequence + 1)]


@functools.cache
def _library() -> Tensor:
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    joined = bytearray(b"\n".join(file.read_bytes() for file in files))
    return torch.frombuffer(joined, dtype=torch.uint8).long()


def batch_of(batch: Tensor, way: str) -> Tensor:
    """The micro-batches of a step, as a run of one GPU takes them."""
    if way == REVERSED:
        return batch.flip(0)
    if way == HALVED:
        return batch.unflatten(1, (2, -1)).flatten(0, 1)
    if way == CONTROL:
        return torch.cat([batch[:1], batch[:-1]])
    return batch


class _Rounded(torch.autograd.Function):
    """Its input, rounded to bf16 once more, in the forward or in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: bool, generator: torch.Generator) -> Tensor:
        ctx.forward_, ctx.generator = forward, generator
        return _round(x, generator) if forward else x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        return gradient if ctx.forward_ else _round(gradient, ctx.generator), None, None


def _round(x: Tensor, generator: torch.Generator) -> Tensor:
    random = torch.rand(x.shape, device=x.device, generator=generator)
    return (x.float() * (1 + 2**-8 * (2 * random - 1))).to(x.dtype)


def round_once_more(chunks: list[Any]) -> None:
    """Round where tensor parallelism adds up what its ranks have rounded.

    That is the output of a layer's second linears, and the gradient of the input of its first ones.
    """
    generator = torch.Generator(device=next(chunks[0].parameters()).device).manual_seed(3)

    def output(module: Any, inputs: Any, found: Any) -> Any:
        return _Rounded.apply(found[0], True, generator), *found[1:]

    def gradient(module: Any, inputs: Any) -> Any:
        return _Rounded.apply(inputs[0], False, generator), *inputs[1:]

    for chunk in chunks:
        for name, module in chunk.named_modules():
            if name.endswith(("linear_proj", "linear_fc2")):
                module.register_forward_hook(output)
            elif name.endswith(("linear_qkv", "linear_fc1")):
                module.register_forward_pre_hook(gradient)


def curve(
    layout: Layout, kind: str, schedule: str, count: int, options: argparse.Namespace, way: str = PLAIN
) -> list[float]:
    """The loss of every step of a training run in bf16.

    Args:
        way: PLAIN, or for one GPU one of NOISE and CONTROL.
    """
    scale = TINY if options.tiny else LARGE
    switch(layout)
    dtype = torch.bfloat16
    settings: dict[str, Any] = {k: v for k, v in scale.model.items() if kind != "dense" or "moe" not in k}
    settings |= dict(bf16=True, params_dtype=dtype, use_cpu_initialization=not HAVE_TE)
    if kind == "moe":
        settings |= dict(moe_grouped_gemm=HAVE_TE)
    config = layout.config(kind, **settings)
    how: dict[str, Any] = dict(sizes=scale.batch, te=HAVE_TE)
    how |= dict(weights=functools.partial(fill, std=scale.std))
    chunks = gpt.build(layout, config, kind, mhc_of(schedule, max(options.streams)), **how)
    if way == ROUNDED:
        round_once_more(chunks)
    adam = OptimizerConfig(
        optimizer="adam",
        lr=RATE[kind],
        weight_decay=0.1,
        clip_grad=1.0,
        adam_beta2=0.95,
        bf16=True,
        params_dtype=dtype,
        use_distributed_optimizer=layout.distributed_optimizer,
    )
    optimizer = get_megatron_optimizer(adam, chunks, use_gloo_process_groups=False)
    run = dict(schedule=schedule_of(schedule), masked=not HAVE_TE)
    losses = []
    for step in range(scale.steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE[kind] * min(1.0, (step + 1) / RISE)
        optimizer.zero_grad()
        batch = batch_of(text(scale.batch, step, count), way)
        losses.append(gpt.iterate(chunks, config, batch, **run))
        optimizer.step()
    return losses


def cases(world: int) -> list[tuple[str, str, str]]:
    return [
        (name, kind, schedule)
        for name, kind, schedule in CURVES
        if schedule in schedules_of(LAYOUTS[name][0]) and fits(LAYOUTS[name][0], world)
    ]


def title(name: str, kind: str, schedule: str, options: argparse.Namespace) -> str:
    return f"{name}, {kind}, n={max(options.streams)}, {schedule}"


def references(options: argparse.Namespace, world: int) -> dict[Any, Callable[[], list[float]]]:
    """What one GPU is to train, by `key`."""
    kinds = dict.fromkeys(kind for _, kind, _ in cases(world))
    run = functools.partial(curve, Layout(), schedule=NONE, count=micro_batches(world), options=options)
    return {
        key(kind, way, options): functools.partial(run, kind=kind, way=way) for kind in kinds for way in WAYS
    }


def key(kind: str, way: str, options: argparse.Namespace) -> tuple[Any, ...]:
    return "curve", kind, way, max(options.streams)


def run(report: Report, expected: dict[Any, Any], options: argparse.Namespace) -> None:
    """Train in every layout, and compare with one GPU."""
    world = dist.get_world_size()
    wanted = cases(world)
    alone = {kind: {way: expected[key(kind, way, options)] for way in WAYS} for _, kind, _ in wanted}
    for kind, runs in alone.items():
        name = title("one GPU", kind, NONE, options)
        if report.wanted("curves", name):
            report.add("curves", name, noise_of(runs))
    for layout, kind, schedule in wanted:
        name = title(layout, kind, schedule, options)
        if report.wanted("curves", name):
            losses = curve(LAYOUTS[layout][0], kind, schedule, micro_batches(world), options)
            report.add("curves", name, compared(losses, alone[kind]))


def noise_of(alone: dict[str, list[float]]) -> Row:
    """What the runs of one GPU say: their noise, the tolerance that follows, whether it notices a fault.

    Args:
        alone: the losses of each of WAYS.
    """
    far = {way: distance(alone[way], alone[PLAIN]) for way in (*NOISE, CONTROL)}
    noise = max(far[way] for way in NOISE)
    tolerance = min(MOST, max(LEAST, FACTOR * noise))
    row: Row = {"first": alone[PLAIN][0], "last": alone[PLAIN][-1], "noise": noise, "tolerance": tolerance}
    return row | {"runs": far, "ok": far[CONTROL] > tolerance, "control": far[CONTROL], "losses": alone}


def compared(losses: list[float], alone: dict[str, list[float]]) -> Row:
    """A layout's curve beside one GPU's."""
    error, allowed = distance(losses, alone[PLAIN]), noise_of(alone)
    row: Row = {"first": losses[0], "last": losses[-1], "one GPU's last": alone[PLAIN][-1]}
    row |= {"mean error": error, "noise": allowed["noise"], "tolerance": allowed["tolerance"]}
    return row | {"ok": error <= allowed["tolerance"], "losses": losses}


def distance(losses: list[float], expected: list[float]) -> float:
    """Mean over the steps of the absolute difference, in nats; infinite where a loss is not a number."""
    errors = [abs(a - b) for a, b in zip(losses, expected, strict=True)]
    mean = sum(errors) / len(errors)
    return mean if mean == mean else float("inf")

"""Time whole training steps with mHC against the same model without it, on one GPU.

    python scripts/bench/train.py --out train.json [--models dense,moe_ep8] [--batches 4] [--n 4,2] ...

embedding, layers, head, loss, backward, gradient buffers, clipping, Adam: a GPTModel in bf16 under
Megatron's DDP and distributed optimizer, several micro-batches a step, through its own schedule. The layers
are those of layer.py: dense (4096/14336), moe_ep8 (the paper's 27B layer as a rank of EP=8 computes it, 9
experts, no exchange), moe (all 72 experts: --layers 2 on 80 GB). The vocabulary is cut in proportion to the
layers, so that embedding and head take the share that they have of the whole 32 or 30 layers. Weight
gradients accumulate inside TE's GEMMs. All rows see the same seeds and tokens.

vanilla, again  without mHC, at the start and at the end of a group: the difference is the noise
triton, reference, compile   mHC's operations; compile is torch.compile of the reference, and comes last
auto            --mhc-recompute-layer-num auto

wall            median interval between the ends of steps
kernels         GPU time summed over kernels and copies (CUPTI, after all wall times; each model built anew)
busy            part of the wall time in which any of them ran; below 0.95 the host sets the pace
launches        of the whole step, per layer and micro-batch
peak            memory of a step, MiB, of which `states` are weights, gradients and optimizer
loss            of the last timed step; `from reference` is its distance from the reference's

--out is written after every row, and drawn by train_figure.py; a second run with the same --out adds the
rows that it lacks. Without a GPU, to check the program and no speed:

    python -m megatron_mhc.testing.cpu scripts/bench/train.py --tiny --out train.json
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import logging
import math
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import train_figure
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
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module

from megatron_mhc import MHCConfig
from megatron_mhc.hyper_connection import HyperConnectionModule
from megatron_mhc.specs import wrap_block_spec

OPS = ("vanilla", "triton", "reference", "again", "compile")
PAPER, LLAMA = (129280, 30), (128256, 32)  # tokens and layers of the whole models
WHOLE = {"dense": LLAMA, "moe": PAPER, "moe_ep8": PAPER}
KEYS = ("wall_ms", "kernels_ms", "peak_MiB")

Row = dict[str, Any]

logging.getLogger("megatron").setLevel(logging.ERROR)  # a line for every model and DDP


def vocabulary(model: str, layers: int, tiny: bool) -> int:
    """Its size for a few layers of a model, a multiple of 128."""
    tokens, whole = WHOLE[model]
    return 256 if tiny else 128 * math.ceil(tokens * layers / whole / 128)


class Trainer:
    """A model, its optimizer and the micro-batches of its step, as a row asks."""

    def __init__(self, row: Row, options: argparse.Namespace):
        tensor_parallel.model_parallel_cuda_manual_seed(1, force_reset_rng=True)
        torch.manual_seed(1)
        self.shape = (row["batch"], options.seq)
        tokens = vocabulary(row["model"], options.layers, options.tiny)
        model, self.config = build(row, options, tokens)
        settings = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
        self.model = DistributedDataParallel(self.config, settings, Float16Module(self.config, model.cuda()))
        adam = dict(optimizer="adam", lr=3e-4, weight_decay=0.1, adam_beta1=0.9, adam_beta2=0.95)
        adam |= dict(bf16=True, params_dtype=torch.bfloat16, use_distributed_optimizer=True, clip_grad=1.0)
        self.optimizer = get_megatron_optimizer(OptimizerConfig(**adam), [self.model])
        self.config.grad_scale_func = self.optimizer.scale_loss
        self.config.finalize_model_grads_func = finalize_model_grads
        self.schedule = get_forward_backward_func()
        generator = torch.Generator().manual_seed(2)  # a few common tokens, which are soon learnt
        draws = torch.rand(options.micro_batches, row["batch"], options.seq + 1, generator=generator)
        self.data = [batch.cuda() for batch in (tokens * draws**4).long()]
        self.positions = torch.arange(options.seq, device="cuda").expand(self.shape).contiguous()

    def forward(self, batches: Iterator[Tensor], model: Any) -> tuple[Tensor, Callable[..., Any]]:
        batch = next(batches)
        labels = batch[:, 1:].contiguous()

        def mean(losses: Tensor) -> tuple[Tensor, Tensor]:
            loss = losses.float().mean()
            return loss, loss.detach().clone()

        return model(batch[:, :-1].contiguous(), self.positions, None, labels=labels), mean

    def step(self) -> tuple[Tensor, float]:
        """Train; returns the mean loss, which is not waited for, and the gradient norm."""
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        losses = self.schedule(
            forward_step_func=self.forward,
            data_iterator=iter(self.data),
            model=[self.model],
            num_microbatches=len(self.data),
            seq_length=self.shape[1],
            micro_batch_size=self.shape[0],
            forward_only=False,
        )
        succeeded, norm, _ = self.optimizer.step()
        assert succeeded
        return torch.stack(losses).mean(), float(norm)

    def close(self) -> None:
        """Free weights, gradients, optimizer state and the last graph.

        Dropping the trainer would not: DDP's hooks, what MoE's dispatcher keeps of a micro-batch and the
        optimizer's views of fp32 parameters make cycles through autograd's nodes, which nothing collects.
        """
        for module in self.model.modules():
            if (dispatcher := getattr(module, "token_dispatcher", None)) is not None:
                for name, value in vars(dispatcher).items():
                    if isinstance(value, Tensor):
                        setattr(dispatcher, name, None)
        tensors = [*self.model.parameters(), *(p.main_grad for p in self.model.parameters())]
        for group in self.optimizer.param_groups:
            tensors += group["params"]
        for part in self.optimizer.chained_optimizers:
            for state in part.optimizer.state.values():
                tensors += [value for value in state.values() if isinstance(value, Tensor)]
        for tensor in tensors:
            tensor.untyped_storage().resize_(0)


def build(row: Row, options: argparse.Namespace, tokens: int) -> tuple[GPTModel, Any]:
    """The model of a row and its config."""
    fusion = dict(moe_permute_fusion=options.permute_fusion)
    config = make_config(row["model"], options.layers, options.tiny, **fusion)
    spec: Any = get_gpt_decoder_block_spec(config, use_transformer_engine=ON_GPU, normalization="RMSNorm")
    if row["n"]:
        backend = "triton" if row["ops"] == "triton" else "reference"
        mhc = MHCConfig(num_residual_streams=row["n"], backend=backend, recompute_layer_num=row["recompute"])
        spec = wrap_block_spec(spec, mhc, config)
    untied = dict(share_embeddings_and_output_weights=False, position_embedding_type="rope")
    model = GPTModel(config, spec, tokens, options.seq, **untied)
    for module in model.modules():
        # Not by config.gradient_accumulation_fusion, with which the head would ask for apex.
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True
        if row["ops"] == "compile" and isinstance(module, HyperConnectionModule):
            compile_operations(module)
    return model, config


class Clock:
    """The GPU's clock and power, asked of nvidia-smi at the start of steps and not waited for."""

    def __init__(self) -> None:
        self.asked: list[subprocess.Popen[str]] = []

    def ask(self) -> None:
        if ON_GPU and shutil.which("nvidia-smi"):
            question = "nvidia-smi -i 0 --query-gpu=clocks.sm,power.draw --format=csv,noheader,nounits"
            self.asked.append(subprocess.Popen(question.split(), stdout=subprocess.PIPE, text=True))

    def medians(self) -> dict[str, float]:
        answers = [re.fullmatch(r"(\d+), ([\d.]+)", p.communicate()[0].strip()) for p in self.asked]
        found = [tuple(map(float, answer.groups())) for answer in answers if answer]
        return dict(zip(("MHz", "W"), map(statistics.median, zip(*found, strict=True)), strict=False))


def time_steps(trainer: Trainer, options: argparse.Namespace) -> Row:
    """Wall time, memory and losses."""
    clock, history = Clock(), [trainer.step() for _ in range(options.warm_up)]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    states = torch.cuda.memory_allocated()

    def step() -> None:
        clock.ask()
        history.append(trainer.step())

    wall = statistics.median(intervals(step, options.steps))
    tokens = math.prod(trainer.shape) * options.micro_batches
    found: Row = {"wall_ms": wall, "tokens_per_s": 1e3 * tokens / wall, **clock.medians()}
    found |= {"peak_MiB": torch.cuda.max_memory_allocated() / 2**20, "states_MiB": states / 2**20}
    found |= {"losses": [loss.item() for loss, _ in history], "grad_norms": [norm for _, norm in history]}
    if not all(map(math.isfinite, found["losses"] + found["grad_norms"])):
        raise FloatingPointError(f"losses {found['losses']}, gradient norms {found['grad_norms']}")
    return found | {"loss": found["losses"][-1]}


def profile_steps(trainer: Trainer, options: argparse.Namespace) -> Row:
    """Kernel time and launches of a step, in all and of the kernels that take longest."""
    for _ in range(options.warm_up):
        trainer.step()
    torch.cuda.synchronize()
    work = gpu_work(trainer.step, 1)
    found: Row = summary(work, 1)
    found["launches_per_layer"] = found["launches"] / options.layers / options.micro_batches
    by_name: dict[str, list[float]] = collections.defaultdict(lambda: [0.0, 0])
    for begin, end, name in work:
        by_name[name[:80]][0] += (end - begin) / 1e3
        by_name[name[:80]][1] += 1
    longest = sorted(by_name.items(), key=lambda item: -item[1][0])[:25]
    return found | {"ms_and_launches_of": {name: [round(ms, 3), count] for name, (ms, count) in longest}}


MEASURE = {"time": time_steps, "profile": profile_steps}  # in this order: CUPTI slows launches for good
RESULT = {"time": "wall_ms", "profile": "kernels_ms"}


def run(row: Row, name: str, options: argparse.Namespace) -> None:
    """Add to a row what a pass finds, with a model of its own."""

    def measure() -> Row:
        with contextlib.closing(Trainer(row, options)) as trainer:
            return MEASURE[name](trainer, options)

    clean()
    row["left_MiB"] = torch.cuda.memory_allocated() / 2**20  # by the rows before
    if row["ops"] == "compile":
        torch._dynamo.reset()  # compiled as if it were the only shape
    row.get("failed", {}).pop(name, None)  # an earlier run's
    row |= attempt(row, name, measure) or {}


def finish(group: list[Row]) -> None:
    """Bring the rows of one model and batch into relation."""
    compare(group, KEYS)
    for row in group:
        same = (r for r in group if (r["ops"], r["n"], r["recompute"]) == ("reference", row["n"], "off"))
        reference = next(same, {}).get("loss")
        if row.get("loss") and reference:
            row["loss_from_reference"] = row["loss"] - reference


def table(rows: list[Row]) -> str:
    head = "model | b | n | ops | recompute | wall ms | + % | kernels ms | + % | busy | launches/layer "
    head += "| tokens/s | MiB | + % | states | loss | from reference | MHz"
    lines = [f"| {head} |", "|---" * 18 + "|"]
    columns = {"wall_ms": 1, "kernels_ms": 1, "busy": 3, "launches_per_layer": 0, "tokens_per_s": 0}
    columns |= {"peak_MiB": 0, "states_MiB": 0, "loss": 4, "loss_from_reference": 5, "MHz": 0}
    for row in rows:
        cells = [row["model"], str(row["batch"]), str(row["n"] or "-"), row["ops"], row["recompute"]]
        for key, digits in columns.items():
            cells.append("-" if row.get(key) is None else f"{row[key]:.{digits}f}")
            if key in KEYS:
                more = row.get("overhead_pct", {}).get(key)
                cells.append("" if more is None or row["ops"] == "vanilla" else f"{more:+.1f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plan(options: argparse.Namespace) -> list[Row]:
    """The rows that are asked for, by model and batch."""
    rows = []
    for model in options.models:
        for batch in map(int, options.batches):
            for op in (op for op in OPS if op in options.ops):
                plain = op in ("vanilla", "again")
                for n in [None] if plain else map(int, options.n):
                    for recompute in ["off"] if plain or op == "compile" else options.recompute:
                        rows.append(dict(model=model, batch=batch, ops=op, n=n, recompute=recompute))
    return rows


def key(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("model", "batch", "ops", "n", "recompute"))


def take_up(path: Path, report: Row) -> list[Row]:
    """The rows of an earlier run with the same settings, none where there was no run.

    Raises:
        SystemExit: it had other settings.
    """
    if not path.exists():
        return []
    earlier = json.loads(path.read_text())
    for name in ("device", "versions", "settings"):
        if earlier[name] != report[name]:
            raise SystemExit(f"{path}: {name} {earlier[name]}, here {report[name]}: give another --out")
    return earlier["rows"]


def lacks(row: Row, name: str) -> bool:
    """Whether a row is to be measured by a pass."""
    possible = name == "time" or (ON_GPU and "time" not in row.get("failed", {}))
    return possible and RESULT[name] not in row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    lists = dict(models="dense,moe_ep8", batches="4", n="4,2", ops=",".join(OPS), recompute="off,auto")
    lists["measure"] = ",".join(MEASURE)
    known = dict(models=MODELS, ops=OPS, recompute=("off", "auto"), measure=MEASURE)
    for name, default in lists.items():
        among = f"some of {','.join(known[name])}; " if name in known else ""
        parser.add_argument("--" + name, default=default, help=f"{among}default {default}")
    numbers = {"seq": 4096, "layers": 4, "micro-batches": 4, "warm-up": 2, "steps": 5}
    for name, number in numbers.items():
        parser.add_argument("--" + name, default=number, type=int, help=f"default {number}")
    parser.add_argument("--permute-fusion", action="store_true", help="Megatron's --moe-permute-fusion")
    parser.add_argument("--tiny", action="store_true", help="toy sizes")
    parser.add_argument("--out", type=Path, help="JSON, taken up where it exists; the figure goes beside it")
    options = parser.parse_args()
    if options.tiny:
        options.seq, options.layers = min(options.seq, 32), min(options.layers, 2)
        options.micro_batches, options.steps = min(options.micro_batches, 2), min(options.steps, 2)
    for name in lists:
        setattr(options, name, getattr(options, name).split(","))
        if unknown := set(getattr(options, name)) - set(known.get(name, getattr(options, name))):
            parser.error(f"--{name} {','.join(unknown)}: choose from {','.join(known[name])}")
    settings = {k: v for k, v in vars(options).items() if k not in lists and k != "out"}
    report = start() | {"settings": settings}
    print(report, flush=True)

    asked = plan(options)
    earlier = take_up(options.out, report) if options.out else []
    done = {key(row): row for row in earlier}
    asked = [done.get(key(row), row) for row in asked]
    report["rows"] = rows = earlier + [row for row in asked if key(row) not in done]
    for last in (False, True):  # what compiles comes last, of all models
        for name in (name for name in MEASURE if name in options.measure):
            for row in (r for r in asked if (r["ops"] == "compile") == last and lacks(r, name)):
                run(row, name, options)
                finish([r for r in rows if (r["model"], r["batch"]) == (row["model"], row["batch"])])
                if options.out:
                    options.out.write_text(json.dumps(report, indent=1) + "\n")
                print(table([row]).splitlines()[-1], flush=True)
    print(f"\n{table(rows)}")
    if options.out:
        train_figure.draw(report, options.out.with_suffix(".png"))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

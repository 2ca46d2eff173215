"""Time mHC's operations on one GPU beside plain torch, torch.compile and Transformer Engine.

    python scripts/bench/ops.py [--shapes 8192x4096,4096x2560] [--n 4] [--dtype bf16] [--out bench.json]

Chain = pre -> F -> post_res, forward and backward with every gradient, where F is the identity; with
--sublayers 4 four of them in a row, each with parameters of its own, as in a model, and times are of a
quarter of that. One unit u is the bytes of one stream of all tokens; the floor of the chain is 7 n + 5 u, 33
for n = 4 (pre 5, post_res 9, their backward 5 and 14, each tensor moved once per operation), at the bandwidth
of a large device-to-device copy measured in the same run. Errors are relative L2 against float64.
"megatron_mhc" is Triton's kernels; "megatron_mhc, Hopper" is there on H100 and H200, for n = 4 and bf16;
"fused" works ahead for the next connection, as under --mhc-boundary fused (its post_res column counts that
in); the last one of a row has none to work for.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from megatron_mhc.backend import H100
from megatron_mhc.ops import autograd, reference
from megatron_mhc.ops.autograd import NextPre
from megatron_mhc.ops.hopper.pre import post_res_pre
from megatron_mhc.ops.kernels import HOPPER, TRITON
from megatron_mhc.ops.options import Options

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
OPTIONS = Options(1e-6, 20, False)
SEEDS = 64  # draws that errors are of
BETWEEN = "float64 between tensors"
COLUMNS = ["chain, us", "x floor", "from Python, us", "pre x floor", "post x floor", "peak MiB"]
COLUMNS += ["worst error"]
GRADS = ("x", "weight", "bias", "alpha_pre", "alpha_post", "alpha_res")
TENSORS = ("layer_input", "streams", *GRADS)


def plain(x, weight, bias, a_pre, a_post, a_res):
    """The definition: layer input and coefficients."""
    logits = reference.mapping_logits(x, weight, (a_pre, a_post, a_res), bias, 1e-6)
    h = reference.mhc_mappings(logits, x.shape[1])
    return reference.pre(x, h.h_pre), (x, h)


def plain_post(f, state):
    x, h = state
    return reference.post_res(x, f, h.h_post, h.h_res)


def exact(*tensors):
    """The definition in float64, with a layer input of the streams' dtype."""
    layer_input, state = plain(*(t.double() for t in tensors))
    return layer_input.to(tensors[0].dtype), state


def exact_post(f, state):
    return plain_post(f.double(), state).to(f.dtype)


def ours(x, weight, bias, *alphas):
    return autograd.pre(x, weight, bias, alphas, OPTIONS)


def by_hopper(x, weight, bias, *alphas):
    return autograd.pre(x, weight, bias, alphas, OPTIONS, HOPPER)


def next_by_triton(weight, bias, *alphas):
    """What post_res is told of the connection that it works ahead for."""
    return NextPre(TRITON, weight, bias, alphas, OPTIONS)


def next_by_hopper(weight, bias, *alphas):
    return NextPre(HOPPER, weight, bias, alphas, OPTIONS)


class Provider(NamedTuple):
    """pre and post_res, and what post_res is told of the next connection's parameters if it works ahead."""

    pre: Callable
    post: Callable
    reads: Callable | None = None


def transformer_engine(split_k: bool) -> Provider:
    """TE's operations; their streams lie [.., C, n], so inputs are laid out for them."""
    from transformer_engine.pytorch.triton import mhc

    def pre(x, weight, bias, a_pre, a_post, a_res):
        alpha = torch.cat([a_pre, a_post, a_res])
        out, h_post, h_res = mhc.mhc_generate_mix_and_aggregate(
            x.unsqueeze(1), weight, alpha, bias.view(1, -1), use_split_k=split_k
        )
        return out, (x.unsqueeze(1), h_post, h_res)

    def post(f, state):
        x, h_post, h_res = state
        return mhc.mhc_fused_expand_combine(f, None, h_post, x, h_res, 4)

    return Provider(pre, post)


def providers(n: int, dtype: torch.dtype) -> dict[str, Provider]:
    found = {
        "megatron_mhc": Provider(ours, autograd.post_res),
        "megatron_mhc, Hopper": Provider(by_hopper, autograd.post_res),
        "megatron_mhc, Hopper, fused": Provider(by_hopper, autograd.post_res, next_by_hopper),
        "megatron_mhc, fused": Provider(ours, autograd.post_res, next_by_triton),
        BETWEEN: Provider(exact, exact_post),
        "torch eager": Provider(plain, plain_post),
        "torch.compile": Provider(torch.compile(plain), torch.compile(plain_post)),
    }
    if torch.cuda.get_device_capability() != H100[:2] or n != 4 or dtype != torch.bfloat16:
        del found["megatron_mhc, Hopper"], found["megatron_mhc, Hopper, fused"]
    if n == 4:
        try:
            found["TransformerEngine"] = transformer_engine(False)
            found["TransformerEngine split-K"] = transformer_engine(True)
        except ImportError as error:
            print(f"TransformerEngine left out: {error}")
    return found


def make_inputs(
    tokens: int, width: int, n: int, dtype: torch.dtype, channel_last: bool, seed: int = 0
) -> list[torch.Tensor]:
    generator = torch.Generator(device="cuda").manual_seed(seed)

    def rand(*shape):
        return torch.randn(*shape, generator=generator, device="cuda")

    rows = n * n + 2 * n
    shape = (tokens, width, n) if channel_last else (tokens, n, width)
    tensors = [rand(*shape).to(dtype), rand(rows, n * width) * 0.02, rand(rows)]
    tensors += [torch.full((1,), 0.5, device="cuda") for _ in range(3)]
    return [t.requires_grad_() for t in tensors]


def time_us(run: Callable[[], object], graph: bool) -> float:
    """Median microseconds of `run`, called from Python, or one of four in a CUDA graph that is replayed.

    Four, since what an event on either side and the start of a replay take, 10 us, would count in full.
    """
    times = 4 if graph else 1
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    if graph:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run()
        torch.cuda.current_stream().wait_stream(side)
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            for _ in range(times):
                run()
        run = captured.replay
    # Streams are several times the L2 at the shapes of interest; each run starts where the last ended.
    samples = []
    for _ in range(30):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end) * 1e3 / times)
    return statistics.median(samples)


def copy_bandwidth() -> float:
    """Bytes per second, read plus written, of a 1 GiB copy."""
    source = torch.empty(1 << 29, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    return 2 * source.numel() * 2 / (time_us(lambda: target.copy_(source), graph=False) * 1e-6)


def our_layout(parameter: torch.Tensor, width: int, n: int) -> torch.Tensor:
    """TE's phi [M, C*n] or bias [M] as ours: stream outer in the columns, H_res transposed in the rows."""
    if parameter.dim() == 2:
        parameter = parameter.view(-1, width, n).transpose(1, 2).reshape(parameter.shape)
    res = torch.arange(n * n).view(n, n).T.flatten() + 2 * n
    return parameter[torch.cat([torch.arange(2 * n), res]).to(parameter.device)].contiguous()


def errors(pre, post, width: int, n: int, dtype: torch.dtype, channel_last: bool) -> dict[str, float]:
    """Relative L2 errors against float64 of 1024 tokens' outputs and gradients, of SEEDS draws together.

    Of one draw a single number's, as d alpha is, would be luck: it is a sum of terms that cancel.
    """
    missed = dict.fromkeys(TENSORS, 0.0)
    lengths = dict(missed)
    for seed in range(SEEDS):
        wanted, got = compared(pre, post, width, n, dtype, channel_last, seed)
        for name, a, b in zip(missed, got, wanted, strict=True):
            missed[name] += (a.reshape(b.shape).double() - b).square().sum().item()
            lengths[name] += b.square().sum().item()
    return {name: (missed[name] / lengths[name]) ** 0.5 for name in missed}


def compared(
    pre, post, width: int, n: int, dtype: torch.dtype, channel_last: bool, seed: int
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Outputs and gradients in float64, and those of `pre` and `post`, in the same layout."""
    tensors = make_inputs(1024, width, n, dtype, channel_last, seed)
    first = tensors[0].detach()
    doubles = [first.transpose(1, 2) if channel_last else first, *(t.detach() for t in tensors[1:])]
    doubles = [t.double().contiguous().requires_grad_() for t in doubles]
    if channel_last:  # TE flattens [C, n] and multiplies by H_res from the right: the same function, for ours
        doubles[1], doubles[2] = (our_layout(t.detach(), width, n).requires_grad_() for t in doubles[1:3])
    results = []
    for fn, end, leaves in ((plain, plain_post, doubles), (pre, post, tensors)):
        layer_input, state = fn(*leaves)
        out = end(layer_input, state)
        generator = torch.Generator(device="cuda").manual_seed(SEEDS + seed)
        g = torch.randn(1024, n, width, device="cuda", generator=generator).to(dtype)
        if out.shape[-1] == n:  # TE
            g = g.transpose(1, 2).reshape(out.shape)
        grads = torch.autograd.grad(out, leaves, g.to(out.dtype).view(out.shape))
        results.append([layer_input, out, *grads])
    wanted, got = results
    if channel_last:
        got[1] = got[1].reshape(1024, width, n).transpose(1, 2)
        got[2] = got[2].transpose(1, 2)
        got[3], got[4] = (our_layout(t, width, n) for t in got[3:5])
        wanted[2] = wanted[2].view(1024, n, width)
    return wanted, got


def timed(
    name: str,
    provider: Provider,
    tokens: int,
    width: int,
    n: int,
    dtype: torch.dtype,
    sublayers: int,
    unit_us: float,
) -> dict:
    """Microseconds, MiB and multiples of the floor."""
    pre, post, reads = provider
    channel_last = name.startswith("TransformerEngine")
    leaves = make_inputs(tokens, width, n, dtype, channel_last)
    own = [leaves[1:]]  # parameters of each connection
    for _ in range(sublayers - 1):
        own.append([parameter.detach().clone().requires_grad_() for parameter in leaves[1:]])
    leaves += [parameter for parameters in own[1:] for parameter in parameters]
    layer_input, state = pre(leaves[0], *own[0])
    out = post(layer_input, state)
    g = torch.randn_like(out)
    del layer_input, state, out

    def forward():
        x = leaves[0]
        for parameters, following in zip(own, [*own[1:], None], strict=True):
            layer_input, state = pre(x, *parameters)
            ahead = {"next_pre": reads(*following)} if reads and following else {}
            x = post(layer_input, state, **ahead).view_as(leaves[0])
        return x

    def chain():
        return torch.autograd.grad(forward(), leaves, g.view_as(leaves[0]))

    def pre_only():
        with torch.no_grad():
            return pre(leaves[0], *own[0])

    row = {"sublayers": sublayers}
    chain()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    chain()
    row["peak_MiB"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    row["chain_us"] = time_us(chain, graph=True) / sublayers
    row["chain_eager_us"] = time_us(chain, graph=False) / sublayers
    row["pre_us"] = time_us(pre_only, graph=True)
    with torch.no_grad():
        layer_input, state = pre_only()

        def post_only():
            if not hasattr(state, "take_tunnel"):
                return post(layer_input, state)
            # A benchmark may call it again: no gradient is at stake.
            x, values = leaves[0], state.coefficients
            if reads is None:
                return autograd.post_res_forward(x, layer_input, values)
            if reads is next_by_triton:
                return autograd.post_res_project(x, layer_input, values, own[0][0])
            return post_res_pre(x, layer_input, values, None, *own[0][:2], own[0][2:], OPTIONS)

        row["post_us"] = time_us(post_only, graph=True)
    row["chain_over_floor"] = row["chain_us"] / ((7 * n + 5) * unit_us)
    row["pre_over_floor"] = row["pre_us"] / ((n + 1) * unit_us)
    row["post_over_floor"] = row["post_us"] / ((2 * n + 1) * unit_us)
    return row


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="4096x2560,8192x4096,4096x7168", help="tokens x channels, ...")
    parser.add_argument("--n", type=int, default=4)
    parser.add_argument("--sublayers", type=int, default=1, help="connections in a row")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument(
        "--only", default="", help="run providers whose names contain one of these, with commas between"
    )
    parser.add_argument("--errors", action="store_true", help="of all providers, and no times")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    dtype = DTYPES[options.dtype]
    bandwidth = copy_bandwidth()
    packages = ("torch", "triton", "transformer-engine")
    report = {
        "device": torch.cuda.get_device_name(),
        "copy_TB_per_s": round(bandwidth / 1e12, 3),
        "versions": {p: installed(p) for p in packages},
        "rows": [],
    }

    def keep(row: dict) -> None:
        report["rows"].append(row)
        if options.out:
            options.out.write_text(json.dumps(report, indent=1))

    print(json.dumps({k: v for k, v in report.items() if k != "rows"}), flush=True)
    columns = ["implementation", "T x C", *(TENSORS if options.errors else COLUMNS)]
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for shape in options.shapes.split(","):
        tokens, width = map(int, shape.split("x"))
        unit_us = tokens * width * torch.finfo(dtype).bits // 8 / bandwidth * 1e6
        for name, provider in providers(options.n, dtype).items():
            if not any(part in name for part in options.only.split(",")):
                continue
            row = {"name": name, "tokens": tokens, "width": width, "n": options.n}
            row["dtype"] = str(dtype).removeprefix("torch.")
            try:
                if not options.errors and name != BETWEEN:
                    row |= timed(name, provider, tokens, width, options.n, dtype, options.sublayers, unit_us)
                channel_last = name.startswith("TransformerEngine")
                row["errors"] = errors(*provider[:2], width, options.n, dtype, channel_last)
            except Exception as error:  # a rival's failure is a result too
                row["failed"] = repr(error)[:300]
            print(f"| {' | '.join([name, shape, *cells(row, options.errors)])} |", flush=True)
            keep(row)
            torch.cuda.empty_cache()


def cells(row: dict, all_errors: bool) -> list[str]:
    """What the table shows of a row."""
    if "failed" in row:
        return [f"failed: {row['failed'][:120]}"]
    if all_errors:
        return [f"{error:.2e}" for error in row["errors"].values()]
    worst = max(row["errors"], key=row["errors"].get)
    error = f"{worst} {row['errors'][worst]:.1e}"
    if "chain_us" not in row:
        return ["-"] * (len(COLUMNS) - 1) + [error]
    found = [f"{row['chain_us']:.0f}", f"{row['chain_over_floor']:.2f}", f"{row['chain_eager_us']:.0f}"]
    found += [f"{row['pre_over_floor']:.2f}", f"{row['post_over_floor']:.2f}", f"{row['peak_MiB']:.0f}"]
    return [*found, error]


if __name__ == "__main__":
    main()

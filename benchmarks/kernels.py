"""The operations of a connection on one GPU: time, floor, memory and errors, beside torch.compile and TE.

    python -m benchmarks.kernels --out kernels.json [--shapes 8192x4096,4096x2560] [--sublayers 16]
        [--only ops,rivals,forms,errors,stages] [--providers hopper,TransformerEngine]

ops      connections in a row, as in a model: pre -> F -> post_res, forward and backward with every gradient,
         F the identity, each with parameters of its own; by the plugin's own module and back ends
forms    the same of other forms: read with the weights of the connection in front (single-pass), H_res = I;
         with their errors, as below
rivals   one connection by itself: these, Transformer Engine's kernels, and the definition under torch.compile
errors   relative L2 against float64 of every output and gradient, over many draws together: of one draw the
         gradient of an alpha, a sum that cancels, is luck
norms    connections in a row, each with the RMSNorm in front of F: folded into the kernels, behind the same
         kernels, and behind Transformer Engine's, see norms; `x floor` is of a connection without
native   connections in a row of Megatron's own mHC, with its operations and with these, and their errors, see
         native; by itself, since it needs another Megatron
stages   what a tile of the Hopper kernels does when, see hopper_stages

Numbers are of a connection, medians over alternating rounds:

graph_us     in a replayed CUDA graph: the kernels alone
python_us    called from Python, from the end of one call to the end of the next
host_us      until such a call has returned on the host
x floor      graph_us over what the bytes take at a copy's bandwidth of the same run, if each tensor moves
             once in each operation: 7 n + 5 times the bytes of a stream (pre n + 1, post_res 2 n + 1,
             backward n + 1 and 3 n + 2); forward: of pre and post_res
peak_MiB     above what is there before the call
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.harness import (
    ON_GPU,
    Report,
    Row,
    attempt,
    bandwidth,
    captured,
    clean,
    command_line,
    host_ms,
    intervals,
    one_rank,
    summary,
)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SECTIONS = ("ops", "rivals", "forms", "errors", "norms", "native", "stages")
GRADS = ("x", "weight", "bias", "alpha_pre", "alpha_post", "alpha_res")


class Connections(NamedTuple):
    """Connections in a row: what they compute, and what gradients are taken of.

    Args:
        forward: streams -> streams. leaves: the streams, then each connection's parameters.
        read: streams -> the first layer input.
    """

    forward: Callable[[Tensor], Tensor]
    leaves: list[Tensor]
    read: Callable[[Tensor], Tensor]


def parameters(connection: Any) -> list[Tensor]:
    """phi and affine of a connection, as leaves."""
    return [connection.mapping_proj.weight, connection.affine]


def set_parameters(connection: Any, values: list[Tensor]) -> None:
    with torch.no_grad():
        for parameter, value in zip(parameters(connection), values, strict=True):
            parameter.copy_(value)


def draw(tokens: int, width: int, n: int, dtype: torch.dtype, seed: int) -> list[Tensor]:
    """Streams [T, n, C], phi and affine: a bias of each of its rows, then the alphas."""
    generator = torch.Generator(device="cuda" if ON_GPU else "cpu").manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda")

    rows = n * n + 2 * n
    alphas = torch.full((3,), 0.5, device="cuda")
    x, weight = rand(tokens, n, width).to(dtype), rand(rows, n * width) * 0.02
    return [x, weight, torch.cat([rand(rows), alphas])]


def plugin(
    drawn: list[Tensor],
    count: int,
    backend: str = "auto",
    boundary: str = "auto",
    compiled: bool = False,
    exact: bool = False,
    **form: Any,
) -> Connections:
    """The plugin's connections.

    Args:
        exact: compute in float64 between tensors of the streams' dtype.
        form: further options of MHCConfig.
    """
    from megatron.core.transformer import TransformerConfig

    from megatron_mhc import MHCConfig
    from megatron_mhc.handed_on import first_weights
    from megatron_mhc.hyper_connection import HyperConnectionModule

    x, weight, affine = drawn
    tokens, n, width = x.shape
    dtype = torch.float64 if exact else x.dtype
    config = TransformerConfig(num_layers=1, hidden_size=width, num_attention_heads=1, params_dtype=dtype)
    mhc = MHCConfig(num_residual_streams=n, backend=backend, boundary=boundary, **form)
    rows = sum(mhc.parts.values())  # of H_res = I fewer
    values = [weight[:rows], torch.cat([affine[:rows], affine[len(weight) :][: len(mhc.parts)]])]
    row = [HyperConnectionModule(config, mhc, at).cuda() for at in range(count)]
    for connection in row:
        set_parameters(connection, values)
        if compiled:
            how = functools.partial(torch.compile, fullgraph=True, dynamic=False)
            connection.forward, connection.post_res = how(connection.forward), how(connection.post_res)
    leaf = x.detach().view(tokens, 1, n * width).requires_grad_()
    ahead = boundary in ("auto", "fused") and not exact and not compiled

    def forward(streams: Tensor) -> Tensor:
        streams = streams.to(dtype)
        h_pre = first_weights(streams, n) if mhc.reads_previous else None
        for connection, following in zip(row, [*row[1:], None], strict=True):
            layer_input, mappings = connection(streams, h_pre)
            h_pre = connection.handed_on(mappings)
            if exact:
                layer_input = layer_input.to(x.dtype).to(dtype)
            next_pre = following.next_pre(streams, h_pre) if following is not None and ahead else None
            streams = connection.post_res(streams, layer_input, mappings, next_pre=next_pre)
        return streams.to(x.dtype)

    def read(streams: Tensor) -> Tensor:
        streams = streams.to(dtype)
        first = first_weights(streams, n) if mhc.reads_previous else None
        return row[0](streams, first)[0].to(x.dtype)

    return Connections(forward, [leaf, *(p for connection in row for p in parameters(connection))], read)


# Transformer Engine's streams lie [.., C, n]: the rows of its phi and bias are ours in another order.


def theirs(parameter: Tensor, width: int, n: int) -> Tensor:
    """phi [M, n*C] or bias [M] as TE has it: channel outer in the columns, H_res transposed in the rows."""
    res = torch.arange(n * n).view(n, n).T.flatten() + 2 * n
    rows = parameter[torch.cat([torch.arange(2 * n), res]).to(parameter.device)]
    if rows.dim() == 2:
        rows = rows.view(-1, n, width).transpose(1, 2).reshape(rows.shape)
    return rows.contiguous()


def ours(parameter: Tensor, width: int, n: int) -> Tensor:
    """The other way."""
    if parameter.dim() == 2:
        parameter = parameter.view(-1, width, n).transpose(1, 2).reshape(parameter.shape)
    res = torch.arange(n * n).view(n, n).T.flatten() + 2 * n
    return parameter[torch.cat([torch.arange(2 * n), res]).to(parameter.device)].contiguous()


def transformer_engine(
    drawn: list[Tensor], count: int, split_k: bool = False, norm: Callable[..., Any] | None = None
) -> Connections:
    from transformer_engine.pytorch.triton import mhc

    x, weight, affine = drawn
    tokens, n, width = x.shape
    bias, *alphas = affine.split([len(weight), 1, 1, 1])
    values = [theirs(weight, width, n), theirs(bias, width, n), *alphas]
    row = [[v.detach().clone().requires_grad_() for v in values] for _ in range(count)]
    norms = [norm(width, x.dtype).cuda() for _ in row] if norm else []
    leaf = x.detach().transpose(1, 2).contiguous().unsqueeze(1).requires_grad_()  # [T, 1, C, n]

    def pre(x: Tensor, weight: Tensor, bias: Tensor, *alphas: Tensor) -> Any:
        return mhc.mhc_generate_mix_and_aggregate(
            x, weight, torch.cat(alphas), bias.view(1, -1), use_split_k=split_k
        )

    def forward(streams: Tensor) -> Tensor:
        for at, own in enumerate(row):
            layer_input, h_post, h_res = pre(streams, *own)
            layer_input = norms[at](layer_input) if norms else layer_input
            streams = mhc.mhc_fused_expand_combine(layer_input, None, h_post, streams, h_res, n)
            streams = streams.view(leaf.shape)
        return streams

    parameters = [*(p for own in row for p in own), *(norm.weight for norm in norms)]
    return Connections(forward, [leaf, *parameters], lambda x: pre(x, *row[0])[0])


Provider = Callable[[list[Tensor], int], Connections]
PLUGIN: dict[str, Provider] = {
    "hopper": functools.partial(plugin, backend="hopper", boundary="linked"),
    "hopper, fused": functools.partial(plugin, backend="hopper", boundary="fused"),
    "triton": functools.partial(plugin, backend="triton", boundary="linked"),
    "triton, fused": functools.partial(plugin, backend="triton", boundary="fused"),
}
SINGLE_PASS, IDENTITY = dict(read="previous"), dict(h_res="identity")
FORMS: dict[str, tuple[Provider, dict[str, str]]] = {
    name: (functools.partial(plugin, backend=backend, boundary=boundary, **form), form)
    for name, backend, boundary, form in (
        ("hopper, fused", "hopper", "fused", {}),
        ("hopper, fused, single-pass", "hopper", "fused", SINGLE_PASS),
        ("hopper, single-pass", "hopper", "linked", SINGLE_PASS),
        ("triton, fused", "triton", "fused", {}),
        ("triton, fused, single-pass", "triton", "fused", SINGLE_PASS),
        ("triton, single-pass", "triton", "linked", SINGLE_PASS),
        ("triton", "triton", "linked", {}),
        ("triton, identity", "triton", "linked", IDENTITY),
        ("triton, fused, identity", "triton", "fused", IDENTITY),
    )
}
FORMS_ON_CPU = {
    f"reference{name}": (functools.partial(plugin, backend="reference", **form), form)
    for name, form in ((", single-pass", SINGLE_PASS), (", identity", IDENTITY))
}
RIVALS: dict[str, Provider] = {
    "TransformerEngine": transformer_engine,
    "TransformerEngine, split-K": functools.partial(transformer_engine, split_k=True),
    "torch.compile": functools.partial(plugin, backend="reference", compiled=True),
    "torch eager": functools.partial(plugin, backend="reference"),
}
EXACT = {"float64 between tensors": functools.partial(plugin, backend="reference", exact=True)}


class Timed:
    """A provider's row of connections, built anew for each round, and what its calls take."""

    def __init__(self, make: Provider, drawn: list[Tensor], count: int):
        self.make, self.drawn, self.count = make, drawn, count
        self.samples: dict[str, list[list[float]]] = {}
        self.peak = 0.0

    def round(self, times: int) -> None:
        """Add a round of `times` samples."""
        row = self.make(self.drawn, self.count)
        leaf = row.leaves[0]
        with torch.no_grad():
            g = torch.randn_like(row.forward(leaf)).view_as(leaf)

        def forward() -> Tensor:
            return row.forward(leaf)

        def chain() -> Any:
            return torch.autograd.grad(row.forward(leaf).view_as(leaf), row.leaves, g)

        for _ in range(3):
            chain()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        chain()
        self.peak = (torch.cuda.max_memory_allocated() - before) / 2**20
        self.keep("python_us", intervals(chain, times)[1:])
        self.keep("host_us", host_ms(chain, times))
        # Four in a graph: what a replay's start and the events on either side take would count in full.
        self.keep("graph_us", [ms / 4 for ms in intervals(captured(chain, 4), times)[1:]])
        with torch.no_grad():
            self.keep("forward_us", [ms / 4 for ms in intervals(captured(forward, 4), times)[1:]])

    def keep(self, name: str, milliseconds: list[float]) -> None:
        self.samples.setdefault(name, []).append([1e3 * ms / self.count for ms in milliseconds])

    def row(self, stream_us: float) -> Row:
        """Args: stream_us: microseconds that one stream of all tokens takes at a copy's bandwidth."""
        n = self.drawn[0].shape[1]
        found: Row = {name: summary(parts) for name, parts in self.samples.items()}
        row: Row = {name: found[name]["median"] for name in ("graph_us", "python_us", "host_us")}
        row |= {"forward_us": found["forward_us"]["median"], "apart, %": found["graph_us"]["apart, %"]}
        row["x floor"] = row["graph_us"] / ((7 * n + 5) * stream_us)
        row["forward x floor"] = row["forward_us"] / ((3 * n + 2) * stream_us)
        return row | {"peak_MiB": self.peak}


def measure(
    report: Report,
    section: str,
    shape: tuple[int, int],
    providers: dict[str, Provider],
    count: int,
    options: argparse.Namespace,
) -> None:
    """A row of each provider, which take turns."""
    tokens, width = shape
    names = {name: f"{name}, {tokens}x{width}, n={options.n}, {count} in a row" for name in providers}
    missing = [name for name in providers if report.row(section, names[name]) is None]
    if not missing:
        return
    drawn = draw(tokens, width, options.n, DTYPES[options.dtype], 0)
    timed = {name: Timed(providers[name], drawn, count) for name in missing}
    failed: dict[str, Row] = {}
    for _ in range(options.rounds):
        for name in (name for name in missing if name not in failed):
            found = attempt(lambda name=name: timed[name].round(options.times) or {})
            failed |= {name: found} if "failed" in found else {}
            clean()
    stream_us = drawn[0][:, 0].nbytes / statistics.median(bandwidth() for _ in range(3)) * 1e6
    for name in missing:
        report.add(section, names[name], failed.get(name) or timed[name].row(stream_us))


def errors(make: Provider, width: int, options: argparse.Namespace, **form: str) -> Row:
    """Relative L2 of 1024 tokens' outputs and gradients, all seeds together; form: see `plugin`."""
    n, dtype, tokens = options.n, DTYPES[options.dtype], 64 if options.tiny else 1024
    missed: dict[str, float] = dict.fromkeys(("layer_input", "streams", *GRADS), 0.0)
    lengths = dict(missed)
    for seed in range(options.seeds):
        drawn = draw(tokens, width, n, dtype, seed)
        exact = plugin([drawn[0].double(), *drawn[1:]], 1, "reference", **form)
        g = torch.randn(tokens, n, width, device="cuda").to(dtype)
        row = make(drawn, 1)
        last = row.leaves[0].shape[-1] == n  # Transformer Engine's layout
        results = []
        for one, theirs_ in ((exact, False), (row, last)):
            with torch.no_grad():
                layer_input = one.read(one.leaves[0])
            streams = one.forward(one.leaves[0])
            given = g.transpose(1, 2) if theirs_ else g
            grads = torch.autograd.grad(streams, one.leaves, given.reshape(streams.shape).to(streams.dtype))
            found = [layer_input, streams, *grads]
            if theirs_:
                for at in (1, 2):
                    found[at] = found[at].view(tokens, width, n).transpose(1, 2)
                found[3:5] = [ours(t, width, n) for t in found[3:5]]
            elif len(found) == 5:  # affine is one
                rows = found[3].shape[0]
                found[4:] = found[4].split([rows, *[1] * (len(found[4]) - rows)])
            results.append(found)
        for name, wanted, got in zip(missed, *results, strict=False):  # of H_res = I there is no alpha_res
            missed[name] += (got.reshape(wanted.shape).double() - wanted).square().sum().item()
            lengths[name] += wanted.double().square().sum().item()
    return {name: (missed[name] / lengths[name]) ** 0.5 for name in missed if lengths[name]}


def main(argv: list[str] | None = None) -> None:
    parser = command_line("kernels", __doc__)
    add = parser.add_argument
    add("--out", type=Path)
    add("--only", default="ops,rivals", help=f"of {','.join(SECTIONS)}")
    add("--providers", default="", help="those whose names contain one of these, with commas between")
    add("--shapes", default="4096x2560,8192x4096,4096x7168", help="tokens x channels, ...")
    add("--n", type=int, default=4)
    add("--sublayers", type=int, default=16, help="connections in a row, of ops")
    add("--dtype", choices=DTYPES, default="bf16")
    for name, default in (("rounds", 2), ("times", 20), ("seeds", 64)):
        add("--" + name, type=int, default=default, help=f"default {default}")
    add("--tiny", action="store_true", help="toy sizes, for a CPU")
    options = parser.parse_args(argv)
    if options.tiny:
        options.shapes, options.sublayers, options.times, options.seeds = "32x32", 2, 3, 2
    sections, wanted = options.only.split(","), options.providers.split(",")
    if unknown := set(sections) - set(SECTIONS):
        parser.error(f"--only {','.join(unknown)}: choose from {','.join(SECTIONS)}")
    plugin_ = PLUGIN if ON_GPU else {"reference": functools.partial(plugin, backend="reference")}
    rivals = RIVALS if ON_GPU else {}

    def chosen(providers: dict[str, Provider]) -> dict[str, Provider]:
        return {name: make for name, make in providers.items() if any(part in name for part in wanted)}

    settings: Row = {key: value for key, value in vars(options).items() if key != "out"}
    one_rank()
    report = Report(options.out, "kernels", settings)
    for shape in options.shapes.split(","):
        tokens, width = map(int, shape.split("x"))
        if "ops" in sections:
            measure(report, "ops", (tokens, width), chosen(plugin_), options.sublayers, options)
        if "rivals" in sections:
            measure(report, "rivals", (tokens, width), chosen({**plugin_, **rivals}), 1, options)
        if "errors" in sections:
            for name, make in chosen({**plugin_, **EXACT, **rivals}).items():
                run = functools.partial(errors, make, width, options)
                report.run("errors", f"{name}, C={width}, n={options.n}", run)
                clean()
        if "norms" in sections:
            from benchmarks import norms

            theirs_ = functools.partial(transformer_engine, norm=norms.norm_module)
            found = norms.PROVIDERS | {"TransformerEngine, its norm": theirs_} if ON_GPU else norms.ON_CPU
            measure(report, "norms", (tokens, width), chosen(found), options.sublayers, options)
        if "native" in sections:
            from benchmarks import native

            providers = chosen(native.PROVIDERS if ON_GPU else native.ON_CPU)
            measure(report, "native", (tokens, width), providers, options.sublayers, options)
            for name, make in providers.items():
                run = functools.partial(errors, make, width, options, preset="deepseek_v4")
                report.run("errors", f"{name}, C={width}, n={options.n}", run)
                clean()
        if "forms" in sections:
            forms = FORMS if ON_GPU else FORMS_ON_CPU
            providers = chosen({name: make for name, (make, _) in forms.items()})
            measure(report, "forms", (tokens, width), providers, options.sublayers, options)
            for name, make in providers.items():
                run = functools.partial(errors, make, width, options, **forms[name][1])
                report.run("forms' errors", f"{name}, C={width}, n={options.n}", run)
                clean()
        if "stages" in sections and ON_GPU:
            from benchmarks import hopper_stages

            hopper_stages.measure(report, tokens, width)
    report.end()


if __name__ == "__main__":
    main()

"""Where a tile of the kernels for Hopper spends its time: clocks noted at points of its way, of all tiles.

Each kernel is built a second time with -DMHC_MARKS, which makes it a little slower. A tile's clocks are of
one SM, the first and the last STAGES tiles of a group are left out; a span is given as 10 %, median and 90 %.
`ring` is how many tiles of a block are on their way at once: residence / ring is the time that a tile takes
at best, `memory clocks a tile` what its bytes take at a copy's bandwidth, `us` the time of the usual build in
a replayed graph. pre_mix is pre behind the post_res of the connection before. No other benchmark knows the
kernels' insides.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.harness import Report, Row, bandwidth, captured, intervals
from megatron_mhc.ops.hopper import compile as building
from megatron_mhc.ops.hopper import pre, pre_backward
from megatron_mhc.ops.options import Options

MARKED = 128  # tiles of a group
POINTS = {"pre": 9, "pre_backward": 11}  # noted by MARK(tile, point) in the sources
UNITS = {"pre": 5, "pre_mix": 10, "pre_backward": 15}  # that a call moves, [T, C] tensors
SPANS = {  # between which points, in the order of a tile's way
    "pre": {
        "load": (0, 1),
        "mix and project": (1, 2),
        "finish comes": (2, 7),
        "slowest block": (7, 3),
        "sums": (3, 4),
        "aggregate comes": (4, 8),
        "aggregate": (8, 5),
        "residence": (0, 5),
        "until coefficients are read": (2, 6),
    },
    "pre_backward": {
        "load": (0, 1),
        "products": (1, 2),
        "middle comes": (2, 3),
        "slowest block": (3, 4),
        "coefficients": (4, 5),
        "slowest token": (5, 6),
        "all of it": (2, 6),
        "fetch": (6, 7),
        "dx comes": (7, 8),
        "dx": (8, 9),
        "store": (9, 10),
        "residence": (0, 10),
    },
}


class Marked:
    """Takes the place of `compile.kernel` and keeps what it built with marks."""

    def __init__(self) -> None:
        self.built: dict[str, tuple[Any, dict[str, int]]] = {}

    def kernel(self, source: building.Source, device: int, shared: int, **defines: int) -> building.Kernel:
        name = source.path.stem
        marks = dict(MARKS=256, MARKED=MARKED, POINTS=POINTS[name])
        found = building.kernel(source, device, shared, **marks, **defines)
        self.built[name] = found, defines
        return found

    def clocks(self, name: str) -> torch.Tensor:
        """[block, tile, point] int64; 0 where nothing was noted."""
        from cuda.bindings import driver

        module = building.checked(driver.cuFuncGetModule(self.built[name][0].function), "cuFuncGetModule")
        address, size = building.checked(driver.cuModuleGetGlobal(module, b"marks"), "cuModuleGetGlobal")
        held = torch.empty(256, MARKED, POINTS[name], dtype=torch.int64)
        assert held.numel() * 8 == size
        building.checked(driver.cuMemcpyDtoH(held.data_ptr(), address, size), "cuMemcpyDtoH")
        return held


def calls(tokens: int, width: int) -> dict[str, Any]:
    """Both kernels, ready to run."""
    generator = torch.Generator(device="cuda").manual_seed(0)

    def rand(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device="cuda").to(dtype)

    x, g, f, dl = rand(tokens, 4, width), rand(tokens, 4, width), rand(tokens, width), rand(tokens, width)
    weight, affine = rand(24, 4 * width, dtype=torch.float32) * 0.02, rand(27, dtype=torch.float32)
    options = Options(1e-6, 20, False)
    _, saved, *_ = pre.pre_forward(x, weight, affine, options)

    def backward() -> None:
        pre_backward.pre_backward(x, g, f, dl, weight, affine, saved, options, writer=(saved, affine))

    _, _, before, _ = pre.pre_forward(x, weight, affine, options)
    return {
        "pre": lambda: pre.pre_forward(x, weight, affine, options),
        "pre_mix": lambda: pre.post_res_pre(x, f, before, None, weight, affine, options),
        "pre_backward": backward,
    }


def measure(report: Report, tokens: int, width: int) -> None:
    """A row of each kernel at this shape."""
    stream_us = 2 * tokens * width / bandwidth() * 1e6
    for call, run in calls(tokens, width).items():
        name = f"{call}, {tokens}x{width}"
        report.run("stages", name, functools.partial(stages, call, run, tokens, width, stream_us))


def stages(call: str, run: Callable[[], Any], tokens: int, width: int, stream_us: float) -> Row:
    """Times of a call, and the clocks of its tiles' spans."""
    name = call.removesuffix("_mix")
    module = pre if name == "pre" else pre_backward
    microseconds = statistics.median(intervals(captured(run, 4), 20)[1:]) * 1e3 / 4
    marked = Marked()
    module.kernel = marked.kernel
    try:
        run()  # once: a block's slice, and with it which tokens it notes, is another in each launch
        torch.cuda.synchronize()
        clocks = marked.clocks(name)
    finally:
        module.kernel = building.kernel
    defines = marked.built[name][1]
    blocks = building.multiprocessors(torch.device("cuda", 0))
    cut = building.layout(tokens, width, module.WIDEST, blocks, defines["TILE"])
    tiles = -(-tokens // defines["TILE"]) // cut.groups
    clocks = clocks[: cut.groups * cut.slices, defines["STAGES"] : min(tiles, MARKED) - defines["STAGES"]]
    floor = UNITS[call] * stream_us
    row: Row = {"us": microseconds, "x floor": microseconds / floor, "blocks": cut.groups * cut.slices}
    row |= {"slices": cut.slices, "channels": cut.width, "tile": defines["TILE"], "ring": defines["STAGES"]}
    spans = {}
    for span, (a, b) in SPANS[name].items():
        there = (clocks[..., a] > 0) & (clocks[..., b] > 0)
        found = (clocks[..., b] - clocks[..., a])[there].double()
        if found.numel():
            spans[span] = [round(found.quantile(q).item()) for q in (0.1, 0.5, 0.9)]
    begun = clocks[..., 0].double()
    a_tile = ((begun[:, -1] - begun[:, 0]) / (begun.shape[1] - 1)).median().item()
    row |= {"tiles": tiles, "clocks": spans, "clocks a tile": round(a_tile)}
    return row | {"memory clocks a tile": round(a_tile * floor / microseconds)}

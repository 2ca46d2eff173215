"""How fast the kernels for Hopper could be if they only copied: their loads and stores, nothing in between.

    python scripts/bench/hopper_copies.py [--shapes 8192x4096,...] [--stay 0,8000,13000] [--out copies.json]

The same boxes of the same tensors go through rings of the same size, by as many blocks, each of which goes
its own way; a tile stays in shared memory for `stay` clocks. What hopper_stages.py finds beyond this is
arithmetic and the blocks' waiting for each other.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from hopper_stages import UNITS
from ops import copy_bandwidth, time_us

from megatron_mhc.ops.hopper import compile as building
from megatron_mhc.ops.hopper import pre, pre_backward

SOURCE = building.Source(Path(__file__).resolve().with_suffix(".cu"), THREADS=96)
# What a kernel reads, [T, 4, C] and [T, C] tensors; its tile and widest cut.
KERNELS: dict[str, dict[str, Any]] = {
    "pre": dict(WIDE=1, SINGLES=0, tile=pre.TILE, widest=pre.WIDEST),
    "pre_mix": dict(WIDE=1, SINGLES=1, tile=pre.TILE, widest=pre.WIDEST),
    "pre_backward": dict(WIDE=2, SINGLES=2, tile=pre_backward.TILE, widest=pre_backward.WIDEST),
}


def stages(kernel: str, width: int) -> int:
    if kernel == "pre_backward":
        return pre_backward.memory(width, 20)[1]
    return pre.memory(width, mix=kernel == "pre_mix")[1]


def time_copies(kernel: str, tokens: int, channels: int, stay: int) -> float:
    """Microseconds of a launch in a replayed graph, the zeroing of its ticket included."""
    reads = KERNELS[kernel]
    device = torch.device("cuda", 0)
    blocks = building.multiprocessors(device)
    cut = building.layout(tokens, channels, reads["widest"], blocks, reads["tile"])
    ring = stages(kernel, cut.width)
    stage = (4 * reads["WIDE"] + reads["SINGLES"]) * reads["tile"] * cut.width * 2
    defines = cut.defines(channels, reads["tile"], ring) | dict(WIDE=reads["WIDE"], SINGLES=reads["SINGLES"])
    compiled = building.kernel(SOURCE, 0, ring * stage, **defines)

    def maps(count: int, *shape: int) -> list[Any]:
        drawn = [torch.randn(*shape, device=device).bfloat16() for _ in range(count)]
        kept.extend(drawn)
        return [building.tensor_map(t, cut.width, 4 if t.dim() == 3 else 1, reads["tile"]) for t in drawn]

    kept: list[torch.Tensor] = []
    x, g, streams_out = maps(3, tokens, 4, channels)
    f, dl, out = maps(3, tokens, channels)

    def launch() -> None:
        ticket = torch.zeros(4, device=device, dtype=torch.int32)
        compiled.launch(
            cut.groups * cut.slices, device, x, g, f, dl, streams_out, out, ticket, tokens, cut.groups, stay
        )

    return time_us(launch, graph=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="8192x4096,4096x7168,4096x2560", help="tokens x channels, ...")
    parser.add_argument("--stay", default="0,8000,13000", help="clocks, ...")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    bandwidth = copy_bandwidth()
    report: dict[str, Any] = {"device": torch.cuda.get_device_name(), "copy_TB_per_s": bandwidth / 1e12}
    report["rows"] = []
    for shape in options.shapes.split(","):
        tokens, channels = map(int, shape.split("x"))
        for kernel in KERNELS:
            for stay in map(int, options.stay.split(",")):
                us = time_copies(kernel, tokens, channels, stay)
                floor = UNITS[kernel] * tokens * channels * 2 / bandwidth * 1e6
                row = dict(kernel=kernel, tokens=tokens, width=channels, stay=stay, us=round(us, 1))
                report["rows"].append(row | {"x_floor": round(us / floor, 3)})
                print(json.dumps(report["rows"][-1]), flush=True)
    if options.out:
        options.out.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()

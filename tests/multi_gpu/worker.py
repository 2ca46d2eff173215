"""One rank of test_parity.py and test_curves.py, under torchrun: the rows of a section, each in a report.

What one GPU computes comes first, each rank a share of it in a world of its own; it is kept in `--scratch`.
"""

from __future__ import annotations

import argparse
import faulthandler
import logging
import os
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

# Many queues: with one, a message that waits for its sender holds up whatever stands behind it.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # no NVLink multicast

import torch
import torch.distributed as dist

torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # before anything else touches a GPU
warnings.filterwarnings("ignore", module="megatron")

from benchmarks.harness import Report  # noqa: E402
from multi_gpu import curves, parity  # noqa: E402


def references(options: argparse.Namespace, backend: str, settings: dict[str, str]) -> dict[Any, Any]:
    """This rank's share of what one GPU computes."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    make = parity.exact_references if options.section == "parity" else curves.references
    tasks = make(options, world)
    mine = list(tasks)[rank::world]
    file = options.scratch / f"references_{options.section}_{rank}_of_{world}.pt"
    kept = torch.load(file, weights_only=False) if file.exists() else {}
    found = kept["found"] if kept.get("settings") == settings else {}
    if not set(mine) - set(found):
        return {key: found[key] for key in mine}
    options.scratch.mkdir(parents=True, exist_ok=True)
    with parity.alone(backend):
        for key in mine:
            if key not in found:
                found[key] = tasks[key]()
                torch.save({"settings": settings, "found": found}, file)
    return {key: found[key] for key in mine}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("section", choices=("parity", "curves"))
    add("--out", type=Path, required=True)
    add("--scratch", type=Path, required=True)
    add("--dtype", choices=("float32", "float64"), default="float32", help="of parity")
    add("--transport", choices=("auto", "push", "nccl"), default="auto", help="of the plugin's schedules")
    add("--layouts", type=lambda text: text.split(","), default=[], help="of parity; all if not given")
    add("--streams", type=lambda text: list(map(int, text.split(","))), default=[4], help="n")
    add("--timeout", type=int, default=180, help="of a collective, in seconds")
    add("--row-timeout", type=int, default=90, help="seconds")
    add("--tiny", action="store_true", help="toy sizes, for a CPU")
    options = parser.parse_args()
    settings = {name: str(getattr(options, name)) for name in ("dtype", "streams", "tiny", "transport")}
    options.dtype = getattr(torch, options.dtype)
    logging.getLogger("megatron").setLevel(logging.ERROR)
    backend = "nccl" if parity.ON_GPU else "gloo"
    torch.backends.cuda.matmul.allow_tf32 = False
    report = Report(options.out, options.section, settings, options.row_timeout)
    # The ranks wait for each other's share; a hang ends with all stacks on stderr.
    faulthandler.dump_traceback_later(max(options.timeout, 4 * options.row_timeout), exit=True)
    found = references(options, backend, settings)
    # Not with a device_id: it would put all messages of a group on one stream.
    dist.init_process_group(backend, timeout=timedelta(seconds=options.timeout))
    shares: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(shares, found)
    expected = {key: value for share in shares for key, value in share.items()}
    (parity.run_exact if options.section == "parity" else curves.run)(report, expected, options)
    dist.barrier()
    faulthandler.cancel_dump_traceback_later()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

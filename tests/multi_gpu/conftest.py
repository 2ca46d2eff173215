"""Programs on two ranks that write a report: over NCCL with MEGATRON_MHC_GPU_TESTS=nccl, else toys on a CPU.

They are processes of their own, with Transformer Engine where it is installed. A report goes to
BENCHMARK_REPORT if that names a file (of one program), and is gone on with where it is there.
"""

import json
import os
import sys
from pathlib import Path

import pytest

from multi_gpu.supervise import supervise

ROOT = Path(__file__).resolve().parents[2]
NCCL = os.environ.get("MEGATRON_MHC_GPU_TESTS") == "nccl"


@pytest.fixture
def report(tmp_path):
    """`report(module, *arguments, limit=280, torchrun=True)` -> the program's rows by section and name."""

    def run(module, *arguments, limit=280, torchrun=True):
        given = os.environ.get("BENCHMARK_REPORT")
        name = "_".join([module, *arguments]).replace("--", "").replace(".", "_")
        out = Path(given) if given else tmp_path / f"{name}.json"
        scratch = out.with_suffix(".scratch") if given else tmp_path / "scratch"
        command = [sys.executable]
        if torchrun:
            command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        if not NCCL:
            command += ["-m", "megatron_mhc.testing.cpu"]
        command += ["-m", module, *arguments, "--out", str(out), "--scratch", str(scratch)]
        command += [] if NCCL else ["--tiny"]
        path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
        supervise(command, out, limit, cwd=ROOT, env=os.environ | {"PYTHONPATH": path})
        rows = json.loads(out.read_text())["rows"]
        bad = [row for row in rows if "failed" in row or "running" in row or not row.get("ok", True)]
        assert not bad, "\n".join(map(str, bad))
        return {(row["section"], row["name"]): row for row in rows}

    return run

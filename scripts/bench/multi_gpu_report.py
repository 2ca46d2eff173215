"""The rows of scripts/bench/multi_gpu.py: in a JSON file as they come, and as tables."""

from __future__ import annotations

import faulthandler
import importlib.metadata
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]
_VARIABLES = ("NCCL_", "CUDA_DEVICE", "CUDA_MODULE")


def machine() -> Row:
    """Device, driver, links, versions, and the variables that decide how ranks communicate."""
    found = {d.name.replace("_", "-"): d.version for d in importlib.metadata.distributions()}
    on_gpu = torch.empty(0, device="cuda").is_cuda
    about = {
        "device": torch.cuda.get_device_name(),
        "ranks": int(os.environ["WORLD_SIZE"]),
        "versions": {p: found.get(p) for p in ("torch", "triton", "transformer-engine", "megatron-core")},
        "environment": {key: os.environ[key] for key in sorted(os.environ) if key.startswith(_VARIABLES)},
    }
    if on_gpu:
        query = ["--query-gpu=driver_version", "--format=csv,noheader"]
        about["driver"] = _nvidia_smi(*query).splitlines()[0]
        about["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
        about["links"] = _nvidia_smi("topo", "-m")
    return about


def _nvidia_smi(*arguments: str) -> str:
    try:
        return subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nvidia-smi: {error}\n"


class Report:
    """Rows by section and name; rank 0 writes them, all ranks know what is there.

    A file that exists is gone on with: rows in it are not run again, one that was running when its
    process ended counts as failed.

    Args:
        limit: seconds after which a row's process ends, with its stacks on stderr; 0 for none.

    Raises:
        ValueError: the file's machine or environment is another.
    """

    def __init__(self, path: Path, settings: Row, limit: int = 0):
        self.path, self.head, self.limit = path, machine() | {"settings": settings}, limit
        self.rows: list[Row] = []
        if path.exists():
            old = json.loads(path.read_text())
            for key in ("device", "ranks", "environment", "settings"):
                if old.get(key) != self.head[key]:
                    raise ValueError(
                        f"--out {path} was made with {key} {old.get(key)}, this run has {self.head[key]}: "
                        "give another file"
                    )
            self.rows = old["rows"]
            for row in self.rows:
                if row.pop("running", False):
                    row["failed"] = "the run ended in its midst, see its log"

    def wanted(self, section: str, name: str) -> bool:
        """Whether a row is still to be run; if so it counts as running from here on."""
        if self.row(section, name) is not None:
            return False
        self.rows.append({"section": section, "name": name, "running": True})
        self._write()
        if self.limit:
            faulthandler.dump_traceback_later(self.limit, exit=True)
        return True

    def row(self, section: str, name: str) -> Row | None:
        return next((r for r in self.rows if (r["section"], r["name"]) == (section, name)), None)

    def note(self, section: str, name: str, result: Row) -> None:
        """Write what a row that runs has so far, in case that it does not come to its end."""
        row = self.row(section, name)
        assert row is not None
        row |= result
        self._write()

    def add(self, section: str, name: str, result: Row) -> None:
        """Fill the row that `wanted` made."""
        faulthandler.cancel_dump_traceback_later()
        self.note(section, name, result)
        row = self.row(section, name)
        assert row is not None
        del row["running"]
        self._write()
        if os.environ["RANK"] == "0":
            print(f"{section}: {name}: {brief(result)}", flush=True)

    def _write(self) -> None:
        if os.environ["RANK"] == "0":
            self.path.parent.mkdir(parents=True, exist_ok=True)
            new = self.path.with_suffix(".new")
            new.write_text(json.dumps(self.head | {"rows": self.rows}, indent=1) + "\n")
            new.replace(self.path)  # a killed run leaves a whole file

    def section(self, name: str) -> list[Row]:
        return [row for row in self.rows if row["section"] == name]

    def bad(self) -> list[str]:
        """Names of the rows that failed, or are beyond their tolerance."""
        return [
            f"{r['section']}: {r['name']}"
            for r in self.rows
            if "failed" in r or r.get("running") or not r.get("ok", True)
        ]

    def tables(self) -> str:
        """All sections in markdown."""
        parts = []
        for section in dict.fromkeys(row["section"] for row in self.rows):
            rows = self.section(section)
            columns = list(dict.fromkeys(key for row in rows for key in row if _shown(key, row[key])))
            lines = [f"\n**{section}**\n", f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
            for row in rows:
                cells = [_text(row.get(column)) for column in columns]
                lines.append(f"| {' | '.join([row['name'], *cells])} |")
            parts.append("\n".join(lines))
        return "\n".join(parts)


def _shown(key: str, value: Any) -> bool:
    return key not in ("section", "name") and isinstance(value, (bool, int, float, str))


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "**NO**"
    if isinstance(value, float):
        return f"{value:.1e}" if value and abs(value) < 0.01 else f"{value:.4g}"
    return "-" if value is None else str(value)


def brief(result: Row) -> str:
    return ", ".join(f"{key} {_text(value)}" for key, value in result.items() if _shown(key, value))

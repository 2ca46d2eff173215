"""Run megatron_mhc beside each kind of apex and Transformer Engine and print what it did, as JSON.

    python tests/unit/optional/child.py

A fresh interpreter, because Megatron looks for both when it is imported: each kind is a fork of it from
before that. test_optional_parts.py compares the findings.
"""

from __future__ import annotations

import argparse
import builtins
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
PARTS = ("apex", "amp_C", "transformer_engine", "transformer_engine_torch")
HEAVY = (*PARTS, "torch", "triton", "megatron")
KINDS = ("absent", "apex", "transformer_engine", "broken_apex", "broken_transformer_engine")


def loaded() -> list[str]:
    return [name for name in HEAVY if name in sys.modules]


def bare_import() -> dict[str, list[str]]:
    """What the package brings in before anything asks for Megatron."""
    import megatron_mhc

    at_import = loaded()
    parser = megatron_mhc.add_mhc_args(argparse.ArgumentParser())
    megatron_mhc.MHCConfig.from_args(parser.parse_args(["--mhc-num-residual-streams", "2"]))
    return {"import": at_import, "options": loaded()}


def prepare(kind: str) -> None:
    """Make apex and Transformer Engine what `kind` says, whatever this machine has."""
    import fused

    for name in PARTS:
        sys.modules[name] = None  # type: ignore[assignment]  # an import of it fails
    if kind == "apex":
        fused.install_apex()
    elif kind == "transformer_engine":
        fused.install_transformer_engine()
    elif kind != "absent":  # there, without any of its parts: built without its extensions
        fused.module(kind.removeprefix("broken_"), __version__="2.0")


def trace_imports() -> set[str]:
    """The modules that import apex or Transformer Engine from now on."""
    importers, real = set(), builtins.__import__

    def traced(name: str, scope: Any = None, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] in PARTS and scope:
            importers.add(scope["__name__"])
        return real(name, scope, *args, **kwargs)

    builtins.__import__ = traced
    return importers


def findings(kind: str, folder: Path) -> dict[str, Any]:
    """What happens beside one kind."""
    import logging
    import warnings

    from megatron_mhc.testing import cpu

    prepare(kind)
    importers = trace_imports()
    warnings.simplefilter("ignore")
    import megatron_mhc

    if kind == "broken_transformer_engine":
        return {"errors": [error_of(lambda: megatron_mhc.register()), error_of(stock_core)]}
    cpu.patch_megatron()
    logging.disable(logging.WARNING)
    import trials

    te = kind == "transformer_engine"
    found = {"hooks": trials.hooks(), "chosen": trials.chosen()}
    found["builds"] = {
        normalization: [error_of(trials.build, mhc, normalization) for mhc in (None, trials.MHC)]
        for normalization in ("LayerNorm", "RMSNorm")
    }
    if kind != "broken_apex":
        found["runs"] = trials.runs(te, resume=kind != "absent")
        found["recompute"] = trials.recompute(te)
    if te:
        found["checkpoints"] = trials.checkpoints(folder)
    if kind in ("absent", "transformer_engine"):
        import folded

        (folder / kind).mkdir()
        found["folded"] = folded.checkpoints(te, folder / kind) | {"same": folded.same(te)}
        if te:
            found["refused"] = folded.refused()
    return found | {"importers": sorted(importers)}


def stock_core() -> None:
    import megatron.core.fp8_utils  # noqa: F401


def error_of(fn: Any, *args: Any) -> str | None:
    try:
        fn(*args)
    except Exception as error:
        return f"{type(error).__name__}: {error}".split(" when instantiating")[0]
    return None


def main() -> None:
    out = {"bare": bare_import()}
    import tempfile

    import torch
    import torch._dynamo  # once, not in every fork

    from megatron_mhc.testing import cpu, ranks

    torch.set_num_threads(1)
    cpu.install()
    with tempfile.TemporaryDirectory() as folder:
        for kind in sys.argv[1:] or KINDS:
            out[kind] = ranks.run_ranks(1, findings, kind, Path(folder))[0]
    print(json.dumps(out))


if __name__ == "__main__":
    main()

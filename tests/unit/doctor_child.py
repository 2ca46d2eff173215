"""Print what the doctor says on machines that lack something, as JSON: text and health of each kind.

    python tests/unit/doctor_child.py FOLDER KIND...

Each kind is a fork, from before Megatron, which looks for Triton and Transformer Engine at its import.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from megatron_mhc.testing import ranks


def lacks(name: str) -> None:
    sys.modules[name] = None  # type: ignore[assignment]  # an import of it fails


def broken_transformer_engine(folder: Path) -> None:
    package = folder / "transformer_engine"
    package.mkdir()
    (package / "__init__.py").write_text("__version__ = '2.0'\n")  # built without its extensions
    sys.path.insert(0, str(folder))


def other_megatron(folder: Path, version: str = "0.16.1", own: bool = False) -> None:
    core = folder / version / "megatron" / "core"
    (core / "transformer").mkdir(parents=True)
    (core / "__init__.py").write_text(f"__version__ = '{version}'\n")
    (core / "transformer" / "__init__.py").touch()
    if own:
        (core / "transformer" / "hyper_connection.py").touch()
    sys.path.insert(0, str(folder / version))
    (core.parent / "__init__.py").touch()  # a package of its own, before the namespace of the installed one


KINDS = {
    "as it is": lambda folder: None,
    "no triton": lambda folder: lacks("triton"),
    "no cuda-bindings": lambda folder: lacks("cuda"),
    "broken transformer engine": broken_transformer_engine,
    "old megatron": other_megatron,
    "megatron with its own": lambda folder: other_megatron(folder, "0.19.0", own=True),
    "no megatron": lambda folder: lacks("megatron"),
}


def said(kind: str, folder: Path, words: list[str]) -> tuple[str, bool]:
    KINDS[kind](folder)
    from megatron_mhc.doctor import report

    return report(words)


if __name__ == "__main__":
    import torch._dynamo  # noqa: F401  # once, not in every fork

    words = json.load(sys.stdin)
    folder = Path(sys.argv[1])
    print(json.dumps({kind: ranks.run_ranks(1, said, kind, folder, words)[0] for kind in KINDS}))

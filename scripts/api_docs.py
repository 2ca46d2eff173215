"""Write API pages of the public names by pdoc, which the docs extra has; a warning of pdoc's fails.

python scripts/api_docs.py [FOLDER]
"""

from __future__ import annotations

import argparse
import warnings
from importlib import import_module
from pathlib import Path

MODULES = (
    "megatron_mhc",
    "megatron_mhc.pipeline",
    "megatron_mhc.recompute",
    "megatron_mhc.diagnostics",
    "megatron_mhc.convert",
    "megatron_mhc.export",
)


def main() -> None:
    """Write them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=Path("build/api"), help="default: build/api")
    folder = parser.parse_args().folder
    import pdoc

    for name in MODULES:
        module = import_module(name)
        for public in getattr(module, "__all__", ()):
            vars(module)[public] = getattr(module, public)  # pdoc looks up no name that is loaded lazily
    warnings.filterwarnings("error", module=r"pdoc\b")
    pdoc.render.configure(docformat="google")
    pdoc.pdoc(*(word for name in MODULES for word in (name, f"!{name}\\.")), output_directory=folder)
    print(f"{folder / 'index.html'}")


if __name__ == "__main__":
    main()

"""Write the README's table of options from their descriptions in megatron_mhc/config.py.

python scripts/option_table.py
"""

from __future__ import annotations

import re
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

from megatron_mhc.config import MHCConfig, flag, takes

README = Path(__file__).resolve().parents[1] / "README.md"
HEAD = "| option (`--mhc-...`) | default | takes | |\n|---|---|---|---|\n"


def row(option: Field[Any]) -> str:
    """One option's line of the table."""
    name = flag(option.name).removeprefix("--mhc-")
    words = takes(option).removeprefix("one of ")
    for choice in option.metadata["choices"]:
        words = re.sub(rf"\b{choice}\b", f"`{choice}`", words)
    default = option.default
    if option.type == "bool":
        words, default = f"nothing; `{option.name}=true` in MEGATRON_MHC", "off"
    meaning = re.sub(r"docs/\w+\.md", r"[\g<0>](\g<0>)", option.metadata["help"])
    return f"| `{name}` | `{default}` | {words} | {meaning} |\n"


def table() -> str:
    """The table of every option, in Markdown."""
    return HEAD + "".join(row(option) for option in fields(MHCConfig))


def main() -> None:
    """Put the table in the place of the README's."""
    old = re.compile(r"^\| option \(`--mhc-.*\n(\|.*\n)+", re.MULTILINE)
    text, count = old.subn(lambda _: table(), README.read_text())
    if count != 1:
        raise SystemExit(f"{README}: {count} tables of options, expected one")
    README.write_text(text)


if __name__ == "__main__":
    main()

"""One option: how it is described and spelt, and its value from text."""

from __future__ import annotations

import math
import operator
import reprlib
from dataclasses import Field, field
from typing import Any

ENVIRONMENT = "MEGATRON_MHC"

_MOST = 2**31 - 1  # of a whole number: what a kernel takes
_SWITCH = {"true": True, "1": True, "yes": True, "on": True}
_SWITCH |= {"false": False, "0": False, "no": False, "off": False}
short = reprlib.Repr(maxstring=80, maxother=80).repr


def flag(name: str) -> str:
    """Command-line spelling of a field: `num_residual_streams` -> `--mhc-num-residual-streams`."""
    return "--mhc-" + name.replace("_", "-")


def in_options(name: str, value: Any) -> str:
    """The end of a message about a flag: how users of MEGATRON_MHC or a YAML file write it."""
    return f" (in {ENVIRONMENT}: {name}={str(value).lower() if value is True else value})"


def option(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] = (),
    least: float | None = None,
    above: float | None = None,
    stored: bool = False,
) -> Any:
    """A field of MHCConfig with its description.

    Args:
        help: what it does, for --help and docs/options.md, which scripts/doc_tables.py writes.
        choices: the words it takes; with `least` it takes whole numbers beside them.
        least, above: the bound of a number, itself included or not.
        stored: whether it changes the arithmetic, so that checkpoints keep it and compare it.
    """
    rules = dict(help=help, choices=choices, least=least, above=above, stored=stored)
    return field(default=default, metadata=rules)


def takes(option: Field[Any]) -> str:
    """The values that an option takes, in words."""
    rules = option.metadata
    bound = f"at least {rules['least']}" if rules["above"] is None else f"above {rules['above']}"
    words = {"bool": "true or false", "int": f"a whole number, {bound}", "float": f"a finite number, {bound}"}
    if option.type != "str":
        return words[str(option.type)]
    choices = ", ".join(rules["choices"])
    return f"one of {choices}" if rules["least"] is None else f"{choices}, or {words['int']}"


def read(option: Field[Any], value: Any) -> Any:
    """An option's value, from text or a Python value.

    Raises:
        ValueError: it is of another type or outside its range, naming the flag, the value and the remedy.
    """
    try:
        return _read(option, value)
    except (ValueError, TypeError, OverflowError, KeyError):
        raise ValueError(
            f"{flag(option.name)}={short(value)}: give {takes(option)} (default {option.default})"
        ) from None


def _read(option: Field[Any], value: Any) -> Any:
    rules = option.metadata
    if option.type == "bool":
        return _SWITCH[str(value).lower()]
    if option.type == "str":
        word = "off" if value is False else value  # as YAML's own reader has it
        if isinstance(word, str) and word in rules["choices"]:
            return word
        if rules["least"] is None:
            raise ValueError
    if isinstance(value, bool):
        raise ValueError
    if option.type == "float":
        number = float(value)
    else:
        number = int(value) if isinstance(value, str) else operator.index(value)
    below = number < rules["least"] if rules["above"] is None else number <= rules["above"]
    if below or not math.isfinite(number) or (isinstance(number, int) and number > _MOST):
        raise ValueError
    return str(number) if option.type == "str" else number

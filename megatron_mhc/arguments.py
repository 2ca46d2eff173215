"""The --mhc-* command-line flags, one per field of MHCConfig."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import Field, fields
from functools import partial
from typing import Any, NoReturn

from megatron_mhc.config import MHCConfig, flag, read, refuse_environment
from megatron_mhc.version import check_version


def add_mhc_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the --mhc-* flags; pass it to Megatron as `extra_args_provider`.

    Raises:
        ValueError: an unsupported Megatron; one that has hyper-connections has flags of these names too.
    """
    if "megatron.core" in sys.modules:  # else the parser is not Megatron's
        check_version()
    group = parser.add_argument_group("mhc")
    for option in fields(MHCConfig):
        rules = option.metadata
        # None means "not given", so that MHCConfig alone knows the defaults.
        settings: dict[str, Any] = dict(default=None, help=f"{rules['help']} (default: {option.default})")
        if option.type == "bool":
            settings["action"] = "store_true"
        elif rules["choices"] and rules["least"] is None:
            settings["choices"] = rules["choices"]
        else:
            settings |= dict(type=partial(_read, option), metavar="|".join((*rules["choices"], "N")))
        group.add_argument(flag(option.name), **settings)
    parser.error = partial(_explain, parser.error)  # type: ignore[method-assign]
    return parser


def no_such_flags(words: Iterable[str]) -> list[str]:
    """What to say of each --mhc-* flag in `words` that there is not: those that it may stand for."""
    known = {option.name.replace("_", "-"): flag(option.name) for option in fields(MHCConfig)}
    found = dict.fromkeys(name for word in words for name in re.findall(r"(?<!\S)--mhc[\w-]*", word))
    said = []
    for name in (name for name in found if name not in known.values()):
        word = re.sub("^--mhc[-_]?", "", name).replace("_", "-")
        near = [long for long in known if word and set(word.split("-")) <= set(long.split("-"))]
        near = near or difflib.get_close_matches(word, known)
        remedy = f"give {' or '.join(known[long] for long in near)}" if near else "see --help"
        said.append(f"{name}: no such flag, {remedy}")
    return said


def _explain(error: Callable[[str], NoReturn], message: str) -> NoReturn:
    """A parser's `error`, which also says what a misspelt --mhc-* flag looks like."""
    error("; ".join([message, *no_such_flags([message])]))


def _read(option: Field[Any], text: str) -> Any:
    try:
        return read(option, text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def use_mhc(args: Any, model_config: Any) -> None:
    """Build the model with mHC if the command line has an --mhc-* flag; see patches/.

    Args:
        args: Megatron's parsed arguments, from a parser that `add_mhc_args` extended.
        model_config: Megatron's GPTModelConfig, whose `transformer_layer_spec` is set.

    Raises:
        ValueError: options in MEGATRON_MHC, another --spec, or a model that takes no layer spec.
    """
    given = [f.name for f in fields(MHCConfig) if getattr(args, "mhc_" + f.name) is not None]
    refuse_environment()
    if not given:
        return
    from megatron_mhc.specs import gpt_mhc_spec

    if args.spec is not None and list(args.spec) != ["megatron_mhc.specs", "gpt_mhc_spec"]:
        raise ValueError(f"--spec {' '.join(args.spec)}: drop it; mHC wraps what Megatron chooses")
    if getattr(args, "modelopt_enabled", False) or not hasattr(model_config, "transformer_layer_spec"):
        raise ValueError(f"{flag(given[0])}: only for a GPT that takes a layer spec, not for ModelOpt's")
    model_config.transformer_layer_spec = gpt_mhc_spec

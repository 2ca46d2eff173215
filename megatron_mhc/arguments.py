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
from megatron_mhc.releases import OWN_SWITCHES, release


def add_mhc_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the --mhc-* flags; pass it to Megatron as `extra_args_provider`.

    Flags that Megatron's main has for its own mHC are read for this package's, unless its own is turned on.

    Raises:
        ValueError: an unsupported Megatron.
    """
    # Else the parser is not Megatron's.
    own = release().own_options if "megatron.core" in sys.modules else ()
    theirs = {name: parser._option_string_actions.get(flag(name)) for name in own}
    group = parser.add_argument_group("mhc")
    shared = parser.add_argument_group("mhc, also Megatron's own", conflict_handler="resolve")
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
        (shared if theirs.get(option.name) else group).add_argument(flag(option.name), **settings)
    parser.error = partial(_explain, parser.error)  # type: ignore[method-assign]
    both = {name: action for name, action in theirs.items() if action is not None}
    if both:
        settle = partial(_settle, parser, parser.parse_known_args, both)
        parser.parse_known_args = settle  # type: ignore[assignment, method-assign]
    return parser


def _settle(
    parser: argparse.ArgumentParser,
    parse: Callable[..., Any],
    theirs: dict[str, argparse.Action],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Parse, and let shared flags mean what they mean to Megatron where its own mHC is turned on."""
    namespace, rest = parse(*args, **kwargs)
    if own_switch(namespace) is None:
        return namespace, rest
    for name, action in theirs.items():
        value = getattr(namespace, action.dest)
        read_by: Any = action.type
        try:
            setattr(namespace, action.dest, action.default if value is None else read_by(value))
        except ValueError:
            parser.error(
                f"argument {flag(name)}: {value} is not for Megatron's own mHC, which "
                f"{own_switch(namespace)} turns on and which reads it by {read_by.__name__}: drop either"
            )
    return namespace, rest


def own_switch(args: Any) -> str | None:
    """The flag by which these arguments turn on Megatron's own mHC."""
    given = (name for name in OWN_SWITCHES if getattr(args, name, False))
    return next(("--" + name.replace("_", "-") for name in given), None)


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
        ValueError: options in MEGATRON_MHC, another --spec, a model that takes no layer spec, or Megatron's
            own mHC.
    """
    switch = own_switch(args)
    own = release().own_options if switch else ()
    names = [option.name for option in fields(MHCConfig) if option.name not in own]
    given = [name for name in names if getattr(args, "mhc_" + name) is not None]
    refuse_environment()
    if not given:
        return
    if switch:
        raise ValueError(f"{switch} turns on Megatron's own mHC, which has no {flag(given[0])}: drop either")
    from megatron_mhc.specs import gpt_mhc_spec

    if args.spec is not None and list(args.spec) != ["megatron_mhc.specs", "gpt_mhc_spec"]:
        raise ValueError(f"--spec {' '.join(args.spec)}: drop it; mHC wraps what Megatron chooses")
    if getattr(args, "modelopt_enabled", False) or not hasattr(model_config, "transformer_layer_spec"):
        raise ValueError(f"{flag(given[0])}: only for a GPT that takes a layer spec, not for ModelOpt's")
    model_config.transformer_layer_spec = gpt_mhc_spec

"""Run an unmodified Megatron launch script with mHC.

    torchrun ... -m megatron_mhc.launch pretrain_gpt.py <its arguments> --mhc-num-residual-streams 4

The --mhc-* flags are taken out of the command line and checked, `--spec megatron_mhc.specs
gpt_mhc_spec` (of a HybridModel's script: hybrid_mhc_spec) is added to it, and the script runs as if it had
been started by itself.
"""

from __future__ import annotations

import argparse
import os
import runpy
import sys

from megatron_mhc.arguments import add_mhc_args, no_such_flags
from megatron_mhc.config import ENVIRONMENT, MHCConfig
from megatron_mhc.refusals import OWN, refuse
from megatron_mhc.releases import OWN_SWITCHES
from megatron_mhc.version import check_version

SPEC = ("megatron_mhc.specs", "gpt_mhc_spec")
HYBRID_SPEC = ("megatron_mhc.specs", "hybrid_mhc_spec")
HYBRID_SCRIPTS = {"pretrain_hybrid.py", "pretrain_mamba.py"}
OTHER_MODELS = {"pretrain_vlm.py"}


def spec_of(script: str, arguments: list[str]) -> tuple[str, str]:
    """The target of --spec that a script's model takes."""
    name = os.path.basename(script)
    pattern = any(word.startswith("--hybrid-layer-pattern") for word in arguments)
    return HYBRID_SPEC if name in HYBRID_SCRIPTS or (pattern and name != "pretrain_gpt.py") else SPEC


def prepare(argv: list[str]) -> tuple[list[str], MHCConfig]:
    """Split a command line into the script's own (with --spec) and the mHC options.

    Args:
        argv: the script's path and its arguments, --mhc-* flags among them.

    Raises:
        ValueError: an unsupported Megatron, no script or one of another model, a wrong flag or value, or
            options given twice.
    """
    parser = argparse.ArgumentParser(
        prog="python -m megatron_mhc.launch",
        usage="%(prog)s SCRIPT [arguments] [--mhc-...]",
        exit_on_error=False,
        allow_abbrev=False,  # as Megatron's
    )
    add_mhc_args(parser)
    if not argv or argv[0] in ("-h", "--help"):
        parser.print_help()
        raise SystemExit(0 if argv else 2)
    check_version()
    script, *rest = argv
    if not os.path.isfile(script):
        raise ValueError(f"{script}: no such script; give the path of pretrain_gpt.py before its arguments")
    if os.path.basename(script) in OTHER_MODELS:
        raise ValueError(
            f"{script}: mHC wraps the layers of a GPTModel and a HybridModel; use pretrain_gpt.py or "
            "pretrain_hybrid.py"
        )
    try:
        given, others = parser.parse_known_args(rest)
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from error
    if unknown := no_such_flags(others):
        raise ValueError("; ".join(unknown))
    switches = argparse.Namespace(**{name: f"--{name.replace('_', '-')}" in others for name in OWN_SWITCHES})
    refuse(OWN, switches)
    mhc = MHCConfig.from_args(given)
    if os.environ.get(ENVIRONMENT):
        if mhc != MHCConfig():
            raise ValueError(
                f"options in flags and in {ENVIRONMENT}: unset {ENVIRONMENT}, so that one place decides"
            )
        mhc = MHCConfig.from_environment()
    spec = spec_of(script, others)
    if "--spec" in others:
        at = others.index("--spec")
        if tuple(others[at + 1 : at + 3]) != spec:
            raise ValueError(
                f"--spec {' '.join(others[at + 1 : at + 3])}: drop it; mHC wraps what Megatron chooses"
            )
    else:
        others += ["--spec", *spec]
    return [script, *others], mhc


def main() -> None:
    """Run the script named by the command line."""
    for script in sys.argv[1:2]:
        # As `python script.py` would, and first: beside a checkout's script lies its own megatron.
        sys.path.insert(0, os.path.dirname(os.path.abspath(script)))
    argv, mhc = prepare(sys.argv[1:])
    os.environ[ENVIRONMENT] = mhc.to_options()
    sys.argv = argv
    runpy.run_path(argv[0], run_name="__main__")


if __name__ == "__main__":
    main()

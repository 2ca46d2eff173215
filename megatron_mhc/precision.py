"""What FP8 and FP4 ask of a machine: Transformer Engine, its version, and GPUs that have the formats.

Without one of them Megatron stops in the first step, or its local layers train in the parameters' dtype.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from packaging.version import Version


class Needs(NamedTuple):
    """Of a recipe: the least Transformer Engine, compute capability and CUDA; what to take instead."""

    transformer_engine: str
    capability: tuple[int, int]
    instead: str
    cuda: tuple[int, int] = (0, 0)


class Lack(NamedTuple):
    """What cannot be and why, and what to do: the two halves of a refusal."""

    what: str
    remedy: str


_TENSORWISE = "use --fp8-recipe tensorwise"
NEEDS = {
    "delayed": Needs("1.0", (8, 9), "drop it"),
    "tensorwise": Needs("2.2.0.dev0", (8, 9), "use --fp8-recipe delayed"),
    "blockwise": Needs("2.3.0.dev0", (9, 0), _TENSORWISE, (12, 9)),
    "mxfp8": Needs("2.1.0", (10, 0), _TENSORWISE),
    "nvfp4": Needs("2.7.0.dev0", (10, 0), "use --fp8-format hybrid instead of --fp4-format"),
    "custom": Needs("1.0", (8, 9), "drop it"),
}


def recipe(config: Any) -> str | None:
    """The recipe of a configuration in FP8 or FP4; None in neither."""
    name = "fp4_recipe" if config.fp4 else "fp8_recipe" if config.fp8 else None
    found = getattr(config, name) if name else None
    return getattr(found, "value", found)


def lacking(config: Any) -> Lack | None:
    """What of a configuration's FP8 or FP4 cannot be, and why; None where it can.

    Where there is no Transformer Engine or no GPU, a launch is planned, and the machine is not looked at.
    """
    name = recipe(config)
    if name not in NEEDS:
        return None
    bits, form = ("fp4", config.fp4) if config.fp4 else ("fp8", config.fp8)
    asked, needs = f"--{bits}-format {form} --{bits}-recipe {name}", NEEDS[name]
    if config.transformer_impl == "local":
        what = f"{asked} with --transformer-impl local, whose linears have the parameters' dtype"
        return Lack(what, "use --transformer-impl transformer_engine, or drop it")
    from megatron.core.utils import get_te_version

    if (found := get_te_version()) == Version("0.0.0"):
        return None
    if found < Version(needs.transformer_engine):
        least = needs.transformer_engine.removesuffix(".dev0")
        what = f"{asked} needs Transformer Engine {least}, here is {found}"
        return Lack(what, f"install it, or {needs.instead}")
    if not torch.cuda.is_available():
        return None
    capability = torch.cuda.get_device_capability()
    if capability < needs.capability:
        least, here = (".".join(map(str, one)) for one in (needs.capability, capability))
        what = f"{asked} needs GPUs of compute capability {least}, these have {here}"
        return Lack(what, needs.instead)
    cuda = tuple(map(int, (torch.version.cuda or "0.0").split(".")[:2]))
    if cuda < needs.cuda:
        least, here = (".".join(map(str, one)) for one in (needs.cuda, cuda))
        return Lack(f"{asked} needs CUDA {least}, this PyTorch has {here}", needs.instead)
    return None

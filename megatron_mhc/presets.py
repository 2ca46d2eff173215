"""What a preset implies for options that are left at `auto`, and which options contradict one another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from megatron_mhc.option import flag

if TYPE_CHECKING:
    from megatron_mhc.config import MHCConfig

GATED_RANK = 320

# What `auto` stands for under each preset. h_pre and h_post are dynamic in all published models.
_DEFAULTS = dict(h_res="sinkhorn", read="current", contract="mean", init="home_stream")
_IMPLIED = {
    "paper": _DEFAULTS,
    "deepseek_v4": _DEFAULTS | dict(contract="learned_head"),
    "deepseek_v41": _DEFAULTS | dict(read="previous"),
    "glm_5_3": _DEFAULTS,
    "hy_v4": _DEFAULTS | dict(h_res="identity", contract="learned_head", init="mean_read"),
    "qwen4_exp": _DEFAULTS | dict(h_res="identity", contract="mixer"),
}
_PUBLISHED = ("glm_5_3", "hy_v4")  # of which every option is the model's
# What the gated residual has a form for, and why for no other.
_GATED: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    ("h_res", ("identity",), "which leaves the streams unmixed"),
    ("h_pre", ("dynamic",), "whose read is a gate for each channel"),
    ("h_post", ("dynamic",), "whose write is its own"),
    ("read", ("current",), "whose read is of the streams that it gates"),
    ("mtp", ("single",), "of which no model has layers of multi-token prediction between streams"),
    ("init", ("home_stream",), "whose matrices start by --init-method-std"),
    ("norm", ("apart", "auto"), "which has no norm in front of F"),
    ("load_dense", (False,), "which has no place for a plain model's norms"),
    ("backend", ("auto", "reference"), "which has no kernels"),
)


def implied(options: Mapping[str, Any]) -> dict[str, Any]:
    """The values of the options that are `auto` and follow from others."""
    found = dict(_IMPLIED[options["preset"]])
    reads = found["read"] if options["read"] == "auto" else options["read"]
    if reads == "previous":
        found["contract"] = "h_pre"
    return {name: value for name, value in found.items() if options[name] == "auto"}


def check(mhc: MHCConfig) -> None:
    """Check that no option contradicts another, with `auto` gone.

    Raises:
        ValueError: naming the flag, its value and the remedy.
    """
    if mhc.has_deepseek_form and mhc.h_res == "unconstrained":
        raise ValueError(
            f"{flag('h_res')}=unconstrained has no {mhc.preset} form: use {flag('preset')}=paper"
        )
    if mhc.preset in _PUBLISHED:
        for name in ("h_res", "h_pre", "h_post", "read", "contract"):
            value, own = getattr(mhc, name), _IMPLIED[mhc.preset].get(name, "dynamic")
            if value != own:
                raise ValueError(
                    f"{flag(name)}={value} is not {mhc.preset}'s, which has {own}: leave it out, or use "
                    f"{flag('preset')}=deepseek_v4, which takes it"
                )
    if mhc.preset != "hy_v4" and mhc.post_magnitude != 2.0:
        raise ValueError(
            f"{flag('post_magnitude')}={mhc.post_magnitude} belongs to hy_v4, {mhc.preset} has 2.0: leave it "
            f"out, or use {flag('preset')}=hy_v4"
        )
    _check_read(mhc)
    _check_gated(mhc)


def _check_read(mhc: MHCConfig) -> None:
    if mhc.preset == "deepseek_v41" and mhc.read == "current":
        raise ValueError(f"{flag('read')}=current contradicts {flag('preset')}=deepseek_v41: use deepseek_v4")
    if mhc.reads_previous and mhc.h_pre == "fixed":
        raise ValueError(
            f"{flag('read')}=previous with {flag('h_pre')}=fixed hands on nothing: drop one of them"
        )
    if mhc.reads_previous and mhc.mtp == "multistream":
        raise ValueError(
            f"{flag('read')}=previous with {flag('mtp')}=multistream: no model says whose weights such a "
            f"layer's first read takes; use {flag('mtp')}=single"
        )
    if mhc.contract == "library" and mhc.mtp == "multistream":
        raise ValueError(
            f"{flag('contract')}=library with {flag('mtp')}=multistream, of which each layer has a "
            f"contraction of its own: use {flag('mtp')}=single"
        )
    if mhc.contract == "h_pre" and not mhc.reads_previous:
        raise ValueError(
            f"{flag('contract')}=h_pre needs weights that no sub-layer reads with: add "
            f"{flag('read')}=previous"
        )


def _check_gated(mhc: MHCConfig) -> None:
    """Raise ValueError for an option that the gated residual has no form for, or is alone to have."""
    if not mhc.is_gated:
        alone = dict(contract=mhc.contract == "mixer", gated_rank=mhc.gated_rank != GATED_RANK)
        for name in (name for name, found in alone.items() if found):
            raise ValueError(
                f"{flag(name)}={getattr(mhc, name)} belongs to {flag('preset')}=qwen4_exp: add that, or drop "
                f"{flag(name)}"
            )
        return
    for name, known, why in _GATED:
        if getattr(mhc, name) not in known:
            raise ValueError(
                f"{flag(name)}={getattr(mhc, name)} has no form in {flag('preset')}=qwen4_exp, {why}: use "
                f"{flag(name)}={known[0]}, or {flag('preset')}=paper"
            )
    if mhc.recompute_layer_num != "off" and not mhc.recompute_coefficients:
        raise ValueError(
            f"{flag('recompute_layer_num')}={mhc.recompute_layer_num} with {flag('preset')}=qwen4_exp, whose "
            f"layer input no coefficients give back: add {flag('recompute_coefficients')}"
        )

"""Megatron's conventions for mHC: their keys, and which way round they hold H_res.

    plain          a model without mHC (only as a source)
    plugin         this package
    megatron-main  Megatron-LM's branch main, --enable-mhc-connections
    megatron-dev   Megatron-LM's branch dev, --enable-hyper-connections
    transformers   Hugging Face's DeepSeek-V4, GLM-5.3-Flash and HY-V4, as --mhc-preset says:
                   model.layers.0.attn_hc.fn, ... (mapping parameters only); and its Qwen4-Exp under
                   qwen4_exp, see `gated`
    deepseek       DeepSeek-V4's own files: layers.0.hc_attn_fn, ... (mapping parameters only)

DeepSeek-V4.1 (--mhc-read previous) has the names of V4, and no head.

All hold the rows pre (n), post (n), res (n*n) of one projection, but disagree about the last block: in
the paper and on main its logits are those of H_res[written, read], elsewhere those of comb[read, written]
= H_res^T. The transposed matrix is as doubly stochastic as the right one, so a forgotten transposition
shows in no check but a comparison of outputs.

Shapes: n streams, C channels, m = n*n + 2n, L layers in front where Megatron stacks them.
    mapping_proj.weight, fn   [(L,) m, n*C]     bias, base [(L,) m]     alpha_* [(L,) 1], scale [3]
HY-V4 has no H_res: m = 2n, no alpha_res, scale [2].
"""

from __future__ import annotations

from typing import Any

from megatron_mhc.checkpoint_keys import (
    ARITHMETIC,
    DEPTH,
    FINAL_NORMS,
    HEAD,
    NORM,
    PLAIN_NORM,
    decode_arithmetic,
    encode_arithmetic,
    ends_decoder,
)
from megatron_mhc.config import MHCConfig, flag
from megatron_mhc.convert import gated
from megatron_mhc.convert.check import CONNECTION, check_entries, check_streams, is_equal_head, width
from megatron_mhc.convert.depths import rename_depths
from megatron_mhc.convert.orientation import EPS, equal_head, is_comb, turn

MEGATRON = ("plugin", "megatron-main", "megatron-dev")
PUBLISHED = ("transformers", "deepseek")  # names of mapping parameters alone
SOURCES = ("plain", *MEGATRON, *PUBLISHED)
TARGETS = (*MEGATRON, *PUBLISHED)
HEADS = {  # fn, base and scale of the learned output head
    "plugin": tuple(HEAD + part for part in ("mapping_proj.weight", "bias", "alpha")),
    "megatron-dev": tuple("decoder.hc_head_" + part for part in ("fn", "base", "scale")),
    "transformers": tuple("model.hc_head.hc_" + part for part in ("fn", "base", "scale")),
    "deepseek": tuple("hc_head_" + part for part in ("fn", "base", "scale")),
}


def read_arithmetic(state: dict[str, Any]) -> MHCConfig:
    """The options that a plugin checkpoint was trained under.

    Raises:
        ValueError: the entry is absent, so `state` is not a plugin's checkpoint or not its last stage.
    """
    key = (ends_decoder(state) or FINAL_NORMS[0]).arithmetic
    if key not in state:
        raise ValueError(f"{key} is absent: not the checkpoint of a plugin's whole model")
    return MHCConfig.from_mapping(decode_arithmetic(state[key]), key)


def check(mhc: MHCConfig, source: str, target: str) -> None:
    """Refuse what the target, or the plugin's options, cannot express.

    Args:
        mhc: options of the plugin's side, or of both sides' meaning where neither is the plugin.

    Raises:
        ValueError: naming the option and the remedy.
    """
    if source not in SOURCES or target not in TARGETS:
        raise ValueError(f"{source} -> {target}: from one of {', '.join(SOURCES)} to {', '.join(TARGETS)}")
    if source == target:
        raise ValueError(f"{source} -> {target}: nothing to convert")
    if source == "plain" and target != "plugin":
        raise ValueError(f"plain -> {target}: convert plain -> plugin first, then plugin -> {target}")
    for side in {source, target} - {"plugin"}:
        if mhc.contract == "library":
            raise ValueError(f"{flag('contract')}=library has no form in {side}: convert by your own code")
        if mhc.is_gated and (side != "transformers" or mhc.contract != "mixer"):
            raise ValueError(
                f"{flag('preset')}=qwen4_exp with {flag('contract')}={mhc.contract} has no form in {side}, "
                f"only {flag('contract')}=mixer in transformers"
            )
    if mhc.is_gated:
        return
    for side in {source, target} - {"plain", "plugin"}:
        if mhc.preset == "hy_v4" and side != "transformers":
            raise ValueError(f"{flag('preset')}=hy_v4 has no form in {side}, only in transformers")
        if mhc.preset == "glm_5_3" and side == "deepseek":
            raise ValueError(f"{flag('preset')}=glm_5_3 has no form in deepseek, only in transformers")
        if mhc.preset == "hy_v4":
            continue
        for name, only in (("h_res", "sinkhorn"), ("h_pre", "dynamic"), ("h_post", "dynamic")):
            if getattr(mhc, name) != only:
                raise ValueError(f"{flag(name)}={getattr(mhc, name)} has no form in {side}, only {only}")
        if mhc.reads_previous and (side in MEGATRON or mhc.contract != "h_pre"):
            only = "current" if side in MEGATRON else f"that with {flag('contract')}=h_pre"
            raise ValueError(f"{flag('read')}=previous has no form in {side}, only {only}")
        if side == "megatron-main" and mhc.contract == "learned_head":
            raise ValueError(f"megatron-main averages the streams: {flag('contract')} learned_head is lost")


def check_state(state: dict[str, Any], convention: str, mhc: MHCConfig) -> None:
    """Raise ValueError for the first entry of a Megatron state dict that is not as `mhc` has it."""
    if mhc.is_gated:
        return gated.check_entries(state, mhc)
    check_streams(state, mhc)
    check_entries(state, HEADS.get(convention, ()), mhc)


def differences(mhc: MHCConfig, other: str) -> list[str]:
    """What to set on the other side, and what its arithmetic does that the plugin's does not."""
    if other in ("plugin", "plain"):
        return []
    if mhc.is_gated:
        sizes = f"hc_count {mhc.num_residual_streams}, hc_lowrank {mhc.gated_rank}"
        return [f"config.json: {sizes}, rms_norm_eps {mhc.norm_eps} for the streams' norms"]
    streams, iterations = mhc.num_residual_streams, mhc.sinkhorn_iterations
    if other == "megatron-main":
        line = f"--enable-mhc-connections --mhc-num-residual-streams {streams} --mhc-sinkhorn-iterations "
        line += (
            f"{iterations}; it normalises rows before columns and adds 1e-6 behind the root: outputs agree "
        )
        line += "as far as the Sinkhorn iteration has converged"
    elif other == "megatron-dev":
        line = f"--enable-hyper-connections --num-residual-streams {streams} --mhc-sinkhorn-iterations "
        line += (
            f"{iterations}; it adds 1e-6 behind the root, and casts coefficients to the activations' dtype"
        )
    else:
        own = f"hc_sinkhorn_iters {iterations}"
        own = f"hc_magnitude {mhc.post_magnitude}" if mhc.preset == "hy_v4" else own
        line = f"config.json: hc_mult {streams}, {own}, hc_eps 1e-6, rms_norm_eps {mhc.norm_eps} for the "
        line += "mappings"
    lines = [line]
    if mhc.preset == "paper" and other != "megatron-main":
        lines.append(f"{flag('preset')} paper has no eps 1e-6 behind its steps, {other} has")
    if mhc.contract not in ("learned_head", "h_pre") and other in HEADS and mhc.preset != "glm_5_3":
        lines.append("the mean of the streams became a head of equal weights")
    if mhc.norm_eps != EPS and other in MEGATRON:
        lines.append(f"{flag('norm_eps')} {mhc.norm_eps} becomes 1e-6, fixed there")
    if mhc.mtp == "multistream" and other in PUBLISHED:
        lines.append("mappings of mtp.* are left out: only those of decoder layers are converted")
    return lines


def rename(state: dict[str, Any], source: str, target: str, mhc: MHCConfig) -> dict[str, Any]:
    """Turn the names and the orientation of one Megatron convention into another's.

    A mean or sum of the streams becomes, for a convention that has a head, a head of equal weights; such a
    head becomes a mean or sum again where `mhc.contract` says so.

    Args:
        state: entries of a model or of a pipeline stage of it; layers may be stacked.
        source, target: of `MEGATRON`.
        mhc: the plugin's options (`check` them first).

    Returns:
        a new state dict; what is no part of mHC and its final norm is taken over as it is.

    Raises:
        ValueError: entries that are not those of `mhc`, or a part of mHC that has no counterpart.
    """
    heads = dict(zip(HEADS.get(source, ()), HEADS.get(target, ()), strict=False))
    check_state(state, source, mhc)
    n = mhc.num_residual_streams
    swap = is_comb(source, mhc) != is_comb(target, mhc)
    learned, has_head = mhc.contract == "learned_head", any(key in state for key in heads)
    averages = mhc.contract in ("mean", "sum")
    if has_head and not learned and not is_equal_head(*(state[key] for key in heads)):
        raise ValueError(f"{next(iter(heads))} is a learned output head: give contract=learned_head")
    out = rename_depths(state, source, target, mhc)
    for key, value in state.items():
        if DEPTH.match(key):
            continue
        if match := CONNECTION.match(key):
            out[key] = turn(match.group(3), value, n) if swap else value
        elif key in heads:
            if learned:
                out[heads[key]] = value
        elif "hyper_connection" in key or "hc_head" in key:
            raise ValueError(
                f"{key}: this part of mHC has no counterpart (only decoder layers are converted)"
            )
        elif (moved := move_norm(key, source, target)) is not None:
            out[moved] = value
    if ends_decoder(state):
        if heads and learned and not has_head:
            raise ValueError(f"{next(iter(heads))} is absent, though contract=learned_head")
        if target == "megatron-dev" and averages:
            out.update(zip(HEADS[target], equal_head(n, width(state, n)), strict=True))
        if target == "plugin":
            out[ARITHMETIC] = encode_arithmetic(mhc)
    return out


def move_norm(key: str, source: str, target: str) -> str | None:
    """The final norm's key under the target's convention; None for an entry to drop."""
    if source == "plugin" and target != "plugin":
        if key.split("/")[0] == ARITHMETIC:
            return None
        return PLAIN_NORM + key[len(NORM) :] if key.startswith(NORM) else key
    if source != "plugin" and target == "plugin" and key.startswith(PLAIN_NORM):
        return NORM + key[len(PLAIN_NORM) :]
    return key

"""Mapping parameters under other projects' names, and plain checkpoints turned into mHC ones.

Works on state dicts of any Megatron format; `scripts/convert_checkpoint.py` reads and writes the files.

    plain          a GPT without mHC (only as a source)
    plugin         this package
    megatron-main  Megatron-LM's branch main, --enable-mhc-connections
    megatron-dev   Megatron-LM's branch dev, --enable-hyper-connections
    transformers   Hugging Face's DeepSeek-V4: model.layers.0.attn_hc.fn, ... (mapping parameters only)
    deepseek       DeepSeek-V4's own files: layers.0.hc_attn_fn, ... (mapping parameters only)

All hold the rows pre (n), post (n), res (n*n) of one projection, but disagree about the last block: in
the paper and on main its logits are those of H_res[written, read], elsewhere those of comb[read, written]
= H_res^T. The transposed matrix is as doubly stochastic as the right one, so a forgotten transposition
shows in no check but a comparison of outputs.

Shapes: n streams, C channels, m = n*n + 2n, L layers in front where Megatron stacks them.
    mapping_proj.weight, fn   [(L,) m, n*C]     bias, base [(L,) m]     alpha_* [(L,) 1], scale [3]
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

import torch
from torch import Tensor

from megatron_mhc.config import MHCConfig, flag

MEGATRON = ("plugin", "megatron-main", "megatron-dev")
PUBLISHED = ("transformers", "deepseek")  # names of mapping parameters alone
SOURCES = ("plain", *MEGATRON, *PUBLISHED)
TARGETS = (*MEGATRON, *PUBLISHED)
ARITHMETIC = "decoder.final_layernorm._extra_state"

_EPS = 1e-6  # of DeepSeek-V4's head, whose weights are sigmoid(.) + eps
_NORM, _PLUGIN_NORM = "decoder.final_layernorm.", "decoder.final_layernorm.norm."
_CONNECTION = re.compile(r"^decoder\.layers\.(?:(\d+)\.)?(self_attention|mlp)_hyper_connection\.(.+)$")
_LAYER = re.compile(r"^decoder\.layers\.(?:(\d+)\.)?self_attention\.linear_proj\.weight$")
_PARTS = ("mapping_proj.weight", "bias", "alpha_pre", "alpha_post", "alpha_res")
_HEADS = {
    "plugin": tuple(_NORM + "head." + part for part in ("mapping_proj.weight", "bias", "alpha")),
    "megatron-dev": tuple("decoder.hc_head_" + part for part in ("fn", "base", "scale")),
    "transformers": tuple("model.hc_head.hc_" + part for part in ("fn", "base", "scale")),
    "deepseek": tuple("hc_head_" + part for part in ("fn", "base", "scale")),
}


def sizes(state: dict[str, Any]) -> tuple[int, int]:
    """Read n and C off the shapes of a plugin's or a Megatron branch's mapping projections.

    Raises:
        ValueError: no complete mapping projection is there.
    """
    for key, value in state.items():
        match = _CONNECTION.match(key)
        if match and match.group(3) == "mapping_proj.weight":
            return _sizes(key, value)
    raise ValueError("no mHC mapping projection among the entries: is this a plain checkpoint?")


def _sizes(key: str, weight: Tensor) -> tuple[int, int]:
    rows, columns = weight.shape[-2:]
    n = math.isqrt(rows + 1) - 1
    if n < 1 or n * n + 2 * n != rows or columns % n:
        raise ValueError(
            f"{key} is {rows} x {columns}: not n*n + 2n rows of n*C columns. Mappings with a fixed part "
            f"or {flag('h_res')} unconstrained exist in the plugin alone"
        )
    return n, columns // n


def read_arithmetic(state: dict[str, Any]) -> MHCConfig:
    """The options that a plugin checkpoint was trained under.

    Raises:
        ValueError: the entry is absent, so `state` is not a plugin's checkpoint or not its last stage.
    """
    if ARITHMETIC not in state:
        raise ValueError(f"{ARITHMETIC} is absent: not the checkpoint of a plugin's whole model")
    return MHCConfig.from_mapping(json.loads(bytes(state[ARITHMETIC].cpu().tolist())), ARITHMETIC)


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
    for side in {source, target} - {"plain", "plugin"}:
        for name, only in (("h_res", "sinkhorn"), ("h_pre", "dynamic"), ("h_post", "dynamic")):
            if getattr(mhc, name) != only:
                raise ValueError(f"{flag(name)}={getattr(mhc, name)} has no form in {side}, only {only}")
        head = mhc.contract == "learned_head"
        if side == "megatron-main" and head:
            raise ValueError(f"megatron-main averages the streams: {flag('contract')} learned_head is lost")
        if side == source and side != "megatron-main" and not head:
            raise ValueError(f"{side} has a learned output head: give contract=learned_head")


def differences(mhc: MHCConfig, other: str) -> list[str]:
    """What to set on the other side, and what its arithmetic does that the plugin's does not."""
    if other in ("plugin", "plain"):
        return []
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
        line = f"config.json: hc_mult {streams}, hc_sinkhorn_iters {iterations}, hc_eps 1e-6, rms_norm_eps "
        line += f"{mhc.norm_eps} for the mappings"
    lines = [line]
    if mhc.preset == "paper" and other != "megatron-main":
        lines.append(f"{flag('preset')} paper has no eps 1e-6 behind its steps, {other} has")
    if mhc.contract != "learned_head" and other in _HEADS:
        lines.append("the mean of the streams became a head of equal weights")
    if mhc.norm_eps != _EPS and other in MEGATRON:
        lines.append(f"{flag('norm_eps')} {mhc.norm_eps} becomes 1e-6, fixed there")
    return lines


def transpose_res(tensor: Tensor, n: int, dim: int) -> Tensor:
    """Swap the two indices of the n*n block behind the 2n rows of pre and post in dimension `dim`."""
    dim %= tensor.dim()
    read_write, res = tensor.split([2 * n, n * n], dim)
    res = res.unflatten(dim, (n, n)).transpose(dim, dim + 1).flatten(dim, dim + 1)
    return torch.cat([read_write, res], dim)


def _is_comb(convention: str, mhc: MHCConfig) -> bool:
    """Whether the last block's logits are those of comb = H_res^T."""
    if convention == "plugin":
        return mhc.preset == "deepseek_v4"
    return convention != "megatron-main"


def rename(state: dict[str, Any], source: str, target: str, mhc: MHCConfig) -> dict[str, Any]:
    """Turn the names and the orientation of one Megatron convention into another's.

    Args:
        state: entries of a model or of a pipeline stage of it; layers may be stacked.
        source, target: of `MEGATRON`.
        mhc: the plugin's options (`check` them first).

    Returns:
        a new state dict; what is no part of mHC and its final norm is taken over as it is.

    Raises:
        ValueError: shapes that are not those of `mhc`, or a part of mHC that has no counterpart.
    """
    n = mhc.num_residual_streams
    swap = _is_comb(source, mhc) != _is_comb(target, mhc)
    heads = dict(zip(_HEADS.get(source, ()), _HEADS.get(target, ()), strict=False))
    out: dict[str, Any] = {}
    has_head = False
    for key, value in state.items():
        match = _CONNECTION.match(key)
        if match:
            value = _rename_part(key, match.group(3), value, n, swap)
        elif key in heads:
            key, has_head = heads[key], True
        elif "hyper_connection" in key or "hc_head" in key:
            raise ValueError(
                f"{key}: this part of mHC has no counterpart (only decoder layers are converted)"
            )
        else:
            if (moved := _move_norm(key, source, target)) is None:
                continue
            key = moved
        out[key] = value
    ends = any(key.startswith(_PLUGIN_NORM if source == "plugin" else _NORM) for key in state)
    if ends and target in _HEADS and mhc.contract == "learned_head" and not has_head:
        raise ValueError(f"{_HEADS[source][0]} is absent, though contract=learned_head")
    if ends and target == "megatron-dev" and mhc.contract != "learned_head":
        out.update(zip(_HEADS[target], _equal_head(*sizes(state)), strict=True))
    if ends and target == "plugin":
        out[ARITHMETIC] = arithmetic(mhc)
    return out


def _rename_part(key: str, part: str, value: Tensor, n: int, swap: bool) -> Tensor:
    if part not in _PARTS:
        raise ValueError(f"{key}: unknown mapping parameter")
    if part == "mapping_proj.weight" and (found := _sizes(key, value)[0]) != n:
        raise ValueError(f"{key} belongs to {found} streams: give num_residual_streams={found}")
    if not swap or part.startswith("alpha"):
        return value
    return transpose_res(value, n, -2 if part == "mapping_proj.weight" else -1)


def _move_norm(key: str, source: str, target: str) -> str | None:
    """The final norm's key under the target's convention; None for an entry to drop."""
    if source == "plugin" and target != "plugin":
        if key.split("/")[0] == ARITHMETIC:
            return None
        return _NORM + key[len(_PLUGIN_NORM) :] if key.startswith(_PLUGIN_NORM) else key
    if source != "plugin" and target == "plugin" and key.startswith(_NORM):
        return _PLUGIN_NORM + key[len(_NORM) :]
    return key


def _equal_head(n: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """fn, base and scale of the head that weighs n streams by 1/n; the final norm ignores the scale."""
    weight = 1 / n - _EPS
    base = torch.full((n,), math.log(weight / (1 - weight)))
    return torch.zeros(n, n * width), base, torch.ones(1)


def arithmetic(mhc: MHCConfig) -> Tensor:
    """The entry `ARITHMETIC` of a plugin's checkpoint: JSON bytes, uint8."""
    return torch.frombuffer(bytearray(json.dumps(mhc.arithmetic()).encode()), dtype=torch.uint8)


def to_published(
    state: dict[str, Any], names: str, mhc: MHCConfig, first_layer: int = 0
) -> dict[str, Tensor]:
    """Mapping parameters of a plugin's state dict under published names.

    Args:
        state: entries of a model or pipeline stage under the plugin's names.
        names: of `PUBLISHED`.
        mhc: options of the checkpoint.
        first_layer: 0-based index of the first layer in `state`, where its layers are numbered from 0.

    Returns:
        fp32 tensors fn [m, n*C], base [m], scale [3] of every sub-layer; those of the head at the end.
    """
    state = rename(state, "plugin", "megatron-dev", mhc)
    parts: dict[tuple[int, str], dict[str, Tensor]] = {}
    for key, value in state.items():
        if not (match := _CONNECTION.match(key)):
            continue
        number, sublayer, part = match.groups()
        rows = value if number is None else value[None]
        for i, row in enumerate(rows):
            layer = first_layer + (i if number is None else int(number))
            parts.setdefault((layer, sublayer), {})[part] = row
    out = {}
    for (layer, sublayer), found in sorted(parts.items()):
        fn, base, scale = _published_keys(names, layer, sublayer)
        out[fn], out[base] = found["mapping_proj.weight"].contiguous(), found["bias"].contiguous()
        out[scale] = torch.cat([found["alpha_" + part] for part in ("pre", "post", "res")])
    for theirs, ours in zip(_HEADS[names], _HEADS["megatron-dev"], strict=True):
        if ours in state:
            out[theirs] = state[ours]
    return out


def _published_keys(names: str, layer: int, sublayer: str) -> tuple[str, str, str]:
    short = "attn" if sublayer == "self_attention" else "ffn"
    if names == "transformers":
        prefix = f"model.layers.{layer}.{short}_hc."
    else:
        prefix = f"layers.{layer}.hc_{short}_"
    return prefix + "fn", prefix + "base", prefix + "scale"


def from_published(
    published: dict[str, Tensor], names: str, mhc: MHCConfig, into: dict[str, Any], first_layer: int = 0
) -> dict[str, Any]:
    """Put published mapping parameters into a plugin's state dict.

    Args:
        published: entries under `names`; others than those of mHC are ignored.
        mhc: the plugin's options; its preset decides about the transposition.
        into: entries of the plugin's model or pipeline stage, which give layers and dtypes.
        first_layer: as in `to_published`.

    Returns:
        a copy of `into` with its mapping parameters, head and arithmetic replaced.

    Raises:
        ValueError: an entry is absent or has another shape.
    """
    out = dict(into)
    n, swap = mhc.num_residual_streams, not _is_comb("plugin", mhc)
    for key, value in into.items():
        if not (match := _CONNECTION.match(key)):
            continue
        number, sublayer, part = match.groups()
        layers = range(value.shape[0]) if number is None else [int(number)]
        rows = [_take(published, names, first_layer + layer, sublayer, part, key) for layer in layers]
        rows = [_rename_part(key, part, row, n, swap) for row in rows]
        out[key] = _fit(key, torch.stack(rows) if number is None else rows[0], value)
    for theirs, ours in zip(_HEADS[names], _HEADS["plugin"], strict=True):
        if ours in into:
            out[ours] = _fit(ours, _get(published, theirs, ours), into[ours])
    if ARITHMETIC in into:
        if _HEADS["plugin"][0] not in into:
            raise ValueError(
                f"{_HEADS['plugin'][0]} is absent: convert into a checkpoint with a learned head"
            )
        out[ARITHMETIC] = arithmetic(mhc)
    return out


def _take(
    published: dict[str, Tensor], names: str, layer: int, sublayer: str, part: str, ours: str
) -> Tensor:
    fn, base, scale = _published_keys(names, layer, sublayer)
    if part.startswith("alpha_"):
        at = ("pre", "post", "res").index(part.removeprefix("alpha_"))
        return _get(published, scale, ours)[at : at + 1]
    return _get(published, fn if part == "mapping_proj.weight" else base, ours)


def _get(published: dict[str, Tensor], key: str, ours: str) -> Tensor:
    for name in (key, key.removeprefix("model.")):
        if name in published:
            return published[name]
    raise ValueError(f"{key} is absent, which {ours} should become")


def _fit(key: str, value: Tensor, old: Tensor) -> Tensor:
    if value.shape != old.shape:
        raise ValueError(f"{key} is {list(old.shape)} here and {list(value.shape)} in the other model")
    return value.to(old.dtype).contiguous()


def from_plain(
    state: dict[str, Any], mhc: MHCConfig, first_layer: int = 0, seed: int = 1234
) -> dict[str, Any]:
    """Add initial mappings to a plain model's state dict.

    With `--mhc-init home_stream` the new model computes what the plain one did, up to the norms'
    epsilons: its streams stay copies of one another, and every norm takes back the scale of H_pre.

    Args:
        state: entries of a plain GPT, or of one of its pipeline stages.
        mhc: options of the new model.
        first_layer: 0-based index of the first layer in `state`, where its layers are numbered from 0.
        seed: of the random projections of `--mhc-init uniform`, combined with the sub-layer's index, so
            that copies of a layer in several files agree.

    Raises:
        ValueError: `state` has mHC already.
    """
    if any(_CONNECTION.match(key) for key in state):
        raise ValueError("the checkpoint has mHC parameters already: use --from plugin")
    layers = {key: match.group(1) for key in state if (match := _LAYER.match(key))}
    norm = [key for key in state if key.startswith(_NORM)]
    out = {_move_norm(key, "plain", "plugin") or key: value for key, value in state.items()}
    for key, number in layers.items():
        width, count = state[key].shape[-2], state[key].shape[0] if number is None else 1
        for sublayer in ("self_attention", "mlp"):
            at = [first_layer + (i if number is None else int(number)) for i in range(count)]
            made = [_initial(mhc, width, 2 * layer + (sublayer == "mlp"), seed) for layer in at]
            middle = "" if number is None else f"{number}."
            for part in made[0]:
                rows = [one[part] for one in made]
                name = f"decoder.layers.{middle}{sublayer}_hyper_connection.{part}"
                out[name] = torch.stack(rows) if number is None else rows[0]
    if norm:
        out[ARITHMETIC] = arithmetic(mhc)
        if mhc.contract == "learned_head":
            from megatron_mhc.streams import ContractHead

            head = ContractHead(_tiny_config(state[_NORM + "weight"].shape[0]), mhc)
            out.update({_NORM + "head." + name: p.detach() for name, p in head.named_parameters()})
    return out


def _initial(mhc: MHCConfig, width: int, sublayer_index: int, seed: int) -> dict[str, Tensor]:
    """Initial parameters of one connection, from the module that a new model would build."""
    from megatron_mhc.hyper_connection import HyperConnectionModule

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + sublayer_index)
        module = HyperConnectionModule(_tiny_config(width), mhc, sublayer_index)
    return {name: parameter.detach() for name, parameter in module.named_parameters()}


def _tiny_config(width: int) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    sizes = dict(num_layers=1, hidden_size=width, num_attention_heads=1)
    return TransformerConfig(**sizes, use_cpu_initialization=True)

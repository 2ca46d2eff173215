"""A GPT's layers as a HybridModel's, attention and MLP each by itself, and back.

    decoder.layers.N.self_attention.*    decoder.layers.2N.self_attention.*
    decoder.layers.N.mlp.*               decoder.layers.2N+1.mlp.*
    decoder.final_layernorm.*            decoder.final_norm.*

A sub-layer's norm and its connection go with it. In torch_dist Megatron stacks a GPT's layers, [L, ...],
where they are alike; a HybridModel's have numbers always.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_mhc.checkpoint_keys import FINAL_NORMS, ends_decoder
from megatron_mhc.convert.check import check_numbers

NAMES = {"gpt": "GPTModel", "hybrid": "HybridModel"}
MODELS = tuple(NAMES)
State = dict[str, Any]
_LAYER = re.compile(r"^decoder\.layers\.(?:(\d+)\.)?(.+)$")
_ATTENTION = ("self_attention", "self_attention_hyper_connection", "input_layernorm")
_MLP = ("mlp", "mlp_hyper_connection", "pre_mlp_layernorm")
_KINDS = {"M": "a Mamba layer", "G": "a gated delta net", "D": "DeepSeek's sparse attention"}
_OUTPUT = "output_layer._extra_state"  # empty; a HybridModel's torch_dist has it, a GPT's has not


def model_of(keys: Iterable[str]) -> str | None:
    """Which of `MODELS` ends its decoder among these entries; None where none does."""
    final = ends_decoder(keys)
    return None if final is None else MODELS[FINAL_NORMS.index(final)]


def symbol(names: Iterable[str]) -> str:
    """A hybrid layer's symbol, by the names of its entries."""
    names = list(names)

    def has(*starts: str) -> bool:
        return any(name.startswith(starts) for name in names)

    if has("mixer."):
        return "M"
    if has("self_attention.core_attention.indexer."):
        return "D"
    if has("self_attention.linear_kv_up_proj."):
        return "+"
    if has("self_attention."):
        return "*" if has("self_attention.linear_qkv.") else "G"
    return "E" if has("mlp.router.", "mlp.experts.") else "-"


def pattern_of(state: Mapping[str, Any], model: str) -> str:
    """The hybrid pattern of a model's layers, or of those of one of its pipeline stages.

    Args:
        model: of `MODELS`; a GPT's layer is a pair of symbols.

    Raises:
        ValueError: a layer missing between others, or an entry that is no part of attention or MLP.
    """
    return "".join(map(symbol, _sublayers(state) if model == "gpt" else _numbered(state).values()))


def check_pairs(pattern: str) -> None:
    """Check that a hybrid pattern is of pairs of attention and MLP, which are a GPT's layers.

    Raises:
        ValueError: naming the pattern, the layer in the way and the remedy.
    """
    attention = next((kind for kind in pattern if kind in "*+"), "*")
    stay = "a GPT has only pairs of attention and MLP (*-, *E, +-, +E), so it stays a HybridModel"
    for i, kind in enumerate(pattern.replace("|", "")):
        if kind in _KINDS:
            raise ValueError(f"pattern {pattern}: layer {i + 1} is {kind}, {_KINDS[kind]}: {stay}")
        if kind not in (attention if i % 2 == 0 else "-E"):
            order = "attention of the other kind" if kind in "*+" and i % 2 == 0 else "out of this order"
            raise ValueError(f"pattern {pattern}: layer {i + 1} is {kind}, {order}: {stay}")
    for part in pattern.split("|"):
        if len(part) % 2:
            place = "a pipeline stage of it" if "|" in pattern else "it"
            remedy = "save it as torch_dist" if "|" in pattern else stay
            raise ValueError(f"pattern {pattern}: {place} ends between attention and its MLP: {remedy}")


def to_hybrid(state: Mapping[str, Any]) -> State:
    """The entries of a GPT, or of one of its pipeline stages, as a HybridModel's.

    Args:
        state: of either torch_dist or torch, with mHC or plain; its layers may be stacked.

    Raises:
        ValueError: an entry that a HybridModel has no place for.
    """
    out = _others(state, *FINAL_NORMS)
    for number, entries in enumerate(_sublayers(state)):
        for name, value in entries.items():
            out |= _placed(f"decoder.layers.{number}.{name}", value)
    sharded = _sharded_object()
    if ends_decoder(state) and any(isinstance(value, sharded) for value in state.values()):
        out |= _placed(_OUTPUT, sharded(_OUTPUT, None, (1,), (0,)))
    return out


def to_gpt(state: Mapping[str, Any], stack: bool = False) -> State:
    """The entries of a HybridModel of pairs, or of one of its pipeline stages, as a GPT's.

    Args:
        stack: put layers into one tensor where all are alike, as Megatron does in torch_dist.

    Raises:
        ValueError: naming the pattern and what is in the way.
    """
    pattern = pattern_of(state, "hybrid")
    check_pairs(pattern)
    sharded = _sharded_object()
    out = _others(state, *reversed(FINAL_NORMS))
    for key in [key for key in out if key.split("/")[0] == _OUTPUT and isinstance(out[key], sharded)]:
        del out[key]
    layers = list(_numbered(state).values())
    pairs = [{**layers[i], **layers[i + 1]} for i in range(0, len(layers), 2)]
    if stack and pairs and pattern == pattern[:2] * len(pairs):
        return out | _stacked(pairs)
    for number, entries in enumerate(pairs):
        for name, value in entries.items():
            out |= _placed(f"decoder.layers.{number}.{name}", value)
    return out


def to_model(args: Any, model: str, pattern: str) -> Any:
    """A checkpoint's arguments as a run of the other model has them.

    Args:
        args: of the run that saved it, or None.
        model: of `MODELS`, which it becomes.
        pattern: of the layers, `|` between pipeline stages.
    """
    if args is None:
        return None
    args, layers = copy.copy(args), pattern.replace("|", "")
    hybrid = model == "hybrid"
    args.num_layers = len(layers) if hybrid else len(layers) // 2
    args.hybrid_layer_pattern = pattern if hybrid else None
    args.moe_layer_freq = 1 if hybrid else expert_layers(layers)
    if hasattr(args, "hybrid_override_pattern"):
        args.hybrid_override_pattern = None
    spec = getattr(args, "spec", None)
    if spec and spec[0] == "megatron_mhc.specs":
        args.spec = [spec[0], FINAL_NORMS[hybrid].spec]
    return args


def expert_layers(pattern: str) -> int | list[int]:
    """--moe-layer-freq of the GPT of these pairs: 1 where all layers are alike."""
    experts = [int(kind == "E") for kind in pattern.replace("|", "")[1::2]]
    return experts if len(set(experts)) > 1 else 1


def settings(model: str, pattern: str) -> str:
    """What to tell the user about a run of the other model."""
    if model == "hybrid":
        return f"--hybrid-layer-pattern '{pattern}' in the place of --num-layers"
    layers = pattern.replace("|", "")
    experts = expert_layers(layers)
    freq = f" --moe-layer-freq '({experts})'" if isinstance(experts, list) else ""
    return f"--num-layers {len(layers) // 2}{freq} in the place of --hybrid-layer-pattern"


def _others(state: Mapping[str, Any], ours: Any, theirs: Any) -> State:
    """What is no layer's, with the final norm under the other model's name."""
    out: State = {}
    for key, value in state.items():
        if key.startswith("mtp."):
            raise ValueError(
                f"{key}: layers of multi-token prediction differ between a GPT and a HybridModel: save it "
                "from a run without them (--mtp-num-layers, or what stands behind / in the pattern)"
            )
        if key.startswith(ours.plain):
            key = theirs.plain + key.removeprefix(ours.plain)
        if not _LAYER.match(key):
            out[key] = value
    return out


def _numbered(state: Mapping[str, Any]) -> dict[int, State]:
    """Entries by layer, by what their keys have behind the layer's number; stacked ones taken apart."""
    sharded = _sharded_object()
    layers: dict[int, State] = {}
    for key, value in state.items():
        if not (match := _LAYER.match(key)):
            continue
        number, name = match.groups()
        if number is not None:
            layers.setdefault(int(number), {})[name] = value
        elif isinstance(value, sharded):
            (number, *at), (_, *shape) = value.global_offset, value.global_shape
            one = sharded(key, value.data, tuple(shape) or (1,), tuple(at) or (0,))
            layers.setdefault(number, {})[_name_of(name, one)] = one
        elif isinstance(value, Tensor) and value.dim():
            for i, row in enumerate(value):
                layers.setdefault(i, {})[name] = row
        else:
            raise ValueError(f"{key} is no tensor of stacked layers")
    check_numbers(map(str, layers))
    return {number: layers[number] for number in sorted(layers)}


def _sublayers(state: Mapping[str, Any]) -> list[State]:
    """Of a GPT: the entries of attention and MLP of each layer in turn."""
    out: list[State] = []
    for number, entries in _numbered(state).items():
        parts: tuple[State, State] = {}, {}
        for name, value in entries.items():
            first = name.split(".")[0]
            if first not in (*_ATTENTION, *_MLP):
                raise ValueError(
                    f"decoder.layers.{number}.{name} is no part of attention or MLP: a HybridModel has no "
                    "layer for it, keep the GPT"
                )
            parts[first in _MLP][name] = value
        for part, what in zip(parts, ("attention", "MLP"), strict=True):
            if not part:
                raise ValueError(
                    f"decoder.layers.{number} has no weights of its {what}, and a HybridModel has no "
                    "layer without any: keep the GPT"
                )
        if (kind := symbol(parts[0])) in _KINDS:
            raise ValueError(
                f"decoder.layers.{number}.self_attention is {_KINDS[kind]}, and only attention and MLA are "
                "converted: keep the GPT"
            )
        out += parts
    return out


def _stacked(layers: list[State]) -> State:
    sharded, count = _sharded_object(), len(layers)
    out: State = {}
    for number, entries in enumerate(layers):
        for name in layers[0]:
            if name not in entries:
                raise ValueError(f"decoder.layers.{number}: {name} is absent, which its first layer has")
        if more := sorted(set(entries) - set(layers[0])):
            raise ValueError(f"decoder.layers.{number}: {more[0]} is absent in its first layer")
    for name, value in layers[0].items():
        values = [entries[name] for entries in layers]
        if not isinstance(value, sharded):
            out[f"decoder.layers.{name}"] = torch.stack(values)
            continue
        for number, one in enumerate(values):
            alone = (one.global_shape, one.global_offset) == ((1,), (0,))
            shape = (count, *(() if alone else one.global_shape))
            at = (number, *(() if alone else one.global_offset))
            out |= _placed(f"decoder.layers.{name}", sharded("", one.data, shape, at))
    return out


def _placed(key: str, value: Any) -> State:
    """One entry by its key; a sharded object's holds its place too."""
    if not isinstance(value, sharded := _sharded_object()):
        return {key: value}
    moved = sharded(key.split("/")[0], value.data, value.global_shape, value.global_offset)
    return {moved.unique_key: moved}


def _name_of(name: str, value: Any) -> str:
    """A sharded object's name below its layer, without the layer in its place."""
    value.key = name.split("/")[0]
    return value.unique_key


def _sharded_object() -> Any:
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    return ShardedObject

"""A folder's tensors, read as data, and a dense model's by the names of the exported model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_mhc.convert.check import check_finite
from megatron_mhc.convert.read import import_safetensors, naming, published_files

_DTYPES = ("float32", "bfloat16", "float16", "float64")
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"mlp\.experts\.(\d+)\.(gate|up|down)_proj\.weight")
_RENAMED = {
    "self_attn.kv_a_proj_with_mqa.weight": "self_attn.kv_a_proj.weight",
    "mlp.gate.weight": "mlp.router.weight",
    "mlp.gate.e_score_correction_bias": "mlp.expert_bias",
    "mlp.shared_experts.gate_proj.weight": "mlp.shared.gate_proj.weight",
    "mlp.shared_experts.up_proj.weight": "mlp.shared.up_proj.weight",
    "mlp.shared_experts.down_proj.weight": "mlp.shared.down_proj.weight",
    "mlp.experts.gate_up_proj": "mlp.gate_up_proj",
    "mlp.experts.down_proj": "mlp.down_proj",
}


def read(folder: Path) -> tuple[dict[str, Tensor], dict[str, Path]]:
    """All tensors of a folder's .safetensors files, and the file of each.

    Raises:
        ValueError: naming the file, and the key where it is one: absent, unreadable, in two files, not
            floating-point, not finite.
    """
    tensors: dict[str, Tensor] = {}
    files: dict[str, Path] = {}
    found = published_files(folder) if folder.is_dir() else []
    # Mistral's folders hold the same weights twice, here in a form that transformers does not read.
    found = [file for file in found if not file.name.startswith("consolidated")]
    if not found or found[0].suffix != ".safetensors":
        raise ValueError(
            f"{folder} is no folder of *.safetensors: save the model by transformers 5, which writes them"
        )
    for file in found:
        with naming(str(file)), import_safetensors().safe_open(file, "pt") as opened:
            for key in opened.keys():
                if key in files:
                    raise ValueError(f"{key} is in {files[key].name} too")
                tensors[key], files[key] = opened.get_tensor(key), file
                if str(tensors[key].dtype).removeprefix("torch.") not in _DTYPES:
                    raise ValueError(f"{key} is of {tensors[key].dtype}; {', '.join(_DTYPES)} are read")
                check_finite({key: tensors[key]})
    index = folder / "model.safetensors.index.json"
    if index.exists():
        with naming(str(index)):
            placed = json.loads(index.read_text())["weight_map"]
            for key in placed.keys() | files.keys():
                if key not in files or placed.get(key) != files[key].name:
                    there = files[key].name if key in files else "no file"
                    raise ValueError(f"{key} is in {there}, not in {placed.get(key)}")
    return tensors, files


def rename(
    tensors: dict[str, Tensor], given: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    """A dense model's tensors by the exported model's names, and the names that each had.

    Layers behind the last (of multi-token prediction) and frequencies that transformers once saved are left
    out.

    Args:
        given: of `dense.architecture`.

    Raises:
        ValueError: naming the key that is absent or too many.
    """
    layers, experts = given["num_layers"], given.get("num_experts", 0)
    out: dict[str, Tensor] = {}
    of: dict[str, list[str]] = {}
    parts: dict[str, dict[tuple[int, str], str]] = {}
    for key, value in tensors.items():
        match = _LAYER.fullmatch(key)
        if key.endswith("rotary_emb.inv_freq") or (
            match and given.get("multi_latent_attention") and int(match[1]) >= layers
        ):
            continue
        if match and (found := _EXPERT.fullmatch(match[2])):
            parts.setdefault(match[1], {})[int(found[1]), found[2]] = key
            continue
        name = f"model.layers.{int(match[1])}.{_RENAMED.get(match[2], match[2])}" if match else key
        if name in out:
            raise ValueError(f"{key} and {of[name][0]} are the same tensor of the model: drop one of them")
        out[name], of[name] = value, [key]
    for layer, keys in parts.items():
        prefix = f"model.layers.{layer}.mlp."
        for expert, which in ((e, w) for e in range(experts) for w in ("gate", "up", "down")):
            if (expert, which) not in keys:
                raise ValueError(
                    f"{prefix}experts.{expert}.{which}_proj.weight is absent, of {experts} experts"
                )
        if len(keys) > 3 * experts:
            extra = max(keys)
            raise ValueError(f"{keys[extra]} is there, though the model has {experts} experts")
        sizes = {which: tensors[keys[0, which]].shape for which in ("gate", "up", "down")}
        for place, key in keys.items():
            if tensors[key].shape != sizes[place[1]]:
                raise ValueError(
                    f"{key} is of shape {list(tensors[key].shape)}, of expert 0 {list(sizes[place[1]])}"
                )
        both = sorted((place, key) for place, key in keys.items())
        gates, ups, downs = (
            [tensors[key] for (_, which), key in both if which == kind] for kind in ("gate", "up", "down")
        )
        made = {
            "gate_up_proj": torch.stack([torch.cat(pair) for pair in zip(gates, ups, strict=True)]),
            "down_proj": torch.stack(downs),
        }
        for name, value in made.items():
            if prefix + name in out:
                raise ValueError(f"{prefix}experts.{name} is there beside single experts: drop one of them")
            out[prefix + name] = value
            of[prefix + name] = [key for place, key in both if (place[1] == "down") == (name == "down_proj")]
    if not given["untie_embeddings_and_output_weights"] and "lm_head.weight" in out:
        if not torch.equal(out.pop("lm_head.weight"), out.get("model.embed_tokens.weight", torch.empty(0))):
            raise ValueError(
                "lm_head.weight is another tensor than the embedding: tie_word_embeddings is false then"
            )
    return out, of

"""The folder that `transformers` loads: weights, config.json, tokenizer and the model's own file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_mhc import __version__
from megatron_mhc.convert.write import save_safetensors, staged
from megatron_mhc.export import settings, weights

MODELING = Path(__file__).with_name("modeling_mhc_gpt.py")
SHARD = 5 * 10**9  # bytes of a file, as transformers writes them


def export(load: Path, out: Path, *, tokenizer: str | None = None, trust: bool = False) -> list[str]:
    """Write a checkpoint as a Hugging Face folder; it appears whole or not at all.

    Args:
        load: a plugin checkpoint's folder, of torch_dist or torch.
        out: a new folder.
        tokenizer: a Hugging Face name or folder; default: that of the training.
        trust: run what the checkpoint's pickles hold.

    Returns:
        what to tell the user.

    Raises:
        ValueError: naming the flag or the file, what is wrong and the remedy.
    """
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise ValueError(f"--out {out} is there already: give another")
    config, tensors, args = read(load, trust)
    done = [f"{load} -> {out}: {sum(t.numel() for t in tensors.values())} parameters, {config['dtype']}"]
    if getattr(args, "mtp_num_layers", None):
        done.append("the layers of --mtp-num-layers are left out: they take no part in generation")
    words = load_tokenizer(args, tokenizer)
    with staged(out) as folder:
        folder.mkdir()
        if words is None:
            done.append(f"no tokenizer: the training had {args.tokenizer_type}; --tokenizer names one")
        else:
            words.save_pretrained(folder)
            config |= {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id}
        write(folder, config, tensors)
    return done


def read(load: Path, trust: bool = False) -> tuple[dict[str, Any], dict[str, Tensor], Any]:
    """The exported model's sizes and tensors, and the arguments of the training.

    Raises:
        ValueError: of `weights` and `settings`, naming the file or the flag.
    """
    state, args, mhc = weights.read(load, trust)
    tensors = weights.translate(state, args)
    return settings.config(args, mhc, tensors), tensors, args


def load_tokenizer(args: Any, named: str | None) -> Any:
    """transformers' tokenizer of the training, or of `named`; None where the training had another kind.

    Raises:
        ValueError: transformers is not installed, or does not find it.
    """
    if named is None and getattr(args, "tokenizer_type", None) == "HuggingFaceTokenizer":
        named = args.tokenizer_model
    if named is None:
        return None
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ValueError(f"--tokenizer {named}: `pip install transformers`") from error
    try:
        return AutoTokenizer.from_pretrained(named)
    except (OSError, ValueError) as error:
        line = (str(error).splitlines() or [""])[0]
        raise ValueError(f"--tokenizer {named}: {line}; give its folder, or a name of the hub") from error


def write(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Put the model into a folder that is there."""
    shutil.copyfile(MODELING, folder / MODELING.name)
    head = {
        "architectures": ["MHCGPTForCausalLM"],
        "model_type": "mhc_gpt",
        "auto_map": {
            "AutoConfig": f"{MODELING.stem}.MHCGPTConfig",
            "AutoModelForCausalLM": f"{MODELING.stem}.MHCGPTForCausalLM",
        },
        "megatron_mhc_version": __version__,
    }
    _write_json(folder / "config.json", head | config)
    ids = {name: config[name] for name in ("bos_token_id", "eos_token_id") if config.get(name) is not None}
    _write_json(folder / "generation_config.json", ids)
    shards = _shards(tensors)
    index: dict[str, str] = {}
    for number, keys in enumerate(shards, 1):
        part = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        name = f"model{part}.safetensors"
        index |= dict.fromkeys(keys, name)
        save_safetensors({key: tensors[key] for key in keys}, folder / name)
    if len(shards) > 1:
        total = {"total_size": sum(tensor.nbytes for tensor in tensors.values())}
        _write_json(folder / "model.safetensors.index.json", {"metadata": total, "weight_map": index})


def _shards(tensors: dict[str, Tensor]) -> list[list[str]]:
    """Keys by files of at most SHARD bytes."""
    shards: list[list[str]] = [[]]
    size = 0
    for key, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > SHARD:
            shards.append([])
            size = 0
        shards[-1].append(key)
        size += tensor.nbytes
    return shards


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")

"""A folder on disk made into a checkpoint."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_mhc.config import MHCConfig, flag
from megatron_mhc.convert.read import naming
from megatron_mhc.convert.write import staged
from megatron_mhc.export import settings
from megatron_mhc.import_hf import checkpoint, dense, launch, tensors
from megatron_mhc.import_hf.values import Values

_DTYPES = ("float32", "bfloat16", "float16")
ARGS = "model.args"


def import_folder(
    load: Path, save: Path, *, options: str | None = None, transformer_impl: str = "transformer_engine"
) -> list[str]:
    """Write a Hugging Face folder as an mHC checkpoint of torch_dist; it appears whole or not at all.

    Args:
        load: a folder that `export` wrote, or a dense model of `dense.MODELS`.
        save: a new folder.
        options: mHC options of a dense model, key=value,... or a .yaml file; default: the paper's.
        transformer_impl: transformer_engine or local, whose names the checkpoint has.

    Returns:
        what to tell the user.

    Raises:
        ValueError: naming the flag, or the file and the key, what is wrong and the remedy.
    """
    if save.exists() and (save.is_file() or any(save.iterdir())):
        raise ValueError(f"--save {save} is there already: give another")
    file = load / "config.json"
    values = Values.of(file)
    exported = values.left.get("model_type") == "mhc_gpt"
    if exported and options is not None:
        raise ValueError("--options with an exported model: drop it, the folder says its own")
    with naming(str(file)):
        dtype = values.take("dtype", values.take("torch_dtype", "float32"))
        if dtype not in _DTYPES:
            raise ValueError(f"dtype is {dtype!r:.80}, only of {', '.join(_DTYPES)}")
        vocabulary = values.size("vocab_size")
        if exported:
            given, mhc, sizes = _exported(values)
        else:
            given, mhc, sizes = dense.architecture(values), MHCConfig.from_options(options or ""), None
            values.end()
    read, files = tensors.read(load)
    named = {key: [key] for key in read}
    with naming(str(load)):
        if not exported:
            read, named = tensors.rename(read, given)
        _check_count(read, given, vocabulary)
    with naming(str(file)):
        flags = launch.words(given, mhc, dtype, vocabulary)
        args, config, mhc = launch.parse(flags, given)
        settings.check(args)
        settings.check_form(mhc)
        if mhc.is_gated and not exported:
            raise ValueError(
                f"{flag('preset')} {mhc.preset} has no place for a dense model's norms: use {flag('preset')} "
                "paper"
            )
    _add_tokenizer(args, load, flags)
    with checkpoint.empty_model(args, config, str(file)) as model:
        with naming(str(file)):
            wanted = checkpoint.expected(model, args)
        _check(read, wanted, named, files, load, exported)
        if sizes is not None:
            with naming(str(file)):
                _compare(sizes, settings.config(args, mhc, read))
        checkpoint.fill(model, args, mhc, read)
        with staged(save) as folder:
            folder.mkdir()
            checkpoint.write(model, args, folder, transformer_impl == "transformer_engine")
            # No quotes: $(cat ...) would hand them on as they are.
            (folder / ARGS).write_text("".join(" ".join(words) + "\n" for words in flags))
    count = sum(value.numel() for value in read.values())
    kind = "exported model" if exported else f"dense model, mHC by {flag('init')} {mhc.init}"
    said = [f"{load} -> {save}: {count} parameters, {dtype}, {kind}; names of {transformer_impl}"]
    return [*said, f"the training's flags of the model: $(cat {save / ARGS}) --load {save} --finetune"]


def _exported(values: Values) -> tuple[dict[str, Any], MHCConfig, dict[str, Any]]:
    """Arguments and options of an exported model, and what config.json says of the sizes."""
    inside = values.inside("megatron")
    if inside is None:
        raise ValueError("megatron is absent: export the model by this version of megatron_mhc")
    given = {name: inside.left[name] for name in settings.ARCHITECTURE if name in inside.left}
    inside.drop(*settings.ARCHITECTURE)
    inside.end()
    for name in (
        "num_layers",
        "hidden_size",
        "ffn_hidden_size",
        "num_attention_heads",
        "max_position_embeddings",
    ):
        Values(given, "megatron").size(name)
    groups, heads = given.get("num_query_groups"), given["num_attention_heads"]
    if given.get("group_query_attention") and (type(groups) is not int or groups < 1 or heads % groups):
        raise ValueError(f"megatron.num_query_groups is {groups!r:.80}, which does not divide {heads} heads")
    frequency = given.get("moe_layer_freq")
    if isinstance(frequency, list) and len(frequency) != given["num_layers"]:
        raise ValueError(
            f"megatron.moe_layer_freq has {len(frequency)} layers, num_layers is {given['num_layers']}"
        )
    options = Values(values.take("mhc"), "mhc")
    for name in MHCConfig().arithmetic():
        if options.left.get(name) is None:
            options.take(name)  # raises: a default may be another than the model's
    return given, MHCConfig.from_mapping(options.left, "mhc"), values.left


def _check_count(read: dict[str, Tensor], given: dict[str, Any], vocabulary: int) -> None:
    """Compare the sizes with the tensors, in front of a model that would be built of wrong ones."""
    embedding = read.get("model.embed_tokens.weight")
    if embedding is None:
        raise ValueError("model.embed_tokens.weight is absent")
    wanted = [vocabulary, given["hidden_size"]]
    if list(embedding.shape) != wanted:
        raise ValueError(f"model.embed_tokens.weight is of shape {list(embedding.shape)}, expected {wanted}")
    numbers = {int(key.split(".")[2]) for key in read if key.startswith("model.layers.")}
    count = given["num_layers"]
    if len(numbers) != count or max(numbers, default=-1) != count - 1:
        absent = min(set(range(min(count, len(numbers) + 1))) - numbers, default=None)
        if absent is not None:
            raise ValueError(f"model.layers.{absent} is absent, of {count} layers in config.json")
        raise ValueError(f"model.layers.{max(numbers)} is there, though config.json has {count} layers")
    most = max(value.numel() for value in read.values())
    for name, value in given.items():
        if type(value) is int and name not in ("rotary_base", "max_position_embeddings") and value > most:
            raise ValueError(f"{name} of {value} is more than the largest tensor has: config.json")


def _check(
    read: dict[str, Tensor],
    expected: dict[str, Tensor],
    named: dict[str, list[str]],
    files: dict[str, Path],
    load: Path,
    exported: bool,
) -> None:
    """Compare the tensors with those of the model; a dense model's take the model's dtype."""
    for name, like in expected.items():
        mine = "_hc." in name or ".hc_head." in name
        if name not in read:
            if mine and not exported:
                continue
            raise ValueError(f"{load}: {name} is absent")
        where = f"{files[named[name][0]]}: {named[name][0]}"
        if read[name].shape != like.shape:
            raise ValueError(f"{where} is of shape {list(read[name].shape)}, expected {list(like.shape)}")
        if exported and read[name].dtype != like.dtype:
            raise ValueError(f"{where} is of {read[name].dtype}, the model's is of {like.dtype}: set dtype")
        read[name] = read[name].to(like.dtype)
        if like.dtype == torch.float16 and not read[name].isfinite().all():
            raise ValueError(f"{where} is too large for float16: set dtype to bfloat16 or float32")
    for name in read:
        if name not in expected:
            where = f"{files[named[name][0]]}: {named[name][0]}"
            raise ValueError(f"{where} has no place in the model that config.json describes")


def _compare(said: dict[str, Any], made: dict[str, Any], where: str = "") -> None:
    """Raise ValueError where config.json says something else than its arguments of Megatron mean."""
    for key, value in made.items():
        if key in ("megatron", "dtype", "mhc", "vocab_size"):
            continue
        found = said.get(key)
        if isinstance(value, dict) and isinstance(found, dict):
            _compare(found, value, f"{where}{key}.")
        elif isinstance(value, list) and isinstance(found, list) and len(value) == len(found):
            _compare(dict(enumerate(found)), dict(enumerate(value)), f"{where}{key}.")  # type: ignore[arg-type]
        elif isinstance(value, float) and isinstance(found, int | float):
            if not math.isclose(value, found, rel_tol=1e-6):
                raise ValueError(f"{where}{key} is {found}, by its `megatron` {value}")
        elif found != value:
            raise ValueError(f"{where}{key} is {found!r:.80}, by its `megatron` {value!r:.80}")


def _add_tokenizer(args: Any, load: Path, flags: list[list[str]]) -> None:
    """Have the training take the folder's tokenizer, if it has one.

    Raises:
        ValueError: the path holds a blank, at which $(cat ...) would part it.
    """
    if any((load / name).exists() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        args.tokenizer_type, args.tokenizer_model = "HuggingFaceTokenizer", str(load.absolute())
        if len(args.tokenizer_model.split()) != 1:
            raise ValueError(
                f"--load {load}: {ARGS} names the folder's tokenizer, and cannot hold the blank in its path; "
                "rename the folder"
            )
        flags.append(["--tokenizer-type", args.tokenizer_type, "--tokenizer-model", args.tokenizer_model])

"""Checkpoints of the other kind: a plain one is taken only under --mhc-load-dense, never by accident.

An mHC checkpoint differs from a plain one by its keys (`checkpoint_keys`). A model of either kind is kept
from half-loading the other:

    torch_dist   `adapt_request` compares the request with the checkpoint's metadata before reading
    fsdp_dtensor `check_fsdp_load` does so behind the load, which drops what has no place and may leave what
                 is absent as it is
    any format   `check_state_dict` compares the kinds and the options first, and `take_or_refuse`, which
                 mHC's modules call, keeps plain entries from an mHC model

The last two raise in load_state_dict itself, because megatron.training swallows the first error of a strict
load and tries again without `strict`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedTensor, ShardedTensorFactory
from torch import Tensor, nn

from megatron_mhc.checkpoint_keys import (
    FINAL_NORMS,
    MAPPING,
    compare_arithmetic,
    decode_arithmetic,
    ends_decoder,
    is_mhc,
)
from megatron_mhc.config import MHCConfig, flag, in_options

_REMEDY = (
    "the checkpoint has none of these parameters (a plain model's, or one's with fixed mappings): pass "
    f"{flag('load_dense')} together with --finetune or --no-load-optim to start from a plain model's "
    f"weights, or load an mHC checkpoint of the same options{in_options('load_dense', True)}"
)
OTHER_LAYOUT = (
    "it is keyed by parameter index, and the indices are others here: it is of another optimizer "
    "(--optimizer, --use-distributed-optimizer), of another parallel layout, or of megatron_mhc 0.1, which "
    "had four parameters where 0.2 has one (`affine`). Save it with --dist-ckpt-optim-fully-reshardable "
    "where it fits and load that, or load with --no-load-optim"
)
_OPTIMIZER_STATE = "optimizer.state."  # in keys of every optimizer that is not saved by buckets
_OTHER_OPTIMIZER = (
    "its optimizer state is of another optimizer (--optimizer, --use-distributed-optimizer, "
    "--use-precision-aware-optimizer) than this run's: take that of the run that saved it, or pass "
    "--no-load-optim, which loads weights and step and starts the optimizer (--finetune: weights alone)"
)
_OPTIMIZER = (
    "is of a model without mHC's parameters (a plain one, or fixed mappings), and so is the optimizer "
    f"state in it: pass --finetune, or --no-load-optim, and {flag('load_dense')}, which both need (where a "
    "HybridModel loads a GPT's checkpoint, Megatron looks at --no-load-optim alone)"
    f"{in_options('load_dense', True)}"
)


def _foreign(checkpoint: str, keys: Collection[str]) -> ValueError:
    spec = (ends_decoder(keys) or FINAL_NORMS[0]).spec
    return ValueError(
        f"{checkpoint} is an mHC model's: add --spec megatron_mhc.specs {spec} and the --mhc-* options of "
        "its training (with megatron_mhc.pretrain_gpt, drop --no-mhc), or load a plain checkpoint"
    )


def take_or_refuse(
    mhc: MHCConfig, state_dict: dict[str, Any], prefix: str, current: Iterable[tuple[str, Tensor]]
) -> None:
    """Fill a state dict that lacks all of a module's entries with the module's own values.

    One that has some of them alone is of no checkpoint of ours, and megatron.training would take it.

    Args:
        mhc: options of the module's model.
        state_dict: what load_state_dict was given; changed in place.
        prefix: the module's prefix in it.
        current: the module's entries, (name, value).

    Raises:
        ValueError: some entries are absent, or all are and `load_dense` is off.
    """
    entries = dict(current)
    absent = [name for name in entries if prefix + name not in state_dict]
    if not absent:
        return
    if len(absent) < len(entries):
        there = next(name for name in entries if name not in absent)
        raise ValueError(
            f"{prefix}{absent[0]} is not in the checkpoint, which has {prefix}{there}: it is damaged, or of "
            "a conversion that left entries out; load one that has all of them"
        )
    if not mhc.load_dense:
        raise ValueError(f"{prefix}*: {_REMEDY}")
    state_dict.update({prefix + name: value.detach() for name, value in entries.items()})


def check_state_dict(model: nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Compare a whole state dict with the model, or pipeline stage, that is to load it.

    Raises:
        ValueError: an mHC state dict for a plain model, or for one with other mHC options.
    """
    if not is_mhc(state_dict):
        return
    if not is_mhc(name for name, _ in model.named_parameters()):
        raise _foreign("the checkpoint", state_dict)
    _refuse_branch(state_dict, "the checkpoint")
    for final in FINAL_NORMS:
        if final.arithmetic in state_dict:
            model.get_submodule(final.plain.rstrip(".")).set_extra_state(state_dict[final.arithmetic])


def adapt_request(request: dict[str, Any], checkpoint_dir: str) -> dict[str, Any]:
    """Compare what a model asks of a torch_dist checkpoint with what is there.

    From a plain checkpoint an mHC model asks the shared part; `take_or_refuse` decides about the rest.

    Raises:
        ValueError: an mHC checkpoint for a plain model; other mHC options; a plain checkpoint's optimizer.
    """
    from megatron.core.dist_checkpointing import load_tensors_metadata

    items = [item for leaf in _leaves(request) for item in _built(leaf) if isinstance(item, ShardedBase)]
    keys = [item.key for item in items]
    if not any(key.startswith("decoder.") for key in keys):
        return request
    there = load_tensors_metadata(checkpoint_dir)
    if not is_mhc(keys):
        # Whose request it is a stage without the final norm can tell by mappings alone.
        if is_mhc(there) and (ends_decoder(keys) or any(MAPPING in key for key in there)):
            raise _foreign(checkpoint_dir, there)
        return request
    if is_mhc(there):
        _refuse_branch(there, checkpoint_dir)
        _compare_options(items, there, checkpoint_dir)
        _compare_buckets(items, there, checkpoint_dir)
        return request
    if any(key.startswith("optimizer") for key in request):
        raise ValueError(f"{checkpoint_dir} {_OPTIMIZER}")
    return _without_mhc(request)


def check_fsdp_load(model: Collection[str], there: Collection[str]) -> None:
    """Compare what a model has asked of a fsdp_dtensor checkpoint with the keys there.

    Such a checkpoint has no entry of its arithmetic: Megatron leaves all extra states out of it.

    Raises:
        ValueError: a checkpoint of the other kind, or of other mHC parameters.
    """
    saved = [key.removeprefix("model.") for key in there if key.startswith("model.")]
    if not is_mhc(model):
        if is_mhc(saved):
            raise _foreign("the checkpoint", saved)
        return
    if not is_mhc(saved):
        raise ValueError(
            "--ckpt-format fsdp_dtensor: the checkpoint is a plain model's, and Megatron-FSDP loads no "
            "weights without their optimizer: start from a torch_dist checkpoint by "
            f"{flag('load_dense')}, without --use-megatron-fsdp"
        )
    asked, found = (
        {k for k in keys if any(map(_is_ours, _suffixes(k))) and not k.endswith("_extra_state")}
        for keys in (model, saved)
    )
    if asked != found:
        where = "not in the checkpoint" if asked - found else "in the checkpoint, and not in this model"
        raise ValueError(
            f"{min(asked - found or found - asked)} is {where}: pass the --mhc-* options that it was trained "
            "with"
        )


def _suffixes(key: str) -> Iterable[str]:
    """A key without the prefixes of wrappers."""
    parts = key.split(".")
    return (".".join(parts[i:]) for i in range(len(parts)))


def _compare_options(items: list[ShardedBase], there: dict[str, Any], checkpoint_dir: str) -> None:
    saved = _read_arithmetic(there, checkpoint_dir)
    for item in items:
        if any(item.key == final.arithmetic for final in FINAL_NORMS):
            compare_arithmetic(saved, MHCConfig.from_mapping(decode_arithmetic(item.data)))
    # A stage without the final norm knows its options by the shapes that they give alone. Those of weights
    # first: an optimizer's state lacks what the model lacks.
    ours = [item for item in items if isinstance(item, ShardedTensor) and _is_ours(item.key)]
    for of_optimizer in (False, True):
        for item in ours:
            found = there.get(item.key)
            fits = found is not None and tuple(found.global_shape) == tuple(item.global_shape)
            if not fits and (_OPTIMIZER_STATE in item.key) == of_optimizer:
                shape = "absent" if found is None else f"of shape {tuple(found.global_shape)}"
                if of_optimizer:
                    raise ValueError(f"{item.key} is {shape} in {checkpoint_dir}: {_OTHER_OPTIMIZER}")
                trained = " ".join(f"{flag(name)} {value}" for name, value in saved.items())
                raise ValueError(
                    f"{item.key} is {shape} in {checkpoint_dir}, of shape {tuple(item.global_shape)} here: "
                    f"pass the options that it was trained with, {trained}, and the same model sizes"
                )


def _compare_buckets(items: list[ShardedBase], there: dict[str, Any], checkpoint_dir: str) -> None:
    """Raise ValueError where a distributed optimizer asks for buckets of gradients that others had filled."""
    for item in items:
        if isinstance(item, ShardedTensor) and ".bucket_idx_" in item.key:
            found = there.get(item.key)
            if found is None or tuple(found.global_shape) != tuple(item.global_shape):
                raise ValueError(f"{checkpoint_dir}: its optimizer state cannot be loaded; {OTHER_LAYOUT}")


def _built(leaf: Any) -> Iterable[Any]:
    """What a factory of ours asks for; else the leaf itself."""
    ours = isinstance(leaf, ShardedTensorFactory) and MAPPING in leaf.key
    return leaf.build().values() if ours else (leaf,)


def _read_arithmetic(there: Collection[str], checkpoint_dir: str) -> dict[str, Any]:
    """The options of a torch_dist mHC checkpoint with these keys, which any rank may read by itself."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject
    from megatron.core.dist_checkpointing.serialization import load

    key = (ends_decoder(there) or FINAL_NORMS[0]).arithmetic
    loaded = load(
        {key: ShardedObject(key, None, (1,), (0,))}, checkpoint_dir, validate_access_integrity=False
    )
    return decode_arithmetic(loaded[key])


def _refuse_branch(keys: Collection[str], checkpoint: str) -> None:
    """Raise ValueError where mHC entries come with a plain model's final norm."""
    if (final := ends_decoder(keys)) and not any(final.is_ours(key) for key in keys):
        raise ValueError(
            f"{checkpoint} has mHC mappings and no {final.norm}weight: if it is of one of Megatron's own mHC "
            "branches, convert it by `python -m megatron_mhc.convert`"
        )


def _is_ours(key: str) -> bool:
    ends = any(
        key.startswith((final.head, final.contraction)) or key == final.arithmetic for final in FINAL_NORMS
    )
    return MAPPING in key or ends


def _leaves(tree: Any) -> Iterable[Any]:
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, (list, tuple)):
        yield tree
        return
    for branch in tree:
        yield from _leaves(branch)


def _without_mhc(tree: dict[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            out[key] = _without_mhc(value)
        elif isinstance(value, ShardedBase):
            if _is_ours(value.key):
                continue
            for final in FINAL_NORMS:
                if value.key.startswith(final.norm):
                    value.key = final.plain + value.key[len(final.norm) :]
                    key = key.replace(final.norm, final.plain)  # as a plain model's state dict has it
            out[key] = value
        else:
            out[key] = value
    return out

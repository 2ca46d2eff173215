"""Optimizer checkpoints of models whose parameters are partly bf16 and partly fp32.

Megatron's optimizers train such a model correctly, but number its parameters in two different orders
when they save: DistributedOptimizer counts them as they lie in the gradient buffers, while its groups
list fp32 parameters first; Float16OptimizerWithFloat16Params numbers the bf16 ones alone.

A state that is keyed by parameter index is refused where the indices are others, with the remedy.

All of this is for optimizers that train mappings (`are_ours`): that of a plain model is Megatron's, also in a
process that has an mHC model.
"""

from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import torch

from megatron_mhc.checkpoint import OTHER_LAYOUT
from megatron_mhc.mapping_parameters import are_ours, mark


def _of(groups: Iterable[Any]) -> Iterable[torch.Tensor]:
    """The parameters of an optimizer's groups."""
    return chain.from_iterable(group["params"] for group in groups)


def number_float32_first(build: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `DistributedOptimizer._build_optimizer_group_ranges` so that both orders are one."""

    def build_in_group_order(self: Any, param_groups: Any, gbuf_ranges: Any) -> Any:
        positions, group_ranges = build(param_groups, gbuf_ranges)
        if not are_ours(_of(param_groups)):  # those of all data-parallel ranks
            return positions, group_ranges
        for number, group in enumerate(group_ranges):
            group["params"].sort(key=lambda parameter: parameter.dtype != torch.float32)  # stable
            positions.update({p: (number, place) for place, p in enumerate(group["params"])})
        return positions, group_ranges

    return build_in_group_order


def number_all_parameters(shard: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `Float16OptimizerWithFloat16Params.sharded_state_dict` to know its fp32 parameters too."""

    def shard_mixed(
        self: Any, model_sharded_state_dict: Any, is_loading: bool = False, metadata: Any = None
    ) -> Any:
        if not are_ours(chain(*self.fp32_from_fp32_groups)):
            return shard(self, model_sharded_state_dict, is_loading, metadata)
        from megatron.core.dist_checkpointing.optimizer import (
            get_param_id_to_sharded_param_map,
            make_sharded_optimizer_tensor,
            optim_state_to_sharding_state,
        )

        if is_loading:
            self.init_state_fn(self.optimizer, self.config)
        state = self.state_dict()
        pairs = zip(chain(*self.fp32_from_float16_groups), chain(*self.float16_groups), strict=True)
        model_parameter = {id(main): parameter for main, parameter in pairs}
        groups = [group["params"] for group in self.optimizer.param_groups]
        ordered = [model_parameter.get(id(p), p) for p in chain(*groups)]
        numbered = get_param_id_to_sharded_param_map(model_sharded_state_dict, ordered)
        masters = (
            [
                make_sharded_optimizer_tensor(numbered[number], p, prefix="optimizer.state.fp32_param")
                for number, p in zip(saved["params"], group, strict=True)
                if id(p) in model_parameter
            ]
            for saved, group in zip(state["optimizer"]["param_groups"], groups, strict=True)
        )
        state["fp32_from_fp16_params"] = list(filter(None, masters))  # see `load_by_masters`
        step = self._extract_common_per_param_step(state["optimizer"])
        optim_state_to_sharding_state(state["optimizer"], numbered, exclude_keys="step")
        if step:
            state["optimizer"]["state"]["common_step"] = step
        return state

    return shard_mixed


def detach_float32_shards(build: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `DistributedOptimizer._build_model_and_main_param_groups` to detach all shards alike.

    A bf16 parameter's shard is detached; an fp32 one's is a view of the parameter under autograd, which
    optimizers refuse in their constructor, and into which no checkpoint can be loaded.
    """

    def build_detached(
        self: Any, gbuf_ranges: Any, param_gbuf_map: Any, opt_group_ranges: Any, config: Any
    ) -> tuple[list[list[torch.Tensor]], ...]:
        ours = are_ours(_of(group_range["orig_group"] for group_range in opt_group_ranges))
        groups = build(gbuf_ranges, param_gbuf_map, opt_group_ranges, config)
        if not ours:
            return groups
        float32_shards = groups[3]
        for group_range, shards in zip(opt_group_ranges, float32_shards, strict=True):
            for i, shard in enumerate(shards):
                shards[i] = shard.detach()
                vars(shards[i]).update(vars(shard))  # what Megatron keeps on a shard: its TP layout, its name
            # They come first in what the optimizer gets.
            group_range["orig_group"]["params"][: len(shards)] = shards
            mark(group_range["orig_group"]["params"])
        return groups

    return build_detached


def lend_main_gradients(copy: Callable[[Any], None]) -> Callable[[Any], None]:
    """Wrap `Float16OptimizerWithFloat16Params._copy_model_grads_to_main_grads` (--use-torch-fsdp2).

    It takes the gradients of fp32 parameters from `main_grad`, which FSDP2 does not keep.
    """

    def copy_lent(self: Any) -> None:
        lent = [p for p in chain(*self.fp32_from_fp32_groups) if not hasattr(p, "main_grad")]
        lent = lent if are_ours(lent) else []
        for parameter in lent:
            parameter.main_grad = parameter.grad
        copy(self)
        for parameter in lent:
            del parameter.main_grad  # who finds one reduces it in place of `grad`

    return copy_lent


def master_every_parameter(divide: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `HybridDeviceOptimizer._get_sub_optimizer_param_groups` (--optimizer-cpu-offload).

    With `param_update_in_fp32` it steps fp32 masters of all parameters but those that are fp32 already. Those
    get no gradient on the GPU, and a loaded state finds no master for them.
    """

    def divide_masters(self: Any, offload_fraction: float) -> Any:
        divided = divide(self, offload_fraction)
        _, gpu_groups, cpu_copies, _, masters = divided
        if self.param_update_in_fp32 and are_ours(_of(self.param_groups)):
            for parameter, copy in cpu_copies.items():
                masters.setdefault(parameter, copy)
            own = {parameter for group in self.param_groups for parameter in group["params"]}
            for group in gpu_groups:
                for i, parameter in enumerate(group["params"]):
                    if parameter in own:
                        group["params"][i] = masters[parameter] = parameter.detach().clone()
        return divided

    return divide_masters


def save_current_float32(get: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `DistributedOptimizer._get_main_param_and_optimizer_states` (--use-precision-aware-optimizer).

    Transformer Engine's Adam makes a master of every parameter, and steps an fp32 one without it: what
    Megatron would save is the parameter at its first step, to which a run without the flag would return.
    """

    def get_current(self: Any, model_param: torch.Tensor) -> Any:
        tensors = get(self, model_param)
        in_adam = self.config.use_precision_aware_optimizer and not self.config.optimizer_cpu_offload
        groups = self.optimizer.param_groups
        if in_adam and model_param.dtype == torch.float32 and are_ours(_of(groups)):
            group, place = self.model_param_group_index_map[model_param]
            tensors["param"] = groups[group]["params"][place].detach()
        return tensors

    return get_current


# What Megatron's own loading raises of a state that is not this optimizer's.
_UNFIT = (AssertionError, IndexError, KeyError, RuntimeError, TypeError, ValueError)


def explain_other_layout(load: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap what loads an optimizer's state, and fails where it is another's or of another layout."""

    def load_or_explain(self: Any, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return load(self, state_dict, *args, **kwargs)
        except _UNFIT as error:
            explained = OTHER_LAYOUT in str(error)  # by an optimizer that this one holds
            # A subclass, as of memory that ran out, is no matter of the state.
            if explained or type(error) not in _UNFIT or not are_ours(_parameters(self)):
                raise
            found = f"{type(error).__name__}: {error}"
            raise ValueError(f"the optimizer state cannot be loaded ({found}); {OTHER_LAYOUT}") from error

    return load_or_explain


def _parameters(optimizer: Any) -> Iterable[torch.Tensor]:
    """What one of Megatron's optimizers trains: the model's parameters, or shards or masters of them."""
    for one in getattr(optimizer, "chained_optimizers", ()):
        yield from _parameters(one)
    yield from chain(*getattr(optimizer, "float16_groups", ()))
    if not hasattr(optimizer, "chained_optimizers") and optimizer.optimizer is not None:
        yield from _of(optimizer.optimizer.param_groups)


def load_by_masters(load: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `Float16OptimizerWithFloat16Params.load_state_dict`, with `explain_other_layout`.

    Megatron pairs the lists of fp32 masters by their places. A group of fp32 parameters alone has an empty
    one, which the torch format keeps and torch_dist does not; a process may load one and save the other.
    """
    load = explain_other_layout(load)

    def load_masters(self: Any, state_dict: Any) -> Any:
        if not are_ours(chain(*self.float16_groups, *self.fp32_from_fp32_groups)):
            return load(self, state_dict)
        for parameters in (self.float16_groups, self.fp32_from_float16_groups):
            parameters[:] = filter(None, parameters)
        masters = {
            key: state_dict[key] for key in ("fp32_from_fp16_params", "fp32_from_fp16") if key in state_dict
        }
        return load(
            self, {**state_dict, **{key: list(filter(None, found)) for key, found in masters.items()}}
        )

    return load_masters

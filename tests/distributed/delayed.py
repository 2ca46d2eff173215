"""Megatron's local linears with delayed weight gradients, as Transformer Engine's have them.

Like those they queue (x, dy) in backward, tell a data-parallel wrapper to leave their parameters to
`backward_dw`, and run its hooks there. For a tensor-parallel size of 1.
"""

import dataclasses
import functools
import queue

import torch
from harness import gpt
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.spec_utils import ModuleSpec
from torch.nn import functional as F

events = []  # of this rank: ("dw", linear, tag)
tag = []  # what a queued weight gradient is noted with: the last thing in here


class Store:
    """Transformer Engine's WeightGradStore."""

    def __init__(self):
        self.context = queue.Queue()

    def delay_wgrad_compute(self):
        return True


class Multiply(torch.autograd.Function):
    """x W^T + b, whose backward returns dx and queues the rest."""

    @staticmethod
    def forward(ctx, x, weight, bias, linear):
        ctx.save_for_backward(x, weight)
        ctx.linear, ctx.biased = linear, bias is not None
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        ctx.linear.wgrad_store.context.put((x, dy, ctx.biased, tag[-1] if tag else None))
        placeholder = None
        if Delayed.fused_accumulation:  # what it returns stands for a gradient that is in main_grad
            placeholder = torch.full_like(weight, torch.nan)
            ctx.linear.weight.grad_added_to_main_grad = True
        return dy @ weight, placeholder, None, None


class Delayed:
    fused_accumulation = False  # --gradient-accumulation-fusion

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.wgrad_store, self.wgrad_accumulation_and_reduce_hooks = Store(), []
        for parameter in self.parameters():
            parameter.skip_backward_post_hook = True

    def _forward_impl(self, input, weight, bias=None, **_):
        return Multiply.apply(input, weight, bias, self)

    def register_wgrad_accumulation_and_reduce_hooks(self, hook):
        self.wgrad_accumulation_and_reduce_hooks.append(hook)

    @torch.no_grad()
    def backward_dw(self):
        x, dy, biased, noted = self.wgrad_store.context.get_nowait()
        events.append(("dw", self, noted))
        x, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        dw = dy.T @ x
        if self.fused_accumulation:
            self.weight.main_grad.add_(dw)
        else:
            self.weight.grad = dw
        if biased:
            self.bias.grad = dy.sum(0)
        for hook in self.wgrad_accumulation_and_reduce_hooks:
            hook()


class DelayedColumn(Delayed, ColumnParallelLinear):
    pass


class DelayedRow(Delayed, RowParallelLinear):
    pass


def delay(spec):
    """The same spec with linears that delay."""
    if spec in (ColumnParallelLinear, RowParallelLinear):
        return {ColumnParallelLinear: DelayedColumn, RowParallelLinear: DelayedRow}[spec]
    if isinstance(spec, functools.partial):
        keywords = {name: delay(value) for name, value in spec.keywords.items()}
        return functools.partial(spec.func, *map(delay, spec.args), **keywords)
    if isinstance(spec, list):
        return [delay(part) for part in spec]
    if isinstance(spec, ModuleSpec) or (dataclasses.is_dataclass(spec) and not isinstance(spec, type)):
        parts = {field.name: getattr(spec, field.name) for field in dataclasses.fields(spec)}
        # MLA takes no other classes than Megatron's for its down projections.
        return dataclasses.replace(spec, **{k: v if "_down_" in k else delay(v) for k, v in parts.items()})
    return spec


def build(layout, config, kind, mhc, ddp=None, wrapped=True):
    """`harness.build` of delayed linears; on a rank of its own, since it changes what `gpt` builds.

    Args:
        wrapped: the data-parallel wrapper knows that they delay.
    """
    for name in ("get_gpt_decoder_block_spec", "get_gpt_mtp_block_spec"):
        original = getattr(gpt, name)
        original = getattr(original, "original", original)

        def delayed(*args, original=original, **kwargs):
            return delay(original(*args, **kwargs))

        delayed.original = original
        setattr(gpt, name, delayed)
    # Megatron's own checks ask for Transformer Engine's layers, experts on several ranks and bf16.
    config.delay_wgrad_compute = True
    return gpt.build(layout, config, kind, mhc, (ddp or {}) | dict(delay_wgrad_compute=wrapped))

"""--cpu-offloading-num-layers on a CPU: a stand-in of Transformer Engine's context, by the same rules.

As that (2.10 and later) it brings back what the layer has saved whose output's gradient came last, and then
forgets what the layer behind it has saved. Copies stand for the host's: who asks under another layer gets
other tensors or none.
"""

from __future__ import annotations

import contextlib
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

copied: list[tuple[torch.Size, ref[Any]]] = []  # what went to the host: its shape, and its storage if alive


class _Layers:
    """What the layers of a model have saved: {layer: its tensors}, of the first `offloaded` layers."""

    def __init__(self, offloaded: int, layers: int):
        self.offloaded, self.layers = offloaded, layers
        self.saved: dict[int, list[Tensor]] = {}
        self.forward = self.current = -1
        self.behind: int | None = None

    def begin_forward(self) -> int:
        if self.forward in (-1, self.layers - 1):
            self.saved, self.forward = {}, -1
        self.forward += 1
        self.current = self.forward
        return self.forward

    def begin_backward(self, layer: int) -> None:
        if self.behind is not None:
            self.saved.pop(self.behind, None)
        self.behind = self.current = layer

    def end_backward(self) -> None:
        if self.behind is not None:
            self.saved.pop(self.behind, None)
        self.behind = None

    def push(self, tensor: Tensor) -> Any:
        if self.forward >= self.offloaded or isinstance(tensor, torch.nn.Parameter) or tensor.dim() == 0:
            return tensor
        if not tensor.is_contiguous() or getattr(tensor, "_TE_do_not_offload", False):
            return tensor
        copied.append((tensor.shape, ref(tensor.untyped_storage())))
        saved = self.saved.setdefault(self.forward, [])
        saved.append(tensor.detach().clone())
        return len(saved) - 1

    def pop(self, kept: Any) -> Tensor:
        return kept if isinstance(kept, Tensor) else self.saved[self.current][kept]


class _Context:
    """Entered around each layer's forward."""

    def __init__(self, layers: _Layers):
        self.layers, self.inside_context, self.layer = layers, False, -1

    def __enter__(self) -> None:
        self.inside_context, self.layer = True, self.layers.begin_forward()
        self._hooks = saved_tensors_hooks(self.layers.push, self.layers.pop)
        self._hooks.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)
        self.inside_context = False

    def synchronize(self, tensor: Tensor) -> Tensor:
        layers, layer = self.layers, self.layer

        def begin(_: Any) -> None:
            torch.autograd.Variable._execution_engine.queue_callback(layers.end_backward)
            layers.begin_backward(layer)

        assert tensor.grad_fn is not None
        tensor.grad_fn.register_prehook(begin)
        return tensor


def context(enabled: bool, num_layers: int, model_layers: int, *_: Any) -> tuple[Any, Any]:
    """In the place of Megatron's `get_cpu_offload_context`."""
    if not enabled:
        return contextlib.nullcontext(), lambda tensor: tensor
    one = _Context(_Layers(num_layers, model_layers))
    return one, one.synchronize


def install() -> None:
    """Let Megatron's blocks offload by `context`; for this process."""
    import megatron.core.tensor_parallel.layers as layers
    import megatron.core.transformer.transformer_block as transformer_block

    transformer_block.get_cpu_offload_context = context
    layers.HAVE_TE = True  # where it marks the inputs of linears, for older Transformer Engines

"""CUDA graphs on a CPU, for tests: what is captured are operations and their tensors, and a replay runs them
again on these tensors, in place. Python runs at capture alone, as with CUDA.

`install()`, after `cpu.install` and `cpu.patch_megatron`, puts them under Megatron's three implementations.
What a CPU cannot show: a graph's memory pool, whose memory a later graph reuses, streams, and kernels.
"""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_iter, tree_unflatten

_capturing: Graph | None = None


class Graph:
    """A torch.cuda.CUDAGraph of operations on a CPU."""

    all_replays = 0  # of all graphs

    def __init__(self, *_: Any, **__: Any):
        self.operations: list[Callable[[], None]] = []

    def register_generator_state(self, state: Any) -> None:
        pass

    def replay(self) -> None:
        Graph.all_replays += 1
        with torch.no_grad():
            for operation in self.operations:
                operation()

    def reset(self) -> None:
        self.operations = []


class _Recorder(TorchDispatchMode):
    """Writes operations down in a graph; what they change of older tensors is undone at the end."""

    def __init__(self, graph: Graph):
        super().__init__()
        self.graph = graph
        self.made: dict[int, Tensor] = {}  # by storage; held, so that no other storage takes the number
        self.older: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, op: Any, types_: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if op is torch.ops.aten._local_scalar_dense.default:
            _refuse_ours()
        read = {_key(t) for t in _tensors((args, kwargs))}
        if op._schema.is_mutable:
            for t in _tensors((args, kwargs)):
                if _key(t) not in self.made and _key(t) not in self.older:
                    self.older[_key(t)] = (t.untyped_storage(), t.untyped_storage().clone())
        # Detached, so that a replay makes no graph of autograd.
        kept = _detached((args, kwargs))
        with _uncaptured():
            out = op(*args, **kwargs)
        results = [(t.detach(), _key(t) not in read) for t in _tensors(out)]
        self.made |= {_key(t): t for t, fresh in results if fresh}

        def again() -> None:
            new = op(*kept[0], **kept[1])
            for handle in tree_iter(new):
                if isinstance(handle, torch.ScriptObject):  # of a collective
                    handle.wait()
            for (place, fresh), value in zip(results, _tensors(new), strict=True):
                if fresh and 0 not in place.stride():  # else an expanded one, which no one reads
                    place.copy_(value)

        # In inference mode there are ops, such as reshape, that make a view or a copy.
        if not op.is_view or any(fresh for _, fresh in results):
            self.graph.operations.append(again)
        return out

    def undo(self) -> None:
        for place, value in self.older.values():
            place.copy_(value)


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _tensors(tree: Any) -> list[Tensor]:
    return [t for t in tree_iter(tree) if isinstance(t, Tensor)]


def _detached(tree: Any) -> Any:
    leaves, spec = tree_flatten(tree)
    return tree_unflatten([t.detach() if isinstance(t, Tensor) else t for t in leaves], spec)


def _refuse_ours() -> None:
    """Raise where our own code asks for a tensor's value, on which a capture cannot wait."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name.startswith("megatron.") or name.startswith("megatron_mhc.ops"):
            break
        frame = frame.f_back
    if frame is not None and frame.f_globals["__name__"].startswith("megatron_mhc"):
        raise RuntimeError("a graph is being captured, and the host asks for a tensor's value")


@contextlib.contextmanager
def capture(graph: Graph, *_: Any, **__: Any) -> Iterator[None]:
    """torch.cuda.graph."""
    global _capturing
    assert _capturing is None, "two graphs are captured at once"
    resize, _capturing = torch.UntypedStorage.resize_, graph

    def keep(storage: Any, size: int) -> Any:
        # What is freed in a graph keeps its memory for the replays; here also its place.
        return resize(storage, size) if size > storage.nbytes() else storage

    torch.UntypedStorage.resize_ = keep
    recorder = _Recorder(graph)
    try:
        with _Generator.kept(), recorder:
            yield
    finally:
        _capturing = None
        torch.UntypedStorage.resize_ = resize
        recorder.undo()


@contextlib.contextmanager
def _uncaptured() -> Iterator[None]:
    """Around an operation, which the graph holds as a whole, with all that it launches."""
    global _capturing
    graph, _capturing = _capturing, None
    try:
        yield
    finally:
        _capturing = graph


def launched(run: Callable[[], None]) -> None:
    """Run what no dispatcher sees, as a Triton kernel in its interpreter, now and in every replay."""
    with _disable_current_modes():
        run()
    if _capturing is not None:
        _capturing.operations.append(run)


def make_graphed_callables(
    layers: tuple[Any, ...],
    sample_args: list[tuple[Tensor, ...]],
    *,
    sample_kwargs: list[dict[str, Tensor]],
    num_warmup_iters: int,
    _order: list[int],
    _num_layers_per_chunk: list[int],
    **_: Any,
) -> list[Callable[..., Any]]:
    """Transformer Engine's: a graph of each layer and micro-batch, captured in the order of the schedule."""
    chunks = len(_num_layers_per_chunk)
    micro_batches = len(_order) // chunks // 2
    before = [sum(_num_layers_per_chunk[:c]) for c in range(chunks)]
    passes: dict[int, _Pass] = {}
    done = {sign: [0] * chunks for sign in (1, -1)}
    for step in _order:
        chunk, sign = abs(step) - 1, 1 if step > 0 else -1
        at = before[chunk] * micro_batches + done[sign][chunk] * _num_layers_per_chunk[chunk]
        done[sign][chunk] += 1
        for k in range(_num_layers_per_chunk[chunk])[::sign]:
            if sign > 0:
                layer = layers[before[chunk] + k]
                with _Generator.kept():  # so that dropout draws as it does without graphs
                    passes[at + k] = _Pass(
                        layer, sample_args[at + k], sample_kwargs[at + k], num_warmup_iters
                    )
            else:
                passes[at + k].capture_backward()
    return [passes[at].call for at in sorted(passes)]


class _Pass:
    """Forward and backward graph of one layer and micro-batch."""

    def __init__(self, layer: Any, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], warmup: int):
        self.names = list(kwargs)
        self.inputs = [*args, *kwargs.values()]
        self.forward_graph, self.backward_graph = Graph(), Graph()
        for _ in range(warmup):
            outputs = [t for t in tree_iter(layer(*args, **kwargs)) if t is not None and t.requires_grad]
            found = _gradients(outputs, [torch.zeros_like(t) for t in outputs], list(layer.parameters()))
            pairs = zip(layer.parameters(), found, strict=True)
            self.parameters = [p for p, grad in pairs if grad is not None]
        with capture(self.forward_graph):
            made = layer(*args, **kwargs)
        self.outputs, self.spec = tree_flatten(made)

    def capture_backward(self) -> None:
        outputs = [t for t in self.outputs if t is not None and t.requires_grad]
        self.grad_outputs = [
            torch.empty_like(t) if t is not None and t.requires_grad else None for t in self.outputs
        ]
        with capture(self.backward_graph):
            self.grad_inputs = _gradients(
                outputs,
                [g for g in self.grad_outputs if g is not None],
                [*self.inputs, *self.parameters],
            )
        # As Megatron's memory, which is the next graph's now.
        self.outputs = [None if t is None else t.detach() for t in self.outputs]

    def call(self, *args: Any, **kwargs: Any) -> Any:
        inputs = [*args, *(kwargs[name] for name in self.names)]
        out = _Replay.apply(self, *inputs, *self.parameters)
        return tree_unflatten(list(out), self.spec)

    def reset(self) -> None:
        self.forward_graph.reset()
        self.backward_graph.reset()


def _gradients(outputs: list[Tensor], grads: list[Tensor], inputs: list[Tensor]) -> list[Tensor | None]:
    """By backward(), as checkpoints inside want it; no input's own gradient is touched."""
    held = [t.grad for t in inputs]
    for t in inputs:
        t.grad = None
    torch.autograd.backward(outputs, grads)
    found = [t.grad for t in inputs]
    for t, grad in zip(inputs, held, strict=True):
        t.grad = grad
    return found


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, its: _Pass, *inputs: Any) -> Any:
        ctx.its = its
        for place, value in zip(its.inputs, inputs, strict=False):
            if place.data_ptr() != value.data_ptr():
                place.detach().copy_(value)
        its.forward_graph.replay()
        outputs = tuple(None if t is None else t.detach() for t in its.outputs)
        pairs = zip(outputs, its.grad_outputs, strict=True)
        ctx.mark_non_differentiable(*(t for t, g in pairs if t is not None and g is None))
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        its = ctx.its
        for place, grad in zip(its.grad_outputs, grads, strict=True):
            if place is not None:
                place.copy_(grad)
        its.backward_graph.replay()
        return None, *(None if g is None else g.detach().clone() for g in its.grad_inputs)


class _Generator:
    """A CUDA generator's state as the object that a graph knows; one of them is the CPU generator's now."""

    all: list[_Generator] = []
    current: _Generator

    def __init__(self) -> None:
        self.state = torch.get_rng_state()
        self.all.append(self)

    def manual_seed(self, seed: int) -> None:
        self.state = torch.Generator().manual_seed(int(seed)).get_state()

    @classmethod
    def get(cls, device: Any = "cuda", clone: bool = False, graph_safe: bool = False) -> Any:
        if not graph_safe:
            return torch.get_rng_state()
        return cls() if clone else cls.current

    @classmethod
    def put(cls, state: Any, device: Any = -1, graph_safe: bool = False) -> None:
        launched((lambda: cls._switch(state)) if graph_safe else (lambda: torch.set_rng_state(state)))

    @classmethod
    @contextlib.contextmanager
    def kept(cls) -> Iterator[None]:
        """Leave all states as they are in front of the block."""
        now, current = torch.get_rng_state(), cls.current
        states = [(one, one.state) for one in cls.all]
        try:
            yield
        finally:
            torch.set_rng_state(now)
            cls.current = current
            for one, state in states:
                one.state = state

    @classmethod
    def _switch(cls, to: _Generator) -> None:
        if to is not cls.current:
            cls.current.state = torch.get_rng_state()
            torch.set_rng_state(to.state)
            cls.current = to


_Generator.current = _Generator()


def install() -> None:
    """Put these graphs under Megatron; its RNG tracker has to be a `use_cudagraphable_rng` one."""
    import megatron.core.distributed.param_and_grad_buffer as param_and_grad_buffer
    import megatron.core.full_cuda_graph as full
    import megatron.core.tensor_parallel.layers as layers
    import megatron.core.tensor_parallel.mappings as mappings
    import megatron.core.tensor_parallel.random as tp_random
    import megatron.core.transformer.cuda_graphs as cuda_graphs
    import megatron.core.transformer.transformer_layer as transformer_layer

    torch.cuda.CUDAGraph, torch.cuda.graph = Graph, capture
    torch.cuda.graph_pool_handle = lambda: (0, 0)
    torch.cuda.is_current_stream_capturing = lambda: _capturing is not None
    for name in ("_cuda_beginAllocateCurrentThreadToPool", "_cuda_endAllocateToPool"):
        setattr(torch._C, name, lambda *_: None)
    cuda_graphs.make_graphed_callables = make_graphed_callables
    cuda_graphs.HAVE_TE_GRAPHS = False
    cuda_graphs._ensure_generator_state_is_cudagraph_safe = lambda generator: generator
    for module in (cuda_graphs, transformer_layer):
        module.is_te_min_version = lambda *_, **__: True
    full.get_shared_capture_stream = torch.cuda.Stream
    _allow_helper(cuda_graphs.TECudaGraphHelper)
    for module in (layers, mappings, param_and_grad_buffer):
        module.dist_reduce_scatter_func = _reduce_scatter
    tp_random._get_cuda_rng_state, tp_random._set_cuda_rng_state = _Generator.get, _Generator.put
    _interpret_in_graphs()


def _reduce_scatter(
    output: Tensor, input: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, **_: Any
) -> Any:
    """For gloo's own, which copies its result where its handle is waited for, out of a graph's sight."""
    total, options = input.clone(), dist.AllreduceOptions()
    options.reduceOp = op
    # Not dist.all_reduce, which puts it off where calls are coalesced.
    (group or dist.group.WORLD).allreduce([total], options).wait()
    output.copy_(total.view(dist.get_world_size(group), -1)[dist.get_rank(group)].view_as(output))
    return dist.all_reduce(torch.zeros(1), group=group, async_op=True)


def _interpret_in_graphs() -> None:
    """Let graphs hold the kernels that Triton's interpreter runs."""
    interpreter = sys.modules.get("triton.runtime.interpreter")
    if interpreter is None or hasattr(interpreter.GridExecutor, "_in_graphs"):
        return
    run = interpreter.GridExecutor.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> None:
        launched(lambda: run(self, *args, **kwargs))

    interpreter.GridExecutor.__call__ = call
    interpreter.GridExecutor._in_graphs = True


def helper(chunks: list[Any], config: Any, sequence: int, micro_batch: int, micro_batches: int) -> Any:
    """Megatron's TECudaGraphHelper, for a loop that has no calculator of micro-batches."""
    import megatron.core.transformer.cuda_graphs as cuda_graphs

    cuda_graphs.get_num_microbatches = lambda: micro_batches
    return cuda_graphs.TECudaGraphHelper(chunks, config, sequence, micro_batch)


def _allow_helper(kind: Any) -> None:
    """Let Megatron make a TECudaGraphHelper, which needs Transformer Engine's name and no more of it."""
    if hasattr(kind, "_allowed"):
        return
    init = kind.__init__

    def initialise(*args: Any, **kwargs: Any) -> None:
        names = init.__globals__
        for name in ("transformer_engine", "transformer_engine.pytorch"):
            sys.modules.setdefault(name, types.ModuleType(name))
        names["HAVE_TE_GRAPHS"] = True
        try:
            init(*args, **kwargs)
        finally:
            names["HAVE_TE_GRAPHS"] = False

    kind.__init__ = initialise
    kind._allowed = True

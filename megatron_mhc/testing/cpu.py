"""Megatron-Core on a CPU with gloo, for tests and the quickstart. Never active unless asked for.

    torchrun --nproc-per-node 2 -m megatron_mhc.testing.cpu -m megatron_mhc.pretrain_gpt <arguments>
    torchrun --nproc-per-node 2 -m megatron_mhc.testing.cpu pretrain_gpt.py <arguments>

The arguments need `--distributed-backend gloo --transformer-impl local --no-rope-fusion
--no-persist-layer-norm --no-gradient-accumulation-fusion --no-masked-softmax-fusion --num-workers 0`.

In a program: `install()` before the first `import megatron`, `patch_megatron()` after it. Both redirect
the "cuda" that Megatron hard-codes and fill what gloo, the wheel and the local modules lack. Collectives,
schedules, RNG tracker, optimizers and checkpoints are the real ones. What a CPU cannot show: stream
races, NCCL, fused kernels, bf16 as a GPU rounds it. CUDA graphs: `graphs`.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import logging
import os
import queue
import runpy
import sys
import time
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_mhc.testing import gloo

_installed = False


def install(pretend_cuda: bool = False) -> None:
    """Redirect torch.cuda and device="cuda" to the CPU; a second call does nothing.

    Args:
        pretend_cuda: also answer yes to `torch.cuda.is_available()`, on which megatron.training insists.
            Megatron core alone does without, and takes its branches for a CPU.

    Raises:
        RuntimeError: Megatron was imported before.
    """
    global _installed
    if pretend_cuda:
        torch.cuda.is_available = lambda: True
        torch.cuda.device_count = lambda: int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if _installed:
        return
    if "megatron.core" in sys.modules:
        raise RuntimeError("call megatron_mhc.testing.cpu.install() before the first import of megatron")
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron asks for it under TP
    # Megatron compiles small functions; on a CPU each would cost a C++ build.
    torch.compile = lambda model=None, **_: model if model is not None else (lambda fn: fn)
    _patch_cuda(torch.cuda, pretend_cuda)
    _patch_factories()
    _patch_tensor_methods()
    _patch_autocast()
    gloo.patch()
    _installed = True


class _Stream:
    """A torch.cuda.Stream whose work is always done."""

    cuda_stream = 0
    device = torch.device("cpu")

    def __init__(self, *_: Any, **__: Any):
        pass

    def wait_stream(self, stream: Any = None) -> None:
        pass

    wait_event = synchronize = wait_stream

    def query(self) -> bool:
        return True

    def record_event(self, event: Any = None) -> Any:
        event = event or _Event()
        event.record(self)
        return event

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: Any) -> None:
        pass


class _Event:
    """A torch.cuda.Event; `elapsed_time` is wall time between two records, in milliseconds."""

    def __init__(self, *_: Any, **__: Any):
        self.at = 0.0

    def record(self, stream: Any = None) -> None:
        self.at = time.perf_counter()

    def wait(self, stream: Any = None) -> None:
        pass

    synchronize = wait

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: _Event) -> float:
        return (end.at - self.at) * 1e3


class _DeviceContext(contextlib.nullcontext):
    """torch.cuda.device; a class, because torch asks isinstance of it."""

    def __init__(self, *_: Any, **__: Any):
        super().__init__()


class _CpuGenerators(dict):
    """torch.cuda.default_generators, where every index is the CPU's generator."""

    def __missing__(self, index: int) -> torch.Generator:
        return torch.default_generator


def _answer(owner: Any, names: str, value: Any) -> None:
    for name in names.split():
        # One function per name: dynamo refuses to import when two names share an object.
        setattr(owner, name, lambda *_, **__: value)


def _patch_cuda(cuda: Any, pretend_cuda: bool) -> None:
    about = dict(name="cpu", major=9, minor=0, multi_processor_count=1, total_memory=2**34)
    _answer(cuda, "current_device", torch.device("cpu"))
    _answer(cuda, "memory_allocated max_memory_allocated memory_reserved max_memory_reserved", 0)
    _answer(cuda, "get_device_capability", (9, 0))
    _answer(cuda, "get_device_name", "cpu")
    _answer(cuda, "get_device_properties", types.SimpleNamespace(**about))
    _answer(cuda, "mem_get_info", (2**34, 2**34))
    _answer(cuda, "is_current_stream_capturing", False)
    _answer(cuda, "set_device synchronize empty_cache ipc_collect init _lazy_init set_stream", None)
    _answer(cuda, "reset_peak_memory_stats reset_max_memory_allocated", None)
    _answer(cuda, "current_stream default_stream", _Stream())
    _answer(cuda.nvtx, "range_push range_pop mark", None)
    if not pretend_cuda:
        _answer(cuda, "device_count", 0)
    cuda.memory_stats = lambda *_, **__: collections.defaultdict(int)
    cuda.device = _DeviceContext
    cuda.Stream, cuda.Event = _Stream, _Event
    cuda.stream = lambda stream=None: contextlib.nullcontext()

    # The CUDA generator is the CPU's, so Megatron's RNG tracker saves and restores what dropout uses.
    cuda._lazy_call = lambda fn, **_: fn()
    cuda.default_generators = _CpuGenerators()
    generator = torch.default_generator  # torch.manual_seed would call cuda.manual_seed_all in turn
    for module in (cuda, cuda.random):
        module.get_rng_state = lambda device=None: torch.get_rng_state()
        module.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
        module.manual_seed = lambda seed: generator.manual_seed(int(seed))
        module.manual_seed_all = lambda seed: generator.manual_seed(int(seed))
        module.initial_seed = lambda: torch.initial_seed()
    # The tracker warns when a region moves the CPU's generator, which is the only one here.
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )


def _cpu_for_cuda(device: Any) -> Any:
    if isinstance(device, int) and not isinstance(device, bool):
        return "cpu"
    if isinstance(device, (str, torch.device)) and str(device).startswith("cuda"):
        return "cpu"
    return device


def _on_cpu(function: Callable[..., Any], device_first: bool = False) -> Callable[..., Any]:
    """Wrap a function so that CUDA devices in its arguments become the CPU and pin_memory is off."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if device_first and len(args) > 1 and not isinstance(args[1], (torch.dtype, Tensor)):
            args = (args[0], _cpu_for_cuda(args[1]), *args[2:])
        if "device" in kwargs:
            kwargs["device"] = _cpu_for_cuda(kwargs["device"])
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return function(*args, **kwargs)

    return wrapped


def _patch_factories() -> None:
    names = (
        "empty empty_like empty_strided zeros zeros_like ones ones_like full full_like tensor as_tensor "
        "arange linspace eye rand randn randint randperm rand_like randn_like scalar_tensor"
    )
    for name in names.split():
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    for name in "new_empty new_zeros new_ones new_full new_tensor".split():
        setattr(Tensor, name, _on_cpu(getattr(Tensor, name)))


def _patch_tensor_methods() -> None:
    Tensor.to = _on_cpu(Tensor.to, device_first=True)
    torch.nn.Module.to = _on_cpu(torch.nn.Module.to, device_first=True)
    Tensor.cuda = lambda self, *_, **__: self
    Tensor.pin_memory = lambda self, *_, **__: self
    Tensor.record_stream = lambda self, stream: None
    torch.nn.Module.cuda = lambda self, device=None: self
    original = Tensor.type

    def type_(self: Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        # Optimizers compare tensor.type() with "torch.cuda.FloatTensor" and its kin.
        if dtype is None:
            return original(self).replace("torch.", "torch.cuda.", 1)
        if isinstance(dtype, str):
            dtype = dtype.replace("torch.cuda.", "torch.")
        return original(self, dtype, *args, **kwargs)

    Tensor.type = type_


def _patch_autocast() -> None:
    """Megatron's enable_autocast, and its linear layers, which go backward in the state of their forward."""
    init = torch.autocast.__init__

    @functools.wraps(init)
    def init_on_cpu(self: Any, device_type: str, *args: Any, **kwargs: Any) -> None:
        init(self, _cpu_for_cuda(device_type), *args, **kwargs)

    torch.autocast.__init__ = init_on_cpu  # type: ignore[method-assign]
    for name in ("custom_fwd", "custom_bwd"):
        original = getattr(torch.amp, name)
        setattr(torch.amp, name, functools.partial(_on_cpu_type, original))


def _on_cpu_type(original: Callable[..., Any], fn: Any = None, *, device_type: str, **options: Any) -> Any:
    return original(fn, device_type=_cpu_for_cuda(device_type), **options)


def patch_megatron() -> None:
    """Replace what Megatron cannot do, or only slowly, without CUDA and TransformerEngine."""
    import megatron.core.datasets.utils as dataset_utils
    import megatron.core.dist_checkpointing.strategies.async_utils as async_utils
    import megatron.core.dist_checkpointing.strategies.filesystem_async as filesystem_async
    import megatron.core.inference.communication_utils as inference
    import megatron.core.tensor_parallel.random as tp_random

    checkpoint_init = tp_random.CheckpointWithoutOutput.__init__
    if not getattr(checkpoint_init, "_on_cpu", False):
        # fp8=False counts as fp8, and that asks TransformerEngine for its state.
        def init(self: Any, fp8: Any = None, *args: Any, **kwargs: Any) -> None:
            checkpoint_init(self, fp8 or None, *args, **kwargs)

        init._on_cpu = True  # type: ignore[attr-defined]
        tp_random.CheckpointWithoutOutput.__init__ = init

    def share_storage(target: Tensor, source: Tensor) -> None:
        to, of = target.untyped_storage(), source.untyped_storage()
        to.resize_(of.nbytes())
        to.copy_(of)

    # A C++ extension built on first use (25 s); copying the bytes has the same result.
    tp_random._get_share_storage = lambda: share_storage
    if "--async-save" in sys.argv:
        async_utils.PersistentAsyncCaller.async_loop = staticmethod(_async_loop)
    else:
        # A synchronous save passes its results through a manager process per rank (6 s, 0.5 GB).
        filesystem_async._results_queue = queue.Queue()
    inference._is_cuda = lambda tensor: None  # what the engines broadcast over a pipeline
    # The wheel has the compiled helpers but not their Makefile, without which this exits.
    dataset_utils.compile_helpers = lambda: None
    _name_inference_classes()


def _name_inference_classes() -> None:
    """Let main ask whether a layer is one of these; without TransformerEngine their names hold stand-ins."""
    import megatron.core.tensor_parallel.inference_layers as inference_layers

    for name in ("InferenceColumnParallelLinear", "InferenceLayerNormColumnParallelLinear"):
        if not isinstance(getattr(inference_layers, name, object), type):
            setattr(inference_layers, name, type(name, (), {}))


def _async_loop(*args: Any, **kwargs: Any) -> None:
    """What the process that saves for a rank does: it is no fork of the rank, so nothing is patched in it."""
    torch.cuda.device_count = lambda: 1
    _patch_cuda(torch.cuda, pretend_cuda=True)
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

    PersistentAsyncCaller.async_loop(*args, **kwargs)


def use_plain_adam() -> None:
    """Give Megatron a FusedAdam in plain torch.

    Without apex and TransformerEngine, DistributedOptimizer cannot load its own checkpoints: it expects
    the state that fused optimizers keep, with one step count per group.
    """
    import megatron.core.optimizer as optimizer
    import megatron.core.optimizer.distrib_optimizer as distrib_optimizer

    from megatron_mhc.testing.adam import PlainAdam

    optimizer.Adam, optimizer.USING_PYTORCH_OPTIMIZER = PlainAdam, False
    distrib_optimizer.Adam = PlainAdam
    distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_APEX_OPTIMIZER = True


def local_norm(config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> torch.nn.Module:
    """A torch LayerNorm or RMSNorm that, unlike Megatron's WrappedTorchNorm, allows sequence parallelism."""
    kinds: dict[str, Any] = {"LayerNorm": torch.nn.LayerNorm, "RMSNorm": torch.nn.RMSNorm}
    norm = kinds[config.normalization](hidden_size, eps=eps, dtype=config.params_dtype)
    for parameter in norm.parameters():
        # Each rank sees its own tokens: finalize_model_grads sums the gradients of marked parameters.
        parameter.sequence_parallel = config.sequence_parallel
    return norm


def use_local_modules() -> None:
    """Let Megatron's local specs use `local_norm`, and an attention that takes MLA's head sizes."""
    import megatron.core.models.backends as backends
    import megatron.core.models.gpt.gpt_layer_specs as gpt_layer_specs
    import megatron.core.transformer.torch_norm as torch_norm
    import megatron.core.transformer.transformer_block as transformer_block
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    class LocalAttention(DotProductAttention):
        def __init__(self, *args: Any, k_channels: Any = None, v_channels: Any = None, **kwargs: Any):
            super().__init__(*args, **kwargs)
            if v_channels is not None:  # MLA: values and queries differ in width
                self.hidden_size_per_partition = v_channels * self.num_attention_heads_per_partition

    for module in (backends, gpt_layer_specs, torch_norm, transformer_block):
        for name in ("LNImpl", "LayerNormImpl", "WrappedTorchNorm"):
            if hasattr(module, name):
                setattr(module, name, local_norm)
    backends.DotProductAttention = LocalAttention
    from megatron_mhc.releases import release

    if release().hybrid:
        from megatron_mhc.testing.hybrid import use_local_stack

        use_local_stack(local_norm)


def main() -> None:
    """Run a script or, after -m, a module as __main__ on the CPU."""
    argv = sys.argv[1:]
    as_module = argv[:1] == ["-m"]
    if len(argv) < 1 + as_module or argv[0] in ("-h", "--help"):
        raise SystemExit("usage: python -m megatron_mhc.testing.cpu (SCRIPT | -m MODULE) [arguments]")
    torch.set_num_threads(1)
    install(pretend_cuda=True)
    patch_megatron()
    use_plain_adam()
    use_local_modules()
    if "--cuda-graph-impl" in argv:
        from megatron_mhc.testing import graphs

        graphs.install()
    if "--cpu-offloading-num-layers" in argv:
        from megatron_mhc.testing import offloading

        offloading.install()
    if any(word.startswith("--inference-dynamic-batching") for word in argv):
        from megatron_mhc.testing import paged

        paged.install()
    if "--sft" in argv:
        from megatron_mhc.testing import packed

        packed.install()
    if {"--use-megatron-fsdp", "--use-torch-fsdp2"} & set(argv):
        from megatron_mhc.testing import fsdp

        fsdp.install()
    sys.argv = argv[as_module:]
    if as_module:
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, os.path.dirname(os.path.abspath(argv[0])))  # as `python script.py` would
        runpy.run_path(argv[0], run_name="__main__")
    if torch.distributed.is_initialized():
        # A process that ends in the midst of gloo's threads may abort.
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    # Not this copy, named __main__: what runs may import the module by its name.
    from megatron_mhc.testing import cpu

    cpu.main()

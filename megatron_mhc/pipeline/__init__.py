"""Pipeline parallelism of the streams: `forward_backward` is the door for a training loop of one's own."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_mhc.pipeline.engine import forward_backward

__all__ = ["forward_backward"]


def __getattr__(name: str) -> Any:
    # Lazy, so that the simulator and the checks of a configuration do not load the engine.
    if name in __all__:
        from importlib import import_module

        return getattr(import_module("megatron_mhc.pipeline.engine"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

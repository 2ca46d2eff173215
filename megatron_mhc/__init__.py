"""megatron_mhc: manifold-constrained hyper-connections for released Megatron-Core.

Importing it changes nothing in Megatron: the `--spec` door, `wrap_block_spec` and `register` do,
and `register().report()` says what.
"""

from typing import TYPE_CHECKING, Any

from megatron_mhc.config import MHCConfig

if TYPE_CHECKING:
    from megatron_mhc.arguments import add_mhc_args
    from megatron_mhc.hooks import register
    from megatron_mhc.specs import wrap_block_spec, wrap_hybrid_spec, wrap_layer_spec

__version__ = "0.2.0"
__all__ = ["MHCConfig", "add_mhc_args", "register", "wrap_block_spec", "wrap_hybrid_spec", "wrap_layer_spec"]

_LAZY = {
    "add_mhc_args": "megatron_mhc.arguments",
    "register": "megatron_mhc.hooks",
    "wrap_block_spec": "megatron_mhc.specs",
    "wrap_hybrid_spec": "megatron_mhc.specs",
    "wrap_layer_spec": "megatron_mhc.specs",
}


def __getattr__(name: str) -> Any:
    # Lazy, so that `import megatron_mhc` pulls in neither torch nor Megatron.
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

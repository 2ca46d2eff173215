"""Megatron-Bridge on a CPU, for tests: `install()` in front of the first import of megatron.bridge.

Bridge imports Transformer Engine, ModelOpt, the resiliency extension and Energon whether or not a run uses
them. Where one is absent, a module stands in whose names are empty classes and further modules.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import Any

IMPORTED = ("transformer_engine", "modelopt", "nvidia_resiliency_ext", "megatron.energon")


class _StandIn(types.ModuleType):
    __path__: list[str] = []
    __version__ = "0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made: Any = type(name, (), {}) if name[0].isupper() else _StandIn(f"{self.__name__}.{name}")
        setattr(self, name, made)
        return made

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Of a function: nothing is quantised, distilled or restarted here."""


class _Finder(MetaPathFinder, Loader):
    def __init__(self, names: tuple[str, ...]):
        self.names = names

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        found = any(fullname == name or fullname.startswith(name + ".") for name in self.names)
        return ModuleSpec(fullname, self, is_package=True) if found else None

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def install() -> None:
    """Put stand-ins in the places of what is absent; `testing.cpu` has to be installed, with pretend_cuda."""
    # Those who look for Transformer Engine and can do without have to have looked.
    import megatron.core.extensions.transformer_engine  # noqa: F401
    import megatron.core.models.gpt.gpt_layer_specs  # noqa: F401
    import megatron.training.training  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    absent = tuple(name for name in IMPORTED if importlib.util.find_spec(name) is None)
    sys.meta_path.append(_Finder(absent))

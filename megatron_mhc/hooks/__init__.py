"""Register, revert and report the replaced Megatron symbols of `targets`; fails closed."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from types import TracebackType
from typing import Any

from packaging.specifiers import SpecifierSet

from megatron_mhc.hooks.targets import HOOKS, SCHEDULE_HOOKS, SUPPORTED, TRAINING_HOOKS, Hook
from megatron_mhc.hyper_connection import operations


class Handle:
    """The registered hooks; `revert` (or leaving a `with` block) restores Megatron's own symbols."""

    def __init__(self) -> None:
        self._installed: list[tuple[Any, str, Any]] = []
        self.hooks: list[Hook] = []  # those that are registered

    @property
    def active(self) -> bool:
        return bool(self._installed)

    def install(self, hooks: tuple[Hook, ...]) -> None:
        """Replace the symbols of `hooks` that are not replaced yet."""
        # Everything is checked before anything is replaced.
        found = [(hook, *_resolve(hook)) for hook in hooks if hook not in self.hooks]
        for hook, owner, name, original in found:
            # As it is stored, since a lookup would bind a class method.
            stored = inspect.getattr_static(owner, name)
            setattr(owner, name, hook.replacement(original))
            self._installed.append((owner, name, stored))
            self.hooks.append(hook)

    def revert(self) -> None:
        """Put the original symbols back; a second call does nothing."""
        while self._installed:
            owner, name, stored = self._installed.pop()
            setattr(owner, name, stored)
        self.hooks.clear()

    def report(self) -> str:
        """A table of the replaced symbols and why each is replaced, and what the models alive now run."""
        from megatron.core import __version__ as version

        state = "registered" if self.active else "not registered"
        lines = [f"megatron_mhc hooks on megatron-core {version} ({SUPPORTED} supported): {state}"]
        lines += [f"  {hook.target}\n      {hook.reason}" for hook in self.hooks or HOOKS]
        lines += [f"  {line}" for line in operations() or ["no connection is built yet"]]
        return "\n".join(lines)

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.revert()


_handle = Handle()


def register(training: bool = False, schedule: bool = False) -> Handle:
    """Replace the symbols of `targets.HOOKS`; registering twice is registering once.

    The spec doors call it. Models without mHC run the original code either way.

    Args:
        training: also those of `targets.TRAINING_HOOKS`, which import megatron.training.
        schedule: also those of `targets.SCHEDULE_HOOKS`, which import it too.

    Raises:
        ValueError: an unsupported Megatron version, a changed signature, a symbol that somebody else
            replaced, or a Megatron that has hyper-connections of its own.
    """
    if not _handle.active:
        check_version()
    _handle.install(HOOKS + TRAINING_HOOKS * training + SCHEDULE_HOOKS * schedule)
    return _handle


def check_version() -> None:
    """Raise ValueError unless the installed megatron-core is one that the hooks were written for."""
    from megatron.core import __version__ as version

    if find_spec("megatron.core.transformer.hyper_connection") is not None:
        raise ValueError(
            f"megatron-core {version} has hyper-connections of its own: use those, or install {SUPPORTED}"
        )
    # A git checkout appends +<commit> to the version.
    if not SpecifierSet(SUPPORTED, prereleases=True).contains(version.split("+")[0]):
        raise ValueError(f"megatron-core {version} is not supported: install megatron-core {SUPPORTED}")


def _resolve(hook: Hook) -> tuple[Any, str, Callable[..., Any]]:
    module_name, path = hook.target.split(":")
    owner: Any = import_module(module_name)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    original = getattr(owner, name, None)
    if original is None:
        raise ValueError(f"{hook.target} does not exist: install megatron-core {SUPPORTED}")
    if original.__module__ != hook.defined_in or hasattr(original, "__wrapped__"):
        raise ValueError(
            f"{hook.target} was replaced by {original.__module__}: start without that patch, "
            "or call megatron_mhc.register() before it is applied"
        )
    parameters = tuple(inspect.signature(original).parameters)
    if parameters != hook.parameters:
        raise ValueError(
            f"{hook.target} takes {parameters}, expected {hook.parameters}: install megatron-core {SUPPORTED}"
        )
    return owner, name, original
